"""Videos in, batches out; and, in the last third, what all scripts share.

A set is decoded once: each video becomes one file of uint8 frames in a cache. A training batch is a
handful of random windows read from those files, so nothing is decoded while a network trains.

    python data.py                                  # the toy set: drawn in seconds, no download
    python data.py --data sky                       # Sky Timelapse in datasets/sky_timelapse
    python data.py --data ucf101                    # UCF-101 in datasets/UCF-101
    python data.py --data sky --download            # ... fetched first
    python data.py --data ~/my_videos --size 64     # any folder of videos, GIFs or frame folders
    python data.py --data clips.npy --size 64       # an array of videos, uint8 (N, T, H, W, 3)

Each command prepares the cache and writes a preview GIF. It can be interrupted and run again.
Videos are float (B, 3, T, H, W) in [-1, 1] inside the networks, uint8 (N, T, H, W, 3) outside.
"""
import argparse
import atexit
import difflib
import errno
import hashlib
import http.client
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import urllib.request
import warnings
import zipfile
import zlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:                      # Windows has neither: no lock, no peak memory on a CPU
    fcntl = resource = None

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".webm", ".mkv", ".gif"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}

SETS = {                                 # properties of a set, whatever is trained on it
    "toy": dict(size=32),
    "sky": dict(size=128),
    "ucf101": dict(size=128),
}
DOWNLOADS = {                            # zip archives: URL, sha256 if one is published
    "sky": [("https://huggingface.co/datasets/maxin-cn/SkyTimelapse/resolve/main/sky_timelapse.zip",
             "")],
    "ucf101": [("https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip",
                "5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27"),
               ("https://storage.googleapis.com/thumos14_files/UCF101_videos.zip",
                "dabf56f573cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d")],
}
EXPECTED = {                             # what an error says when there is no usable video
    "sky": "expected {root}/sky_timelapse/sky_train/<clip>/.../*.jpg and sky_test/ likewise. "
           "Fetch it with python data.py --data sky --download, or by hand from Google Drive id "
           "1xWLiU-MBGN7MrsFHQm4_yXmfHBsMbJQo.",
    "ucf101": "expected {root}/UCF-101/<Class>/*.avi and {root}/ucfTrainTestlist/trainlist01.txt. "
              "Fetch both with python data.py --data ucf101 --download, or by hand from "
              "https://www.crcv.ucf.edu/data/UCF101.php.",
    "folder": "expected videos (mp4, avi, mov, webm, mkv, gif) or folders of JPEG/PNG frames in "
              "{root}; first-level folders that hold them are classes; train/ and test/ folders, "
              "if both are there, are the splits. Or an .npy file of uint8 (N, T, H, W, 3).",
}

# --------------------------------------------------------------------------------------------------
# value ranges, and writing pictures

def to_float(videos):
    """uint8 (N, T, H, W, 3) tensor or array -> float32 (N, 3, T, H, W) in [-1, 1]"""
    x = torch.as_tensor(videos).movedim(-1, 1)
    return x.float().div(127.5).sub(1)

def to_uint8(x):
    """float (N, 3, T, H, W), clipped to [-1, 1] -> uint8 (N, T, H, W, 3) array"""
    x = x.float().clamp(-1, 1).add(1).mul(127.5)
    x = x.round().to(torch.uint8).movedim(1, -1)
    return x.cpu().numpy()

def save_grid(path, videos, columns=0, zoom=0):
    """Write uint8 videos (N, T, H, W, 3) side by side as a looping GIF, or an mp4 if path ends so.

    columns 0: nearly as many as rows. zoom 0: small videos are enlarged.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4"):
        raise UserError(f"{path} must end in .gif or .mp4")
    N, T, H, W, _ = videos.shape
    columns = columns or math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    zoom = zoom or max(1, min(192 // H, 960 // (columns * W), 1200 // (rows * H)))
    grid_shape = T, rows * (H + 1) - 1, columns * (W + 1) - 1, 3  # a white line between two
    grid = np.full(grid_shape, 255, np.uint8)
    for i, video in enumerate(videos):
        y = i // columns * (H + 1)
        x = i % columns * (W + 1)
        grid[:, y:y + H, x:x + W] = video
    grid = grid.repeat(zoom, 1).repeat(zoom, 2)
    if path.suffix == ".mp4":
        _, H, W, _ = grid.shape                                   # H.264 needs even sides
        grid = np.pad(grid, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), "edge")
        options = dict(plugin="pyav", codec="libx264", fps=8)
    else:
        options = dict(plugin="pillow", duration=125, loop=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(iio.imwrite("<bytes>", grid, extension=path.suffix, **options))

# --------------------------------------------------------------------------------------------------
# the toy set

TOY_SHAPES = ("circle", "column", "bar")
TOY_MOTIONS = {                                                   # (x, y)
    "right": (1, 0),
    "left": (-1, 0),
    "down": (0, 1),
    "up": (0, -1),
}
TOY_CLASSES = [f"{shape}-{motion}" for shape in TOY_SHAPES for motion in TOY_MOTIONS]
TOY_SPLITS = {"train": (8192, 0), "test": (1024, 1)}              # number of videos, seed

def toy_distance(shape, dx, dy, radius):
    """Signed distance in pixels, negative inside, from the outline to the point (dx, dy); the
    centre is (0, 0)."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    along, across = (dy, dx) if shape == "column" else (dx, dy)   # a rod with round ends
    along = np.maximum(np.abs(along) - radius, 0)
    return np.hypot(across, along) - 0.5 * radius

def toy_labels(n, rng):
    """int64 (n,), label = 4 * shape + motion: balanced, in random order."""
    return rng.permutation(np.arange(n) % len(TOY_CLASSES))

def toy_videos(n, frames=16, size=32, seed=0):
    """n videos of one bright shape gliding over a dark gradient; class = shape x direction.

    The world is a torus: what leaves on one side enters on the other, so a motion can go on for
    ever. Colours, position and size are random, the speed is not. Edges are two pixels soft, so
    that positions between pixels are visible.
    Returns uint8 (n, frames, size, size, 3) and int64 labels (n,), the same for the same seed.
    """
    rng = np.random.default_rng(seed)
    labels = toy_labels(n, rng)
    videos = np.empty((n, frames, size, size, 3), np.uint8)
    y, x = np.mgrid[:size, :size]                                           # (H, W)
    for i, label in enumerate(labels):
        shape, direction = TOY_CLASSES[label].split("-")
        motion = TOY_MOTIONS[direction]
        hue = (rng.uniform(0, 6) + np.array([0, 4, 2])) % 6                 # HSV, full value
        colour = np.clip(np.abs(hue - 3) - 1, 0.15, 1)                      # (3,)
        first, last = rng.uniform(0.05, 0.45, (2, 3))                       # the ground's ends
        angle = rng.uniform(0, 2 * np.pi)
        across, down = x / size - 0.5, y / size - 0.5
        along = np.cos(angle) * across + np.sin(angle) * down               # from the centre
        ramp = 0.5 + along / np.sqrt(2)                                     # 0 to 1
        ground = first + (last - first) * ramp[..., None]                   # (H, W, 3)
        radius = size * rng.uniform(0.21, 0.25)
        speed = size / 32                                                   # pixels a frame
        anywhere = rng.uniform(0, 1, 2)
        central = rng.uniform(0.38, 0.62, 2)
        middle = size * np.where(motion, anywhere, central)                 # in mid-clip
        way = (np.arange(frames)[:, None, None] - frames / 2) * speed       # since mid-clip
        dx = (x - middle[0] - motion[0] * way + size / 2) % size - size / 2  # (T, H, W)
        dy = (y - middle[1] - motion[1] * way + size / 2) % size - size / 2
        distance = toy_distance(shape, dx, dy, radius)
        alpha = np.clip(0.5 - distance / 2, 0, 1)[..., None]                # (T, H, W, 1)
        video = ground + (colour - ground) * alpha
        videos[i] = np.rint(255 * video)
    return videos, labels

def prepare_toy(folder, split, frames, size):
    """Draw one split of the toy set into one .npy file -> its Videos"""
    n, seed = TOY_SPLITS[split]
    path = folder / f"toy7-{split}-{frames}x{size}.npy"           # 7: version of the drawing
    chunks = range(0, n, 256)
    if open_array(path, np.uint8) is None:
        check_disk(folder, n * frames * size * size * 3, f"toy {split}")
        with replacing(path) as temporary:
            array = new_array(temporary, np.uint8, (n, frames, size, size, 3))
            for i in tqdm(chunks, desc=f"toy {split}", unit_scale=256, unit=" clips"):
                array[i:i + 256], _ = toy_videos(256, frames, size, seed=(seed, i))
            array.flush()
            del array
    videos = []
    for i in chunks:
        labels = toy_labels(256, np.random.default_rng((seed, i)))
        for k, label in enumerate(labels, i):
            videos.append(Video(f"toy {k}", TOY_CLASSES[label], frames, path, k))
    return videos

