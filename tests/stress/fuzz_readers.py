"""Gives damaged files to everything that reads files.

    python -m tests.stress.fuzz_readers 2000      # damaged files; the test suite tries a few

Valid files of each kind are cut, have bits flipped, are overwritten with zeros, noise or absurd
numbers, or get the content of another kind. Each reader may use what is left, or end in one line
(UserError). Failures are: any other exception, the death of the process, more than 20 seconds, more
than 2 GB of memory, or good videos that are not used because one beside them is damaged.
Prints a table; the exit status is 1 if there was a failure.
"""
import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"           # a forked process cannot use its parent's threads
import imageio.v3 as iio
import numpy as np
import torch
from tqdm import tqdm

import data
import diffusion
import evaluate
import vqgan3d
from tests.conftest import STAGE1, STAGE2
from tests.stress.crash_training import train

SECONDS, GIGABYTES = 20, 2                    # limits of a reader

# --------------------------------------------------------------------------------------------------
# damage

WAYS = ["cut", "flipped bits", "zeros", "noise", "absurd number", "repeated", "another kind",
        "empty", "other digits"]

def damage(content, way, rng, others):
    """bytes -> damaged bytes. others: contents of other kinds of files"""
    b = bytearray(content)
    near_start = rng.random() < 0.5                               # half of them: in the header
    i = rng.randrange(min(len(b), 400) if near_start else len(b))
    if way == "cut":
        return bytes(b[:i])
    if way == "empty":
        return b""
    if way == "another kind":
        return rng.choice(others)
    if way == "flipped bits":
        for _ in range(rng.choice([1, 10, 100])):
            b[rng.randrange(len(b))] ^= 1 << rng.randrange(8)
    elif way == "zeros":
        b[i:i + 64] = bytes(64)
    elif way == "noise":
        b[i:i + 64] = rng.randbytes(64)
    elif way == "absurd number":
        b[i:i + 8] = rng.choice([b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"99999999"])
    elif way == "repeated":
        b[i:i] = b[i // 2:i // 2 + 200]
    else:                                                         # digits of a text or a header
        digits = [k for k, byte in enumerate(b[:2000]) if chr(byte).isdecimal()]
        for k in rng.sample(digits, min(len(digits), 3)):
            b[k] = ord(str(rng.randrange(10)))
    return bytes(b)

# --------------------------------------------------------------------------------------------------
# valid files, all in one folder

FLAGS = ["--data", "clips", "--data_dir", ".", "--out", "run"]
STAGE1_FLAGS = [*FLAGS, *STAGE1, "--steps", 3]
STAGE2_FLAGS = [*FLAGS, *STAGE2, "--steps", 3]

def write_sets(folder):
    """clips/, six videos of four formats in two classes, and a UCF-101 of two videos"""
    videos, _ = data.toy_videos(6, 12, 16, seed=5)
    classes = folder / "clips" / "spin", folder / "clips" / "wave"
    for i, video in enumerate(videos[:4]):
        suffix = "gif" if i % 2 else "mp4"
        data.save_grid(classes[i % 2] / f"{i}.{suffix}", video[None], zoom=1)
    for i, video in enumerate(videos[4:]):
        frames = classes[i] / "frames"
        frames.mkdir()
        for t, frame in enumerate(video):
            iio.imwrite(frames / f"{t}.{('png', 'jpg')[i]}", frame)
    lists = folder / "ucfTrainTestlist"
    lists.mkdir()
    for label in ("Bend", "Jump"):
        path = folder / "UCF-101" / label / f"v_{label}_g01_c01.mp4"
        data.save_grid(path, videos[:1], zoom=1)
    (lists / "classInd.txt").write_text("1 Bend\n2 Jump\n")
    listed = "Bend/v_Bend_g01_c01.mp4 1\nJump/v_Jump_g01_c01.mp4 2\n"
    for split in ("train", "test"):
        (lists / f"{split}list01.txt").write_text(listed)

def write_files(folder):
    """One valid file of each kind below folder"""
    write_sets(folder)
    for module, flags in (vqgan3d, STAGE1_FLAGS), (diffusion, STAGE2_FLAGS):
        result = train(folder, module, flags)
        if not result.is_done():
            raise data.UserError(f"training fails without damage:\n{result.text}")
    samples, _ = data.toy_videos(6, 12, 16)
    np.save(folder / "samples.npy", samples)
    np.savez(folder / "samples.npz", samples)
    settings = dict(data="toy", size=16, frames=12, labels=[0] * len(samples))
    (folder / "samples.json").write_text(json.dumps(settings))
    weights = {"features.0.weight": np.zeros((64, 3, 3, 3), "f4"),
               "params|logits": np.zeros(5, "f4")}
    np.savez(folder / "weights.npz", **weights)                   # a few of all weights

# --------------------------------------------------------------------------------------------------
# the readers, which run in that folder

def open_clips():
    return data.Videos("clips", ".", "train", 16, 8)

def read_folder():
    videos = open_clips()
    assert len(videos) >= 4, f"only {len(videos)} of at least 4 good videos are used"
    videos.batch(4, np.random.default_rng(0))

def read_ucf101():
    data.Videos("ucf101", ".", "train", 16, 8).batch(4, np.random.default_rng(0))

def read_latents():
    """Latents that cannot be used are encoded anew."""
    model = diffusion.load_diffusion("run/diffusion.pt")
    z, _ = diffusion.encode_dataset(model, open_clips(), 32, Path("run"), contextlib.nullcontext)
    assert z.shape == (32, *model.shape)
    z[:].sum()

def read_samples(path):
    clips = evaluate.open_samples(path, 8, 16)
    evaluate.read_settings(Path(path))
    clips[:2].sum()

def read_npy():
    read_samples("samples.npy")

def read_npz():
    read_samples("samples.npz")

def read_i3d():
    evaluate.load_i3d("weights.npz")

def read_vgg():
    vqgan3d.load_vgg("weights.npz")

def read_vqgan():
    vqgan3d.load_vqgan("run/vqgan.pt")(torch.zeros(1, 3, 8, 16, 16))

def read_diffusion():
    model = diffusion.load_diffusion("run/diffusion.pt")
    model.decode(model.sample([0], torch.tensor([0]), steps=1))

def resume_stage1():
    """The run is at its last step: it is only read."""
    sys.argv = ["vqgan3d.py", *map(str, STAGE1_FLAGS)]
    vqgan3d.main()

def resume_stage2():
    sys.argv = ["diffusion.py", *map(str, STAGE2_FLAGS)]
    diffusion.main()

class Kind(NamedTuple):
    name: str
    path: str                # of the file to damage; * stands for a hash
    read: Callable
    is_valid: bool = True    # can it be read when it is not damaged?

KINDS = [
    Kind("mp4", "clips/spin/0.mp4", read_folder),
    Kind("gif", "clips/wave/1.gif", read_folder),
    Kind("png frame", "clips/spin/frames/3.png", read_folder),
    Kind("jpeg frame", "clips/wave/frames/3.jpg", read_folder),
    Kind("class list", "ucfTrainTestlist/classInd.txt", read_ucf101),
    Kind("split list", "ucfTrainTestlist/trainlist01.txt", read_ucf101),
    Kind("cached video", "cache/clips/2-16-*.npy", read_folder),
    Kind("latents", "run/latents-*.npy", read_latents),
    Kind("samples.npy", "samples.npy", read_npy),
    Kind("samples.npz", "samples.npz", read_npz),
    Kind("samples.json", "samples.json", read_npy),
    Kind("I3D weights", "weights.npz", read_i3d, is_valid=False),
    Kind("VGG weights", "weights.npz", read_vgg, is_valid=False),
    Kind("stage-1 checkpoint", "run/vqgan.pt", read_vqgan),
    Kind("stage-1 checkpoint, resumed", "run/vqgan.pt", resume_stage1),
    Kind("stage-1 log", "run/vqgan.jsonl", resume_stage1),
    Kind("stage-2 checkpoint", "run/diffusion.pt", read_diffusion),
    Kind("stage-2 checkpoint, resumed", "run/diffusion.pt", resume_stage2),
]

# --------------------------------------------------------------------------------------------------

def find_file(folder, kind):
    path, = folder.glob(kind.path)
    return path

def call_reader(read, may_refuse):
    """What is wrong with a reader: a sentence, or ""."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss   # KB
    try:
        read()
    except data.UserError as e:
        if "\n" in str(e):
            return f"an error of several lines: {e}"
        if not may_refuse:
            return f"refused: {e}"
    except BaseException as e:
        return f"{type(e).__name__}: {data.first_line(e)}"
    gigabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
    return f"{gigabytes:.1f} GB of memory" if gigabytes > GIGABYTES else ""

def attempt(folder, read, may_refuse=True):
    """call_reader() in a process of its own, which it may crash or keep busy."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os.chdir(folder)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        signal.alarm(SECONDS)
        wrong = call_reader(read, may_refuse)
        os.write(write_end, wrong.encode()[:4000])
        os._exit(0)
    os.close(write_end)
    with open(read_end, errors="replace") as pipe:
        wrong = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status and not wrong:
        return f"killed by signal {-os.waitstatus_to_exitcode(status)}"
    return wrong

def fuzz(home, count, rng):
    """Damage `count` files -> Counter of those of each kind, and of those survived"""
    # the cache depends on the absolute path of a folder, so each copy has the same
    original, copy = home / "original", home / "copy"
    copy.mkdir()
    write_files(copy)
    shutil.copytree(copy, original)
    contents = [find_file(original, kind).read_bytes() for kind in KINDS]
    for kind in KINDS:
        wrong = attempt(copy, kind.read, may_refuse=not kind.is_valid)
        if wrong:
            raise data.UserError(f"{kind.name}, not damaged: {wrong}")
    tried, survived = Counter(), Counter()
    for i in tqdm(range(count), desc="damaged files"):
        kind, content = KINDS[i % len(KINDS)], contents[i % len(KINDS)]
        way = rng.choice(WAYS)
        shutil.rmtree(copy)
        shutil.copytree(original, copy)
        find_file(copy, kind).write_bytes(damage(content, way, rng, contents))
        wrong = attempt(copy, kind.read)
        tried[kind.name] += 1
        survived[kind.name] += not wrong
        if wrong:
            print(f"{kind.name}, {way}, input {i}: {wrong}", file=sys.stderr)
    return tried, survived

def main():
    parser = data.FlagParser(description=__doc__,
                             formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=2000,
                        help="damaged files [%(default)s]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        tried, survived = fuzz(Path(home), args.count, random.Random(0))
    print(f"{'damaged file':<28}{'survived of tried':>20}")
    for kind in KINDS:
        print(f"{kind.name:<28}{survived[kind.name]:>12} of {tried[kind.name]}")
    print(f"{'together':<28}{survived.total():>12} of {tried.total()}")
    sys.exit(0 if survived == tried else 1)

if __name__ == "__main__":
    data.run_main(main)
