"""Videos in, batches out; and, in the last third, what all scripts share.

A set is decoded once: each video becomes one file of uint8 frames in a cache. A training batch is a
handful of random windows read from those files, so nothing is decoded while a network trains.

    python data.py                                  # the toy set: drawn in seconds, no download
    python data.py --data sky                       # Sky Timelapse in datasets/sky_timelapse
    python data.py --data ucf101                    # datasets/UCF-101 and datasets/ucfTrainTestlist
    python data.py --data ~/my_videos --size 64     # any folder of videos, GIFs or frame folders
    python data.py --data clips.npy --size 64       # an array of videos, uint8 (N, T, 64, 64, 3)

Each command prepares the cache and writes a preview GIF. It can be interrupted and run again.
Videos are float (B, 3, T, H, W) in [-1, 1] inside the networks, uint8 (N, T, H, W, 3) outside.
"""
import argparse
import hashlib
import inspect
import json
import math
import os
import re
import signal
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Callable, NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".webm", ".mkv", ".gif"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}

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

def save_grid(path, videos, columns=0):
    """Write uint8 videos (N, T, H, W, 3) side by side as a looping GIF of 8 frames a second. Small
    videos are enlarged. columns 0: about as many as rows."""
    path = Path(path).absolute()
    N, T, H, W, _ = videos.shape
    columns = columns or math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    grid = np.full((T, rows * (H + 2), columns * (W + 2), 3), 255, np.uint8)    # white lines
    for i, video in enumerate(videos):
        y = i // columns * (H + 2)
        x = i % columns * (W + 2)
        grid[:, y:y + H, x:x + W] = video
    zoom = max(1, 960 // max(rows * H, columns * W))
    grid = grid.repeat(zoom, 1).repeat(zoom, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, grid, plugin="pillow", duration=125, loop=0)

# --------------------------------------------------------------------------------------------------
# the toy set

TOY_SHAPES = ("circle", "column", "bar")
TOY_MOTIONS = {                                                   # (x, y)
    "right": (1, 0),
    "left": (-1, 0),
    "down": (0, 1),
    "up": (0, -1),
}
TOY_CLASSES = [f"{shape}-{motion}" for shape, motion in product(TOY_SHAPES, TOY_MOTIONS)]

def toy_distance(shape, dx, dy, radius):
    """Signed distance in pixels, negative inside, from the outline to the point (dx, dy); the
    centre is (0, 0)."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    along, across = (dy, dx) if shape == "column" else (dx, dy)   # a rod with round ends
    along = np.maximum(np.abs(along) - radius, 0)
    return np.hypot(across, along) - 0.5 * radius

def toy_videos(n, frames=16, size=32, seed=0):
    """n videos of one bright shape gliding over a dark gradient; class = shape x direction.

    The world is a torus: what leaves on one side enters on the other, so a motion can go on for
    ever. Colours, position and size are random, the speed is not. Edges are two pixels soft, so
    that positions between pixels are visible.
    Returns uint8 (n, frames, size, size, 3) and int64 labels (n,), label = 4 * shape + motion:
    nearly balanced, in random order, the same for the same seed.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(TOY_CLASSES))
    videos = np.empty((n, frames, size, size, 3), np.uint8)
    y, x = np.mgrid[:size, :size]                                           # (H, W)
    for i, label in enumerate(labels):
        shape, direction = TOY_CLASSES[label].split("-")
        motion = TOY_MOTIONS[direction]
        # HSV to RGB at full value: red, green and blue are the same trapezoid of the hue, a third
        # of the circle apart
        hue = (rng.uniform(0, 6) + np.array([0, 4, 2])) % 6
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

class DrawnSet(NamedTuple):
    """A set that a function draws."""
    draw: Callable   # (n, frames, size, seed) -> videos, labels
    classes: list    # names
    splits: dict     # name -> number of videos, a multiple of 256, and seed

DRAWN_SETS = {
    "toy": DrawnSet(toy_videos, TOY_CLASSES, {"train": (8192, 0), "test": (1024, 1)}),
}

# --------------------------------------------------------------------------------------------------
# finding the videos of a set: {name: path}. A path is a video file or a folder of frames; a name is
# the path inside the set, so it begins with the class. What is skipped is counted and named.

