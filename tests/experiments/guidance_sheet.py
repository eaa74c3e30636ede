"""What guidance does to each class: a GIF with a row per class and a column per guidance scale.

    python -m tests.experiments.guidance_sheet --scales 0,1,2,3,5 --seed 7    # runs/toy/sheet.gif
    python -m tests.experiments.guidance_sheet --checkpoint runs/ucf101/diffusion.pt

All samples start from the same noise.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import UserError, run_main, save_grid, start, to_uint8
from diffusion import DEFAULT_STEPS, load_diffusion

def scales(text):
    """"1,2,4" -> [1.0, 2.0, 4.0]"""
    return [float(scale) for scale in text.split(",")]

def sample_classes(model, scale, seed, steps, autocast, batch_size=16):
    """A video of each class, from the same noise: uint8 (classes, T, H, W, 3)"""
    labels = torch.arange(len(model.classes), device=model.device)
    videos = []
    for part in labels.split(batch_size):
        latents = model.sample([seed] * len(part), part, scale, "dpm", steps, autocast)
        with autocast():
            videos.append(to_uint8(model.decode(latents)))
    return np.concatenate(videos)

@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/toy/diffusion.pt"),
                        help="a trained model with classes [%(default)s]")
    parser.add_argument("--scales", type=scales, default=[0.0, 1.0, 2.0, 3.0, 5.0],
                        help="guidance of each column, from left to right [0,1,2,3,5]")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="network evaluations [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the noise [%(default)s]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [%(default)s]")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    parser.add_argument("--out", type=Path, help="the GIF [sheet.gif beside the checkpoint]")
    args = parser.parse_args()
    device, autocast, _ = start(args)
    model = load_diffusion(args.checkpoint, device)
    if not model.classes:
        raise UserError(f"{args.checkpoint} was trained without classes, so guidance changes "
                        "nothing: give the checkpoint of a set with classes")
    columns = []
    for scale in tqdm(args.scales, desc="guidance"):
        columns.append(sample_classes(model, scale, args.seed, args.steps, autocast))
    videos = np.stack(columns, 1)                                # (classes, scales, T, H, W, 3)
    out = args.out or args.checkpoint.with_name("sheet.gif")
    save_grid(out, videos.reshape(-1, *videos.shape[2:]), columns=len(args.scales))
    print(f"saved: {out}, a row per class, guidance {args.scales} from left to right")

if __name__ == "__main__":
    run_main(main)
