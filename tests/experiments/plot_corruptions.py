"""Do FVD and KVD notice damage? Real clips are corrupted more and more, and each set is scored.

    python -m tests.experiments.plot_corruptions --data sky --dtype bfloat16
    python -m tests.experiments.plot_corruptions --data sky --out assets/corruptions.svg

Noise, blur and frozen frames, in four strengths each. Windows that begin at odd frames are
corrupted and compared with windows of the same videos that begin at even frames. (Compared with the
very same windows, KVD would be below zero: it leaves out the pairs i = j within each set, but not
between the sets.) I3D sees 14 sets of 128 clips. Writes runs/corruptions.svg.
"""
import argparse
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
from data import FlagParser, UserError, Videos, run_main, to_float, to_uint8
from tests.experiments.svg_plot import panel, write

# --------------------------------------------------------------------------------------------------
# the corruptions of videos (B, 3, T, H, W) in [-1, 1]

def add_noise(x, std):
    """Normal noise with a standard deviation in grey levels, the same for all batches"""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return x + std / 127.5 * noise

def blur(x, std):
    """Gaussian blur of every frame, with a standard deviation in pixels; edges are repeated"""
    B, C, T, H, W = x.shape
    k = int(3 * std + 1)
    g = torch.exp(-torch.arange(-k, k + 1).float() ** 2 / (2 * std ** 2))
    g = g / g.sum()
    x = F.pad(x.reshape(-1, 1, H, W), (k, k, k, k), mode="replicate")
    x = F.conv2d(F.conv2d(x, g.view(1, 1, -1, 1)), g.view(1, 1, 1, -1))
    return x.view(B, C, T, H, W)

def freeze(x, fraction):
    """The last frames replaced by the one before them"""
    T = x.shape[2]
    keep = T - round(fraction * T)
    frozen = x[:, :, keep - 1:keep].expand(-1, -1, T - keep, -1, -1)
    return torch.cat([x[:, :, :keep], frozen], 2)

class Corruption(NamedTuple):
    name: str
    unit: str              # of the strength
    strengths: tuple
    corrupt: Callable      # (videos, strength) -> videos

CORRUPTIONS = [
    Corruption("noise", "standard deviation in grey levels", (5, 10, 20, 40), add_noise),
    Corruption("blur", "standard deviation in pixels", (0.5, 1, 2, 4), blur),
    Corruption("frozen", "fraction of the frames", (0.25, 0.5, 0.75, 0.9375), freeze),
]

# --------------------------------------------------------------------------------------------------

class Score(NamedTuple):
    strength: float
    fvd: float
    kvd: float

def spread_windows(videos, n, first):
    """n of the windows that begin at frames first, first + 2, ..., spread evenly over the videos:
    uint8 (n, T, H, W, 3)"""
    windows = []
    for i in range(len(videos)):
        windows += [(i, start) for start in range(first, videos.num_windows(i), 2)]
    if not windows:
        raise UserError(f"--data {videos.data} has videos of a single window: lower --frames")
    return np.stack([videos.window(*windows[k * len(windows) // n]) for k in range(n)])

def corrupt_clips(clips, corruption, strength):
    """uint8 clips, corrupted, a few at a time"""
    parts = []
    for i in range(0, len(clips), 8):
        x = corruption.corrupt(to_float(clips[i:i + 8]), strength)
        parts.append(to_uint8(x))
    return np.concatenate(parts)

def plot(corruption, scores, metric):
    """One panel: FVD or KVD against the strength of a corruption"""
    strengths = [score.strength for score in scores]
    values = [getattr(score, metric.lower()) for score in scores]
    return panel(f"{metric}: {corruption.name}", corruption.unit, {metric: (strengths, values)})

def main():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sky", help="a set of videos [%(default)s]")
    parser.add_argument("--data_dir", default="datasets", help="[%(default)s]")
    parser.add_argument("--size", type=int, default=128, help="pixels a side [%(default)s]")
    parser.add_argument("--frames", type=int, default=16, help="of a clip [%(default)s]")
    parser.add_argument("--n", type=int, default=128, help="clips of each set [%(default)s]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of I3D [%(default)s]")
    parser.add_argument("--i3d", help="I3D weights [downloaded once with pip]")
    parser.add_argument("--out", type=Path, default=Path("runs/corruptions.svg"),
                        help="the SVG file [%(default)s]")
    args = parser.parse_args()
    i3d = evaluate.load_i3d(args.i3d)
    videos = Videos(args.data, args.data_dir, "train", args.size, args.frames)
    clips = spread_windows(videos, args.n, first=1)
    def logits(clips, desc):
        return evaluate.i3d_logits(i3d, clips, desc=desc, dtype=args.dtype)
    real = logits(spread_windows(videos, args.n, first=0), "real clips")
    def score(strength, fake):
        fvd, kvd = evaluate.frechet_distance(real, fake), evaluate.kernel_distance(real, fake)
        return Score(strength, fvd, kvd)
    undamaged = score(0, logits(clips, "other real clips"))
    print(f"without damage: FVD {undamaged.fvd:.1f}, KVD {undamaged.kvd:.2f}")
    fvd_plots, kvd_plots = [], []
    for corruption in CORRUPTIONS:
        scores = [undamaged]
        for strength in corruption.strengths:
            name = f"{corruption.name}, {corruption.unit} {strength}"
            damaged = corrupt_clips(clips, corruption, strength)
            scores.append(score(strength, logits(damaged, name)))
            print(f"{name}: FVD {scores[-1].fvd:.1f}, KVD {scores[-1].kvd:.2f}", flush=True)
        fvd_plots.append(plot(corruption, scores, "FVD"))
        kvd_plots.append(plot(corruption, scores, "KVD"))
    write(args.out, fvd_plots + kvd_plots)

if __name__ == "__main__":
    run_main(main)