def natural_key(path):
    """Sorts frame_10 after frame_9: numbers compare as numbers."""
    parts = re.split(r"(\d+)", str(path).lower())
    parts[1::2] = map(int, parts[1::2])
    return parts

def list_frames(path):
    """The files of a video: itself, or the pictures in its folder, in natural order. ValueError if
    their names differ in more than one number: they may be of several videos, or out of order."""
    if not path.is_dir():
        return [path]
    files = [f for f in path.glob("[!.]*") if f.suffix.lower() in IMAGE_SUFFIXES]
    files.sort(key=natural_key)
    patterns = {re.sub(r"\d+", "#", f.stem) for f in files}
    if len(patterns) == 1:
        numbers = np.array([re.findall(r"\d+", f.stem) for f in files])     # (frames, numbers)
        if (numbers != numbers[0]).any(0).sum() <= 1:
            return files
    raise ValueError("the names of a video's frames may differ in one number only: number them "
                     "0001.png, 0002.png ... in a folder of their own")

def find_sources(root):
    """The videos below a folder, in natural order: {name: path}

    Pictures are the frames of a video if no video lies beside them or in a folder below. Hidden
    files, and folders called runs or cache (our own), are left out. Links to folders are skipped:
    they can lead in a circle.
    """
    root = Path(root)
    videos = set()
    pictures = set()
    others = set()
    for path in root.rglob("*"):
        name = path.relative_to(root).as_posix()
        suffix = path.suffix.lower()
        if re.search(r"(^|/)(\.|__MACOSX|runs/|cache/)", name):
            continue
        if suffix in VIDEO_SUFFIXES:
            videos.add(path)
        elif suffix in IMAGE_SUFFIXES:
            pictures.add(path)
        elif path.is_symlink() or not path.is_dir():
            others.add(path)
    folders = {path.parent for path in pictures}
    for path in videos | folders:
        folders = folders.difference(path.parents)
    others |= {path for path in pictures if path.parent not in folders}
    print_skipped("not a video", sorted(map(str, others)))
    videos = sorted(videos | folders, key=natural_key)
    return {path.relative_to(root).as_posix(): path for path in videos}

def find_set(data, data_dir, split):
    """One split of sky, ucf101 or a folder -> sources, names of classes"""
    if data == "ucf101":
        return find_ucf101(data_dir, split)
    if data != "sky":
        return find_folder(Path(data), split)
    for folder in data_dir.glob(f"sky_timelapse/**/sky_{split}"):   # archives nest differently
        return find_sources(folder), []
    return {}, []

def find_ucf101(data_dir, split):
    """UCF-101 by its official lists -> sources, classes. The lists say the class; which folder of
    UCF-101/ a file lies in does not matter.

    The lists: https://www.crcv.ucf.edu/data/UCF101/UCF101TrainTestSplits-RecognitionTask.zip
    (sha256 5c0d1a53b8ed364a2ac830a73f405e51bece7d98ce1254fd19ed4a36b224bd27). The videos, 7 GB:
    https://storage.googleapis.com/thumos14_files/UCF101_videos.zip
    (dabf56f573cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d), into UCF-101/.
    """
    lists = data_dir / "ucfTrainTestlist"
    if not lists.is_dir():
        return {}, []
    class_list = (lists / "classInd.txt").read_text()             # "1 ApplyEyeMakeup"
    split_list = (lists / f"{split}list01.txt").read_text()       # "Biking/v_Biking_g08_c01.avi 1"
    by_file = {path.name: path for path in find_sources(data_dir / "UCF-101").values()}
    sources = {}
    for name in re.findall(r"(?m)^\S+", split_list):              # one that is missing: unreadable
        sources[name] = by_file.get(Path(name).name, data_dir / "UCF-101" / name)
    return sources, re.findall(r"\d+ +(\S+)", class_list)

def find_folder(root, split):
    """Any folder: its splits train and test (or val, validation), if it has both; first-level
    folders as classes, if there are two or more and each video is in one -> sources, classes"""
    tests = [root / name for name in ("test", "val", "validation") if (root / name).is_dir()]
    if (root / "train").is_dir() and tests:
        splits = dict(train=root / "train", test=tests[0])
        sources = find_sources(splits[split])
        train = find_sources(splits["train"])
    else:
        splits = "a tenth of the videos is held out"
        found = find_sources(root)
        sources = {name: found[name] for name in hold_out(found, split)}
        train = hold_out(found, "train")
    classes = sorted({class_of(name) for name in train}, key=natural_key)
    if "" in classes or len(classes) < 2:
        classes = []
    print(f"{root}: classes {classes}; splits: {splits}")
    return sources, classes

