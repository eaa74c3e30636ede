"""Videos in, batches out. The first room of the house: every other file takes its clips from here.

A set is decoded once into a cache, one flat file of uint8 frames per split, and a training batch is a handful of random
windows cut from that memory map: nothing is decoded while a network trains, so nothing waits.

    python data.py                                  # the toy set: generated in seconds, nothing to download
    python data.py --data sky                       # Sky Timelapse, from datasets/sky_timelapse
    python data.py --data ucf101                    # UCF-101, from datasets/UCF-101 and datasets/ucfTrainTestlist
    python data.py --data ~/my_videos --size 64     # any folder of videos, GIFs or frame folders

Each prepares the cache (run it again after an interruption: it goes on where it stopped) and writes a preview GIF.
Ranges: float (B, 3, T, H, W) in [-1, 1] inside the networks, uint8 (N, T, H, W, 3) everywhere outside.
"""
import argparse, difflib, errno, hashlib, inspect, json, multiprocessing, os, re, shutil, sys, time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

VIDEO = {".mp4", ".avi", ".mov", ".webm", ".mkv", ".gif"}
IMAGE = {".jpg", ".jpeg", ".png"}
SETS = {                                       # what is true of a set, whatever is trained on it
    "toy":    dict(frames=16, size=32, stride=1),
    "sky":    dict(frames=16, size=128, stride=1),
    "ucf101": dict(frames=16, size=128, stride=1),
}
WHERE = {                                      # what to say when there is no usable video
    "sky": "expected {root}/sky_timelapse/sky_train/<clip>/.../*.jpg and sky_test/ likewise. Get it from the Hugging Face data "
           "set maxin-cn/SkyTimelapse or Google Drive id 1xWLiU-MBGN7MrsFHQm4_yXmfHBsMbJQo, and unpack it there.",
    "ucf101": "expected {root}/UCF-101/<Class>/*.avi and {root}/ucfTrainTestlist/trainlist01.txt. Get UCF101.rar (6.5 GB) and the "
              "split lists at https://www.crcv.ucf.edu/data/UCF101.php, or UCF101_videos.zip (6,960,400,115 bytes, sha256 dabf56f5"
              "73cd19c79e096563529fec8126a2a34e18e10c72eb621dd687532b0d) at https://storage.googleapis.com/thumos14_files/UCF101_videos.zip",
    "folder": "expected videos (mp4, avi, mov, webm, mkv, gif) or folders of JPEG/PNG frames in {root}; first-level folders that "
              "hold them are classes; train/ and test/ folders, if both are there, are the splits.",
}

# ----------------------------------------------------------------------------------------------------------------------
# what every script shares: one-line errors, and a command line made of a dataclass

class UserError(Exception):
    """Something the user can mend; the message says what is wrong, where, and how."""

def run(main):
    """Call main(), and end every failure a user can cause in one line on stderr and exit status 1."""
    try:
        return main()
    except UserError as e:
        message = str(e)
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from here"
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
            raise
        message = f"cannot write {e.filename or ''}: {e.strerror}. Free some space or choose another folder, then run the same command again"
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(e):
            raise
        message = f"out of memory ({first_line(e)}): lower --batch_size, or in training compute the batch in parts with --accumulate 2"
    sys.exit(f"error: {message}")

def first_line(e):
    """The beginning of what an exception says, in one line."""
    return (" ".join(str(e).split()) or type(e).__name__)[:120]

