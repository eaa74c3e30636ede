"""From noise to videos: draws from a trained system and paints what it drew.

    python sample.py                                        # the toy: a grid of videos, one row per class
    python sample.py --data sky --n 16 --mp4                # 16 videos of the model in runs/sky
    python sample.py --data ucf101 --classes Bend,JumpingJack --guidance 3
    python sample.py --data sky --n 2048 --grid 0           # enough for python evaluate.py --data sky
    python sample.py --data sky --reconstruct               # held-out clips through stage 1, no diffusion

Writes runs/<data>/: samples.npy (uint8 N, T, H, W, 3), samples.json (how they were made, and the class asked for of each),
samples.gif (a grid of the first ones), and with --mp4 a file per video in samples/.
"""
import json, time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
from tqdm import tqdm
from data import UserError, Videos, parse, run, run_name, save_grid, to_float, to_uint8
from diffusion import SAMPLERS, load_diffusion
from vqgan3d import load_vqgan, peak_memory, pick_device, psnr, side_by_side

@dataclass
class Config:
    data: str = "toy"             # which run: runs/<data>
    checkpoint: str = ""          # another checkpoint than runs/<data>/diffusion.pt (with --reconstruct: vqgan.pt)
    out: str = ""                 # folder for the samples; empty: where the checkpoint lies
    n: int = 0                    # videos; 0: four of each class, or 16
    classes: str = ""             # names or numbers, separated by commas; empty: all of them in turn
    guidance: float = -1.0        # 1: the conditional model, 0: unconditional, more: clearer; -1: that of the run's previews
    sampler: str = "dpm"          # dpm (DPM-Solver++ 2M), ddim, or ddpm, which wants all the steps
    steps: int = 0                # network evaluations; 0: 25, or with ddpm all that the model was trained with
    seed: int = 0                 # sample i is drawn with seed + i, whatever the batch it is in
    batch_size: int = 16          # videos at once
    grid: int = 64                # videos in the GIF; 0: none
    mp4: bool = False             # one mp4 per video as well
    reconstruct: bool = False     # held-out clips over their reconstructions instead of samples
    data_dir: str = "datasets"    # where the held-out clips lie
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (bfloat16 where the hardware multiplies it), float32, bfloat16

def choose_classes(text, classes, n):
    """"Bend,3" -> the label of each of n samples, or None for a set without classes"""
    if not classes:
        if text:
            raise UserError("--classes: this model was trained without classes")
        return None
    names = text.split(",") if text else classes
    chosen = [int(c) if c.isdigit() and int(c) < len(classes) else classes.index(c) if c in classes else None for c in (c.strip() for c in names)]
    if None in chosen:
        raise UserError(f"--classes: there is no class {names[chosen.index(None)]}; there are {', '.join(f'{i} {c}' for i, c in enumerate(classes))}")
    return torch.tensor([chosen[i * len(chosen) // n] for i in range(n)])            # class by class: a row each in the grid

@torch.no_grad()
def reconstruct(cfg, path, out, device, autocast):
    vqgan = load_vqgan(path, device)
    out.mkdir(parents=True, exist_ok=True)
    c = vqgan.config
    clips = Videos(cfg.data, cfg.data_dir, "test", c.size, c.frames, c.stride).fixed(cfg.n or 16)[0]
    y = []
    for part in tqdm(clips.split(cfg.batch_size), desc="reconstructing"):
        with autocast():
            y.append(vqgan(to_float(part).to(device))[0].cpu())
    y = torch.cat(y)
    np.save(out / "reconstructions.npy", to_uint8(y))
    save_grid(out / "reconstructions.gif", side_by_side(clips, y), columns=min(8, len(y)))
    print(f"PSNR {psnr(to_float(clips), y):.2f} dB on {len(y)} held-out clips: {out}/reconstructions.gif, reconstructions.npy")

@torch.no_grad()
def main():
    cfg = parse(Config)
    path = Path(cfg.checkpoint or f"runs/{run_name(cfg.data)}/{'vqgan' if cfg.reconstruct else 'diffusion'}.pt")
    out = Path(cfg.out or path.parent)
    device, autocast = pick_device(cfg.device, cfg.dtype)
    if cfg.sampler not in SAMPLERS:
        raise UserError(f"--sampler {cfg.sampler}: one of {', '.join(SAMPLERS)} is wanted")
    if cfg.reconstruct:
        return reconstruct(cfg, path, out, device, autocast)

    system = load_diffusion(path, device)
    out.mkdir(parents=True, exist_ok=True)
    n = cfg.n or (4 * len(system.classes) if system.classes else 16)
    labels = choose_classes(cfg.classes, system.classes, n)
    guidance = system.config.guidance if cfg.guidance < 0 else cfg.guidance
    steps = cfg.steps or (system.diffusion.T if cfg.sampler == "ddpm" else 25)
    frames, size, _ = system.clip
    print(f"{n} videos of {frames} frames of {size} x {size} from {path}, trained for {system.step} steps; {cfg.sampler}, {steps} steps, guidance {guidance:g}, {device}")

    start = time.time()
    samples = np.lib.format.open_memmap(out / "samples.npy", "w+", np.uint8, (n, frames, size, size, 3))   # not held in memory
    evaluations = -(-n // cfg.batch_size) * steps
    with tqdm(total=evaluations, desc="sampling", unit=" steps") as bar:
        for i in range(0, n, cfg.batch_size):
            seeds = range(cfg.seed + i, cfg.seed + min(n, i + cfg.batch_size))
            y = labels[i:i + len(seeds)].to(device) if labels is not None else None
            z = system.sample(seeds, y, guidance, cfg.sampler, steps, autocast, bar.update)   # (B, C, T, h, w)
            with autocast():
                samples[i:i + len(seeds)] = to_uint8(system.decode(z))                        # (B, T, H, W, 3)
    samples.flush()
    protocol = dict(data=cfg.data, n=n, frames=frames, size=size, stride=system.clip[2], sampler=cfg.sampler, steps=steps, guidance=guidance, seed=cfg.seed,
                    checkpoint=str(path), checkpoint_step=system.step, classes=system.classes, labels=labels.tolist() if labels is not None else None)
    (out / "samples.json").write_text(json.dumps(protocol, indent=1))
    if cfg.grid:
        rows = len(labels.unique()) if labels is not None else 0                              # one row per class, while they fit
        save_grid(out / "samples.gif", samples[:cfg.grid], columns=n // rows if rows and n % rows == 0 and n <= cfg.grid else 0)
    if cfg.mp4:
        for i in tqdm(range(n), desc="mp4"):
            save_grid(out / "samples" / f"{i:04d}{'-' + system.classes[labels[i]] if labels is not None else ''}.mp4", samples[i:i + 1], columns=1)
    seconds = time.time() - start
    print(f"{seconds:.1f} s, {seconds / n:.2f} s a video, peak {peak_memory(device):.1f} GB: {out}/samples.npy, samples.json{', samples.gif' if cfg.grid else ''}{', samples/*.mp4' if cfg.mp4 else ''}")

if __name__ == "__main__":
    run(main)