def class_of(name):
    """The first-level folder of a video's name; "" if it is in none"""
    folder, slash, _ = name.partition("/")
    return folder if slash else ""

def hold_out(names, split):
    """Train or test part of the names of a set that has no splits of its own.

    About a tenth is held out, at least one and never all, chosen by a hash of each name, so that
    adding a video moves no other. A single video is in both parts.
    """
    if len(names) < 2:
        return list(names)
    held_out = {name for name in names if text_hash(name) < "1999999a"}     # a tenth of all hashes
    if len(held_out) in (0, len(names)):
        held_out = {min(names, key=text_hash)}
    return [name for name in names if (name in held_out) == (split == "test")]

def text_hash(text):
    """sha256 of a str (which may hold file names that are not UTF-8) or of bytes, in 64 hexadecimal
    digits"""
    return hashlib.sha256(os.fsencode(text)).hexdigest()

def print_skipped(why, names):
    """How many were skipped, and the first eight names"""
    if names:
        print(f"skipped {len(names)} {why}: {names[:8]}")

# --------------------------------------------------------------------------------------------------
# decoding: files become frames as a player shows them

def read_file(path):
    """Yield the frames of a video, GIF or picture, turned as the file says: uint8 (H, W, 3)"""
    if path.suffix.lower() in {".gif", *IMAGE_SUFFIXES}:
        with iio.imopen(path, "r", plugin="pillow") as file:
            yield from file.iter(mode="RGB", rotate=True)
        return
    import av                            # imageio's video plug-in: imageio itself turns no videos
    with av.open(str(path.absolute())) as container:
        stream = container.streams.best("video")                  # not the picture of a cover
        for frame in container.decode(stream):
            image = frame.to_ndarray(format="rgb24")
            yield np.rot90(image, frame.rotation // 90)           # as phones store them

def read_frames(path, size):
    """Yield the frames of a video file, GIF, frame folder or picture: uint8 (size, size, 3) each.
    UserError when it comes to something that cannot be decoded."""
    file = path = Path(path)
    try:
        for file in list_frames(path):
            for frame in read_file(file):
                yield resize_crop(frame, size)
    except Exception as e:                               # a damaged file can raise anything
        raise UserError(f"cannot read {file}: {' '.join(str(e).split())[:150]}")

def resize_crop(frame, size):
    """uint8 (H, W, 3) -> (size, size, 3): the square in the centre, resized with antialiasing"""
    H, W, _ = frame.shape
    side = min(H, W)
    top = (H - side) // 2
    left = (W - side) // 2
    square = frame[top:top + side, left:left + side].copy()
    x = torch.from_numpy(square).permute(2, 0, 1)[None]                      # (1, 3, side, side)
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).contiguous().numpy()

# --------------------------------------------------------------------------------------------------
# the cache: each video is decoded once

class Video(NamedTuple):
    """A decoded video."""
    name: str        # its path inside the set
    path: Path       # the .npy file that holds it
    frames: int      # how many it has
    index: int       # which video of that file it is; `...`: the file holds this video only
    origin: str      # the same wherever the same files lie: their size, or a hash of pixels

def write_array(path, items, shape):
    """Write uint8 arrays of this shape into one .npy file, one by one, so it needs no memory.
    Their number is known, and the header written, at the end."""
    count = 0
    with replacing(path) as file:
        file.seek(128)                                            # the length of the header
        for item in items:
            file.write(item)
            count += 1
        file.seek(0)
        header = dict(descr="|u1", fortran_order=False, shape=(count, *shape))
        np.lib.format.write_array_header_1_0(file, header)

def prepare_drawn(name, split, size, frames, cache):
    """Draw one split of a DrawnSet into a file, if it is not there -> its Videos. The file's name
    has a hash of the drawing function's source (after a change of what that one calls, delete the
    file); the labels lie beside it, written last."""
    drawn = DRAWN_SETS[name]
    n, seed = drawn.splits[split]
    version = text_hash(inspect.getsource(drawn.draw))[:8]
    path = cache / f"{name}-{split}-{frames}x{size}-{version}.npy"
    labels_path = path.with_suffix(".labels")
    if not labels_path.exists():
        labels = []
        def draw():
            for i in tqdm(range(0, n, 256), f"{name} {split}"):
                videos, chunk = drawn.draw(256, frames, size, (seed, i))
                labels.extend(chunk)
                yield from videos
        write_array(path, draw(), (frames, size, size, 3))
        write_array(labels_path, np.uint8(labels), ())
    videos = []
    for i, label in enumerate(np.load(labels_path)):
        videos.append(Video(f"{drawn.classes[label]}/{i}", path, frames, i, version))
    return videos

