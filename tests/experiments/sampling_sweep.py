"""Which sampler, how many steps, how much guidance? FVD, KVD, class and time of a toy model.

    python -m tests.experiments.sampling_sweep --steps 5,8,12,25
    python -m tests.experiments.sampling_sweep --samplers ddpm --steps 1000
    python -m tests.experiments.sampling_sweep --guidance 1,2,3

All settings start from the same noise and are compared with the same real clips. Each row is added
to runs/sweep.jsonl.
"""
import argparse
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

import evaluate
from data import Videos, ints, run_main, start, to_uint8
from diffusion import load_diffusion
from tests.experiments.toy_accuracy import accuracy

@torch.no_grad()
def generate(model, autocast, n, sampler, steps, guidance, batch_size=32):
    """n videos with label i % classes and seed (0, i): uint8 (n, T, H, W, 3), labels (n,)"""
    labels = torch.arange(n) % len(model.classes)
    videos = []
    for i in range(0, n, batch_size):
        part = labels[i:i + batch_size]
        seeds = [(0, i + k) for k in range(len(part))]
        latents = model.sample(seeds, part, guidance, sampler, steps, autocast)
        with autocast():
            videos.append(to_uint8(model.decode(latents)))
    return np.concatenate(videos), labels.numpy()

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/toy/diffusion.pt", help="[%(default)s]")
    parser.add_argument("--samplers", default="dpm", help="separated by commas [%(default)s]")
    parser.add_argument("--steps", type=ints, default=(12,), help="calls of the network [12]")
    parser.add_argument("--guidance", default="2", help="separated by commas [%(default)s]")
    parser.add_argument("--n", type=int, default=256, help="videos of each setting [%(default)s]")
    parser.add_argument("--i3d", default="", help="I3D weights [downloaded]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    args = parser.parse_args()
    device, autocast, _ = start(args)
    model = load_diffusion(args.checkpoint, device)
    i3d = evaluate.load_i3d(args.i3d).to(device)
    c = model.config
    train = Videos(c.data, c.data_dir, "train", *model.clip_format)
    windows = train.draw(args.n, np.random.default_rng(0))
    clips = np.stack([train.window(i, start) for i, start in windows])
    real = evaluate.i3d_logits(i3d, clips, "real clips")
    print(f"{'sampler':<9}{'steps':>6}{'guidance':>10}{'FVD':>9}{'KVD':>8}{'class':>8}{'s a video':>11}")
    settings = product(args.samplers.split(","), args.steps, map(float, args.guidance.split(",")))
    for sampler, steps, guidance in settings:
        began = time.time()
        videos, labels = generate(model, autocast, args.n, sampler, steps, guidance)
        row = dict(checkpoint=args.checkpoint, n=args.n, sampler=sampler, steps=steps,
                   guidance=guidance, seconds=(time.time() - began) / args.n)
        fake = evaluate.i3d_logits(i3d, videos, "samples")
        row["fvd"] = evaluate.frechet_distance(real, fake)
        row["kvd"] = evaluate.kernel_distance(real, fake)
        row["class"] = float(accuracy(videos, labels).label)
        print(f"{sampler:<9}{steps:>6}{guidance:>10g}{row['fvd']:>9.1f}{row['kvd']:>8.2f}"
              f"{row['class']:>8.1%}{row['seconds']:>11.3f}", flush=True)
        with open(Path("runs") / "sweep.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

if __name__ == "__main__":
    run_main(main)
