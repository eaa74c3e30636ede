"""How videos develop from noise: a GIF with a row per sample and a column for each of eight steps.

    python -m tests.experiments.trajectory            # of the toy: runs/toy/trajectory.gif
    python -m tests.experiments.trajectory --classes column-up --sampler ddpm --steps 1000

Each column shows the network's estimate of the clean video, x_0, from the first step (left) to the
last (right).
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from data import FlagParser, pick_device, run_main, save_grid, to_uint8
from diffusion import SAMPLERS, load_diffusion
from sample import choose_labels, prepare_model

ROWS, COLUMNS = 4, 8

@torch.no_grad()
def main():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/toy/diffusion.pt"),
                        help="a trained model [%(default)s]")
    parser.add_argument("--classes", default="", help="names or numbers, separated by commas [all]")
    parser.add_argument("--guidance", type=float, help="[that of the run's previews]")
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpm", help="[%(default)s]")
    parser.add_argument("--steps", type=int, default=25, help="network evaluations [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [%(default)s]")
    parser.add_argument("--out", type=Path, help="the GIF [trajectory.gif beside the checkpoint]")
    args = parser.parse_args()
    device, autocast = pick_device(args.device)
    model = load_diffusion(args.checkpoint, device)
    prepare_model(model, autocast, use_compile=False)
    labels = choose_labels(args.classes, model.classes, ROWS)
    if labels is not None:
        labels = labels.to(device)
    guidance = model.config.guidance if args.guidance is None else args.guidance

    estimates = []                                               # x_0 after each step
    def keep(x, x0):
        estimates.append(x0)
    seeds = range(args.seed, args.seed + ROWS)
    model.sample(seeds, labels, guidance, args.sampler, args.steps, autocast, keep)
    shown = np.linspace(0, len(estimates) - 1, COLUMNS).round().astype(int)
    with autocast():
        columns = [to_uint8(model.decode(estimates[i])) for i in shown]
    videos = np.stack(columns, 1)                                # (ROWS, COLUMNS, T, H, W, 3)
    out = args.out or args.checkpoint.with_name("trajectory.gif")
    save_grid(out, videos.reshape(-1, *videos.shape[2:]), columns=COLUMNS)
    print(f"saved: {out}, from noise (left) to videos (right)")

if __name__ == "__main__":
    run_main(main)