def prepare_array(path, split, size):
    """The Videos of an .npy file, which are read from there: uint8 (N, T, size, size, 3)"""
    array = np.load(path, mmap_mode="r")
    if array.dtype != np.uint8 or array.shape[2:] != (size, size, 3):
        raise UserError(f"{path} holds {array.dtype} {array.shape}, and must hold uint8 (N, T, "
                        f"{size}, {size}, 3): give its side as --size, or save it anew with "
                        "values from 0 to 255 and the axes in this order")
    origin = text_hash(array[:, 0].tobytes())                     # of the first frames
    names = hold_out([str(i) for i in range(len(array))], split)
    return [Video(name, path, array.shape[1], int(name), origin) for name in names]

def prepare_sources(title, sources, cache, size):
    """Decode the sources {name: path} that are not in the cache -> their Videos

    The cache holds one .npy file a video, written under another name and then renamed: a file that
    exists is a finished one. It is named by a hash of all that determines its content: path; name,
    size and time of change of each file; pixels a side. So an interrupted preparation goes on,
    several processes may prepare the same set at once, and only added and changed videos are
    decoded again. A source that cannot be read is skipped and named.
    """
    unreadable = []
    def decode(name, source):
        try:
            files = list_frames(source)
            stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
            path = cache / f"{text_hash(f'{source.absolute()} {stats} {size}')[:16]}.npy"
            if not path.exists():
                write_array(path, read_frames(source, size), (size, size, 3))
            frames = len(np.load(path, mmap_mode="r"))
            return Video(name, path, frames, ..., str(sum(length for _, length, _ in stats)))
        except (UserError, ValueError, FileNotFoundError) as e:
            unreadable.append(f"{name} ({e})")
    with ThreadPoolExecutor() as pool:                            # decoders release the GIL
        videos = pool.map(decode, sources, sources.values())
        videos = list(tqdm(videos, title, len(sources)))
    print_skipped("unreadable", unreadable)
    return [video for video in videos if video]

# --------------------------------------------------------------------------------------------------
# batches