# --------------------------------------------------------------------------------------------------
# finding the videos of a set

class Source(NamedTuple):
    """A video before it is decoded."""
    path: Path       # a video file, or a folder of frames
    name: str        # its path inside the set
    class_name: str  # or ""

class Listing(NamedTuple):
    """What was found of one split."""
    sources: list    # of Source, in natural order of their names
    remarks: dict    # what to say -> names of videos, as find_sources() returns it
    classes: list    # names, []: no classes; None: take those of the training videos
    needs_split: bool = False    # are there no splits yet?

OUTPUT_MARK = ".vq-vdm"                       # in each folder that these scripts write to

def output_folder(folder):
    """Make a folder for our own files, and mark it, so that it is never taken for data."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder} cannot be a folder, because a file is in the way: remove it, or "
                        "choose another folder")
    (folder / OUTPUT_MARK).touch()
    return folder

def natural_key(path):
    """Sorts frame_10 after frame_9, and 0.5 after 0.125: numbers compare as numbers."""
    parts = re.split(r"(\d+(?:\.\d+)?)", str(path))
    parts[1::2] = [(float(number), number) for number in parts[1::2]]
    return parts

def list_folder_entries(folder):
    """(files, folders) in natural order, without hidden ones (.DS_Store, ._1.jpg, __MACOSX)"""
    paths = [p for p in Path(folder).iterdir() if not p.name.startswith((".", "__MACOSX"))]
    paths.sort(key=lambda path: natural_key(path.name.casefold()))
    folders = [p for p in paths if p.is_dir()]
    files = [p for p in paths if not p.is_dir()]
    return files, folders

def list_frames(folder):
    """The frames in a folder, in natural order."""
    files, _ = list_folder_entries(folder)
    return [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]

def check_frames(files):
    """Do these frames make one video? ValueError if they seem to be several, or if their order is
    not clear. -> the frame after which others are missing, or "".

    All names of a video follow one pattern. If several numbers change, as in c01_0001 and c02_0001,
    and the last one falls, there are several videos, unless the numbers are times.
    """
    if not files:
        return ""
    mixed = "{} and {} seem to be of two videos: put each into a folder of its own"
    patterns = {re.sub(r"\d+", "#", f.name.lower()): f.name for f in reversed(files)}
    if len(patterns) > 1:
        raise ValueError(mixed.format(*list(patterns.values())[:2]))
    numbers = changing_numbers(files)                             # (frames, numbers)
    if not numbers.size:                                          # one frame
        return ""
    last = numbers[:, -1]
    step = np.diff(last)
    falls = np.flatnonzero(step <= 0)
    if numbers.shape[1] == 1:
        if len(falls):                                            # 1.1 and 1.10, or 1 and 01
            raise ValueError(f"the order of {files[falls[0]].name} and {files[falls[0] + 1].name} "
                             "is not clear: write all numbers with as many digits")
        if step.max() > 1.5 * step.min():
            return files[step.argmax()].name
    elif len(falls) and not are_times(last, falls):
        raise ValueError(mixed.format(files[0].name, files[falls[0] + 1].name))
    return ""

def changing_numbers(files):
    """The numbers in names of one pattern, without those that never change: (frames, numbers)"""
    numbers = [re.findall(r"\d+", file.stem) for file in files]
    if len({len(row[-1]) for row in numbers if row}) > 1:         # perhaps 0.5, 0.75
        numbers = [re.findall(r"\d+(?:\.\d+)?", file.stem) for file in files]
    numbers = np.array(numbers, float)
    return numbers[:, (numbers != numbers[0]).any(0)]

def are_times(last, falls):
    """Are these the last numbers of dates or times? last: one a frame; falls: where it falls next.

    A second video usually counts again as the first did: no times. A time begins again at its unit:
    after second 55 comes second 0, a fall of -55, and -55 + 60 is a step of 5. So they are times if
    each fall plus some unit is a step of at most twice the longest.
    """
    steps = np.diff(last)
    longest = steps.max()
    runs = np.split(last, falls + 1)
    alike = all(np.array_equal(run, runs[0][:len(run)]) for run in runs)
    if alike and (last.max() < 60 or longest == 1):               # each counts from the same start
        return False
    units = np.array([24, 28, 29, 30, 31, 60, 1000, 10 ** 6])     # hours, days, seconds, fractions
    gaps = steps[falls][:, None] + units                          # (falls, units)
    return ((gaps > 0) & (gaps <= 2 * longest)).any(1).all()

def find_sources(root):
    """All videos below root: video files, and folders of frames.

    Pictures beside videos, or in a folder above them, are no video. Links are followed once.
    Outputs of these scripts are skipped. Returns a list of paths, and remarks, a dict for
    print_remarks(): "used, though ...", or why videos are skipped -> their names, with details.
    """
    root = Path(root)
    sources, remarks, seen = [], defaultdict(list), set()
    def remark(path, kind, detail=""):
        remarks[kind].append(f"{path.relative_to(root)}{detail}")
    def visit(folder):
        if folder.resolve() in seen:
            remark(folder, "link to a folder that was seen already")
            return
        seen.add(folder.resolve())
        if folder != root and (folder / OUTPUT_MARK).exists():
            remark(folder, "output of these scripts")
            return
        files, folders = list_folder_entries(folder)
        before = len(sources)
        for child in folders:
            visit(child)
        frames = []
        for file in files:
            suffix = file.suffix.lower()
            if not file.is_file():
                remark(file, "link to nothing")
            elif suffix in IMAGE_SUFFIXES:
                frames.append(file)
            elif suffix in VIDEO_SUFFIXES:
                sources.append(file)
            else:
                remark(file, "not a video or image")
        if frames and len(sources) > before:
            remark(folder, "pictures beside videos")
        elif frames:
            try:
                gap = check_frames(frames)
                if gap:
                    remark(folder, "used, though frames are missing", f" (after {gap})")
                sources.append(folder)
            except ValueError as e:
                remark(folder, "mixed sequences of frames", f" ({e})")
        elif not files and not folders:
            remark(folder, "empty folder")
    if root.is_dir():
        visit(root)
    return sorted(sources, key=natural_key), remarks

def list_sky(data_dir, split):
    root = Path(data_dir) / "sky_timelapse" / f"sky_{split}"
    paths, remarks = find_sources(root)
    sources = [Source(p, f"sky_{split}/{p.relative_to(root)}", "") for p in paths]
    return Listing(sources, remarks, classes=[])

def list_ucf101(data_dir, split):
    """UCF-101 by its official lists. Test lists carry no labels, so the folder tells the class.

    Folders and classes are compared without case: HandstandPushups is spelt in two ways.
    """
    root, lists = Path(data_dir) / "UCF-101", Path(data_dir) / "ucfTrainTestlist"
    class_list, split_list = lists / "classInd.txt", lists / f"{split}list01.txt"
    if not class_list.is_file() or not split_list.is_file():
        return Listing([], {}, classes=None)
    classes = find_in_lines(r"^[ \t]*\d+[ \t]+(\S+)[ \t]*$", class_list)      # "1 ApplyEyeMakeup"
    lines = find_in_lines(r"^[ \t]*\S", class_list)
    if not classes or len(classes) < len(lines):
        raise UserError(f"{class_list} must hold lines of a number and a class: fetch the split "
                        f"lists again. {expected('ucf101', data_dir)}")
    class_of = {name.lower(): name for name in classes}
    sources, remarks = [], defaultdict(list)
    for name in find_in_lines(r"^[ \t]*(\S+)", split_list):       # "Biking/v_Biking_g08_c01.avi 1"
        class_name = class_of.get(name.split("/")[0].lower())
        if class_name is None or ".." in Path(name).parts or not (root / name).is_file():
            remarks["listed, but not there"].append(name)
        else:
            sources.append(Source(root / name, name, class_name))
    return Listing(sources, remarks, classes)

def find_in_lines(pattern, path):
    """What a regular expression finds in the lines of a text file, which may come from Windows."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return re.findall(pattern, text.replace("\\", "/"), re.MULTILINE)

SPLIT_NAMES = {                          # names of folders; of a split, the first has precedence
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "val": "test", "valid": "test", "validation": "test",
}

