"""Are samples copies of training clips? Finds the nearest training window of each sample.

    python -m tests.experiments.nearest_neighbours runs/sky/samples.npy

Prints the PSNR of each sample to its nearest window of the training videos, at a quarter of the
resolution, and the same of held-out windows: a copy would be much nearer than a held-out window is.
Writes neighbours.gif beside the samples: some samples, over their nearest windows.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import Videos, run_main, save_grid, to_float

def shrink(clip):
    """uint8 (T, H, W, 3) -> float (D,): its pixels at a quarter of the resolution"""
    return F.avg_pool3d(to_float(np.array(clip[None])), (1, 4, 4)).flatten()

def all_windows(videos):
    """(video, start) of each window of a data.Videos"""
    windows = []
    for i in range(len(videos)):
        windows += [(i, start) for start in range(videos.num_windows(i))]
    return windows

def nearest(x, train):
    """The nearest row of train (M, D) to each of x (N, D): PSNR in dB (N,), index (N,)"""
    distance, index = torch.cdist(x, train).min(1)
    rms = distance / x.shape[1] ** 0.5
    return -20 * (rms / 2).log10(), index                                    # of a range of 2

def report(name, decibels, count):
    low, median, high = decibels.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    print(f"{name}: PSNR to the nearest of {count} training windows: median {median:.1f} dB, "
          f"10% {low:.1f} dB, 90% {high:.1f} dB")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="an .npy of sample.py, its .json beside it")
    parser.add_argument("--data_dir", default="datasets", help="[%(default)s]")
    parser.add_argument("--show", type=int, default=8, help="samples in the GIF [%(default)s]")
    args = parser.parse_args()
    samples = np.load(args.samples)
    made = json.loads(args.samples.with_suffix(".json").read_text())
    clip = made["size"], made["frames"], made["stride"]
    train = Videos(made["data"], args.data_dir, "train", *clip)
    test = Videos(made["data"], args.data_dir, "test", *clip)
    windows = all_windows(train)
    train_pixels = torch.stack([shrink(train.window(*window)) for window in windows])
    test_pixels = torch.stack([shrink(test.window(*window)) for window in all_windows(test)])
    sample_pixels = torch.stack([shrink(sample) for sample in samples])

    decibels, neighbours = nearest(sample_pixels, train_pixels)
    report(f"{len(samples)} samples", decibels, len(windows))
    held_out, _ = nearest(test_pixels, train_pixels)
    report(f"{len(test_pixels)} held-out windows", held_out, len(windows))
    print(f"the samples have {len(set(neighbours.tolist()))} different nearest windows")
    pairs = []
    for sample, i in zip(samples[:args.show], neighbours.tolist()):
        pairs.append(np.concatenate([sample, train.window(*windows[i])], axis=1))
    path = args.samples.with_name("neighbours.gif")
    save_grid(path, np.stack(pairs), columns=len(pairs))
    print(f"saved: {path}, samples over their nearest windows")

if __name__ == "__main__":
    run_main(main)