class Videos:
    """One split: windows of `frames` frames that lie `stride` frames of the video apart.

    flip mirrors half of the training clips; crop cuts random squares of that many pixels.
    .videos: a Video for each that is long enough. .labels: one for each of them, an index into
    .classes, the names of the classes; -1 if it has none. .fingerprint: a hash that is the same
    wherever the same set lies.
    """
    def __init__(self, data, data_dir="datasets", split="train", size=128, frames=16, stride=1,
                 flip=False, crop=0):
        if flip and data == "toy":
            raise UserError("--flip would turn right into left, and the toy's classes are "
                            "directions: leave it off")
        self.size = size
        self.frames = frames
        self.stride = stride
        self.flip = flip
        self.crop = crop or size
        self.span = (frames - 1) * stride + 1                     # frames from first to last
        self.classes = []
        cache = Path(data_dir, "cache")
        cache.mkdir(parents=True, exist_ok=True)
        if data in DRAWN_SETS:
            found = prepare_drawn(data, split, size, frames * stride, cache)
            self.classes = DRAWN_SETS[data].classes
        elif data.endswith(".npy"):
            found = prepare_array(data, split, size)
        else:
            sources, self.classes = find_set(data, Path(data_dir), split)
            found = prepare_sources(f"{run_name(data)} {split}", sources, cache, size)
        short = [video.name for video in found if video.frames < self.span]
        print_skipped(f"shorter than {self.span} frames", short)
        self.videos = [video for video in found if video.frames >= self.span]
        if not self.videos:
            raise UserError(f"no usable video for --data {data} ({split}), --data_dir {data_dir}: "
                            "the README shows what is expected and how to get it ('Real videos')")
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.labels = [label_of.get(class_of(video.name), -1) for video in self.videos]
        if self.classes and -1 in self.labels:
            print(f"{self.labels.count(-1)} videos are of a class that train lacks: no label")
        self.fingerprint = text_hash(str([(v.name, v.frames, v.origin) for v in self.videos]))

    def __len__(self):
        return len(self.videos)

    def num_windows(self, i):
        """How many windows video i has."""
        return self.videos[i].frames - self.span + 1

    def window(self, i, start=0):
        """Frames start, start + stride, ... of video i: uint8 (T, size, size, 3)."""
        video = self.videos[i]
        frames = np.load(video.path, mmap_mode="r")[video.index]
        return frames[start:start + self.span:self.stride]

    def batch(self, n, rng, share=slice(None)):
        """n random windows of random videos, cropped and mirrored: uint8 (n, T, crop, crop, 3),
        and labels (n,); both are tensors.

        rng: a numpy Generator. share: a slice; only these of the n windows are read and returned,
        but the labels of all n are.
        """
        clips, labels = [], []
        for k in range(n):
            i = rng.integers(len(self))
            start = rng.integers(self.num_windows(i))
            y, x = rng.integers(self.size - self.crop + 1, size=2)
            mirrored = self.flip and rng.integers(2)
            labels.append(self.labels[i])
            if k in range(n)[share]:
                clip = self.window(i, start)[:, y:y + self.crop, x:x + self.crop]
                clip = torch.tensor(clip)
                clips.append(clip.flip(2) if mirrored else clip)
        return torch.stack(clips), torch.tensor(labels)

    def draw(self, n, rng, among=None):
        """n random windows, spread evenly over the videos: a list of (video, start). A window comes
        twice only after all came once. among: the videos to draw from; all of them by default."""
        if among is None:
            among = range(len(self))
        left = {}                                        # video -> starts that were not drawn yet
        windows = []
        while len(windows) < n:
            if not any(left.values()):
                left = {i: rng.permutation(self.num_windows(i)).tolist() for i in among}
            for i in rng.permutation(among):
                if left[i]:
                    windows.append((i, left[i].pop()))
        return windows[:n]

    def fixed(self, n):
        """The same n windows every time, neither cropped nor mirrored: uint8 tensor
        (n, T, size, size, 3), labels (n,)"""
        windows = self.draw(n, np.random.default_rng(0))
        clips = np.stack([self.window(i, start) for i, start in windows])
        return torch.from_numpy(clips), torch.tensor([self.labels[i] for i, _ in windows])

# --------------------------------------------------------------------------------------------------
# What all scripts share, and nothing about videos: errors, flags, device, processes, checkpoints.
# Skip it at first reading; main() is at the end of the file.

class UserError(SystemExit):
    """An error that the user can fix: Python prints its message, which says what is wrong, where,
    and how to fix it, and ends with status 1. All other errors are tracebacks."""

def run_main(main):
    """Call main(). Of several processes, number 0 prints for all, and one that fails ends at once:
    the others may wait for it for ever, and torchrun then ends them too."""
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        main()
    except BaseException:
        if WORLD > 1:
            traceback.print_exc()
            os._exit(1)
        raise
    if WORLD > 1:
        dist.destroy_process_group()

# ---- flags ----

def ints(text):
    """"4,4,4" -> (4, 4, 4)"""
    return tuple(map(int, text.split(",")))