def split_folders(root):
    """{"train": folder, "test": folder} if a folder has both, in any of their names; else {}"""
    _, folders = list_folder_entries(root)
    by_name = {folder.name.lower(): folder for folder in folders}
    found = {}
    for name, split in SPLIT_NAMES.items():
        if name in by_name:
            found.setdefault(split, by_name[name])
    if len(found) == 1:
        folder, = found.values()
        print(f"note: {root} has a folder {folder.name}, but not one for train and one for test: "
              "it is not taken for a split")
        return {}
    unused = {f.name for f in folders} - {f.name for f in found.values()}
    if found and unused:
        print(f"note: the splits are {found['train'].name} and {found['test'].name}; not used: "
              f"{', '.join(sorted(unused))}")
    return found

def holds_only_outputs(folder):
    """Is it a folder of these scripts, or one around them, without videos?"""
    if (folder / OUTPUT_MARK).exists():
        return True
    if not any(folder.glob(f"*/{OUTPUT_MARK}")):
        return False
    sources, _ = find_sources(folder)
    return not sources

def list_folder(data, split):
    """Any folder: its splits, if it has folders for them, and first-level folders as classes."""
    root = Path(data)
    if not root.is_dir():
        raise UserError(f"--data {data} is neither one of {', '.join(SETS)} nor a folder of videos "
                        "nor an .npy or .npz file")
    for _ in range(4):                                   # archives unpack to folders in folders
        files, folders = list_folder_entries(root)
        if len(folders) > 1:                             # cache, runs: they came after the videos
            folders = [f for f in folders if not holds_only_outputs(f)]
        media = [f for f in files if f.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES]
        if media or len(folders) != 1:
            break
        root = folders[0]
    splits = split_folders(root)
    root = splits.get(split, root)
    paths, remarks = find_sources(root)
    names = [p.relative_to(root).as_posix() for p in paths]
    class_names = [os.path.dirname(name).split("/")[0] for name in names]
    if split == "train" or not splits:                   # a test split has the classes of train
        if "" in class_names or len(set(class_names)) < 2:
            print(f"no classes in {root}: that takes two folders of videos, and no video outside")
            class_names = [""] * len(names)
    if splits:
        names = [f"{split}/{name}" for name in names]
    else:
        for name in names:
            words = re.split("[/_-]", os.path.dirname(name).lower())
            if SPLIT_NAMES.keys() & words:
                print(f"note: {name} looks like a part of a split, but {root} has no folders train "
                      "and test: a tenth of all videos is held out")
                break
    sources = [*map(Source, paths, names, class_names)]
    return Listing(sources, remarks, classes=None, needs_split=not splits)

def list_sources(data, data_dir, split):
    """The Listing of one split of any set that has to be decoded."""
    if data == "sky":
        return list_sky(data_dir, split)
    if data == "ucf101":
        return list_ucf101(data_dir, split)
    return list_folder(data, split)

def expected(data, data_dir):
    """The sentence of an error that says where the videos of a set must lie."""
    root = Path(data_dir if data in SETS else data)
    return EXPECTED.get(data, EXPECTED["folder"]).format(root=root)

# --------------------------------------------------------------------------------------------------
# downloading a set

UNPACK = [                               # a member of an archive, and where it goes in data_dir
    (r"(.*/)?(v_HandStandPushups_.+\.avi)", r"UCF-101/HandstandPushups/\2"),    # as in the lists
    (r"(.*/)?(v_(\w+)_g\d+_c\d+\.avi)", r"UCF-101/\3/\2"),
    (r"(.*/)?((classInd|trainlist\d+|testlist\d+)\.txt)", r"ucfTrainTestlist/\2"),
    (r"(.*/)?(sky_(train|test)/.+[^/])", r"sky_timelapse/\2"),
]

def download(data, data_dir):
    """Fetch the archives of a set into data_dir, verify those of UCF-101 by their hashes and all by
    the checksums inside, unpack what belongs to the set."""
    if data not in DOWNLOADS:
        raise UserError(f"--download is for --data {' and '.join(DOWNLOADS)}")
    folder = Path(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for url, sha256 in DOWNLOADS[data]:
        archive = folder / Path(url).name
        if not archive.exists():
            fetch(url, archive, sha256)
        unpack(archive, folder)
        print(f"unpacked {archive}, which can be deleted now")

def fetch(url, path, sha256):
    """Download a file; an interrupted download goes on where it stopped."""
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "ab") as file:
            done = max(0, file.tell() - 1)               # with no byte left, a server would refuse
            request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"})
            response = urllib.request.urlopen(request, timeout=60)
            if response.status != 206:                            # the server begins anew
                done = 0
            total = done + int(response.headers["Content-Length"] or 0)
            check_disk(path.parent, total - done, path.name)
            file.truncate(done)
            bar = dict(initial=done, total=total, desc=path.name)
            with response, tqdm.wrapattr(response, "read", **bar) as body:
                shutil.copyfileobj(body, file)
    except (OSError, http.client.HTTPException) as e:
        raise UserError(f"cannot fetch {url}: {first_line(e)}. The same command goes on from here; "
                        f"or put the file at {path} yourself")
    if part.stat().st_size < total:
        raise UserError(f"{url} broke off after {part.stat().st_size} of {total} bytes: the same "
                        "command goes on from here")
    if sha256:
        check_hash(part, url, sha256)
    part.replace(path)