def parse(Config, presets={}, argv=None):
    """The command line of a Config dataclass: default < the set's own facts < preset of --data < flag.

    Each field is a flag, and the comment beside it is its help. Prints what differs from the defaults. Unknown flags and
    wrong types end in one line.
    """
    def error(message):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        close = unknown and difflib.get_close_matches(unknown[1], [f"--{k}" for k in defaults], 1)
        sys.exit(f"error: {message}{f' (did you mean {close[0]}?)' if close else ''}; --help lists the flags")
    defaults, help = vars(Config()), dict(re.findall(r"^\s+(\w+): .*?#\s*(.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = error
    for k, default in defaults.items():
        kind = ints if isinstance(default, tuple) else type(default)
        how = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, metavar=kind.__name__.upper())
        parser.add_argument(f"--{k}", help=f"{help.get(k, '')} [{default}]".replace("%", "%%"), **how)
    flags = vars(parser.parse_args(argv))
    for k, v in flags.items():
        least = 0 if isinstance(v, float) or defaults[k] == 0 or k in ("latents", "grid") else 1        # where 0 has a meaning
        if type(v) in (int, float) and not v >= least:
            error(f"argument --{k}: {v} is too small")
    name = run_name(flags.get("data", Config.data))                                      # so a folder of your own can have a preset
    preset = {**defaults, **SETS.get(name, {}), **presets.get(name, {})}
    for k, v in flags.items():
        print(f"  --{k} {v}   (instead of {preset[k]})")
    return Config(**{k: flags.get(k, preset[k]) for k in defaults})

def ints(text):
    """"4,4,4" or "4x4x4" -> (4, 4, 4)"""
    return tuple(int(v) for v in text.replace("x", ",").split(","))

def run_name(data):
    """The folder name of a set under runs/ and in the cache: toy, sky, ucf101, or the last part of a path."""
    return data if data in SETS else Path(data).expanduser().resolve().name

# ----------------------------------------------------------------------------------------------------------------------
# ranges, and writing pictures

def to_float(videos):
    """uint8 (N, T, H, W, 3) tensor or array -> float32 (N, 3, T, H, W) in [-1, 1]"""
    return torch.as_tensor(videos).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1)

def to_uint8(x):
    """float (N, 3, T, H, W) in [-1, 1], clipped -> uint8 (N, T, H, W, 3) array"""
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).cpu().numpy()

