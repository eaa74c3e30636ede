"""Writes a small set of drifting clouds to train on: 284 clips of 16 x 64 x 64, as frame folders.

    python -m tests.experiments.clouds datasets/clouds
    python vqgan3d.py --data datasets/clouds --size 64 --crop 32 --width 32 --codes 2048 \\
        --perceptual 0 --gan 0 --feature 0 --batch_size 8 --steps 1800

Coloured noise whose spectrum falls with frequency, shifted a little in each frame while it changes.
About a tenth of the clips becomes the test split (data.hold_out). Also prints the PSNR of a
reconstruction without learning: averages of blocks of 4 x 4 x 4 pixels, interpolated.
"""
import argparse
import math
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch.nn.functional as F
from tqdm import tqdm

from data import run_main, to_float, to_uint8
from vqgan3d import psnr

def cloud_videos(n, frames=16, size=64, seed=0):
    """Yield n videos: uint8 (frames, size, size, 3) each, the same for the same seed."""
    rng = np.random.default_rng(seed)
    frequency = np.fft.fftfreq(size)
    fy, fx = np.meshgrid(frequency, frequency, indexing="ij")                # (size, size) each
    amplitude = (1 + np.hypot(fy, fx) * size) ** -1.82
    amplitude /= np.sqrt((amplitude ** 2).mean())                            # standard deviation 1
    for _ in range(n):
        drift = rng.uniform(-2, 2, 2)                                        # pixels a frame
        rate = rng.uniform(0.02, 0.08)                                       # change a frame
        real = rng.normal(size=(2, 3, size, size))
        noise = real + 1j * rng.normal(size=(2, 3, size, size))
        mix = rng.normal(size=(3, 3)) * 0.5 + 0.6                            # fields to colours
        base = rng.uniform(-0.5, 0.5, 3)
        video = []
        for t in range(frames):
            shift = np.exp(-2j * np.pi * (fy * drift[0] + fx * drift[1]) * t)
            spectrum = noise[0] * math.cos(rate * t) + noise[1] * math.sin(rate * t)
            field = np.fft.ifft2(spectrum * amplitude * shift).real * size   # (3, size, size)
            video.append(np.einsum("ij,jhw->hwi", mix, field) * 0.4 + base)
        yield np.rint((np.tanh(np.stack(video)) + 1) * 127.5).astype(np.uint8)

def block_average_psnr(video):
    """PSNR of a video averaged over blocks of 4 x 4 x 4 pixels and interpolated"""
    x = to_float(video[None])                                                # (1, 3, T, H, W)
    y = F.interpolate(F.avg_pool3d(x, 4), x.shape[2:], mode="trilinear")
    return psnr(video[None], to_uint8(y)).item()

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the clips")
    parser.add_argument("--n", type=int, default=284, help="clips [%(default)s]")
    args = parser.parse_args()
    decibels = []
    for i, video in enumerate(tqdm(cloud_videos(args.n), total=args.n, desc="clouds")):
        clip = args.folder / f"{i:04d}"
        clip.mkdir(parents=True, exist_ok=True)
        for t, frame in enumerate(video):
            iio.imwrite(clip / f"{t:02d}.png", frame)
        decibels.append(block_average_psnr(video))
    print(f"{args.folder}: averages of blocks of 4 x 4 x 4 pixels, interpolated, have a PSNR of "
          f"{np.mean(decibels):.2f} dB")

if __name__ == "__main__":
    run_main(main)