def check_hash(path, url, sha256):
    """Delete a download whose hash is not the published one, with a UserError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        path.unlink()
        raise UserError(f"{url} is not the file that it was: its sha256 is {digest.hexdigest()}, "
                        f"not {sha256}. It was deleted; try again, or look for another copy")

def unpack(archive, folder):
    """Unpack the members of a zip archive that belong to a set; their CRCs are checked."""
    try:
        with zipfile.ZipFile(archive) as file:
            for member in tqdm(file.infolist(), desc=f"unpacking {archive.name}"):
                if member.filename.startswith("/") or ".." in Path(member.filename).parts:
                    raise UserError(f"{archive}: its member {member.filename} points outside the "
                                    "folder; delete it and look for another copy")
                for pattern, place in UNPACK:
                    match = re.fullmatch(pattern, member.filename)
                    if match:
                        target = folder / match.expand(place)
                        target.parent.mkdir(parents=True, exist_ok=True)
                        with replacing(target) as temporary:
                            temporary.write_bytes(file.read(member))      # checks the CRC
                        break
    except (zipfile.BadZipFile, EOFError, zlib.error) as e:
        raise UserError(f"{archive} is damaged ({first_line(e)}): delete it, then run the same "
                        "command again")

# --------------------------------------------------------------------------------------------------
# decoding: the one place where files become frames as a player shows them

class Frame(NamedTuple):
    """A decoded frame."""
    image: np.ndarray    # uint8 (H, W, 3)
    aspect: float        # width of a pixel divided by its height
    seconds: float       # when it is shown; None: not known

def read_frames(path, size, fps=0):
    """Yield the frames of a video file, GIF, frame folder or picture: uint8 (size, size, 3) each.

    fps: so many a second; 0: those that the video has. Raises UserError when it comes to something
    that cannot be decoded.
    """
    path, frame = Path(path), None
    try:
        if path.is_dir():
            files = list_frames(path)
            check_frames(files)
            frames = (read_picture(file) for file in files)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            frames = [read_picture(path)]
        elif path.suffix.lower() == ".gif":
            frames = read_gif(path)
        else:
            frames = read_video_file(path)
        if fps:
            frames = resample(frames, fps)
        for frame in frames:
            yield resize_crop(frame.image, size, frame.aspect)
    except MemoryError:                                  # no fault of the file
        raise
    except Exception as e:
        reason = first_line(e)
        if re.search("Invalid data found|unrecognized image|can not handle", reason):
            reason = f"it is damaged, or not of the kind that its name says ({reason})"
        raise UserError(f"cannot read {path}: {reason}")
    if frame is None:
        raise UserError(f"cannot read {path}: no frames in it")

def resample(frames, fps):
    """Yield the Frame that is shown at 0, 1 / fps, 2 / fps ... seconds after the first."""
    count, last = 0, None
    for frame in frames:
        if frame.seconds is None:
            raise ValueError("its frames have no times, which --fps needs")
        if last is None:
            last = first = frame
        if frame.seconds > last.seconds + 600:
            raise ValueError("over ten minutes lie between two of its frames")
        while count / fps < frame.seconds - first.seconds - 1e-4:
            yield last
            count += 1
        last = frame
    if last is not None and count / fps < last.seconds - first.seconds + 1e-4:
        yield last

EXIF_TURNS = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}        # orientation: quarter turns to the left

def read_picture(path):
    """An image file as a viewer shows it -> Frame

    Turned as its EXIF data say, 16-bit grey scaled to 8 bits, transparent pixels black.
    """
    try:
        with iio.imopen(path, "r", plugin="pillow") as file:
            meta = file.metadata(index=0, exclude_applied=False)
            if meta["mode"].startswith("I"):                      # 16 bits
                grey = file.read(index=0) // 257
                image = grey.astype(np.uint8)[..., None].repeat(3, -1)
            else:
                image = on_black(file.read(index=0, mode="RGBA"))
        # imageio's own rotate=True takes the channels of mirrored grey pictures for an axis
        orientation = meta.get("Orientation")
        image = np.rot90(image, EXIF_TURNS.get(orientation, 0))
        if orientation in (2, 4, 5, 7):                           # mirrored
            image = image[:, ::-1]
        return Frame(image, 1.0, None)
    except MemoryError:                                           # no fault of the file
        raise
    except Exception as e:
        raise ValueError(f"{path.name}: {first_line(e)}")

def read_gif(path):
    """Yield each Frame of a GIF, transparent pixels black."""
    seconds = 0
    with iio.imopen(path, "r", plugin="pillow") as file:
        for i, frame in enumerate(file.iter(mode="RGBA")):
            yield Frame(on_black(frame), 1.0, seconds)
            seconds += (file.metadata(index=i).get("duration") or 100) / 1000

def on_black(frame):
    """uint8 (H, W, 4), red, green, blue and alpha, over black -> (H, W, 3)"""
    rgb, alpha = frame[..., :3], frame[..., 3:]
    if alpha.min() == 255:                                # opaque, as most are
        return rgb
    return np.rint(rgb * (alpha / 255)).astype(np.uint8)

def read_video_file(path):
    """Yield each Frame of a video, turned and mirrored as the file says."""
    import av                                     # here: arrays and frames need no PyAV
    # an absolute path: in a relative one, what comes before a colon would be a protocol
    with av.open(os.path.abspath(path)) as container:
        stream = video_stream(container)
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            image = frame.to_ndarray(format="rgb24")
            aspect = float(stream.sample_aspect_ratio or 1)
            data = frame.side_data.get("DISPLAYMATRIX")
            if data is not None:                                  # x' = a x + c y, y' = b x + d y
                matrix = np.frombuffer(bytes(data), np.int32) / 65536        # a b 0 c d 0 x y 1
                a, b, _, c, d = np.sign(matrix[:5].round(3)).astype(int)
                if abs(a) == abs(b) or abs(a) != abs(d):
                    raise ValueError("it is turned by an angle other than 90, 180 or 270 degrees")
                if b:                                             # a quarter turn swaps x and y
                    image, aspect = image.transpose(1, 0, 2), 1 / aspect
                    a, d = c, b
                image = image[::d, ::a]                           # mirrored where the sign is -1
            yield Frame(image, aspect, frame.time)

def video_stream(container):
    """The first video stream that is not an attached picture, such as a cover."""
    import av
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise ValueError("no video stream in it")

def read_video(path, size, fps=0):
    """All that read_frames() yields: uint8 (T, size, size, 3)"""
    return np.stack(list(read_frames(path, size, fps)))

def resize_crop(frame, size, aspect=1.0):
    """uint8 (H, W, 3) -> (size, size, 3): short side resized with antialiasing, centre square.

    aspect: width of a pixel divided by its height. ValueError if the longer side is more than 32
    times the shorter one.
    """
    H, W, _ = frame.shape
    short, long = sorted((H, W * aspect))
    if long > 32 * short:                                        # resized, it would fill the memory
        raise ValueError(f"a frame of {W} x {H} pixels is more than 32 times as long as it is wide")
    if short != size or aspect != 1:
        H, W = round(H * size / short), round(W * aspect * size / short)
        x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)           # (3, H, W)
        x = F.interpolate(x[None], (H, W), mode="bilinear", antialias=True)
        frame = x[0].permute(1, 2, 0).numpy()
    top, left = (H - size) // 2, (W - size) // 2
    return np.ascontiguousarray(frame[top:top + size, left:left + size])

# --------------------------------------------------------------------------------------------------
# the cache: each video is decoded once

class Video(NamedTuple):
    """A decoded video."""
    name: str        # its path inside the set
    class_name: str  # or ""
    frames: int      # how many it has
    path: Path       # the .npy file of its frames
    index: int = -1  # which video of that file it is; -1: the file is this video
    label: int = -1  # number of its class; -1: none, or not known yet

    def open(self):
        """Its frames as a memory map, uint8 (frames, H, W, 3 or 1)"""
        try:
            array = np.load(self.path, mmap_mode="r")
        except FileNotFoundError:
            raise UserError(f"{self.path} is gone: run the same command again")
        if self.index >= 0:
            array = move_channels_last(array)[self.index]
        return array

def move_channels_last(array):
    """View an array of videos as (N, T, H, W, C); ValueError if its axes cannot be told apart.

    Known are (N, T, H, W, 3), (N, 3, T, H, W) and (N, T, 3, H, W), each also with 1 channel or
    without that axis; and (T, N, H, W), as in Moving MNIST (20, 10000, 64, 64), if T is at least
    10 and N at least a hundred times T.
    """
    if array.ndim == 4 and array.shape[3] not in (1, 3, 4):
        first, second, _, _ = array.shape
        if first >= 10 and second >= 100 * first:                 # (T, N, H, W)
            array = array.swapaxes(0, 1)
        return array[..., None]
    for axis in (4, 1, 2):
        if array.ndim == 5 and array.shape[axis] in (1, 3):
            return np.moveaxis(array, axis, -1)
    raise ValueError(f"its shape is {array.shape}; one video alone is saved as array[None]")

def prepare_array(folder, path):
    """The Videos of an .npy file, or of an .npz file with one array, which is unpacked first."""
    try:
        if path.suffix == ".npz":
            stat = path.stat()
            unpacked = folder / f"{path.stem}-{stat.st_size}-{stat.st_mtime_ns}.npy"
            if open_array(unpacked, np.uint8) is None:
                array, = np.load(path).values()                   # ValueError if there are several
                with replacing(unpacked) as temporary, open(temporary, "wb") as file:
                    np.save(file, array)
            path = unpacked
        array = np.load(path, mmap_mode="r")
        if array.dtype != np.uint8:
            raise ValueError(f"its values are {array.dtype}")
        if not array.size:
            raise ValueError("it is empty")
        N, T, H, W, C = move_channels_last(array).shape
        if max(H, W) > 32 * min(H, W):
            raise ValueError(f"its frames are {W} x {H}, over 32 times as long as wide")
    except Exception as e:                               # a damaged file can raise anything
        if explain(e):                                   # but that is no fault of the file
            raise
        raise UserError(f"cannot use {path} ({first_line(e)}): expected one array, uint8 from 0 to "
                        "255, of shape (N, T, H, W, 3), (N, 3, T, H, W) or (N, T, H, W)")
    print(f"{path.name}: {N} videos of {T} frames of {W} x {H}, {C} channels")
    return [Video(f"{i}", "", T, path.resolve(), i) for i in range(N)]

def probe(path):
    """(frames, frames a second) of a source, without decoding it; 0 for what cannot be told."""
    if path.is_dir():
        return len(list_frames(path)), 0
    try:
        if path.suffix.lower() == ".gif":
            milliseconds = iio.immeta(path, plugin="pillow").get("duration") or 100
            return iio.improps(path, plugin="pillow").shape[0], 1000 / milliseconds
        import av
        with av.open(os.path.abspath(path)) as container:
            stream = video_stream(container)
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            seconds = (container.duration or 0) / av.time_base
            duration = stream.metadata.get("DURATION")            # webm, mkv: sound can be longer
            if duration:
                hours, minutes, rest = map(float, duration.split(":"))
                seconds = 3600 * hours + 60 * minutes + rest
            if not stream.frames and rate > 120:                  # a time base, no frame rate
                return 0, 0
            played = round(seconds * rate)                        # without what was trimmed off
            known = [n for n in (stream.frames, played) if n]
            return min(known, default=0), rate
    except Exception:                                             # decoding will say what is wrong
        return 0, 0

def cache_folder(data, data_dir):
    """<data_dir>/cache, or runs/<data>/cache where the data folder cannot be written."""
    try:
        folder = output_folder(Path(data_dir) / "cache")
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return output_folder(Path("runs") / run_name(data) / "cache")

def cache_path(folder, source, size, fps):
    """The cache file of a source. Its name has a hash of all that determines its content: the path
    inside the set; name, size and time of change of each file; pixels a side; frame rate."""
    files = list_frames(source.path) if source.path.is_dir() else [source.path]
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    digest = text_hash(f"{source.name}|{stats}|{size}|{fps}")[:16]
    title = re.sub(r"[^A-Za-z0-9]+", "_", source.path.stem)[-40:]
    return folder / f"{title}-{size}-{digest}.npy"

def text_hash(text):
    """sha256 in 64 hexadecimal digits; the text may hold file names that are not UTF-8"""
    return hashlib.sha256(os.fsencode(text)).hexdigest()

def count_cached(path):
    """How many frames a cache file holds; 0 if it is absent or damaged."""
    array = open_array(path, np.uint8)
    return 0 if array is None else len(array)

def decode(source, path, size, fps, stop):
    """Decode a source into its cache file.

    The frames are written one by one, so a long video needs no memory. Their number is known at
    the end, when the header is written again; numpy leaves room in it for a first axis that grows.
    If a video breaks off, what came before is used, and a .txt file beside says why it broke off.
    stop: a threading.Event; once it is set, KeyboardInterrupt is raised.
    """
    count, reason = 0, ""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        def write_header():
            header = dict(descr="|u1", fortran_order=False, shape=(count, size, size, 3))
            np.lib.format.write_array_header_1_0(file, header)
        write_header()
        try:
            for frame in read_frames(source.path, size, fps):
                if stop.is_set():
                    raise KeyboardInterrupt
                file.write(frame)
                count += 1
        except UserError as e:
            reason = str(e).removeprefix(f"cannot read {source.path}: ")
        else:
            length, _ = probe(source.path)
            if not fps and count < 0.9 * length:                  # some decoders say nothing
                reason = f"it ends, and should have {length}"
        file.seek(0)
        write_header()
        note = path.with_suffix(".txt")
        note.unlink(missing_ok=True)
        if reason:
            note.write_text(reason, errors="backslashreplace")

def prepare(data, data_dir="datasets", split="train", size=128, frames=16, fps=0):
    """Decode one split into the cache, if it is not there yet.

    Returns (list of Video, without labels; classes, or None for those of the training videos;
    whether the videos are still to be divided into train and test). What cannot be read is counted
    and named. frames: how many the toy has.

    The cache holds one .npy file a video, written under another name and then renamed: a file that
    exists is a finished one. So an interrupted preparation goes on, several processes may prepare
    the same set at once, and only added and changed videos are decoded again.
    """
    name = run_name(data)
    folder = cache_folder(data, data_dir)
    is_array = Path(data).suffix in (".npy", ".npz")
    if fps and (data in ("toy", "sky") or is_array):
        raise UserError(f"--fps: the frames of --data {data} have no times; leave it off, or take "
                        "every second frame with --stride 2")
    if data == "toy":
        return prepare_toy(folder, split, frames, size), TOY_CLASSES, False
    if is_array:
        return prepare_array(folder, Path(data)), None, True
    folder = folder / name
    folder.mkdir(exist_ok=True)
    listing = list_sources(data, data_dir, split)
    remarks = listing.remarks
    paths = {source: cache_path(folder, source, size, fps) for source in listing.sources}
    missing = [source for source, path in paths.items() if not count_cached(path)]
    if missing:
        estimate_disk(folder, [source.path for source in missing], size, fps, f"{name} {split}")
        stop = threading.Event()                                  # a long video takes minutes
        with ThreadPoolExecutor(os.cpu_count()) as pool:          # decoders release the GIL
            jobs = [pool.submit(decode, s, paths[s], size, fps, stop) for s in missing]
            try:
                for job in tqdm(jobs, desc=f"{name} {split}", unit=" videos"):
                    job.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    videos = []
    for source, path in paths.items():
        count, note = count_cached(path), path.with_suffix(".txt")
        if note.exists():
            kind, detail = "unreadable", note.read_text(errors="replace")
            if count:
                kind = "used up to its first damaged frame"
                detail = f"{count} frames, then {detail}"
            remarks[kind].append(f"{source.name} ({detail})")
        if count:
            videos.append(Video(source.name, source.class_name, count, path))
    print_remarks(f"{name} {split}", remarks)
    if not videos:
        raise UserError(f"no usable video for --data {data} ({split} split): "
                        f"{expected(data, data_dir)}")
    return videos, listing.classes, listing.needs_split

def estimate_disk(folder, paths, size, fps, title):
    """Print frame rates and disk need of videos to be decoded, judging by at most 64 of them."""
    every = math.ceil(len(paths) / 64)
    some = [probe(path) for path in paths[::every]]
    rates = [rate for _, rate in some if rate]
    total = 0
    for count, rate in some:
        if fps and rate:
            count *= fps / rate
        total += count
    if rates:
        slowest, fastest = min(rates), max(rates)
        span = f"{slowest:.4g} to " if slowest < fastest else ""
        print(f"{title}: {span}{fastest:.4g} frames a second")
        if fastest > 1.2 * slowest and not fps:
            print("note: the same motion has more frames in some videos than in others; "
                  f"--fps {slowest:.3g} gives all the same rate")
    check_disk(folder, total / len(some) * len(paths) * size * size * 3, title)

def check_disk(folder, need, title):
    """Say how many bytes are going to be written; UserError if the disk has not so many."""
    free = shutil.disk_usage(folder).free
    print(f"{title}: about {need / 1e9:.2f} GB to write to {folder}, {free / 1e9:.1f} GB free")
    if need > free:
        raise UserError(f"not enough disk for {title} in {folder}: about {need / 1e9:.2f} GB "
                        f"needed, {free / 1e9:.2f} GB free; free some, choose another "
                        "--data_dir, or prepare fewer pixels (--size)")

def print_remarks(title, remarks):
    """Count and name the videos that are not used, or not whole. remarks: see find_sources()."""
    for kind, names in sorted(remarks.items()):
        verb = "" if kind.startswith("used") else "skipped "
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        print(f"{title}: {verb}{len(names)} {kind}: {', '.join(names[:8])}{more}")

# --------------------------------------------------------------------------------------------------
# batches

def hold_out(videos, split):
    """Train or test part of a set that has no splits of its own.

    About a tenth is held out, chosen by a hash of each name, so that adding a video moves no other.
    In a small set it can happen that no hash is below a tenth. Then the lowest is held out, and a
    new video can take its place. The highest is never held out. A single video is in both parts.
    """
    if len(videos) < 2:
        return videos
    fractions = [int(text_hash(v.name)[:8], 16) / 2 ** 32 for v in videos]      # in [0, 1)
    limit = max(0.1, min(fractions) + 1e-9)                       # the lowest is always held out,
    limit = min(limit, max(fractions))                            # the highest never
    return [v for v, f in zip(videos, fractions) if (f < limit) == (split == "test")]

class Videos:
    """One split: windows of `frames` frames that lie `stride` frames of the video apart. fps: the
    videos are brought to so many frames a second first; 0: they keep the rates they have.

    flip mirrors half of the training clips; crop cuts random squares of that many pixels. classes:
    names of the training videos' classes, [] if they have none, None: find them. The attribute
    .classes is None if there are none. Videos too short for one window are counted and named.
    """
    def __init__(self, data, data_dir="datasets", split="train", size=128, frames=16, stride=1,
                 fps=0, flip=False, crop=0, classes=None):
        if flip and data == "toy":
            raise UserError("--flip would turn right into left, and the toy's classes are "
                            "directions: leave it off")
        if crop > size:
            raise UserError(f"--crop {crop} is larger than the videos, which are {size} x {size}: "
                            "give a smaller one")
        self.data, self.split = data, split
        self.size, self.frames, self.stride = size, frames, stride
        self.flip, self.crop = flip, crop or size
        self.span = (frames - 1) * stride + 1                     # frames from first to last
        found, known, needs_split = prepare(data, data_dir, split, size, frames * stride, fps)
        usable = []
        remarks = defaultdict(list)
        for v in found:
            if v.frames >= self.span:
                usable.append(v)
            else:
                remarks["too short"].append(f"{v.name} ({v.frames} of {self.span} frames)")
        videos = hold_out(usable, split) if needs_split else usable
        if classes is None:
            classes = known
        if classes is None and split == "train":
            classes = sorted({v.class_name for v in videos} - {""}, key=natural_key)
            if classes:
                print(f"{len(classes)} classes: {', '.join(classes)}")
        if classes is None:                                       # those of the training videos
            classes = Videos(data, data_dir, "train", size, frames, stride, fps).classes or []
        label_of = {name: label for label, name in enumerate(classes)}
        self.classes = classes or None
        self.videos = [v._replace(label=label_of.get(v.class_name, -1)) for v in videos]
        for v in self.videos:
            if classes and v.label < 0:
                remarks["used without a label, as train has no such class"].append(v.name)
        print_remarks(f"{run_name(data)} {split}", remarks)
        if not self.videos:
            raise UserError(f"no video of --data {data} ({split} split) has the {self.span} frames "
                            f"that --frames {frames} --stride {stride} need: lower them")
        rows = "".join(f"{v.path.name} {v.index} {v.label}\n" for v in self.videos)
        if data not in SETS and self.videos[0].index >= 0:        # an array may be written again
            stat = self.videos[0].path.stat()
            rows += f"{stat.st_size} {stat.st_mtime_ns}"
        self.fingerprint = text_hash(rows)

    def __len__(self):
        return len(self.videos)

    def num_windows(self, i):
        """How many windows video i has."""
        return self.videos[i].frames - self.span + 1

    def window(self, i, start=0):
        """Frames start, start + stride, ... of video i: uint8 (T, size, size, 3)."""
        clip = self.videos[i].open()[start:start + self.span:self.stride]
        if clip.shape[1:] != (self.size, self.size, 3):           # of an array of one's own
            clip = clip.repeat(3 // clip.shape[-1], -1)
            clip = np.stack([resize_crop(frame, self.size) for frame in clip])
        return clip

    def batch(self, n, rng, share=slice(None)):
        """n random windows of random videos: uint8 tensor (n, T, H, W, 3), labels (n,).

        rng: a numpy Generator. share: a slice; only these of the n windows are read and returned,
        with all n labels.
        """
        side = self.crop
        clips = []
        labels = torch.empty(n, dtype=torch.int64)
        in_share = range(n)[share]
        for k in range(n):
            i = rng.integers(len(self.videos))
            start = rng.integers(self.num_windows(i))
            y, x = rng.integers(self.size - side + 1, size=2)
            mirrored = self.flip and rng.integers(2)
            labels[k] = self.videos[i].label
            if k in in_share:
                clip = self.window(i, start)[:, y:y + side, x:x + side]
                clip = torch.from_numpy(np.array(clip))
                clips.append(clip.flip(2) if mirrored else clip)  # numpy's [::-1] is much slower
        return torch.stack(clips), labels

    def draw(self, n, rng, among=None):
        """n random windows, every video once before any twice: a list of (video, start).

        among: the videos to draw from; all of them by default.
        """
        among = np.arange(len(self)) if among is None else among
        rounds = [rng.permutation(among) for _ in range(math.ceil(n / len(among)))]
        order = np.concatenate(rounds)[:n]
        return [(i, rng.integers(self.num_windows(i))) for i in order.tolist()]

    def fixed(self, n):
        """As batch(), but the same n windows every time, spread evenly over the videos."""
        clips, labels = [], []
        V = len(self)
        last_round = max(1, (n - 1) // V)                         # counted from 0
        for k in range(n):
            i = k % V                                             # all once, then all again
            if n < V:
                i = k * V // n
            start = (self.num_windows(i) - 1) * (k // V) // last_round
            clips.append(np.array(self.window(i, start)))         # a copy: a map keeps a file open
            labels.append(self.videos[i].label)
        return torch.from_numpy(np.stack(clips)), torch.tensor(labels)

# --------------------------------------------------------------------------------------------------
# What all scripts share, and nothing about videos: errors, flags, device, processes, training runs.
# Skip it at first reading; main() is at the end of the file.

class UserError(Exception):
    """An error that the user can fix; the message says what is wrong, where, and how to fix it."""

def run_main(main):
    """Call main(). Every failure that a user can cause ends in one line on stderr and status 1."""
    sys.stdout.reconfigure(errors="backslashreplace")             # names that are no UTF-8
    if RANK:
        sys.stdout = open(os.devnull, "w")                        # process 0 prints for all
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # so that no temporary file stays
    try:
        return main()
    except BaseException as e:
        message = explain(e)
        if isinstance(e, BrokenPipeError):
            sys.stdout = open(os.devnull, "w")
        if WORLD > 1 and not isinstance(e, SystemExit):
            # the other processes may wait for this one for ever, and an ordinary exit for them:
            # end at once, so that torchrun ends them too
            print(f"error: {message}" if message else traceback.format_exc(), file=sys.stderr,
                  flush=True)
            os._exit(1)
        if not message:
            raise
    sys.exit(f"error: {message}")

def explain(e):
    """One line for an exception that a user can act on; an empty string for others."""
    text = str(e)
    if isinstance(e, UserError):
        return text
    if isinstance(e, KeyboardInterrupt):
        return "interrupted; training and decoding go on if the command is repeated without --fresh"
    if isinstance(e, BrokenPipeError):
        return "what reads the output was closed"
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (f"cannot write {e.filename or 'a file'}: {e.strerror}. Free some space or choose "
                "another folder, then run the same command again, without --fresh")
    if isinstance(e, OSError) and e.errno in (errno.EACCES, errno.EROFS):
        return (f"cannot use {e.filename}: {e.strerror}. Change the permissions or choose another "
                "folder")
    no_memory = "DefaultCPUAllocator" in text or "ALLOC_FAILED" in text
    if isinstance(e, (MemoryError, torch.OutOfMemoryError)) or no_memory:
        return (f"out of memory ({first_line(e)}): lower --batch_size, or in training compute the "
                "batch in parts with --grad_accum_steps 2")
    if isinstance(e, RuntimeError) and re.search("(CUDA|cuDNN|NCCL) error|CUBLAS_STATUS", text):
        return (f"the GPU reports: {first_line(e)}. Lower --batch_size; if that does not help, try "
                "--compile off, then --dtype float32, then --device cpu")
    return ""

def first_line(e):
    """The beginning of an exception's message, in one line."""
    return (" ".join(str(e).split()) or type(e).__name__)[:120]