def save_grid(path, videos, columns=0, fps=8, zoom=0):
    """Write uint8 videos (N, T, H, W, 3) as one looping GIF, or an mp4 if the path ends so; small ones are enlarged."""
    N, T, H, W, _ = videos.shape
    columns = columns or int(np.ceil(np.sqrt(N)))
    rows = -(-N // columns)
    zoom = zoom or max(1, min(192 // H, 960 // (columns * W), 1200 // (rows * H)))
    tiles = np.pad(videos, ((0, rows * columns - N), (0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)   # a white pixel between
    grid = tiles.reshape(rows, columns, T, H + 1, W + 1, 3).transpose(2, 0, 3, 1, 4, 5).reshape(T, rows * (H + 1), columns * (W + 1), 3)
    grid = grid[:, :-1, :-1].repeat(zoom, 1).repeat(zoom, 2)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    how = dict(plugin="pillow", duration=1000 // fps, loop=0)
    if path.suffix == ".mp4":
        how = dict(plugin="pyav", codec="libx264", fps=fps)
        grid = np.pad(grid, ((0, 0), (0, grid.shape[1] % 2), (0, grid.shape[2] % 2), (0, 0)), "edge")   # H.264 wants even sides
    path.write_bytes(iio.imwrite("<bytes>", grid, extension=path.suffix, **how))         # in one go: a full disk is one error

def new_array(path, dtype, shape):
    """An .npy file as a memory map to write to, its space on disk really taken: a disk that is full says so here, where it is
    an error of one line, and not at some later write into the map, where it would be a bus error."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):                                                   # not on macOS
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, os.path.getsize(path))
    return array

# ----------------------------------------------------------------------------------------------------------------------
# the toy set

SHAPES, MOTIONS = ("circle", "column", "bar"), {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
TOY_CLASSES = [f"{shape}-{motion}" for shape in SHAPES for motion in MOTIONS]

def toy_distance(shape, dx, dy, radius):
    """Signed distance in pixels, negative inside, of points (dx, dy) from the centre to the outline of a shape."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    along, across = (dy, dx) if shape == "column" else (dx, dy)                          # a rod with round ends, upright or lying
    return np.hypot(across, np.maximum(np.abs(along) - radius, 0)) - 0.5 * radius

def toy_videos(n, frames=16, size=32, seed=0):
    """n videos of one bright shape gliding over a dark gradient; class = shape x direction of motion.

    The world is a torus: what leaves on one side enters on the other, so a motion can go on for ever. Colours, place and size
    are random, the speed is not; edges are two pixels soft, so that sub-pixel places show. Returns uint8 (n, frames, size, size, 3)
    and int64 labels (n,), label = 4 * shape + motion; balanced, in random order, the same for the same seed.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(TOY_CLASSES))
    videos = np.empty((n, frames, size, size, 3), np.uint8)
    y, x = np.mgrid[:size, :size].astype(np.float32)                                     # (H, W)
    for i, label in enumerate(labels):
        shape, motion = SHAPES[label // 4], list(MOTIONS.values())[label % 4]
        hue = rng.uniform(0, 6)
        colour = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0.15, 1)        # HSV's hue wheel at full value
        ground, angle = rng.uniform(0.05, 0.45, (2, 3)), rng.uniform(0, 2 * np.pi)
        ramp = 0.5 + (np.cos(angle) * (x / size - 0.5) + np.sin(angle) * (y / size - 0.5)) / np.sqrt(2)
        ground = ground[0] + (ground[1] - ground[0]) * ramp[..., None]                   # (H, W, 3)
        radius, speed = size * rng.uniform(0.21, 0.25), size / 32                        # half way round the world in 16 frames
        place = size * np.where(motion, rng.uniform(0, 1, 2), rng.uniform(0.38, 0.62, 2))   # in the middle of the clip
        t = (np.arange(frames)[:, None, None] - frames / 2) * speed
        dx = (x - place[0] - motion[0] * t + size / 2) % size - size / 2                 # (T, H, W) from the centre, on the torus
        dy = (y - place[1] - motion[1] * t + size / 2) % size - size / 2
        cover = np.clip(0.5 - toy_distance(shape, dx, dy, radius) / 2, 0, 1)[..., None]  # (T, H, W, 1), an edge two pixels wide
        videos[i] = np.rint(255 * (ground + (colour - ground) * cover))
    return videos, labels

# ----------------------------------------------------------------------------------------------------------------------
# finding the videos of a set

def find(root):
    """All videos and frame folders below root: sorted paths, and what was passed over as (relative path, reason)."""
    sources, skipped = [], []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        kinds = {Path(folder, f): Path(f).suffix.lower() for f in sorted(files) if not f.startswith(".")}
        sources += [f for f, kind in kinds.items() if kind in VIDEO] + [Path(folder)] * any(kind in IMAGE for kind in kinds.values())
        skipped += [(str(f.relative_to(root)), "not a video or image") for f, kind in kinds.items() if kind not in VIDEO | IMAGE]
        if not kinds and not folders:
            skipped.append((str(Path(folder).relative_to(root)), "empty folder"))
    return sorted(sources), skipped

def scan(data, data_dir, split):
    """The sources of one split: (root, [(path, label)], skipped [(path, reason)], classes or None)."""
    if data == "sky":
        root = Path(data_dir) / "sky_timelapse" / f"sky_{split}"
        sources, skipped = find(root)
        return root, [(s, -1) for s in sources], skipped, None
    if data == "ucf101":
        root, lists, sources, skipped = Path(data_dir) / "UCF-101", Path(data_dir) / "ucfTrainTestlist", [], []
        if not ((lists / f"{split}list01.txt").is_file() and (lists / "classInd.txt").is_file()):
            return root, [], [], None
        read = lambda f: [line.split() for line in (lists / f).read_text(errors="replace").splitlines() if line.strip()]
        rows = read("classInd.txt")                                                      # "1 ApplyEyeMakeup": counts from 1
        if any(len(r) != 2 or not r[0].isdigit() for r in rows):
            raise UserError(f"{lists / 'classInd.txt'} is not a list of 'number class' lines: fetch the split lists again. " + where(data, data_dir))
        classes = [name for _, name in sorted(rows, key=lambda r: int(r[0]))]
        index = {name.lower(): i for i, name in enumerate(classes)}                      # HandstandPushups / HandStandPushups
        for path, *_ in read(f"{split}list01.txt"):                                      # test lists carry no labels: the folder tells
            label = index.get(path.split("/")[0].lower())
            good = label is not None and ".." not in Path(path).parts and (root / path).is_file()
            sources.append((root / path, label)) if good else skipped.append((path, "listed, but not there"))
        return root, sources, skipped, classes
    root = Path(data).expanduser()
    if not root.is_dir():
        raise UserError(f"--data {data} is neither one of {', '.join(SETS)} nor a folder")
    train = root / "train" if (root / "train").is_dir() and (root / "test").is_dir() else None
    root = root / split if train else root
    sources, skipped = find(root)
    inside, classes = [s.relative_to(root).parts for s in sources], None
    if all(len(p) > 1 for p in inside) and len({p[0] for p in inside}) > 1:              # with splits, both count the classes alike
        classes = sorted(f.name for f in train.iterdir() if f.is_dir() and f.name[0] != ".") if train else sorted({p[0] for p in inside})
    sources = [(s, classes.index(p[0]) if classes and p[0] in classes else -1) for s, p in zip(sources, inside)]
    if not train and len(sources) > 1:                                                   # every tenth video is held out
        sources = [s for i, s in enumerate(sources) if (i % 10 == min(9, len(sources) - 1)) == (split == "test")]
    return root, sources, skipped, classes

def where(data, data_dir):
    root = Path(data_dir) if data in SETS else Path(data).expanduser()
    return WHERE.get(data, WHERE["folder"]).format(root=root)

# ----------------------------------------------------------------------------------------------------------------------
# decoding, once, into the cache

def frames_of(path, size):
    """Iterate over the frames of a video file, GIF or frame folder, resized and cropped: uint8 (size, size, 3) each."""
    frame = None
    try:
        if path.is_dir():                                  # sorted by the last integer of the name: frame_10 comes after frame_9
            number = lambda f: (int((re.findall(r"\d+", f.stem) or [0])[-1]), f.name)
            frames = (iio.imread(f, plugin="pillow", mode="RGB") for f in sorted(path.iterdir(), key=number) if f.suffix.lower() in IMAGE)
        elif path.suffix.lower() == ".gif":
            frames = iio.imiter(path, plugin="pillow", mode="RGB")
        else:
            frames = iio.imiter(path, plugin="pyav", format="rgb24")
        for frame in frames:
            yield resize_crop(frame, size)
    except Exception as e:                                 # whatever a decoder raises on a bad file, the user reads it in one line
        raise UserError(f"cannot read {path}: {first_line(e)}")
    if frame is None:
        raise UserError(f"cannot read {path}: no frames in it")

def resize_crop(frame, size):
    """uint8 (H, W, 3) -> (size, size, 3): the short side resized to size with antialiasing, then the centre square."""
    H, W, _ = frame.shape
    short = min(H, W)
    if max(H, W) > 32 * short:                                                           # the long side would fill the memory
        raise ValueError(f"a frame of {W} x {H} pixels")
    if short != size:
        x = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]         # (1, 3, H, W) uint8
        shape = round(H * size / short), round(W * size / short)
        frame = F.interpolate(x, shape, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    top, left = (frame.shape[0] - size) // 2, (frame.shape[1] - size) // 2
    return np.ascontiguousarray(frame[top:top + size, left:left + size])

def read_video(path, size):
    """All frames of a video file, GIF or frame folder, resized and cropped: uint8 (T, size, size, 3)."""
    return np.stack(list(frames_of(Path(path), size)))

def decode(job):
    """A worker's job: decode one source into a file of raw frames. Returns (number of frames, "") or (0, what is wrong)."""
    path, size, part = job
    with open(part, "wb") as f:
        try:
            return sum(f.write(frame) for frame in frames_of(path, size)) // (size * size * 3), ""
        except UserError as e:
            return 0, str(e).replace(f"cannot read {path}", "unreadable")

def count_frames(path):
    """Without decoding, for the disk check; 0 for a bad file, which decode() will name."""
    try:
        if path.is_dir():
            return sum(f.suffix.lower() in IMAGE for f in path.iterdir())
        return iio.improps(path, plugin="pillow" if path.suffix.lower() == ".gif" else "pyav").shape[0]
    except Exception:
        return 0

def cache_folder(data, data_dir):
    """<data_dir>/cache, or runs/<data>/cache where the data folder cannot be written."""
    folder = Path(data_dir) / "cache"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(f"{folder}/", os.W_OK):               # or absent, or a file
        folder = Path("runs") / run_name(data) / "cache"
        folder.mkdir(parents=True, exist_ok=True)
    return folder

def prepare(data, data_dir="datasets", split="train", size=128, frames=16, workers=-1):
    """Decode one split into the cache unless it is there already. Returns the path of its index.

    The cache is a flat file of frames, size * size * 3 bytes each, and a JSON index: (first frame, frames, label, source)
    per video, the classes, and what was skipped and why. Until all is decoded the index bears the name .journal; it is saved
    every few seconds, and a preparation that was interrupted goes on from there.
    """
    name = run_name(data) if data in SETS else f"{run_name(data)}-{hashlib.sha256(str(Path(data).expanduser().resolve()).encode()).hexdigest()[:8]}"
    stem = str(cache_folder(data, data_dir) / f"{name}-{split}-{size}") + (f"x{frames}" if data == "toy" else "")
    index_path, frames_path, journal_path = Path(stem + ".json"), Path(stem + ".u8"), Path(stem + ".journal")
    bytes_a_frame, old = size * size * 3, load_index(index_path)
    if data == "toy":
        (n, seed), videos = (8192, 0) if split == "train" else (1024, 1), []
        fingerprint = f"toy 7 {n} {frames} {size} {seed}"
        if old and old["fingerprint"] == fingerprint:
            return index_path
        check_disk(index_path.parent, n * frames * bytes_a_frame, f"toy {split}")
        with open(frames_path, "wb") as f:
            for i in tqdm(range(0, n, 256), desc=f"toy {split}", unit_scale=256, unit=" clips"):
                clips, labels = toy_videos(256, frames, size, seed=(seed, i))
                f.write(clips)
                videos += [(k * frames, frames, label, f"toy {k}") for k, label in enumerate(labels.tolist(), i)]
        return write_index(index_path, dict(fingerprint=fingerprint, size=size, classes=TOY_CLASSES, videos=videos, skipped=[]))

    root, sources, skipped, classes = scan(data, data_dir, split)
    listing = [(str(s.relative_to(root)), s.stat().st_size if s.is_file() else sum(1 for _ in s.iterdir()), label) for s, label in sources]
    fingerprint = hashlib.sha256(json.dumps([listing, classes]).encode()).hexdigest()
    if old and (old["fingerprint"] == fingerprint or not sources):                       # or a cache that travelled without its raw data
        return index_path
    nothing = UserError(f"no usable video for --data {data} ({split} split): {where(data, data_dir)}")
    if not sources:
        raise nothing
    index = dict(fingerprint=fingerprint, size=size, classes=classes, videos=[], skipped=skipped)
    unreadable, interrupted, known = [], load_index(journal_path), {(source, label) for source, _, label in listing}
    if interrupted and interrupted["fingerprint"] == fingerprint and known.issuperset((s, label) for _, _, label, s in interrupted["videos"]):
        unreadable = [row for row in interrupted["skipped"] if row[1].startswith("unreadable")]
        index |= dict(videos=interrupted["videos"], skipped=skipped + unreadable)
    videos, done, total = index["videos"], len(index["videos"]) + len(unreadable), sum(v[1] for v in index["videos"])
    sample = sources[::max(1, len(sources) // 64)]
    need = sum(count_frames(s) for s, _ in sample) / len(sample) * (len(sources) - done) * bytes_a_frame
    check_disk(index_path.parent, need, f"{name} {split}")
    if workers < 0:
        workers = min(os.cpu_count() or 1, len(sources) // 16)                           # starting a process costs seconds
    jobs = [(s, size, f"{stem}.{i}.part") for i, (s, _) in enumerate(sources)][done:]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) if workers > 1 else None
    index_path.unlink(missing_ok=True)                                                   # its frames are overwritten now
    try:
        with open(frames_path, "r+b" if done else "wb") as f:
            f.seek(f.truncate(total * bytes_a_frame))
            results, saved = zip(listing[done:], jobs, pool.map(decode, jobs) if pool else map(decode, jobs)), time.time()
            for (source, _, label), (*_, part), (n, wrong) in tqdm(results, total=len(sources), initial=done, desc=f"{name} {split}", unit=" videos"):
                if n:
                    with open(part, "rb") as p:
                        shutil.copyfileobj(p, f, 1 << 22)
                    videos.append((total, n, label, source))
                    total += n
                else:
                    index["skipped"].append((source, wrong))
                os.remove(part)
                if time.time() > saved + 5:
                    f.flush()
                    write_index(journal_path, index)
                    saved = time.time()
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        for *_, part in jobs:
            Path(part).unlink(missing_ok=True)
        write_index(journal_path, index)
    report(name, split, index["skipped"], journal_path.replace(index_path))
    if not videos:
        raise nothing
    return index_path

def check_disk(folder, need, what):
    free = shutil.disk_usage(folder).free
    print(f"{what}: about {need / 1e9:.2f} GB to write to {folder}, {free / 1e9:.1f} GB free")
    if need > free:
        raise UserError(f"not enough disk for {what} in {folder}: about {need / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free; "
                        "free some, lower --size, or choose another --data_dir")

def report(name, split, skipped, index_path):
    """Count and name what was not used, by reason."""
    for reason in sorted({r.split(":")[0] for _, r in skipped}):
        rows = [f"{s} ({r})" if ":" in r else s for s, r in skipped if r.split(":")[0] == reason]
        more = f" ... all of them in {index_path}" if len(rows) > 8 else ""
        print(f"{name} {split}: skipped {len(rows)} {reason}: {', '.join(rows[:8])}{more}")

def read_json(text):
    """What a line of JSON says, or None if it is damaged."""
    try:
        return json.loads(text)
    except ValueError:
        return None

def load_index(path):
    """The index of a cache, or None if it is absent, empty, damaged, or promises more than its file of frames holds."""
    try:
        index = json.loads(path.read_text(errors="replace"))
        firsts, counts, labels, sources = zip(*index["videos"])
        good = min(counts) > 0 and firsts == (0, *accumulate(counts))[:-1] and {*labels} <= {*range(-1, len(index["classes"] or []))}
        texts = [*sources, *(text for source, reason in index["skipped"] for text in (source, reason))]
        good = good and all(isinstance(text, str) for text in texts) and "fingerprint" in index
        return index if good and path.with_suffix(".u8").stat().st_size >= sum(counts) * index["size"] ** 2 * 3 else None
    except (TypeError, KeyError, ValueError, OSError):
        return None

def write_index(path, index):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(index))
    return temporary.replace(path)

# ----------------------------------------------------------------------------------------------------------------------
# batches

class Videos:
    """One prepared split: windows of `frames` frames, `stride` source frames apart, cut from a memory map.

    classes: list of names or None. len() counts the videos long enough; the others are counted and named at the start.
    """
    def __init__(self, data, data_dir="datasets", split="train", size=128, frames=16, stride=1, flip=False, crop=0):
        if flip and data == "toy":
            raise UserError("--flip would turn right into left, and the toy's classes are directions: leave it off")
        if crop > size:
            raise UserError(f"--crop {crop} is larger than the videos, which are {size} x {size}: give a smaller one")
        path = prepare(data, data_dir, split, size, frames * stride)
        index = load_index(path)
        self.data, self.split, self.size, self.frames, self.stride, self.flip = data, split, size, frames, stride, flip
        self.crop = crop or size
        self.classes, self.fingerprint, self.span = index["classes"], index["fingerprint"], (frames - 1) * stride + 1
        self.videos = [v for v in index["videos"] if v[1] >= self.span]
        short = [(v[3], f"too short: {v[1]} of {self.span} frames") for v in index["videos"] if v[1] < self.span]
        report(run_name(data), split, short, path)
        if not self.videos:
            raise UserError(f"no video of --data {data} ({split} split) has the {self.span} frames that --frames {frames} --stride {stride} need: lower them")
        self.map = np.memmap(path.with_suffix(".u8"), np.uint8, "r").reshape(-1, size, size, 3)

    def __len__(self):
        return len(self.videos)

    def window(self, i, start=0):
        """Frames start, start + stride, ... of video i: uint8 (T, H, W, 3) and its label (-1: none)."""
        first, _, label, _ = self.videos[i]
        return self.map[first + start:first + start + self.span:self.stride], label

    def batch(self, n, rng):
        """n random windows of random videos, of each a random square if there is a crop: uint8 tensor (n, T, H, W, 3), labels (n,).

        rng: a numpy Generator.
        """
        side = self.crop
        clips, labels = np.empty((n, self.frames, side, side, 3), np.uint8), np.empty(n, np.int64)
        for k in range(n):
            i = rng.integers(len(self.videos))
            clip, labels[k] = self.window(i, rng.integers(self.videos[i][1] - self.span + 1))
            y, x = rng.integers(self.size - side + 1, size=2) if side < self.size else (0, 0)
            clip = clip[:, y:y + side, x:x + side]
            clips[k] = clip[:, :, ::-1] if self.flip and rng.integers(2) else clip
        return torch.from_numpy(clips), torch.from_numpy(labels)

    def fixed(self, n):
        """The same n windows every time, spread evenly over the videos and unflipped: for evaluation and previews."""
        videos, windows = len(self.videos), []
        for k in range(n):
            i = k * videos // n if n <= videos else k % videos
            room = self.videos[i][1] - self.span                                         # shared by the windows of a video, if it gives several
            windows.append(self.window(i, room * (k // videos) // max(1, (n - 1) // videos)))
        clips, labels = zip(*windows)
        return torch.from_numpy(np.stack(clips)), torch.tensor(labels)

@dataclass
class Config:
    data: str = "toy"            # toy, sky, ucf101, or a folder of videos
    data_dir: str = "datasets"   # where the raw sets and the caches lie
    size: int = 128              # pixels a side
    frames: int = 16             # frames of a clip
    stride: int = 1              # source frames from one frame of a clip to the next

def main():
    cfg = parse(Config)
    for split in ("train", "test"):
        videos = Videos(cfg.data, cfg.data_dir, split, cfg.size, cfg.frames, cfg.stride)
        count, total = len(videos), sum(v[1] for v in videos.videos)
        print(f"{split}: {count} videos, {total} frames, {total * cfg.size ** 2 * 3 / 1e9:.2f} GB, {len(videos.classes or [])} classes")
        if split == "train":
            preview = Path("runs") / run_name(cfg.data) / "data.gif"
            save_grid(preview, videos.fixed(min(count, 24))[0].numpy(), columns=6)
            print(f"preview: {preview}")

if __name__ == "__main__":
    run(main)
