"""What the networks cost: three tables. Run it on a machine that does nothing else.

    python -m tests.experiments.benchmark                 # sampling, against diffusion on pixels
    python -m tests.experiments.benchmark --growth        # time against frames, size and batch
    python -m tests.experiments.benchmark --parts         # FLOP and time of each part of a step
    python -m tests.experiments.benchmark --parts --preset sky --batch 1

The networks are untrained, which costs the same. The first table is that of the paper: U-Net steps
and decoder for videos of 16 x 128 x 128, against the same U-Net on pixels of 16 x 64 x 64. On a CPU
two steps are timed, and the others are taken to last as long; on a GPU all of them. "Share": of the
FLOP/s that a large matrix product reaches on the same device, in the same type.
Writes runs/benchmark.json, runs/growth.json or runs/parts.json.
"""
import argparse
import json
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import diffusion
import vqgan3d
from data import (SETS, FlagParser, autocast_dtype, ints, peak_memory, pick_device, replacing,
                  run_main, set_up_compile)
from sample import prepare_model

# --------------------------------------------------------------------------------------------------
# timing

class Machine(NamedTuple):
    device: torch.device
    autocast: Callable       # opens the context of the type that is computed in
    use_compile: bool

def seconds(f, device, repeats=3):
    """The times that f() takes, after one call to warm up: (repeats,)"""
    times = []
    for _ in range(repeats + 1):
        began = synchronized_time(device)
        f()
        times.append(synchronized_time(device) - began)
    return np.array(times[1:])

def synchronized_time(device):
    """The time in seconds when the device has finished its work"""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()

def count_flops(f):
    """The floating-point operations of f(): matrix products and convolutions"""
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()

def matrix_product_rate(machine):
    """FLOP/s of a large matrix product: what can be reached in practice"""
    n = 8192 if machine.device.type == "cuda" else 2048
    dtype = autocast_dtype(machine.device, machine.autocast)
    m = torch.randn(n, n, device=machine.device, dtype=dtype)
    def products():
        for _ in range(8):
            m @ m
    return 8 * 2 * n ** 3 / seconds(products, machine.device).min()

def save(path, machine, rows, **more):
    """Write a table and what it was measured with as JSON."""
    content = dict(device=str(machine.device), compiled=machine.use_compile,
                   torch=torch.__version__, threads=torch.get_num_threads(), **more, rows=rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))
    print(f"saved: {path}")

# --------------------------------------------------------------------------------------------------
# the networks

def build_vqgan(preset, device, **changes):
    """Stage 1 of a preset with other frames, size or down; it quantises."""
    vqgan = vqgan3d.VQGAN(vqgan3d.Config(**{**vqgan3d.PRESETS[preset], **changes})).to(device)
    vqgan.quantizer.started = True
    return vqgan

def build_model(preset, vqgan, frames, size, device):
    """A LatentDiffusion of a preset; without a stage 1 on pixels"""
    config = diffusion.Config(**diffusion.PRESETS[preset])
    return diffusion.LatentDiffusion(config, vqgan, (size, frames, 1, 0), None, device)

# --------------------------------------------------------------------------------------------------
# table 1: sampling, latents against pixels

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

class Sampling(NamedTuple):
    """A row: seconds are means of three repeats; those of a video include the decoder."""
    kind: str
    batch: int
    gflop: float             # of a step, a video
    step: float              # seconds a step of the batch
    share: float             # of the rate of a large matrix product
    decode: float            # seconds of the decoder, for the batch
    peak_gb: float           # on a CPU: of the process so far, earlier rows included
    video_100: float         # seconds a video in 100 steps
    video_100_std: float     # standard deviation
    video_20: float          # in 20 steps

def time_sampling(machine, name, model, batch, gflop, peak):
    """One row of the table"""
    # on a CPU a step takes seconds, and all take equally long
    timed = 100 if machine.device.type == "cuda" else 2
    z = torch.randn(batch, *model.shape, device=machine.device)
    def steps():
        model.sample(range(batch), None, 1.0, "ddim", timed, machine.autocast)
    def decode():
        with machine.autocast():
            model.decode(z)
    with diffusion.reuse_biases(model.unet, model.shape[1]):     # a CUDA graph wants the same ones
        step = seconds(steps, machine.device) / timed                        # (3,)
    decoding = seconds(decode, machine.device)
    video_100, video_20 = ((n * step + decoding) / batch for n in (100, 20))
    share = gflop * 1e9 * batch / step.mean() / peak
    return Sampling(name, batch, gflop, step.mean(), share, decoding.mean(),
                    peak_memory(machine.device), video_100.mean(), video_100.std(),
                    video_20.mean())