# ---- flags ----

class FlagParser(argparse.ArgumentParser):
    """argparse, but a wrong flag ends in one line that names the nearest right one."""
    def error(self, message):
        flags = re.findall(r"--\w+", self.format_usage())
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        close = difflib.get_close_matches(unknown[1], flags, 1) if unknown else []
        hint = f" (did you mean {close[0]}?)" if close else ""
        sys.exit(f"error: {message}{hint}; --help lists the flags")

def ints(text):
    """"4,4,4" or "4x4x4" -> (4, 4, 4)"""
    values = tuple(map(int, re.split("[x,]", text)))
    if min(values) < 1:
        raise ValueError("too small")
    return values

MAY_BE_ZERO = ("grid",)              # int flags that may be 0, though their default is not

def parse_flags(Config, presets={}, argv=None):
    """The command line of a Config dataclass: each field is a flag, the comment beside it its help.

    A value comes from the flag, else from the preset of --data, else from SETS, else it is the
    default. With --pixels the presets "<set> --pixels" and "--pixels" come before that of the set.
    No number may be negative; an int must be at least 1, unless its default is 0 or it is in
    MAY_BE_ZERO; a float whose comment begins with "fraction" is at most 1. Prints the flags given.
    What is wrong with them is said in one line.
    """
    defaults = vars(Config())
    comments = dict(re.findall(r"^\s+(\w+): .*?#\s*(.*)$", inspect.getsource(Config), re.M))
    parser = FlagParser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                        epilog="In []: the default. PRESETS, and SETS in data.py, replace some.",
                        argument_default=argparse.SUPPRESS,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {tuple: ints, str: os.path.expanduser}                # of other types: the type itself
    for name, default in defaults.items():
        help = f"{comments.get(name, '')} [{default}]".replace("%", "%%")
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=help)
        else:
            kind = kinds.get(type(default), type(default))
            parser.add_argument(f"--{name}", type=kind, help=help)
    flags = vars(parser.parse_args(argv))
    set_name = run_name(flags.get("data", Config.data))           # a folder can have a preset too
    values = defaults | SETS.get(set_name, {}) | presets.get(set_name, {})
    if flags.get("pixels"):                                       # presets that come with a flag
        values |= presets["--pixels"] | presets.get(f"{set_name} --pixels", {})
    for name, value in flags.items():
        may_be_zero = isinstance(value, float) or defaults[name] == 0 or name in MAY_BE_ZERO
        smallest = 0 if may_be_zero else 1
        if type(value) in (int, float) and not value >= smallest:     # refuses NaN, too
            parser.error(f"argument --{name}: {value} is too small")
        if comments.get(name, "").startswith("fraction") and value > 1:
            parser.error(f"argument --{name}: {value:g} is not a fraction, from 0 to 1")
        if name == "seed" and value > 10 ** 9:
            parser.error(f"argument --seed: {value} is too large, give at most {10 ** 9}")
        if name == "data" and not value:
            parser.error("argument --data is empty: name a set, a folder or an .npy file")
        print(f"  --{name} {value}   (instead of {values.get(name)!r})")
    if "data" in flags and flags["data"] not in SETS:             # videos/ and videos are one set
        flags["data"] = os.path.abspath(flags["data"])
        if flags.get("out") and os.path.realpath(flags["out"]) == os.path.realpath(flags["data"]):
            parser.error(f"argument --out: {flags['out']} is the folder of the videos, and the "
                         "previews would become some of them; name another, or one inside it")
    return Config(**{name: flags.get(name, values[name]) for name in defaults})

