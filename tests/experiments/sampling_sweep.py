"""Which sampler, how many steps, how much guidance? FVD, KVD, class and time of a toy model.

    python -m tests.experiments.sampling_sweep --samplers dpm,ddim --steps 5,10,20,50,100
    python -m tests.experiments.sampling_sweep --samplers ddpm --steps 1000
    python -m tests.experiments.sampling_sweep --guidance 1,1.5,2,3,5
    python -m tests.experiments.sampling_sweep --long runs/long/samples.npy     # FVD of each window

All settings start from the same noise and are compared with the same real clips. Each row is added
to runs/sweep.json when it is ready; a row that is there already is not measured again. A row
belongs to the checkpoint file whose hash it holds.
"""
import argparse
import hashlib
import json
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

import evaluate
from data import (TOY_CLASSES, FlagParser, UserError, Videos, first_line, ints, pick_device,
                  replacing, run_main, to_uint8)
from diffusion import SAMPLERS, load_diffusion
from sample import prepare_model
from tests.experiments.sample_file import open_samples
from tests.experiments.toy_accuracy import accuracy

def names(text):
    """"dpm,ddim" -> ["dpm", "ddim"], names of samplers"""
    for name in text.split(","):
        if name not in SAMPLERS:
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(SAMPLERS)}")
    return text.split(",")

def numbers(text):
    """"1,1.5" -> [1.0, 1.5]"""
    return [float(number) for number in text.split(",")]

@torch.no_grad()
def generate(model, autocast, n, sampler, steps, guidance, batch_size=32):
    """n videos with label i % classes and seed i: uint8 (n, T, H, W, 3), labels (n,)"""
    labels = torch.arange(n) % len(model.classes)
    videos = []
    for i in range(0, n, batch_size):
        part = labels[i:i + batch_size].to(model.device)
        seeds = range(i, i + len(part))
        latents = model.sample(seeds, part, guidance, sampler, steps, autocast)
        with autocast():
            videos.append(to_uint8(model.decode(latents)))
    return np.concatenate(videos), labels.numpy()

def measure(model, autocast, i3d, real, n, sampler, steps, guidance, dtype):
    """One row of the table: FVD, KVD, fraction of right classes, seconds a video."""
    began = time.time()
    videos, labels = generate(model, autocast, n, sampler, steps, guidance)
    seconds = (time.time() - began) / n
    fake = evaluate.i3d_logits(i3d, videos, dtype=dtype)
    return dict(fvd=evaluate.frechet_distance(real, fake), kvd=evaluate.kernel_distance(real, fake),
                accuracy=float(accuracy(videos, labels).label), seconds=seconds)

def read_rows(path):
    """The rows of an earlier sweep"""
    if not path.exists():
        return []
    try:
        return [dict(row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is not a sweep ({first_line(e)}): give another --out")

def find_row(rows, settings):
    """The row that was measured with these settings, or None"""
    for row in rows:
        if settings.items() <= row.items():
            return row
    return None

def sweep(args, model, autocast, i3d, real):
    """Measure each combination of sampler, steps and guidance; print and keep the rows."""
    digest = hashlib.sha256(args.checkpoint.read_bytes()).hexdigest()[:16]
    rows = read_rows(args.out)
    print(f"{args.n} against {args.n} clips, I3D in {args.dtype}\n"
          f"{'sampler':<9}{'steps':>6}{'guidance':>10}{'FVD':>9}{'KVD':>8}{'class':>8}"
          f"{'s a video':>11}")
    for sampler, steps, guidance in product(args.samplers, args.steps, args.guidance):
        settings = dict(checkpoint=digest, n=args.n, dtype=args.dtype, sampler=sampler, steps=steps,
                        guidance=guidance)
        row = find_row(rows, settings)
        if row is None:
            row = settings | measure(model, autocast, i3d, real, args.n, sampler, steps, guidance,
                                     args.dtype)
            rows.append(row)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(args.out) as temporary:
                temporary.write_text(json.dumps(rows, indent=1))
        print(f"{sampler:<9}{steps:>6}{guidance:>10g}{row['fvd']:>9.1f}{row['kvd']:>8.2f}"
              f"{row['accuracy']:>8.1%}{row['seconds']:>11.3f}", flush=True)

def score_windows(videos, frames, i3d, real, dtype):
    """Print the FVD of each window of `frames` frames of long videos."""
    N, T = videos.shape[:2]
    for start in range(0, T - frames + 1, frames):
        fake = evaluate.i3d_logits(i3d, videos[:, start:start + frames], dtype=dtype)
        fvd = evaluate.frechet_distance(real, fake)
        print(f"frames {start:4} to {start + frames - 1:4} of {N} videos, against {len(real)} "
              f"clips: FVD {fvd:.1f}", flush=True)

def main():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/toy/diffusion.pt"),
                        help="a trained model [%(default)s]")
    parser.add_argument("--samplers", type=names, default=["dpm"], help="[dpm]")
    parser.add_argument("--steps", type=ints, default=(25,), help="network evaluations [25]")
    parser.add_argument("--guidance", type=numbers, default=[2.0], help="[2]")
    parser.add_argument("--n", type=int, default=512, help="videos of each setting [%(default)s]")
    parser.add_argument("--long", type=Path, metavar="SAMPLES",
                        help="instead, FVD of each window of these long videos")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32",
                        help="of I3D [%(default)s]")
    parser.add_argument("--i3d", help="I3D weights [downloaded once with pip]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep.json"), help="[%(default)s]")
    args = parser.parse_args()
    device, autocast = pick_device(args.device)
    model = load_diffusion(args.checkpoint, device)
    if model.classes != TOY_CLASSES and not args.long:
        raise UserError(f"{args.checkpoint} was not trained on the toy, and only the toy's classes "
                        "can be measured: use sample.py and evaluate.py")
    prepare_model(model, autocast, use_compile=False)
    i3d = evaluate.load_i3d(args.i3d).to(device)
    videos = open_samples(args.long) if args.long else None
    n = len(videos) if args.long else args.n

    c = model.config
    train = Videos(c.data, c.data_dir, "train", *model.clip_format)
    protocol = evaluate.Config(data_dir=c.data_dir, dtype=args.dtype)
    real = evaluate.real_logits(protocol, i3d, train, n, seed=0)
    if args.long:
        score_windows(videos, train.frames, i3d, real, args.dtype)
    else:
        sweep(args, model, autocast, i3d, real)

if __name__ == "__main__":
    run_main(main)