def parse_flags(Config, presets={}, argv=None):
    """The command line of a Config dataclass: each field is a flag, the comment beside it its help.

    A value comes from the flag, else from the preset of --data, else it is the default. --help
    shows the defaults, without presets; what a run uses is the first line that it prints.
    """
    comments = dict(re.findall(r"^\s+(\w+): .*?#\s*(.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Config()).items():
        options = dict(default=default, help=comments[name].replace("%", "%%") + " [%(default)s]")
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = ints if isinstance(default, tuple) else type(default)
        parser.add_argument(f"--{name}", **options)
    flags, _ = parser.parse_known_args(argv)
    parser.set_defaults(**presets.get(run_name(flags.data), {}))  # a folder can have a preset too
    cfg = Config(**vars(parser.parse_args(argv)))
    if cfg.data not in {"sky", "ucf101", *DRAWN_SETS}:            # videos/ and videos are one set
        cfg.data = os.path.abspath(cfg.data)
    print(cfg)
    return cfg

def run_name(data):
    """The name of a set in runs/: toy, sky, ucf101, or a path's last part"""
    return Path(data).absolute().name.removesuffix(".npy")

# ---- device and processes ----

# torchrun starts several processes, on one machine, and gives each its number; else there is one
RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

def fastest_dtype(device):
    """bfloat16 if the hardware multiplies it, as GPUs do since 2020; float16 on older GPUs"""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"

def start(cfg):
    """The --device and --dtype of a Config -> torch.device, autocast, GradScaler. Connects the
    processes that torchrun started.

    autocast() opens a context in which networks compute in the dtype. Open one for each forward
    pass: it keeps the weights that it has cast until it closes, and they are stale once the
    optimiser has stepped. The scaler multiplies the losses in float16, which has so little range
    that small gradients would round to zero; with other types it does nothing.
    """
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or RANK)
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group(timeout=timedelta(days=1))        # one may decode for long
    torch.backends.cudnn.benchmark = True                         # shapes do not change
    dtype = getattr(torch, fastest_dtype(device) if cfg.dtype == "auto" else cfg.dtype)
    print(f"{device}, {dtype}, {WORLD} process(es)")
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    return device, autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

@contextmanager
def main_process_first():
    """Process 0 runs the body before the others, so that they find on disk what it leaves there."""
    if RANK:
        gather(None)
    yield
    if not RANK:
        gather(None)

def gather(x):
    """[x of process 0, x of process 1, ...], when all processes have come here"""
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
    """Replace each gradient by its mean over the processes."""
    for module in modules:
        for p in module.parameters():
            if p.grad is not None and WORLD > 1:
                all_reduce_sum(p.grad.div_(WORLD))

def divide_batch(batch_size, grad_accum_steps):
    """-> this process's share of a batch, a slice, and the micro-batches, slices of that share"""
    size, rest = divmod(batch_size, WORLD * grad_accum_steps)
    if rest:
        raise UserError(f"--batch_size {batch_size} cannot be divided among {WORLD} process(es) x "
                        f"--grad_accum_steps {grad_accum_steps}: change one of them")
    n = size * grad_accum_steps
    parts = [slice(i, i + size) for i in range(0, n, size)]
    return slice(RANK * n, (RANK + 1) * n), parts

# ---- checkpoints ----

@contextmanager
def replacing(path):
    """A binary file to write; it gets the name `path` if the body ends without an error. A crash at
    any moment leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def source_hash(cfg):
    """Hash of the script that a Config belongs to: has its code changed since a checkpoint?"""
    return text_hash(inspect.getsource(inspect.getmodule(cfg)))

def save_checkpoint(path, cfg, learners, **state):
    """Write the state dicts of {name: network, optimiser ...}, the Config and other state (tensors
    and plain Python values). UserError, and no file, if a weight is not finite. Of several
    processes, process 0 writes."""
    if RANK:
        return
    for name, learner in learners.items():
        state[name] = learner.state_dict()
        if isinstance(learner, torch.nn.Module):
            check_finite(path, state["step"], state[name])
    log_size = path.with_suffix(".jsonl").stat().st_size
    state |= dict(config=vars(cfg), source=source_hash(cfg), log_size=log_size)
    with replacing(path) as file:
        torch.save(state, file)

def load_checkpoint(path):
    """Read a checkpoint, to the CPU; nothing in it is executed."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}: train it first (python vqgan3d.py --data ..., "
                        "then python diffusion.py --data ...), or give --vqgan or --checkpoint")
    return torch.load(path, map_location="cpu", weights_only=True)

def load_states(path, checkpoint, learners):
    """Load the state dicts of a checkpoint into learners, {name: network, optimiser ...}."""
    for name, learner in learners.items():
        try:
            learner.load_state_dict(checkpoint[name])
        except (KeyError, RuntimeError, ValueError) as e:
            raise UserError(f"{name} of {path} does not fit the code as it is now "
                            f"({' '.join(str(e).split())}): train it anew (--fresh)")

def resume(path, cfg, may_change):
    """The checkpoint to go on from, or None if there is none, or with --fresh. UserError if a flag
    differs that is not in may_change."""
    if cfg.fresh or not path.exists():
        return None
    checkpoint = load_checkpoint(path)
    print(f"resuming {path} at step {checkpoint['step']}")
    for name, value in vars(cfg).items():
        then = checkpoint["config"].get(name)
        if value != then and name not in may_change:
            raise UserError(f"{path} was trained with --{name} {then}, not {value}: give the same, "
                            "another --out, or --fresh to start anew")
    if checkpoint["source"] != source_hash(cfg):
        print("note: the script has changed since this checkpoint was written; --fresh starts anew")
    return checkpoint