def run_name(data):
    """The name of a set in runs/ and in the cache: toy, sky, ucf101, or a path's last part."""
    if data in SETS:
        return data
    path = Path(data).resolve()
    name = path.stem if path.suffix in (".npy", ".npz") else path.name
    return f"{name}-folder" if name in SETS else name             # ./sky is not sky

# ---- device and processes ----

# torchrun starts several processes and gives each its number; without it there is one
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))                 # on its machine
WORLD = int(os.environ.get("WORLD_SIZE", 1))

def has_native_bf16(device):
    """Does the hardware multiply bfloat16? GPUs since 2020, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        names = "_is_amx_tile_supported", "_is_avx512_bf16_supported"
        return any(getattr(torch.cpu, name)() for name in names if hasattr(torch.cpu, name))
    return False

def pick_device(device="auto", dtype="auto"):
    """-> torch.device, and a function that opens an autocast context of the dtype.

    Open a context for each forward pass: autocast keeps the weights that it has cast until it
    closes, and they are stale once the optimiser has stepped. Also lets cuDNN search for its
    fastest kernels.
    """
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise UserError(f"--dtype {dtype}: must be auto, float32, bfloat16 or float16")
    if device == "auto":
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available():
            device = "mps"
    if device == "cuda" and WORLD > 1:
        device = f"cuda:{LOCAL_RANK}"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} cannot be used: {first_line(e)}. Try --device cpu")
    if dtype == "auto":
        dtype = "float32"
        if has_native_bf16(device):
            dtype = "bfloat16"
        elif device.type == "cuda":                               # T4, V100
            dtype = "float16"
    torch.backends.cudnn.benchmark = True                         # shapes do not change
    def autocast():
        return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    return device, autocast

def autocast_dtype(device, autocast):
    """The type in which networks compute in that context."""
    with autocast():
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return torch.float32

def start_processes(device):
    """Connect the processes that torchrun started. The others may wait long while one decodes."""
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
        atexit.register(dist.destroy_process_group)

@contextmanager
def main_process_first():
    """The first process of each machine runs the body before the others, so that they find on disk
    what it leaves there."""
    if LOCAL_RANK:
        wait_for_all()
    yield
    if not LOCAL_RANK:
        wait_for_all()

def wait_for_all():
    """Go on when all processes have come here."""
    if WORLD > 1:
        dist.barrier()

def gather(x):
    """[x of process 0, x of process 1, ...]"""
    shares = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(shares, x)
    return shares

def all_reduce_sum(x):
    """The sum of x over all processes, in place; no gradient flows through it."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x

