"""What sampling costs: latents against pixels. Run it on a machine that does nothing else.

    python -m tests.experiments.benchmark                            # networks of the sky preset
    python -m tests.experiments.benchmark --preset toy --batch 1     # smaller ones

The table is that of the paper: U-Net steps and decoder for videos of 16 x 128 x 128, against the
same U-Net on pixels of 16 x 64 x 64. The networks are untrained, which costs the same. On a CPU two
steps are timed, and the others are taken to last as long; on a GPU all of them.
Writes runs/benchmark.json.
"""
import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import diffusion
import vqgan3d
from data import ints, run_main, start

PUBLISHED = ("published, 100 steps: VDM 35.26 s at 16 x 64 x 64, VQ-VDM 3.95 s at 16 x 128 x 128: "
             "8.9 times faster")

class Contender(NamedTuple):
    name: str
    size: int                # pixels a side
    down: tuple              # of stage 1; (): diffusion on pixels

CONTENDERS = [
    Contender("pixels, 16 x 64 x 64", 64, ()),
    Contender("latent, 16 x 128 x 128, down 4,4,4", 128, (4, 4, 4)),
    Contender("latent, 16 x 128 x 128, down 4,8,8", 128, (4, 8, 8)),
]

def seconds(f, device, repeats=3):
    """The times that f() takes, after one call to warm up: (repeats,)"""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return np.array(times[1:])

def build_model(preset, contender, device):
    """An untrained LatentDiffusion of a preset"""
    vqgan = None
    if contender.down:
        changes = dict(size=contender.size, down=contender.down)
        config = vqgan3d.Config(**vqgan3d.PRESETS[preset] | changes)
        vqgan = vqgan3d.VQGAN(config).to(device).eval()
        vqgan.quantizer.started = True
    config = diffusion.Config(**diffusion.PRESETS.get(preset, {}))
    clip_format = contender.size, 16, 1
    model = diffusion.LatentDiffusion(config, vqgan, clip_format, [], device)
    model.unet.eval()
    return model

@torch.no_grad()
def measure(model, batch, autocast):
    """A row: seconds a step of the batch, of the decoder for the batch, and a video in 100 and 20
    steps"""
    device = model.device
    timed = 100 if device.type == "cuda" else 2
    z = torch.randn(batch, *model.shape, device=device)
    def steps():
        model.sample(range(batch), None, 1.0, "ddim", timed, autocast)
    def decode():
        with autocast():
            model.decode(z)
    step = seconds(steps, device) / timed                                    # (3,)
    decoding = seconds(decode, device)                                       # (3,)
    row = dict(batch=batch, step=step.mean(), decode=decoding.mean())
    for n in (100, 20):
        video = (n * step + decoding) / batch
        row |= {f"video_{n}": video.mean(), f"video_{n}_std": video.std(ddof=1)}
    return row

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="sky", help="networks of stage 1 and 2 [%(default)s]")
    parser.add_argument("--batch", type=ints, default=(1, 4), help="videos at once [1,4]")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 [auto]")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark.json"))
    args = parser.parse_args()
    device, autocast, _ = start(args)
    print(f"{'':<36}{'batch':>6}{'a step':>9}{'decode':>9}{'100 steps':>18}{'ratio':>7}"
          f"{'20 steps':>10}{'ratio':>7}")
    rows = []
    pixels = {}                                          # seconds a video on pixels, by batch
    for contender in CONTENDERS:
        model = build_model(args.preset, contender, device)
        if args.compile:
            model.unet.compile(dynamic=False)
        for batch in args.batch:
            row = measure(model, batch, autocast)
            pixels.setdefault(batch, row["video_100"])
            rows.append(dict(name=contender.name, **row))
            print(f"{contender.name:<36}{batch:>6}{row['step']:>9.4f}{row['decode']:>9.4f}"
                  f"{row['video_100']:>10.3f} ± {row['video_100_std']:<5.3f}"
                  f"{pixels[batch] / row['video_100']:>7.1f}{row['video_20']:>10.3f}"
                  f"{pixels[batch] / row['video_20']:>7.1f}", flush=True)
    print(PUBLISHED)
    content = dict(device=str(device), torch=torch.__version__, threads=torch.get_num_threads(),
                   preset=args.preset, compiled=args.compile, rows=rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1))
    print(f"saved: {args.out}")

if __name__ == "__main__":
    run_main(main)
