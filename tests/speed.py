"""What a step costs, and how much is learnt in a minute. Measurements, not tests: run them on a machine that does nothing else.

    python tests/speed.py --growth                      # seconds a clip against frames, size and batch, of the toy's networks
    python tests/speed.py --growth --preset sky         # of the full ones, for a GPU
    python tests/speed.py --parts                       # FLOPs of each part of a step, and the share of the device's peak
    python tests/speed.py --clouds datasets/clouds      # 256 + 28 clips of drifting clouds, 16 x 64 x 64, to train on:
    python vqgan3d.py --data datasets/clouds --size 64 --width 32 --codes 2048 --perceptual 0 --gan 0 --feature 0 --crop 32 --batch_size 8 --steps 1800
"""
import argparse, json, math, sys, time
from pathlib import Path
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import diffusion, vqgan3d
from data import SETS, to_float
from vqgan3d import compiles, peak_memory, pick_device, psnr

def seconds(f, device, repeats=3):
    """Mean of `repeats` after one for warming up"""
    for i in range(repeats + 1):
        if i == 1:
            device.type == "cuda" and torch.cuda.synchronize()
            start = time.perf_counter()
        f()
    device.type == "cuda" and torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats

def growth(preset, compile, out):
    """One of frames, size and batch grows, the others stay. A step of training is forward, backward and the optimiser."""
    device, autocast = pick_device()
    compile = compiles(compile, device)
    base = (16, 64, 1)
    cases = [base, (32, 64, 1), (64, 64, 1), (128, 64, 1), (16, 128, 1), (16, 256, 1), (16, 64, 2), (16, 64, 4), (16, 64, 8), (16, 64, 16)]
    rows = []
    print(f"networks of the {preset} preset, latent 4 x 4 x 4 times smaller, {device}; milliseconds a clip\n{'frames':>7}{'size':>6}{'batch':>6}"
          f"{'stage 1':>10}{'stage 2':>10}{'denoise':>10}{'decode':>10}")
    for frames, size, batch in cases:
        vqgan = vqgan3d.VQGAN(vqgan3d.Config(**{**vqgan3d.PRESETS[preset], "frames": frames, "size": size})).to(device)
        system = diffusion.System(diffusion.Config(**diffusion.PRESETS[preset]), vqgan, (frames, size, 1), None, device)
        if compile:
            for module in (vqgan, system.unet):
                module.compile(dynamic=False)
        x, z = torch.randn(batch, 3, frames, size, size, device=device), torch.randn(batch, *system.shape, device=device)
        t = torch.full((batch,), 500, device=device)
        opts = {m: vqgan3d.optimisers(m, 1e-3) for m in (vqgan, system.unet)}
        vqgan.quantizer.started.fill_(True)
        def train(module, loss):
            with autocast():
                value = loss()
            value.backward()
            for opt in opts[module]:
                opt.step()
                opt.zero_grad()
        def stage1():
            y, _, losses = vqgan(x)
            return F.mse_loss(y, x) + sum(losses)
        row = dict(frames=frames, size=size, batch=batch)
        try:
            row["stage 1"] = seconds(lambda: train(vqgan, stage1), device)
            row["stage 2"] = seconds(lambda: train(system.unet, lambda: system.unet(z, t).square().mean()), device)
            with torch.no_grad(), autocast():
                row["denoise"], row["decode"] = seconds(lambda: system.unet(z, t), device), seconds(lambda: vqgan.decode(z), device)
        except torch.OutOfMemoryError:
            print(f"{frames:7}{size:6}{batch:6}  does not fit")
            continue
        rows.append(row | dict(memory_gb=peak_memory(device)))
        print(f"{frames:7}{size:6}{batch:6}" + "".join(f"{row[k] / batch * 1e3:10.1f}" for k in ("stage 1", "stage 2", "denoise", "decode")), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(device=str(device), torch=torch.__version__, threads=torch.get_num_threads(), preset=preset, compile=compile, rows=rows), indent=1))
    print(f"saved: {out}")