def count_step(machine, model):
    """GFLOP of a step, a video"""
    x = torch.randn(1, *model.shape, device=machine.device)
    t = torch.zeros(1, dtype=torch.long, device=machine.device)
    def step():
        with machine.autocast():
            model.unet(x, t)
    return count_flops(step) / 1e9

def print_sampling(row, rows):
    """One line; ratios are to 100 steps on pixels with the same batch, the first row of it."""
    pixels = next(other.video_100 for other in rows if other.batch == row.batch)
    print(f"{row.kind:<36}{row.batch:>6}{row.gflop:>7.0f}{row.step:>9.4f}{row.share:>7.0%}"
          f"{row.decode:>9.4f}{row.peak_gb:>6.1f}"
          f"{row.video_100:>9.3f} ± {row.video_100_std:<5.3f}{pixels / row.video_100:>7.1f}"
          f"{row.video_20:>10.3f}{pixels / row.video_20:>7.1f}", flush=True)

@torch.no_grad()
def sampling_table(machine, preset, batches, out):
    peak = matrix_product_rate(machine)
    print(f"{preset} preset, {machine.device}, a large matrix product reaches {peak / 1e12:.2f} "
          f"TFLOP/s; seconds a step of the batch, and seconds a video with its decoding\n"
          f"{'':<36}{'batch':>6}{'GFLOP':>7}{'a step':>9}{'share':>7}{'decode':>9}{'GB':>6}"
          f"{'100 steps':>17}{'ratio':>7}{'20 steps':>10}{'ratio':>7}")
    rows = []
    for name, size, down in CONTENDERS:
        vqgan = None
        if down:
            vqgan = build_vqgan(preset, machine.device, size=size, down=down)
            vqgan.eval().requires_grad_(False)
        model = build_model(preset, vqgan, 16, size, machine.device)
        model.unet.eval().requires_grad_(False)
        gflop = count_step(machine, model)               # before compiling: nothing is counted then
        prepare_model(model, machine.autocast, machine.use_compile)
        for batch in batches:
            if machine.use_compile:
                torch.compiler.reset()                   # graphs of other batches need memory
            if machine.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                rows.append(time_sampling(machine, name, model, batch, gflop, peak))
            except torch.OutOfMemoryError:
                print(f"{name:<36}{batch:>6}  does not fit")
                break
            print_sampling(rows[-1], rows)
        del model, vqgan
    print(PUBLISHED)
    save(out, machine, [row._asdict() for row in rows], preset=preset, peak_tflops=peak / 1e12)

# --------------------------------------------------------------------------------------------------
# table 2: growth with frames, size and batch

class Case(NamedTuple):
    frames: int
    size: int
    batch: int

CASES = [Case(16, 64, 1), Case(32, 64, 1), Case(64, 64, 1), Case(128, 64, 1), Case(16, 128, 1),
         Case(16, 256, 1), Case(16, 64, 2), Case(16, 64, 4), Case(16, 64, 8), Case(16, 64, 16)]

def time_case(machine, preset, case):
    """Seconds of a training step of each stage, of a denoising step and of the decoder, for the
    batch. A training step is forward, backward and the optimisers."""
    frames, size, batch = case
    vqgan = build_vqgan(preset, machine.device, frames=frames, size=size)
    model = build_model(preset, vqgan, frames, size, machine.device)
    if machine.use_compile:
        vqgan.compile(dynamic=False)
        model.unet.compile(dynamic=False)
    x = torch.randn(batch, 3, frames, size, size, device=machine.device)
    z = torch.randn(batch, *model.shape, device=machine.device)
    t = torch.full((batch,), 500, device=machine.device)
    vqgan_opts = vqgan3d.make_optimizers(vqgan, 1e-3)
    unet_opts = vqgan3d.make_optimizers(model.unet, 1e-3)
    def update(loss, opts):
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad()
    def stage1():
        with machine.autocast():
            y, _, vq_losses = vqgan(x)
            loss = F.mse_loss(y, x) + sum(vq_losses.values())
        update(loss, vqgan_opts)
    def stage2():
        with machine.autocast():
            loss = model.unet(z, t).square().mean()
        update(loss, unet_opts)
    @torch.no_grad()
    def denoise():
        with machine.autocast():
            model.unet(z, t)
    @torch.no_grad()
    def decode():
        with machine.autocast():
            vqgan.decode(z)
    work = {"stage 1": stage1, "stage 2": stage2, "denoise": denoise, "decode": decode}
    return {name: seconds(f, machine.device).mean() for name, f in work.items()}

