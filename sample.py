"""Makes videos with a trained model: noise -> latents (stage 2) -> videos (decoder of stage 1).

    python sample.py                                        # the toy: a grid, one row per class
    python sample.py --data sky --n 16                      # 16 videos of the model in runs/sky
    python sample.py --data ucf101 --classes Biking,JumpingJack --guidance 3
    python sample.py --checkpoint assets/toy.pt             # a trained toy model
    python sample.py --data sky --n 2048 --grid 0           # enough for evaluate.py --data sky
    python sample.py --frames 128                           # longer than the clips of training
    python sample.py --data sky --start clip.mp4 --n 4      # four ways to continue a video
    python sample.py --start photo.jpg --classes bar-up     # ... or to set a picture in motion
    torchrun --nproc_per_node 4 -- sample.py --n 2048       # a share of the same videos on each GPU

Writes runs/<data>/: samples.npy (uint8 N, T, H, W, 3), samples.json (how they were made, and the
class of each), samples.gif (a grid of some).
"""
import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import (RANK, WORLD, UserError, gather, parse_flags, read_frames, replacing, run_main,
                  run_name, save_grid, start, to_float, to_uint8)
from diffusion import DEFAULT_STEPS, SAMPLERS, load_diffusion, noise_stream

@dataclass
class Config:
    data: str = "toy"             # which run: runs/<data>
    checkpoint: str = ""          # another checkpoint than runs/<data>/diffusion.pt
    out: str = ""                 # folder; empty: that of the diffusion.pt, or runs/x for an x.pt
    n: int = 0                    # videos; 0: four of each class, or 16
    classes: str = ""             # names, separated by commas; empty: all
    guidance: float = -1.0        # 1: conditional, 0: unconditional; -1: as in the previews
    sampler: str = "dpm"          # dpm (DPM-Solver++ 2M), ddim, or ddpm
    steps: int = 0                # of denoising a window; 0: 12, with ddpm those of training
    frames: int = 0               # length; 0: that of the training clips, with --start twice that
    start: str = ""               # a video to continue from its last frames, or a picture
    seed: int = 0                 # sample i is drawn from (seed, i), in whatever batch it is
    batch_size: int = 16          # videos at once; fewer, if long ones need too much memory
    grid: int = 64                # videos in the GIF, at most; 0: no GIF
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (the fastest here), float32, bfloat16, float16

# --------------------------------------------------------------------------------------------------
# videos longer than the clips of training, window by window

def encode_cond_frames(model, frames):
    """Videos (N, 3, t, H, W) in [-1, 1] to be continued -> latents (N, C, K, h, w)

    In training the encoder saw the frames after the given ones. Here there are none yet, and
    without any the last latent would be biased, and the colours of a long video would drift. So
    the given frames follow once more, backwards.
    """
    K = model.latent_frames(frames.shape[2])
    mirrored = torch.cat([frames, frames.flip(2)], 2)
    return model.encode(mirrored)[:, :, :K]

def encode_start(model, path, autocast):
    """The last frames of a video, at most a clip of training, or a picture as if it stood still for
    one latent frame -> latents (1, C, K, h, w)"""
    size, frames, stride = model.clip_format
    last = deque(read_frames(path, size), maxlen=(frames - 1) * stride + 1)
    clip = np.stack(last)[::-stride][::-1]                       # (t, H, W, 3); the last one stays
    if len(clip) == 1:
        clip = clip.repeat(model.video_frames(1), 0)
    n = model.video_frames(model.latent_frames(len(clip)))
    if not n:
        raise UserError(f"--start {path} is too short: {model.video_frames(1)} frames are needed, "
                        f"{stride} apart")
    x = to_float(clip[None, -n:]).to(model.device)                           # (1, 3, n, H, W)
    with autocast():
        return encode_cond_frames(model, x)