def parts(preset, batch, out):
    """What each network costs a clip: its FLOPs, its time, and what that is of the rate of a large matrix product (the peak in practice)."""
    device, autocast = pick_device()
    config = vqgan3d.Config(**{**vqgan3d.PRESETS[preset], "size": SETS[preset]["size"]})
    vqgan = vqgan3d.VQGAN(config).to(device)
    vqgan.quantizer.started.fill_(True)
    disc = vqgan3d.Discriminator(config.frames, config.size, config.disc_width).to(device)
    vgg = vqgan3d.VGG16().to(device).requires_grad_(False)                          # untrained weights cost the same
    system = diffusion.System(diffusion.Config(**diffusion.PRESETS[preset]), vqgan, (config.frames, config.size, 1), None, device)
    x, z = torch.rand(batch, 3, config.frames, config.size, config.size, device=device) * 2 - 1, torch.randn(batch, *system.shape, device=device)
    y, t = x.clone().requires_grad_(), torch.full((batch,), 500, device=device)
    def stage1():
        y, _, losses = vqgan(x)
        (F.mse_loss(y, x) + sum(losses)).backward()
    def no_grad(f):
        with torch.no_grad():
            f()
    work = {"autoencoder, forward and backward": stage1,
            "discriminator on video and reconstruction": lambda: (disc(x)[0] + disc(y)[0]).sum().backward(),
            "VGG16 on one frame of each": lambda: vgg(x[:, :, 0], y[:, :, 0]).backward(),
            "U-Net, forward and backward": lambda: system.unet(z, t).square().mean().backward(),
            "U-Net, one denoising step": lambda: no_grad(lambda: system.unet(z, t)),
            "decoder": lambda: no_grad(lambda: vqgan.decode(z))}
    n, rows = 2048 if device.type == "cpu" else 8192, []
    m = torch.randn(n, n, device=device)
    def run(f):
        with autocast():
            f()
    peak = 2 * n ** 3 / seconds(lambda: run(lambda: m @ m), device)
    print(f"{preset} preset, batches of {batch}, {device}; a large matrix product reaches {peak / 1e9:.0f} GFLOP/s\n{'':<44}{'GFLOP a clip':>13}{'ms a clip':>11}{'GFLOP/s':>9}{'share':>7}")
    for name, f in work.items():
        with FlopCounterMode(display=False) as counter:
            run(f)
        flop, time_taken = counter.get_total_flops(), seconds(lambda: run(f), device)
        rows.append(dict(part=name, gflop=flop / batch / 1e9, ms=time_taken / batch * 1e3, gflops=flop / time_taken / 1e9, share=flop / time_taken / peak))
        print(f"{name:<44}{rows[-1]['gflop']:13.1f}{rows[-1]['ms']:11.1f}{rows[-1]['gflops']:9.0f}{rows[-1]['share']:7.0%}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(dict(device=str(device), torch=torch.__version__, threads=torch.get_num_threads(), preset=preset, batch=batch, peak_gflops=peak / 1e9, rows=rows), indent=1))
    print(f"saved: {out}")

def clouds(n=284, frames=16, size=64, seed=0):
    """n clips of coloured clouds (noise of a falling spectrum) that drift and change: uint8 (n, frames, size, size, 3)"""
    rng = np.random.default_rng(seed)
    k = np.sqrt(sum(f ** 2 for f in np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij"))) * size
    amplitude = (1 + k) ** -1.82
    amplitude /= np.sqrt((amplitude ** 2).mean())                                  # fields of deviation 1
    for _ in range(n):
        drift, rate = rng.uniform(-2, 2, 2), rng.uniform(0.02, 0.08)               # pixels a frame, change a frame
        noise = rng.normal(size=(2, 3, size, size)) + 1j * rng.normal(size=(2, 3, size, size))
        fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
        mix, base = rng.normal(size=(3, 3)) * 0.5 + 0.6, rng.uniform(-0.5, 0.5, 3)
        video = []
        for t in range(frames):
            spectrum = (noise[0] * math.cos(rate * t) + noise[1] * math.sin(rate * t)) * amplitude * np.exp(-2j * np.pi * (fy * drift[0] + fx * drift[1]) * t)
            field = np.fft.ifft2(spectrum).real * size
            video.append(np.einsum("ij,jhw->hwi", mix, field) * 0.4 + base)
        video = np.stack(video)
        yield np.rint((np.tanh(video) + 1) * 127.5).astype(np.uint8)

def write_clouds(folder):
    """Every tenth clip in the order of names becomes the test split of a folder, as data.py has it."""
    averaged = []
    for i, video in enumerate(tqdm(clouds(), total=284, desc="clouds")):
        (folder / f"{i:04d}").mkdir(parents=True, exist_ok=True)
        for t, frame in enumerate(video):
            iio.imwrite(folder / f"{i:04d}" / f"{t:02d}.png", frame)
        x = to_float(torch.from_numpy(video)[None])
        averaged.append(psnr(F.interpolate(F.avg_pool3d(x, 4), x.shape[2:], mode="trilinear"), x))
    print(f"{folder}: averaging blocks of 4 x 4 x 4 and interpolating them gives {np.mean(averaged):.2f} dB")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--preset", default="toy")
    parser.add_argument("--batch", type=int, default=4, help="clips at once, of --parts")
    parser.add_argument("--compile", default="auto")
    parser.add_argument("--out", type=Path, help="the JSON; else runs/growth.json or runs/parts.json")
    parser.add_argument("--clouds", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.clouds:
        write_clouds(args.clouds)
    if args.growth:
        growth(args.preset, args.compile, args.out or Path("runs/growth.json"))
    if args.parts:
        parts(args.preset, args.batch, args.out or Path("runs/parts.json"))
