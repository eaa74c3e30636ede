"""Makes videos with a trained model: noise -> latents (stage 2) -> videos (decoder of stage 1).

    python sample.py                                        # the toy: a grid, one row per class
    python sample.py --data sky --n 16 --mp4                # 16 videos of the model in runs/sky
    python sample.py --data ucf101 --classes Biking,JumpingJack --guidance 3
    python sample.py --checkpoint assets/toy.pt             # a trained toy model
    python sample.py --data sky --n 2048 --grid 0           # enough for evaluate.py --data sky
    python sample.py --frames 128                           # longer than the clips of training
    python sample.py --data sky --start clip.mp4 --n 4      # four ways to continue a video
    python sample.py --start photo.jpg --classes bar-up     # ... or to set a picture in motion
    torchrun --nproc_per_node 4 -- sample.py --n 2048       # a share of the same videos on each GPU

Writes runs/<data>/: samples.npy (uint8 N, T, H, W, 3), samples.json (how they were made, and the
class of each), samples.gif (a grid of some), and with --mp4 a file per video in samples/.
"""
import json
import math
import os
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import (IMAGE_SUFFIXES, OUTPUT_MARK, RANK, WORLD, UserError, cast_weights, lock_output,
                  new_array, output_folder, parse_flags, peak_memory, pick_device, read_frames,
                  read_video, run_main, run_name, save_grid, set_up_compile, start_processes,
                  to_float, to_uint8, wait_for_all)
from diffusion import DEFAULT_SAMPLER, SAMPLERS, load_diffusion, noise_stream, reuse_biases
from vqgan3d import PatchUp, TimeUp

@dataclass
class Config:
    data: str = "toy"             # which run: runs/<data>
    checkpoint: str = ""          # another checkpoint than runs/<data>/diffusion.pt
    out: str = ""                 # folder; empty: that of the diffusion.pt, or runs/x for an x.pt
    n: int = 0                    # videos; 0: four of each class, or 16
    classes: str = ""             # names or numbers, separated by commas; empty: all
    guidance: float = -1.0        # 1: conditional, 0: unconditional; default: as in the previews
    sampler: str = ""             # dpm (DPM-Solver++ 2M, the default), ddim, or ddpm
    steps: int = 0                # steps of denoising a window; 0: 25, with ddpm those of training
    frames: int = 0               # length; 0: that of the training clips, with --start twice that
    start: str = ""               # a video to continue from its last frames, or a picture
    seed: int = 0                 # sample i is drawn with seed + i, in whatever batch it is
    batch_size: int = 16          # videos at once
    grid: int = 64                # videos in the GIF, spread evenly over all; 0: none
    mp4: bool = False             # one mp4 per video as well
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (the fastest here), float32, bfloat16, float16
    compile: str = "auto"         # torch.compile, takes a minute: on, off, auto (GPU, n >= 256)

# --------------------------------------------------------------------------------------------------
# videos longer than the clips of training, window by window

def encode_cond_frames(model, frames):
    """Videos (N, 3, t, H, W) in [-1, 1] to be continued -> latents (N, C, t / down, h, w)

    In training the encoder saw the frames after the given ones. Here there are none yet, and
    without any the last latent would be biased, and the colours of a long video would drift. So
    the given frames follow once more, backwards.
    """
    K = frames.shape[2] // model.frames_per_latent
    mirrored = torch.cat([frames, frames.flip(2)], 2)
    return model.encode(mirrored)[:, :, :K]

def encode_start(model, path, autocast):
    """The last frames of a video file, or a picture as if it stood still for one latent frame
    -> latents (1, C, K, h, w), K at most T"""
    size, frames, stride, fps = model.clip_format
    frames_per_latent = frames // model.shape[1]
    if Path(path).suffix.lower() in IMAGE_SUFFIXES:
        clip = read_video(path, size).repeat(frames_per_latent, 0)
    else:
        if Path(path).is_dir():                                  # frames have no times
            fps = 0
        span = (frames - 1) * stride + 1                         # of one clip
        last = deque(read_frames(path, size, fps), maxlen=span)
        clip = np.stack(last)[::-stride][::-1]                   # the last frame stays
    n = min(frames, len(clip)) // frames_per_latent * frames_per_latent
    if not n:
        raise UserError(f"--start {path} has {len(clip)} frames, and at least {frames_per_latent} "
                        "are needed")
    x = to_float(clip[None, -n:]).to(model.device)
    with autocast():
        return encode_cond_frames(model, x)