def growth_table(machine, preset, out):
    print(f"networks of the {preset} preset, {machine.device}; milliseconds a clip\n"
          f"{'frames':>7}{'size':>6}{'batch':>6}{'stage 1':>10}{'stage 2':>10}{'denoise':>10}"
          f"{'decode':>10}")
    rows = []
    for case in CASES:
        label = f"{case.frames:7}{case.size:6}{case.batch:6}"
        if machine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            times = time_case(machine, preset, case)
        except torch.OutOfMemoryError:
            print(f"{label}  does not fit")
            continue
        rows.append({**case._asdict(), **times, "memory_gb": peak_memory(machine.device)})
        columns = [f"{1e3 * t / case.batch:10.1f}" for t in times.values()]
        print(label + "".join(columns), flush=True)
    save(out, machine, rows, preset=preset)

# --------------------------------------------------------------------------------------------------
# table 3: the parts of a step

def make_parts(preset, batch, device):
    """{name: function} of each part of a step of a preset, at the size of its set"""
    size = SETS[preset]["size"]
    vqgan = build_vqgan(preset, device, size=size)
    c = vqgan.config
    disc = vqgan3d.Discriminator(c.frames, c.size, c.disc_width).to(device)
    vgg = vqgan3d.VGG16().to(device).requires_grad_(False)
    model = build_model(preset, vqgan, c.frames, c.size, device)
    x = torch.rand(batch, 3, c.frames, c.size, c.size, device=device) * 2 - 1
    y = x.clone().requires_grad_()
    z = torch.randn(batch, *model.shape, device=device)
    t = torch.full((batch,), 500, device=device)
    def autoencoder():
        y, _, vq_losses = vqgan(x)
        loss = F.mse_loss(y, x) + sum(vq_losses.values())
        loss.backward()
    def discriminator():
        real_logits, _ = disc(x)
        fake_logits, _ = disc(y)
        (real_logits + fake_logits).sum().backward()
    def perceptual():
        vgg(x[:, :, 0], y[:, :, 0]).backward()
    def train_unet():
        model.unet(z, t).square().mean().backward()
    @torch.no_grad()
    def denoise():
        model.unet(z, t)
    @torch.no_grad()
    def decode():
        vqgan.decode(z)
    return {"autoencoder, forward and backward": autoencoder,
            "discriminator on video and reconstruction": discriminator,
            "VGG16 on one frame of each": perceptual,
            "U-Net, forward and backward": train_unet,
            "U-Net, one denoising step": denoise,
            "decoder": decode}

def parts_table(machine, preset, batch, out):
    peak = matrix_product_rate(machine)
    print(f"{preset} preset, batches of {batch}, {machine.device}; a large matrix product reaches "
          f"{peak / 1e9:.0f} GFLOP/s\n"
          f"{'':<44}{'GFLOP a clip':>13}{'ms a clip':>11}{'GFLOP/s':>9}{'share':>7}")
    rows = []
    for name, part in make_parts(preset, batch, machine.device).items():
        def work():
            with machine.autocast():
                part()
        flop, took = count_flops(work), seconds(work, machine.device).mean()
        row = dict(part=name, gflop=flop / batch / 1e9, ms=1e3 * took / batch,
                   gflops=flop / took / 1e9, share=flop / took / peak)
        rows.append(row)
        print(f"{name:<44}{row['gflop']:13.1f}{row['ms']:11.1f}{row['gflops']:9.0f}"
              f"{row['share']:7.0%}", flush=True)
    save(out, machine, rows, preset=preset, batch=batch, peak_gflops=peak / 1e9)

def main():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true", help="the second table")
    parser.add_argument("--parts", action="store_true", help="the third table")
    parser.add_argument("--preset", choices=SETS, help="networks [sky; of the other tables toy]")
    parser.add_argument("--batch", type=ints,
                        help="clips at once [1,4, on a GPU 1,4,16,64; with --parts one number, 4]")
    parser.add_argument("--compile", default="auto", help="torch.compile: auto, on, off [auto]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps [auto]")
    parser.add_argument("--out", type=Path, help="the JSON [in runs/]")
    args = parser.parse_args()
    device, autocast = pick_device(args.device)
    machine = Machine(device, autocast, set_up_compile(args.compile, device))
    if args.growth:
        growth_table(machine, args.preset or "toy", args.out or Path("runs/growth.json"))
    elif args.parts:
        batch = args.batch[0] if args.batch else 4
        parts_table(machine, args.preset or "toy", batch, args.out or Path("runs/parts.json"))
    else:
        batches = args.batch or ((1, 4, 16, 64) if device.type == "cuda" else (1, 4))
        out = args.out or Path("runs/benchmark.json")
        sampling_table(machine, args.preset or "sky", batches, out)

if __name__ == "__main__":
    run_main(main)