def sample_long(model, seeds, labels, guidance, sampler, steps, autocast, length, given=None):
    """LatentDiffusion.sample of any length, in latent frames: (N, C, length, h, w)

    given (1, C, K, h, w): latents that each video begins with; they are part of the length.

    Each further window is given the last latent frames so far, at most T // 2. Generated ones are
    decoded and encoded again: the U-Net was trained to continue what the encoder makes of videos,
    latents of the U-Net differ from that a little, and the difference would grow with every window.
    Guidance is at most 1 there: the given frames show the class, and more guidance would shift the
    colours of the video a little in every window.
    """
    T = model.shape[1]
    streams = [noise_stream(seed) for seed in seeds]
    if given is None:
        latents = model.sample(streams, labels, guidance, sampler, steps, autocast)
    else:
        latents = given = given.expand(len(seeds), *given.shape[1:])         # (N, C, K, h, w)
    while latents.shape[2] < length:
        assert T > 1, "clips of one latent frame cannot be continued"
        K = min(T // 2, latents.shape[2])
        cond_frames = latents[:, :, -K:]
        if latents is not given:
            with autocast():
                video = model.decode(latents[:, :, -T:]).clamp(-1, 1)        # (N, 3, ., H, W)
                cond_frames = encode_cond_frames(model, video[:, :, -model.video_frames(K):])
        window = model.sample(streams, labels, min(guidance, 1.0), sampler, steps, autocast,
                              cond_frames=cond_frames)                       # (N, C, T, h, w)
        latents = torch.cat([latents, window[:, :, K:]], 2)
    return latents[:, :, :length]

# --------------------------------------------------------------------------------------------------
# from flags to files

def choose_labels(text, classes, n):
    """"Biking,JumpingJack" -> the label of each of n samples (n,), class by class; -1: of no known
    class. text "": all classes. n = 0: four of each class, or 16."""
    names = text.split(",") if text else classes
    if not names:
        return torch.full((n or 16,), -1)
    for name in names:
        if name not in classes:
            raise UserError(f"--classes: no class is called {name}; there are {classes}")
    chosen = torch.tensor([classes.index(name) for name in names])
    n = n or 4 * len(names)
    return chosen[torch.arange(n) * len(names) // n]

def write_grid(path, samples, labels, n):
    """A GIF of at most n samples: equally many of each class, in a row. labels: class by class"""
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    first = first[:n]                                            # the others of a class follow
    columns = min(n // len(first), counts.min())
    shown = first[:, None] + np.arange(columns)                  # (classes, columns)
    if 1 in shown.shape:
        columns = 0                                              # nearly as many as rows
    save_grid(path, samples[shown.ravel()], columns)

def main():
    cfg = parse_flags(Config)
    path = Path(cfg.checkpoint or f"runs/{run_name(cfg.data)}/diffusion.pt")
    default = path.parent if path.name == "diffusion.pt" else Path("runs", path.stem)
    out = Path(cfg.out or default)
    out.mkdir(parents=True, exist_ok=True)
    device, autocast, _ = start(cfg)
    model = load_diffusion(path, device)

    # what no flag says follows from the model
    size, frames, stride = model.clip_format
    classes = model.classes
    has_null = model.config.label_drop                           # was the null label trained?
    given = None
    if cfg.start:
        given = encode_start(model, cfg.start, autocast)         # (1, C, K, h, w)
        frames *= 2
        if has_null and not cfg.classes:
            classes = []                                         # that of --start is not known
    frames = cfg.frames or frames
    length = model.latent_frames(frames - 1) + 1                 # latent frames, rounded up
    if cfg.start and length <= given.shape[2]:
        raise UserError(f"--frames {frames}: those of --start count too, so give more")
    labels = choose_labels(cfg.classes, classes, cfg.n)
    guidance = cfg.guidance if cfg.guidance >= 0 else model.default_guidance
    if cfg.start:
        guidance = min(guidance, 1.0)                            # as sample_long() does
    if guidance != 1 and not has_null:
        raise UserError(f"--guidance {guidance:g}: {path} was trained with --label_drop 0, so its "
                        "null label is not trained, and only --guidance 1 is possible")
    if cfg.sampler not in SAMPLERS:
        raise UserError(f"--sampler {cfg.sampler}: must be one of {', '.join(SAMPLERS)}")
    steps = cfg.steps or (model.diffusion.timesteps if cfg.sampler == "ddpm" else DEFAULT_STEPS)
    print(f"{len(labels)} videos of {frames} frames from {path} (trained for {model.step} steps): "
          f"{cfg.sampler}, {steps} steps, guidance {guidance:g}")
    if classes:
        print("classes:", [classes[label] for label in labels.unique()])

    # each process makes its share, batch by batch
    share = torch.arange(len(labels)).tensor_split(WORLD)[RANK]
    videos = []
    for batch in tqdm(share.split(cfg.batch_size), "batches", disable=RANK > 0):
        seeds = [(cfg.seed, i) for i in batch.tolist()]
        latents = sample_long(model, seeds, labels[batch], guidance, cfg.sampler, steps, autocast,
                              length, given)                                 # (B, C, length, h, w)
        with autocast():
            x = model.decode(latents)                                        # (B, 3, ., H, W)
        videos.append(to_uint8(x[:, :, :frames]))
    samples = np.concatenate(sum(gather(videos), []))                        # (n, frames, H, W, 3)
    if RANK:
        return
    with replacing(out / "samples.npy") as file:
        np.save(file, samples)
    labels = labels.tolist()
    protocol = vars(cfg) | dict(
        data=model.config.data,
        size=size,
        frames=frames,
        stride=stride,
        n=len(labels),
        guidance=guidance,
        steps=steps,
        checkpoint=str(path),
        checkpoint_step=model.step,
        classes=model.classes,
        labels=labels,
    )
    (out / "samples.json").write_text(json.dumps(protocol))
    if cfg.grid:
        write_grid(out / "samples.gif", samples, labels, cfg.grid)
    print(f"saved: {out}/samples.npy, .json; .gif unless --grid 0")

if __name__ == "__main__":
    run_main(main)