def restore(path, checkpoint, cfg, videos, learners):
    """Load a checkpoint, if there is one, into {name: network, optimiser ...}, and cut the log back
    to what it was then, or empty it -> the step to go on at.

    UserError if the run is resumed on another set; a note if its videos have changed.
    """
    step = log_size = 0
    if checkpoint:
        load_states(path, checkpoint, learners)
        step = checkpoint["step"]
        log_size = checkpoint["log_size"]
        then = checkpoint["config"]["data"]
        if checkpoint["fingerprint"] != videos.fingerprint:
            if then != cfg.data:
                raise UserError(f"{path} was trained on {then}, not on {cfg.data}: give another "
                                "--out")
            print(f"note: the training videos of {cfg.data} have changed since this run began")
    if not RANK:
        path.parent.mkdir(parents=True, exist_ok=True)
        log_path = path.with_suffix(".jsonl")
        log_path.touch()
        os.truncate(log_path, log_size)
    return step

# ---- the training loop's surroundings ----

LOG_EVERY = 20                       # steps; looking at a loss makes the CPU wait for the GPU

def log(path, step, row):
    """Append {step, name: number or scalar tensor, ...} to the log beside a checkpoint, if all is
    finite -> the row in numbers"""
    check_finite(path, step, row)
    row = {name: float(value) for name, value in row.items()}
    if not RANK:
        with open(path.with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(dict(step=step, **row)) + "\n")
    return row

def check_finite(path, step, values):
    """UserError if one of the numbers or tensors {name: value} of a step is not finite."""
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            raise UserError(f"step {step}: {name} is not finite. If {path} is there, it holds the "
                            "last good step. Lower --lr or, if it is a loss, its weight, then run "
                            "again")

def prefetch(fetch, first_step, steps):
    """Yield fetch(step) for each step from the first. A thread fetches the next one during the
    current step, without helper threads: with a second team there would be more threads than
    cores, OpenMP would put all to sleep after each product, and a step of stage 2 would take 3
    times as long."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        future = thread.submit(fetch, first_step)
        for step in range(first_step, steps):
            batch = future.result()
            future = thread.submit(fetch, step + 1)
            yield batch

signals = []                         # that have asked to stop

def on_signal(number, frame):
    if signals:                                                   # the second one stops at once
        raise KeyboardInterrupt
    signals.append(number)
    tqdm.write("stopping after this step, and saving; the same command goes on")

def progress(first_step, steps, title):
    """A progress bar over first_step ... steps. A first Ctrl-C or SIGTERM from here on only makes
    stop_requested() true."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    steps_left = range(first_step, steps + 1)
    return tqdm(steps_left, title, initial=first_step, total=steps, disable=RANK > 0)

def stop_requested(step):
    """Did a signal ask to stop? Several processes must agree: they compare every 20 steps."""
    if WORLD > 1 and step % LOG_EVERY:
        return False
    return any(gather(bool(signals)))

# --------------------------------------------------------------------------------------------------

PRESETS = {"toy": dict(size=32)}

@dataclass
class Config:
    data: str = "toy"            # toy, sky, ucf101, a folder of videos, or an .npy file
    data_dir: str = "datasets"   # where the raw sets and the cache lie
    size: int = 128              # pixels a side
    frames: int = 16             # frames of a clip
    stride: int = 1              # frames of the video from one frame of a clip to the next

def main():
    cfg = parse_flags(Config, PRESETS)
    for split in ("train", "test"):
        videos = Videos(cfg.data, cfg.data_dir, split, cfg.size, cfg.frames, cfg.stride)
        frames = sum(video.frames for video in videos.videos)
        preview = f"runs/{run_name(cfg.data)}/data-{split}.gif"
        print(f"{split}: {len(videos)} videos, {frames} frames, {len(videos.classes)} classes, "
              f"{frames * cfg.size ** 2 * 3 / 1e9:.2f} GB; preview: {preview}")
        clips, _ = videos.fixed(24)
        save_grid(preview, clips.numpy(), columns=6)

if __name__ == "__main__":
    run_main(main)