def reencode(model, latents, K):
    """The last K latent frames, decoded and encoded again.

    The U-Net was trained to continue what the encoder makes of videos. Generated latents differ
    from that a little, and the difference would grow with every window.
    """
    last_window = latents[:, :, -model.shape[1]:]
    video = model.decode(last_window).clamp(-1, 1)
    frames = K * model.frames_per_latent
    return encode_cond_frames(model, video[:, :, -frames:])

def sample_long(model, seeds, labels, guidance, sampler, steps, autocast, length, start=None,
                progress=None):
    """LatentDiffusion.sample of any length: (N, C, length, h, w)

    start (N, C, K, h, w): latents that the video begins with; they are part of the length. Each
    further window is given the last latent frames so far, at most T // 2: those of start as they
    are, generated ones decoded and encoded again. Its guidance is at most 1: the given frames show
    the class, and more guidance would shift the colours of the video a little in every window.
    """
    T = model.shape[1]
    if T == 1 and length > 1:
        raise UserError("--frames: clips of a single latent frame leave no room to continue one; "
                        "train with more --frames, or a smaller --down in time")
    streams = [noise_stream(seed) for seed in seeds]
    latents = start
    if start is None:
        latents = model.sample(streams, labels, guidance, sampler, steps, autocast, progress)
    while latents.shape[2] < length:
        K = min(T // 2, latents.shape[2])
        with autocast():
            if latents is start:
                cond_frames = latents[:, :, -K:]
            else:
                cond_frames = reencode(model, latents, K)
        window = model.sample(streams, labels, min(guidance, 1.0), sampler, steps, autocast,
                              progress, cond_frames)
        latents = torch.cat([latents, window[:, :, K:]], 2)
    return latents[:, :, :length]

def count_sampler_calls(T, length, num_cond):
    """How often sample_long() calls the sampler; num_cond: latent frames to begin with, or 0"""
    calls = 0
    frames = num_cond
    while frames < length:
        frames += T - min(T // 2, frames)
        calls += 1
    return calls

def receptive_field(decoder):
    """How many latent frames the decoder sees to each side of one"""
    side = 0
    for layer in reversed(decoder):                              # from fine to coarse
        if isinstance(layer, TimeUp):
            side = side // 2 + 1                                 # frames before the interpolation
        elif not isinstance(layer, PatchUp):
            side += 1                                            # one convolution of 3 in time
    return side

def decode_long(model, latents, part):
    """LatentDiffusion.decode of any length, `part` latent frames at a time, so that memory does not
    grow with it. Each part is decoded with all that the decoder sees to its sides: no seams."""
    side, rate = 0, model.frames_per_latent
    if model.vqgan:
        side = receptive_field(model.vqgan.decoder)
    videos = []
    for i in range(0, latents.shape[2], part):
        first = max(0, i - side)
        video = model.decode(latents[:, :, first:i + part + side])
        skip = (i - first) * rate
        videos.append(video[:, :, skip:skip + part * rate])
    return torch.cat(videos, 2)

# --------------------------------------------------------------------------------------------------
# from flags to files

def choose_labels(text, classes, n):
    """"Biking,3" -> the label of each of n samples, class by class; None for a set without classes.
    n = 0: four of each class."""
    if not classes:
        if text:
            raise UserError("--classes: this model was trained without classes")
        return None
    chosen = []
    names = text.split(",") if text else classes
    n = n or 4 * len(names)
    for name in names:
        name = name.strip()
        if name in classes:
            chosen.append(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            chosen.append(int(name))
        else:
            known = ", ".join(f"{i} {c}" for i, c in enumerate(classes))
            raise UserError(f"--classes: there is no class {name}; there are {known}")
    order = torch.arange(n) * len(chosen) // n                   # class by class
    return torch.tensor(chosen)[order]

def prepare_model(model, autocast, use_compile):
    """Make a loaded model as fast as possible, for sampling only."""
    cast_weights(model.unet, autocast)
    if model.vqgan:
        cast_weights(model.vqgan.decoder, autocast)
    if use_compile:                                  # on a GPU the U-Net becomes a CUDA graph
        model.unet.compile(dynamic=False, mode="reduce-overhead")
        if model.vqgan:
            model.vqgan.compile(dynamic=False)

def write_videos(out, samples, labels, classes, cfg):
    """samples.gif, and with --mp4 a file per video"""
    n = len(samples)
    if cfg.grid:
        num_shown = min(n, cfg.grid)
        shown = np.arange(num_shown) * n // num_shown
        columns = 0                                              # chosen by save_grid()
        if labels:
            rows = len({labels[i] for i in shown})               # one row per class, if they fit
            if rows < num_shown and num_shown % rows == 0:
                columns = num_shown // rows
        save_grid(out / "samples.gif", samples[shown], columns)
    if cfg.mp4:
        folder = output_folder(out / "samples")
        suffixes = {"", *(f"-{name}" for name in classes or [])}
        for old in folder.glob("[0-9]*.mp4"):                    # of an earlier call
            if old.stem.lstrip("0123456789") in suffixes:
                old.unlink()
        for i in tqdm(range(n), desc="mp4"):
            name = f"{i:04d}-{classes[labels[i]]}" if labels else f"{i:04d}"
            save_grid(folder / f"{name}.mp4", samples[i:i + 1], columns=1)

class Plan(NamedTuple):
    """What is asked for, after the defaults have been filled in."""
    n: int                   # videos
    frames: int              # of each
    labels: torch.Tensor     # (n,), or None
    guidance: float
    sampler: str
    steps: int
    start: torch.Tensor      # latents (1, C, K, h, w) to begin with, or None

def make_plan(cfg, model, autocast):
    labels = choose_labels(cfg.classes, model.classes, cfg.n)
    clip_frames = model.clip_format.frames
    frames = cfg.frames or clip_frames
    guidance = model.config.guidance if cfg.guidance < 0 else cfg.guidance
    start = None
    if cfg.start:
        start = encode_start(model, cfg.start, autocast)
        given = start.shape[2] * model.frames_per_latent
        if cfg.frames and cfg.frames <= given:
            raise UserError(f"--frames {cfg.frames}: the {given} frames from --start count too; "
                            "give more")
        frames = cfg.frames or 2 * clip_frames
        guidance = min(guidance, 1.0)                            # as sample_long() does
        if labels is not None and not cfg.classes:
            labels = None
            print("note: without --classes the model continues the video without knowing its class")
    if labels is None:                                           # nothing to guide towards
        n = cfg.n or 16
        guidance = 0.0
    else:
        n = len(labels)
    sampler = cfg.sampler or DEFAULT_SAMPLER
    if sampler not in SAMPLERS:
        raise UserError(f"--sampler {sampler}: must be one of {', '.join(SAMPLERS)}")
    timesteps = model.diffusion.timesteps
    steps = cfg.steps or (timesteps if sampler == "ddpm" else min(25, timesteps))
    return Plan(n, frames, labels, guidance, sampler, steps, start)

def sample_share(plan, cfg, model, autocast, samples):
    """Fill this process's batches of samples, a memory map: uint8 (n, T, H, W, 3)."""
    T = model.shape[1]
    length = math.ceil(plan.frames / model.frames_per_latent)    # in latent frames
    num_cond = 0 if plan.start is None else plan.start.shape[2]
    num_calls = count_sampler_calls(T, length, num_cond)
    batch_starts = range(RANK * cfg.batch_size, plan.n, WORLD * cfg.batch_size)
    steps = len(model.diffusion.sampling_times(plan.steps))      # eps takes fewer than asked for
    total = len(batch_starts) * steps * num_calls
    bar = tqdm(total=total, desc="sampling", disable=RANK > 0)
    for i in batch_starts:
        batch = range(i, min(plan.n, i + cfg.batch_size))
        seeds = [cfg.seed + k for k in batch]
        labels = start = None
        if plan.labels is not None:
            labels = plan.labels[batch]
        if plan.start is not None:
            start = plan.start.expand(len(batch), -1, -1, -1, -1)
        latents = sample_long(model, seeds, labels, plan.guidance, plan.sampler, plan.steps,
                              autocast, length, start, lambda x, x0: bar.update())
        with autocast():                                         # latents (B, C, length, h, w)
            videos = decode_long(model, latents, 2 * T)[:, :, :plan.frames]
        samples[i:batch.stop] = to_uint8(videos)
    bar.close()
    samples.flush()

@torch.no_grad()
def main():
    cfg = parse_flags(Config)
    path = Path(cfg.checkpoint or f"runs/{run_name(cfg.data)}/diffusion.pt")
    default = path.parent if path.name == "diffusion.pt" else Path("runs", path.stem)
    out = Path(cfg.out or default)
    device, autocast = pick_device(cfg.device, cfg.dtype)
    start_processes(device)
    model = load_diffusion(path, device)
    plan = make_plan(cfg, model, autocast)
    size = model.clip_format.size
    steps = len(model.diffusion.sampling_times(plan.steps))      # eps takes fewer than asked for
    print(f"{plan.n} videos of {plan.frames} frames of {size} x {size} from {path}, trained for "
          f"{model.step} steps; {plan.sampler}, {steps} steps, guidance {plan.guidance:g}")
    few = plan.n < 256                                           # compiling takes longer
    flag = "off" if few and cfg.compile == "auto" else cfg.compile
    prepare_model(model, autocast, set_up_compile(flag, device))

    began = time.time()
    output_folder(out)
    folder = out / "samples"
    is_ours = (folder / OUTPUT_MARK).exists()
    if cfg.mp4 and not is_ours and any(folder.glob("*.mp4")):
        raise UserError(f"{folder} holds videos that sample.py did not make, or an older one did: "
                        "move them away, or give another --out")
    lock = lock_output(out / "samples.npy")                       # kept until main() ends
    temporary = out / "samples.npy.tmp"
    try:
        if not RANK:
            shape = plan.n, plan.frames, size, size, 3
            new_array(temporary, np.uint8, shape)
        wait_for_all()
        samples = np.load(temporary, mmap_mode="r+")             # not held in memory
        with reuse_biases(model.unet, model.shape[1]):           # the same ones for all batches
            sample_share(plan, cfg, model, autocast, samples)
        del samples                                         # Windows cannot rename an open file
        wait_for_all()
        if RANK:
            return
        os.replace(temporary, out / "samples.npy")
    finally:
        if not RANK:
            temporary.unlink(missing_ok=True)
    samples = np.load(out / "samples.npy", mmap_mode="r")
    labels = None if plan.labels is None else plan.labels.tolist()
    protocol = dict(
        data=model.config.data,
        size=size,
        frames=plan.frames,
        stride=model.clip_format.stride,
        fps=model.clip_format.fps,
        n=plan.n,
        guidance=plan.guidance,
        sampler=plan.sampler,
        steps=steps,
        seed=cfg.seed,
        start=cfg.start,
        checkpoint=str(path),
        checkpoint_step=model.step,
        classes=model.classes,
        labels=labels,
    )
    (out / "samples.json").write_text(json.dumps(protocol, indent=1))
    write_videos(out, samples, labels, model.classes, cfg)
    seconds = time.time() - began
    print(f"{seconds:.1f} s, {seconds / plan.n:.2f} s a video, peak {peak_memory(device):.1f} GB: "
          f"{out}/samples.npy, samples.json{', samples.gif' if cfg.grid else ''}"
          f"{', samples/*.mp4' if cfg.mp4 else ''}")

if __name__ == "__main__":
    run_main(main)