def average_gradients(*modules):
    """Replace each gradient by its mean over the processes. All are sent as one tensor."""
    if WORLD == 1:
        return
    params = []
    for module in filter(None, modules):
        params += module.parameters()
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    all_reduce_sum(flat.div_(WORLD))
    sizes = [grad.numel() for grad in grads]
    for grad, mean in zip(grads, flat.split(sizes)):
        grad.copy_(mean.view(grad.shape))

def divide_batch(batch_size, grad_accum_steps):
    """-> this process's share of a batch, a slice, and the micro-batches, slices of that share"""
    size, rest = divmod(batch_size, WORLD * grad_accum_steps)
    if rest:
        raise UserError(f"--batch_size {batch_size} cannot be divided among {WORLD} process(es) x "
                        f"--grad_accum_steps {grad_accum_steps}: change one of them")
    n = size * grad_accum_steps
    parts = [slice(i, i + size) for i in range(0, n, size)]
    return slice(RANK * n, (RANK + 1) * n), parts

def set_up_compile(flag, device):
    """Whether to use torch.compile: as --compile says, but not if a small trial fails. Sets its
    options."""
    if flag not in ("auto", "on", "off"):
        raise UserError(f"--compile {flag}: must be auto, on or off")
    if flag == "off" or (flag == "auto" and device.type != "cuda"):
        return False
    try:
        trial = torch.compile(lambda x: x.sin() + 1, mode="reduce-overhead")
        for _ in range(3):                                        # CUDA graphs begin at the third
            trial(torch.ones(8, device=device))
        torch._dynamo.config.suppress_errors = True      # what cannot be compiled runs as it is
        torch._dynamo.config.cache_size_limit = 64       # shapes and modes of one network
        torch._functorch.config.donated_buffer = False   # the discriminator has two backward passes
    except Exception as e:                               # no C compiler, no Triton, an old torch
        print(f"torch.compile does not work here ({first_line(e)}): going on without")
        return False
    warnings.filterwarnings("ignore", "Dynamo detected a call to a .functools.lru_cache")
    return True

def cast_weights(module, autocast):
    """Cast a frozen network's kernels and matrices once, as autocast would at every call."""
    dtype = autocast_dtype(next(module.parameters()).device, autocast)
    for m in module.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.Linear)):
            m.to(dtype)
    return module

def peak_memory(device):
    """Peak memory in GB: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

# ---- files that are never half written ----

@contextmanager
def replacing(path):
    """A temporary path to write to; it gets the name `path` if the body ends without an error."""
    temporary = path.with_name(f"{path.name}.{RANK}-{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def lock_output(path):
    """Refuse a second process that writes the same file. Keep what this returns: the system frees
    the lock when the process ends, in any way."""
    file = open(path.with_name(f".{path.stem}.lock"), "w")
    try:
        if fcntl and not RANK:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is writing {path}: wait for it, stop it, or give another "
                        "--out")
    except OSError as e:                                 # a network disk without locks
        print(f"note: nothing keeps a second process from {path} here ({first_line(e)})")
    return file

def new_array(path, dtype, shape):
    """An .npy file as a memory map to write to, its disk space reserved: a full disk is an error
    here, of one line, and not a bus error when the map is written."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):                            # not on macOS
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return array

def open_array(path, dtype):
    """The array of an .npy file as a memory map to read; None if it is absent, damaged, or of
    another type."""
    try:
        array = np.load(path, mmap_mode="r")
        return array if array.dtype == dtype else None
    except Exception:                                    # a damaged header can raise anything
        return None

