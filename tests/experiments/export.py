"""Write a trained model to another file without what only training needs, in float16: a fifth as
large. sample.py takes it, and so does load_diffusion(); assets/toy.pt was made so.

    python -m tests.experiments.export runs/toy/diffusion.pt toy.pt
"""
import argparse
from pathlib import Path

import torch

from data import UserError, load_checkpoint, replacing, run_main
from diffusion import load_diffusion

def to_half(state):
    return {name: v.half() if v.is_floating_point() else v for name, v in state.items()}

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a diffusion.pt")
    parser.add_argument("out", type=Path, help="the file to write")
    args = parser.parse_args()
    if args.out.suffix != ".pt" or args.out.is_dir():
        raise UserError(f"{args.out}: must be a file that ends in .pt")
    if args.out.exists() and "muon" in load_checkpoint(args.out):
        raise UserError(f"{args.out} would lose what training needs: give another name")
    load_diffusion(args.checkpoint)                              # says what is wrong with it
    checkpoint = load_checkpoint(args.checkpoint)
    small = {key: checkpoint[key] for key in ("config", "step", "statistics", "classes", "clip")}
    small["ema"] = to_half(checkpoint["ema"])
    small["vqgan"] = stage1 = checkpoint["vqgan"]
    if stage1:
        stage1["model"] = to_half(stage1["model"])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(args.out) as file:
        torch.save(small, file)
    print(f"wrote {args.out}: python sample.py --checkpoint {args.out}")

if __name__ == "__main__":
    run_main(main)