def load_checkpoint(path):
    """Read a checkpoint, to the CPU; nothing in it is executed."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not {"config", "step", "model"} <= set(checkpoint):
            raise ValueError("it is not one of ours")
        return checkpoint
    except FileNotFoundError:
        raise UserError(f"there is no {path}: train it first (python vqgan3d.py --data ..., then "
                        "python diffusion.py --data ...), or give --vqgan or --checkpoint")
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: give the .pt file in it")
    except Exception as e:                               # a damaged file can raise anything
        if explain(e):                                   # but that is no fault of the file
            raise
        reason = first_line(e)
        if "weights_only" in str(e).lower():
            reason = "it holds more than tensors and plain values, and is not executed"
        raise UserError(f"{path} is not a usable checkpoint ({reason}): give another file, or make "
                        "it anew with --fresh (vqgan.pt: vqgan3d.py, diffusion.pt: diffusion.py)")

# ---- a training run ----

LOG_EVERY = 20                       # steps; looking at a loss makes the CPU wait for the GPU

class Run:
    """The folder of a training run: its lock, checkpoint and log; its device, processes, signals.

    It is no trainer: the loop is in the script. Files: <path>.pt, <path>.jsonl. With several
    processes, process 0 writes.
    """
    def __init__(self, path, cfg):
        self.path, self.log_path = Path(f"{path}.pt"), Path(f"{path}.jsonl")
        self.fresh = cfg.fresh
        self.share, self.micro_batches = divide_batch(cfg.batch_size, cfg.grad_accum_steps)
        output_folder(self.path.parent)
        self.lock = lock_output(self.path)
        self.device, self.autocast = pick_device(cfg.device, cfg.dtype)
        start_processes(self.device)
        dtype = autocast_dtype(self.device, self.autocast)
        # float16 has so little range that small gradients would round to zero: scale the losses
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        print(f"{self.device}, {str(dtype).removeprefix('torch.')}, writing {self.path.parent}/")
        self.recent = []             # (step, losses, seconds waited for the batch) since last look
        self.signals = []
        self.num_rows = 0            # of the log

    def resume(self, cfg, fixed):
        """The checkpoint to go on from, or None. The log is cut back to what it was then; that of a
        new run is replaced by its first row.

        Raises UserError if one of the flags in `fixed`, which make the network and the data, has
        another value than then; other changes are printed. A flag that the checkpoint does not
        know had its default.
        """
        checkpoint = None
        if self.path.exists() and not self.fresh:
            checkpoint = load_checkpoint(self.path)
            if "opts" not in checkpoint:
                raise UserError(f"{self.path} was exported for sampling and cannot be trained: "
                                "give another --out")
            then = vars(type(cfg)()) | checkpoint["config"] | dict(fresh=False)
            changed = [name for name, value in vars(cfg).items() if value != then[name]]
            refused = [name for name in changed if name in fixed]
            if refused:
                differ = ", ".join(f"--{n} {then[n]} (now {getattr(cfg, n)})" for n in refused)
                raise UserError(f"{self.path} was trained with {differ}: give the same flags, "
                                "another --out, or --fresh to start anew")
            print(f"resuming {self.path} at step {checkpoint['step']}")
            for name in changed:
                print(f"  --{name} {getattr(cfg, name)}   (until now {then[name]!r})")
            if "steps" in changed:
                print("  the learning rate goes on at this step's place in the new schedule")
        step = checkpoint["step"] if checkpoint else 0
        if len(set(gather(step))) > 1:                            # all must go on from one step
            raise UserError(f"the processes found different checkpoints at {self.path}: --out must "
                            "be a folder that all machines share")
        if not RANK and checkpoint and self.log_path.exists():
            rows = self.log_path.read_bytes().splitlines(keepends=True)
            rows = rows[:checkpoint["log_rows"]]
            with replacing(self.log_path) as temporary:
                temporary.write_bytes(b"".join(rows))
            self.num_rows = len(rows)
        return checkpoint

    def restore(self, checkpoint, videos, opts, **learners):
        """Load a checkpoint into optimisers, networks and the like -> the step to go on at.

        learners: name in the checkpoint = what to load it into, or None. Prints a note if the
        videos have changed; UserError if their set has another name as well.
        """
        if not checkpoint:
            return 0
        if checkpoint["fingerprint"] != videos.fingerprint:
            then = checkpoint["config"]["data"]
            if run_name(then) != run_name(videos.data):
                raise UserError(f"{self.path} was trained on {then}, and {videos.data} has other "
                                "videos: give another --out, or --fresh to start anew")
            print(f"note: the training videos of {videos.data} are not those that this run began "
                  f"with, in {then}: some were added, removed, changed, or copied anew")
        for opt, state in zip(opts, checkpoint["opts"]):
            opt.load_state_dict(state)
        for name, learner in learners.items():
            if learner and checkpoint[name]:
                learner.load_state_dict(checkpoint[name])
        return checkpoint["step"]

    def steps(self, start, total, title):
        """Yield start ... total, with a progress bar. A first Ctrl-C or SIGTERM from here on only
        makes stop_requested() true; a second one stops at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        self.start, self.total = start, total
        self.clock = time.time()
        seconds = 1 if sys.stderr.isatty() else 20                # between two updates of the bar
        self.bar = tqdm(range(start, total + 1), initial=start, total=total, desc=title,
                        mininterval=seconds, disable=RANK > 0)
        yield from self.bar

    def evaluation_due(self, step, every):
        """Before the first step, every so many steps, and at the end; but not once more where a
        resumed run starts."""
        if step == self.start:
            return step == 0
        return step % every == 0 or step == self.total

    def prefetch(self, fetch, start, total):
        """Yield fetch(step), a tuple of tensors, for each step from start.

        A thread fetches the next one during the current step. For a GPU it pins the memory, so that
        the copy does not block.
        """
        def fetch_pinned(step):
            tensors = fetch(step)
            return [t.pin_memory() for t in tensors] if self.device.type == "cuda" else tensors
        with ThreadPoolExecutor(1) as thread:
            future = thread.submit(fetch_pinned, start)
            for step in range(start, total):
                began = time.time()
                batch = future.result()
                self.waited = time.time() - began
                future = thread.submit(fetch_pinned, step + 1)
                yield batch

    def on_signal(self, number, frame):
        if self.signals:                                          # the second one stops at once
            raise KeyboardInterrupt
        self.signals.append(number)

    def update(self, opts, lr):
        """One step of each optimiser at this learning rate, from gradients of scaled losses."""
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            self.scaler.step(opt)
            opt.zero_grad()

    def stop_requested(self, step):
        """Did a signal ask to stop? Several processes must agree: they compare every 20 steps."""
        if step == self.start or (WORLD > 1 and step % LOG_EVERY):
            return False
        return any(gather(bool(self.signals)))

    def log(self, step, losses, **more):
        """Keep the losses of this step; every 20th step, look at those kept and write a row.

        losses, more: numbers or scalar tensors by name.
        """
        self.recent.append((step, losses, self.waited))
        if step % LOG_EVERY:
            return
        row = {name: float(value) for name, value in (losses | more).items()}
        seconds = time.time() - self.clock
        row["seconds_a_step"] = seconds / len(self.recent)
        row["waiting"] = sum(waited for _, _, waited in self.recent) / seconds
        row["memory_gb"] = peak_memory(self.device)
        self.write_row(step, row)
        first = next(iter(losses))
        self.bar.set_postfix({first: f"{row[first]:.4f}", "GB": f"{row['memory_gb']:.1f}"}, False)

    def log_evaluation(self, step, scores):
        """Write the scores of an evaluation, {name: number}; refuse any that is not finite."""
        self.recent.append((step, scores, 0.0))
        self.write_row(step, scores)
        text = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
        self.bar.write(f"step {step}: {text}")

    def write_row(self, step, row):
        """Append {step, name: number, ...} to the log, with six digits, if all is finite."""
        for past_step, losses, _ in self.recent:
            self.check_finite(past_step, losses)
        self.recent, self.clock = [], time.time()                 # only training is timed
        if RANK:
            return
        row = {name: float(f"{value:.6g}") for name, value in row.items()}
        with open(self.log_path, "a" if self.num_rows else "w") as f:        # a new run: a new log
            f.write(json.dumps(dict(step=step, **row)) + "\n")
        self.num_rows += 1

    def check_finite(self, step, values):
        """UserError if one of the numbers or tensors {name: value} of a step is not finite."""
        for name, value in values.items():
            if not torch.as_tensor(value).isfinite().all():
                raise UserError(f"step {step}: {name} is not finite; {self.last_good()}. "
                                "Lower --lr or, if it is a loss, its weight, then run again")

    def last_good(self):
        if self.path.exists() and not self.fresh:
            return f"{self.path} still holds the last good step, to go on from without --fresh"
        return "nothing was saved yet"

    def save(self, step, **state):
        """Write a checkpoint. A crash at any moment leaves the old file or the new one.

        state: state dicts of networks and optimisers, tensors, plain Python values.
        """
        if RANK:
            self.fresh = False
            return
        for part in ("model", "ema", "disc"):
            self.check_finite(step, state.get(part) or {})
        temporary = Path(f"{self.path}.tmp")
        try:
            with open(temporary, "wb") as f:
                torch.save(dict(step=step, log_rows=self.num_rows, **state), f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, self.path)
            self.fresh = False
        except (OSError, RuntimeError) as e:             # torch turns a full disk into RuntimeError
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.path}: {first_line(e)}; {self.last_good()}. Free "
                            "some space, then run the same command again")
        self.clock = time.time()

# --------------------------------------------------------------------------------------------------

@dataclass
class Config:
    data: str = "toy"            # toy, sky, ucf101, a folder of videos, or an .npy file
    data_dir: str = "datasets"   # where the raw sets and the caches lie
    size: int = 128              # pixels a side
    frames: int = 16             # frames of a clip
    stride: int = 1              # frames of the video from one frame of a clip to the next
    fps: float = 0.0             # frames a second to bring all videos to; 0: as they are
    download: bool = False       # first fetch the set: sky, or ucf101 (7 GB)

def main():
    cfg = parse_flags(Config)
    if cfg.download:
        download(cfg.data, cfg.data_dir)
    classes = None
    for split in ("train", "test"):
        videos = Videos(cfg.data, cfg.data_dir, split, cfg.size, cfg.frames, cfg.stride, cfg.fps,
                        classes=classes)
        classes = videos.classes or []
        frames = sum(v.frames for v in videos.videos)
        print(f"{split}: {len(videos)} videos, {frames} frames, "
              f"{frames * cfg.size ** 2 * 3 / 1e9:.2f} GB, {len(videos.classes or [])} classes")
        if split == "train":
            preview = output_folder(Path("runs") / run_name(cfg.data)) / "data.gif"
            clips, _ = videos.fixed(min(len(videos), 24))
            save_grid(preview, clips.numpy(), columns=6)
            print(f"preview: {preview}")

if __name__ == "__main__":
    run_main(main)
