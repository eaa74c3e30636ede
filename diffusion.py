"""Stage 2: a diffusion model of videos in the latent space of stage 1.

    noise (6, 4, 32, 32) -> U-Net, many steps -> latents (6, 4, 32, 32) -> decoder of stage 1

    python diffusion.py                            # the toy, after vqgan3d.py; 6 to 12 minutes
    python diffusion.py --data sky                 # latents of 16 x 128 x 128, one GPU
    python diffusion.py --data toy --pixels        # the same U-Net on pixels, without stage 1 (VDM)

A 3D U-Net factorised into space and time (VDM, Ho et al. 2022) is trained on noisy latents (DDPM,
Ho et al. 2020) to predict v, a mixture of latent and noise (Salimans & Ho 2022). A tenth of the
labels is dropped, so that one network learns the conditional and the unconditional distribution,
and sampling can go from the second to the first and beyond it (classifier-free guidance, Ho &
Salimans 2021).
Writes runs/<data>/, or runs/<data>-pixels/: diffusion.pt (stage 1 included: that one file makes
videos; the same command again resumes from it), diffusion.jsonl (the log), diffusion.gif (samples
from fixed noise, a row for each of at most 12 classes).
"""
import copy
import functools
import hashlib
import math
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from data import (LOG_EVERY, RANK, WORLD, Run, UserError, Videos, average_gradients, explain,
                  first_line, load_checkpoint, main_process_first, new_array, open_array,
                  parse_flags, replacing, run_main, run_name, save_grid, set_up_compile, to_float,
                  to_uint8)
from vqgan3d import Conv3d, build_vqgan, cosine_lr, make_optimizers, zero_init

@dataclass
class Config:
    data: str = "toy"             # toy, sky, ucf101, a folder of videos, or an .npy file
    data_dir: str = "datasets"    # where the raw sets and the caches lie
    out: str = ""                 # folder of this run; empty: runs/<data>, or runs/<data>-pixels
    vqgan: str = ""               # the stage-1 checkpoint; empty: vqgan.pt in the run's folder
    pixels: bool = False          # no stage 1: diffuse the pixels themselves
    size: int = 64                # pixels a side, with --pixels; otherwise that of stage 1
    frames: int = 16              # frames of a clip, with --pixels; otherwise those of stage 1
    stride: int = 1               # stride of the frames, with --pixels; otherwise that of stage 1
    fps: float = 0.0              # frames a second, with --pixels; otherwise those of stage 1
    flip: bool = False            # mirror half of the clips, with --pixels; otherwise as stage 1
    # the network
    width: int = 128              # channels at the finest level
    mults: tuple = (1, 2, 4)      # channels of each level, in widths; between two, size is halved
    blocks: int = 2               # residual blocks at each level, on the way down
    full_attention_tokens: int = 1024  # levels of so many positions or fewer attend to all at once
    head_dim: int = 64            # channels of an attention head
    dropout: float = 0.0          # fraction of values set to zero, in the residual blocks
    # the diffusion
    timesteps: int = 1000         # noise levels
    noise_schedule: str = "cosine"     # cosine (Nichol & Dhariwal 2021) or linear (Ho et al. 2020)
    noise_shift: float = 1.0      # multiplies sigma / alpha; latents of many positions need more
    predict: str = "v"            # output of the network: v (Salimans & Ho 2022) or eps, the noise
    label_drop: float = 0.1       # fraction of labels replaced by the null label, for guidance
    cond_prob: float = 0.25       # fraction of clips with the first 0 ... T - 1 latent frames given
    # training
    steps: int = 200_000          # updates
    batch_size: int = 64          # clips a step
    grad_accum_steps: int = 1     # parts of a batch, computed one by one to save memory
    lr: float = 1e-3              # peak of Muon and Adam: 2% linear warm-up, then cosine to zero
    ema: float = 0.9999           # decay of the averaged weights, used to sample; at first lower
    num_latents: int = 0          # clips encoded once, before training; 0: fresh ones each step
    seed: int = 0                 # everything random follows from (seed, step)
    # running
    eval_every: int = 5000        # steps between evaluations, previews and checkpoints
    guidance: float = 2.0         # of the previews, and what sample.py uses by default
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (the fastest here), float32, bfloat16, float16
    compile: str = "auto"         # torch.compile: auto (on a GPU), on, off
    fresh: bool = False           # start anew instead of resuming

PRESETS = {
    "toy": dict(                  # small enough for a CPU
        width=48,
        mults=(1, 2),
        blocks=1,
        head_dim=32,
        steps=2000,
        batch_size=16,
        cond_prob=0.5,            # long videos keep class and colour better than with 0.25
        lr=4e-3,
        num_latents=8192,         # windows of the 8192 videos, encoded once
        ema=0.99,                 # for few steps, a short average
        eval_every=1000,
    ),
    "sky": dict(                  # 6.9 GB, computed from shapes; 12 GB with grad_accum_steps=1
        grad_accum_steps=2,
        noise_shift=4.0,          # its latents are 32 x 32, the toy's 8 x 8
    ),
    "ucf101": dict(
        grad_accum_steps=2,
        noise_shift=4.0,
    ),
    "--pixels": dict(             # added to the set's preset; for sky 13 GB, from shapes
        size=64,
        grad_accum_steps=16,
        noise_shift=1.0,          # as VDM
    ),
    "toy --pixels": dict(         # added to both
        size=32,
        grad_accum_steps=1,
    ),
}
# flags that a resumed run cannot change
FIXED = ("pixels", "width", "mults", "blocks", "full_attention_tokens", "head_dim", "timesteps",
         "noise_schedule", "noise_shift", "predict", "seed")
FIXED_PIXELS = FIXED + ("size", "frames", "stride", "fps", "flip")

# --------------------------------------------------------------------------------------------------
# the U-Net. A convolution in space sees frames as images, so x is (B*T, C, H, W) throughout.
# GroupNorm and attend(), softmax attention with a bias, are at the end of the file

class ResBlock(nn.Module):
    """A convolution in space, one in time, and one in space; noise level and label scale and shift
    what comes between the last two.

    The label acts after the convolution in time. Only there can a channel mean "it was further
    left a frame ago", which the label "moving right" can then amplify. When attention alone mixed
    the frames, the toy's directions were no better than chance.
    """
    def __init__(self, C, D, E, dropout):
        super().__init__()
        self.norm1 = GroupNorm(C)
        self.conv1 = nn.Conv2d(C, D, 3, padding=1)
        self.time = Conv3d(D, D, (3, 1, 1), padding=(1, 0, 0))
        self.emb = nn.Linear(E, 2 * D)
        self.norm2 = GroupNorm(D)
        self.conv2 = nn.Conv2d(D, D, 3, padding=1)
        self.skip = nn.Conv2d(C, D, 1) if C != D else nn.Identity()
        self.dropout = dropout
        zero_init(self.conv2)                                    # the block starts as the identity

    def forward(self, x, emb, T):                                # (B*T, C, H, W), (B*T, E)
        h = self.conv1(F.silu(self.norm1(x)))                                # (B*T, D, H, W)
        h = h.unflatten(0, (-1, T)).transpose(1, 2)                          # (B, D, T, H, W)
        h = self.time(h)
        h = h.transpose(1, 2).flatten(0, 1)                                  # (B*T, D, H, W)
        emb = self.emb(emb)[:, :, None, None]                                # (B*T, 2D, 1, 1)
        scale, shift = emb.chunk(2, 1)                                       # (B*T, D, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        h = F.dropout(F.silu(h), self.dropout, self.training)
        return self.skip(x) + self.conv2(h)

class Attention(nn.Module):
    """Multi-head self-attention over "time", the frames at each position; "space", the positions of
    each frame; or "both", all positions of all frames, so that a moving thing keeps its colour.

    Each head has a learned bias for each offset between two positions in time, height and width
    (VDM: in time only), so it can tell before from after. Offsets in time beyond max_distance share
    one bias, so that any number of frames is possible. size: height and width of a frame.
    """
    def __init__(self, C, head_dim, axes, size):
        super().__init__()
        self.axes = axes
        self.heads = math.gcd(C, max(1, C // head_dim))          # a divisor of C
        self.size = 1 if axes == "time" else size
        self.max_distance = 0 if axes == "space" else 16
        self.norm = GroupNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        zero_init(self.proj)                                     # starts as the identity
        # at first the heads look at the frame before, the same frame, or the next frame
        distance = torch.arange(-self.max_distance, self.max_distance + 1)
        preferred = torch.arange(self.heads)[:, None] % 3 - 1
        bias = -(distance - preferred).abs().float()                         # (heads, distances)
        in_space = (2 * self.size - 1) ** 2
        self.bias = nn.Parameter(bias.repeat_interleave(in_space, 1))
        self.reused = None                                       # the biases, in reuse_biases()

    def relative_bias(self, T):
        """The bias of each pair of positions of T frames: (heads, L, L)"""
        if self.reused is not None:
            return self.reused
        if self.axes == "space":                                 # one frame at a time
            T = 1
        index = relative_index(T, self.size, self.max_distance, self.bias.device)    # (L, L)
        bias = self.bias.index_select(1, index.flatten())                    # (heads, L*L)
        return bias.view(self.heads, *index.shape)

    def forward(self, x, T):                                                 # (B*T, C, H, W)
        N, C, H, W = x.shape
        h = self.norm(x).movedim(1, -1)                                      # (B*T, H, W, C)
        h = h.reshape(-1, T, H * W, C)                                       # (B, T, HW, C)
        if self.axes == "time":
            h = h.transpose(1, 2)                                            # (B, HW, T, C)
        elif self.axes == "both":
            h = h.flatten(1, 2)[:, None]                                     # (B, 1, T*HW, C)
        h = h.flatten(0, 1).contiguous()                                     # (., L, C)
        h = self.qkv(h).unflatten(-1, (3, self.heads, -1))                   # (., L, 3, heads, D)
        q, k, v = h.permute(2, 0, 3, 1, 4)                                   # (., heads, L, D)
        bias = self.relative_bias(T)
        h = attend(q, k, v, bias.to(q.dtype))                                # (., heads, L, D)
        h = h.transpose(1, 2).flatten(2)                                     # (., L, C)
        h = self.proj(h)
        if self.axes == "time":
            h = h.view(-1, H * W, T, C).transpose(1, 2)                      # (B, T, HW, C)
        h = h.reshape(N, H, W, C).movedim(-1, 1)                             # (B*T, C, H, W)
        return x + h

@functools.lru_cache
def relative_index(T, size, max_distance, device):
    """For each pair of the L = T * size * size positions the column of its bias: (L, L)"""
    ranges = [torch.arange(n, device=device) for n in (T, size, size)]
    grid = torch.cartesian_prod(*ranges).T                                   # (3, L)
    t, y, x = grid[:, None, :] - grid[:, :, None]                            # (L, L) each
    t = t.clamp(-max_distance, max_distance) + max_distance                  # all from 0
    y = y + size - 1
    x = x + size - 1
    offsets = 2 * size - 1                                       # of y, and of x
    return (t * offsets + y) * offsets + x

class UNetBlock(nn.Module):
    """A residual block, then the attentions: each over "time", "space" or "both"."""
    def __init__(self, C, D, E, config, size, *attentions):
        super().__init__()
        self.block = ResBlock(C, D, E, config.dropout)
        self.attention = nn.ModuleList()
        for axes in attentions:
            self.attention.append(Attention(D, config.head_dim, axes, size))

    def forward(self, x, emb, T):
        x = self.block(x, emb, T)
        for attention in self.attention:
            x = attention(x, T)
        return x

class UNet(nn.Module):
    """(x (B, C, T, H, W), t (B,) or (B, T), label (B,)) -> prediction like x

    Each frame may have a noise level t of its own: given frames have 0. Labels are 0 ...
    num_classes - 1; num_classes or -1 is the null label: of no known class. With num_classes = 0
    labels are ignored.
    """
    def __init__(self, config, channels, frames, size, num_classes):
        super().__init__()
        c = config
        if size % 2 ** (len(c.mults) - 1):
            raise UserError(f"the U-Net halves its {size} x {size} grid {len(c.mults) - 1} times, "
                            "which does not divide: give fewer --mults, or another size or --down "
                            "in stage 1")
        if c.width % 2:
            raise UserError(f"--width {c.width}: must be even, for half sines and half cosines")
        self.width = c.width
        self.num_classes = num_classes
        # attention over everything is quadratic in the positions: where there are many, time alone
        levels = []                                              # (channels, size, attention)
        for i, mult in enumerate(c.mults):
            n = size >> i
            few = frames * n * n <= c.full_attention_tokens
            levels.append((c.width * mult, n, "both" if few else "time"))
        middle_attentions = ["both"] if few else ["space", "time"]     # few, n: of the last level
        E = 2 * c.width
        self.emb = nn.Sequential(
            nn.Linear(c.width, E),
            nn.SiLU(),
            nn.Linear(E, E),
        )
        self.label = nn.Embedding(num_classes + 1, E) if num_classes else None
        self.stem = nn.Conv2d(channels, c.width, 3, padding=1)
        self.down = nn.ModuleList()
        self.middle = nn.ModuleList()
        self.up = nn.ModuleList()
        C = c.width
        skips = [C]
        for D, n, attention in levels:
            if n < size:
                self.down.append(nn.Conv2d(C, C, 3, stride=2, padding=1))
                skips.append(C)
            for _ in range(c.blocks):
                self.down.append(UNetBlock(C, D, E, c, n, attention))
                C = D
                skips.append(C)
        for _ in range(2):
            self.middle.append(UNetBlock(C, C, E, c, n, *middle_attentions))
        for D, n, attention in reversed(levels):
            for _ in range(c.blocks + 1):
                C += skips.pop()                                 # concatenated
                self.up.append(UNetBlock(C, D, E, c, n, attention))
                C = D
            if n < size:
                self.up.append(nn.Sequential(
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(C, C, 3, padding=1),
                ))
        self.out = nn.Sequential(
            GroupNorm(C),
            nn.SiLU(),
            nn.Conv2d(C, channels, 3, padding=1),
        )
        nn.init.zeros_(self.out[-1].weight)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                m.to(memory_format=torch.channels_last)          # fastest for convolutions

    def embed(self, t, label):
        """Sinusoidal embedding of t (B,) or (B, T), plus that of the label -> (B, 1 or T, E)"""
        i = torch.arange(0, self.width, 2, device=t.device)
        frequency = torch.exp(i * (-math.log(10000) / self.width))
        t = t.view(len(t), -1, 1).float()                                    # (B, 1 or T, 1)
        angle = t * frequency                                                # (B, 1 or T, .)
        features = torch.cat([angle.cos(), angle.sin()], -1)                 # (B, 1 or T, width)
        emb = self.emb(features)
        if self.label is None:
            return emb
        if label is None:
            return emb + self.label.weight[-1]                               # the null label
        label = label % (self.num_classes + 1)                               # -1: the null label
        return emb + self.label(label)[:, None]

    def forward(self, x, t, label=None):
        B, C, T, H, W = x.shape
        emb = F.silu(self.embed(t, label))                                   # (B, 1 or T, E)
        emb = emb.expand(B, T, -1).flatten(0, 1)                             # (B*T, E)
        h = x.transpose(1, 2).flatten(0, 1)                                  # (B*T, C, H, W)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))       # (B*T, width, H, W)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, T) if isinstance(layer, UNetBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb, T)
        for layer in self.up:
            if isinstance(layer, UNetBlock):
                h = torch.cat([h, skips.pop()], 1)
                h = layer(h, emb, T)
            else:
                h = layer(h)
        h = self.out(h).float()                                              # (B*T, C, H, W)
        return h.unflatten(0, (B, T)).transpose(1, 2)                        # (B, C, T, H, W)

# --------------------------------------------------------------------------------------------------
# the diffusion: noise levels, loss, guidance, and the samplers side by side

class Diffusion:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), where t runs from 0, nearly
    clean, to timesteps - 1, nearly noise (Ho et al. 2020, eq. 4).

    noise_shift multiplies sigma / alpha at all times (Chen 2023; Hoogeboom et al. 2023). The mean
    colour of many positions stays visible under noise that hides each of them. With too little
    noise the first of 25 steps decides it, and all samples look alike.
    """
    def __init__(self, timesteps, noise_schedule, predict, noise_shift=1.0, device="cpu"):
        if noise_schedule not in ("cosine", "linear"):
            raise UserError(f"--noise_schedule {noise_schedule}: must be cosine or linear")
        if predict not in ("eps", "v"):
            raise UserError(f"--predict {predict}: must be eps or v")
        if noise_shift <= 0:
            raise UserError(f"--noise_shift {noise_shift:g}: must be more than 0")
        self.timesteps = timesteps
        self.predict = predict
        if noise_schedule == "linear":                           # 1e-4 to 0.02 at 1000 timesteps
            beta = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
        else:                                                    # Nichol & Dhariwal 2021, eq. 17
            t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
            f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), 0)              # (timesteps,) float64
        self.alpha_bar = alpha_bar / (alpha_bar + noise_shift ** 2 * (1 - alpha_bar))
        self.alpha = self.alpha_bar.sqrt().float().to(device)
        self.sigma = (1 - self.alpha_bar).sqrt().float().to(device)

    def times(self, u):
        """u in [0, 1) -> times t; uniform u give the times of training."""
        return (u * self.timesteps).long()

    def sampling_times(self, steps):
        """At most `steps` different times, evenly spaced from timesteps - 1, nearly noise, to 0.

        With eps they begin later, at the largest t whose sqrt(alpha_bar_t) is at least 0.03: x_0 is
        (x_t - sigma eps) / alpha, so an error of the network in eps grows by 1 / alpha, which is
        20,000 at the end of the cosine schedule. v has no such division (Lin et al. 2023, 3.2).
        """
        first = self.timesteps - 1
        if self.predict == "eps":
            first = (self.alpha_bar >= 0.03 ** 2).sum().item() - 1
        times = torch.linspace(first, 0, steps, dtype=torch.float64)
        times = times.round().long().tolist()
        return list(dict.fromkeys(times))                        # none of them twice

    def alpha_sigma(self, t, x):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for times (B,), shaped to multiply x"""
        shape = -1, *[1] * (x.dim() - 1)
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def add_noise(self, x0, eps, t):
        """-> x_t, and the target of the network"""
        alpha, sigma = self.alpha_sigma(t, x0)
        target = eps if self.predict == "eps" else alpha * eps - sigma * x0
        return alpha * x0 + sigma * eps, target

    def predict_x0_eps(self, x_t, output, t, bound):
        """Output of the network -> (x_0, eps), x_0 clipped to the range of the data, +-bound"""
        alpha, sigma = self.alpha_sigma(t, x_t)
        if self.predict == "eps":
            x0 = (x_t - sigma * output) / alpha
        else:
            x0 = alpha * x_t - sigma * output
        x0 = x0.clamp(-bound, bound)
        return x0, (x_t - alpha * x0) / sigma

    def transitions(self, times):
        """(t, alpha_bar_t, alpha_bar_next) for each step; the last one ends at clean data: 1"""
        alpha_bar = [*self.alpha_bar[times].tolist(), 1.0]
        return zip(times, alpha_bar, alpha_bar[1:])

def denoising_loss(unet, diffusion, x0, t, eps, labels, num_cond):
    """Mean squared error of v, or of eps (Ho et al. 2020, eq. 14), for each clip: (B,)

    x0, eps (B, C, T, H, W); t, labels (B,). The first num_cond (B,) frames of a clip are given:
    they are shown clean, with noise level 0, and do not count.
    """
    frame = torch.arange(x0.shape[2], device=x0.device)
    is_cond = frame < num_cond[:, None]                                      # (B, T)
    x_t, target = diffusion.add_noise(x0, eps, t)
    x_t = torch.where(is_cond[:, None, :, None, None], x0, x_t)
    frame_times = t[:, None].masked_fill(is_cond, 0)                         # (B, T)
    output = unet(x_t, frame_times, labels)
    error = (output - target).square().mean((1, 3, 4))                       # (B, T)
    error = error.masked_fill(is_cond, 0).sum(1)                             # (B,)
    return error / (~is_cond).sum(1)

def classifier_free_guidance(unet, labels, scale):
    """The function (x, t) -> null + scale * (conditional - null), both in one batch (Ho & Salimans
    2021, eq. 6, where scale is 1 + w). Scale 1 is the conditional model, 0 the unconditional one.
    """
    def network(x, t):
        if labels is None or not unet.num_classes:
            return unet(x, t)
        if scale == 1:
            return unet(x, t, labels)
        null_labels = torch.full_like(labels, -1)
        both_labels = torch.cat([labels, null_labels])
        x_twice = torch.cat([x, x])
        t_twice = torch.cat([t, t])
        conditional, null = unet(x_twice, t_twice, both_labels).chunk(2)
        return torch.lerp(null, conditional, scale)
    return network

# A sampler yields (x, x_0) after each step. denoise(x, t) -> (x_0, eps); randn() -> noise like x.
# Symbols are those of each paper: alpha_t is 1 - beta_t in ddpm and sqrt(alpha_bar_t) in dpm;
# sigma_t is the noise added in ddim and sqrt(1 - alpha_bar_t) in dpm.

def ddpm(denoise, diffusion, x, times, randn):
    """Ancestral sampling (Ho et al. 2020, eq. 6-7), of all times or of some"""
    for t, alpha_bar_t, alpha_bar_next in diffusion.transitions(times):
        x0, _ = denoise(x, t)
        alpha_t = alpha_bar_t / alpha_bar_next
        beta_t = 1 - alpha_t
        x0_weight = alpha_bar_next ** 0.5 * beta_t
        x_weight = alpha_t ** 0.5 * (1 - alpha_bar_next)
        x = (x0_weight * x0 + x_weight * x) / (1 - alpha_bar_t)              # mean
        if alpha_bar_next < 1:
            variance = beta_t * (1 - alpha_bar_next) / (1 - alpha_bar_t)
            x = x + variance ** 0.5 * randn()
        yield x, x0

def ddim(denoise, diffusion, x, times, randn=None, eta=0.0):
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 adds no noise, eta 1 is ddpm"""
    for t, alpha_bar_t, alpha_bar_next in diffusion.transitions(times):
        x0, eps = denoise(x, t)
        beta_t = 1 - alpha_bar_t / alpha_bar_next
        variance = beta_t * (1 - alpha_bar_next) / (1 - alpha_bar_t)
        sigma_t = eta * variance ** 0.5
        direction = (1 - alpha_bar_next - sigma_t ** 2) ** 0.5 * eps         # "pointing to x_t"
        x = alpha_bar_next ** 0.5 * x0 + direction
        if sigma_t > 0:
            x = x + sigma_t * randn()
        yield x, x0

def dpm(denoise, diffusion, x, times, randn=None):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in lambda = log(alpha / sigma).

    D is x_0 extrapolated from this step and the last. min(1, .) is ours: the last steps are much
    longer in lambda than those before, and an extrapolation so far ahead overshoots.
    """
    x0_last = h_last = None
    for t, alpha_bar_t, alpha_bar_next in diffusion.transitions(times):
        x0, _ = denoise(x, t)
        if alpha_bar_next == 1:
            x = x0
        else:
            alpha_t = alpha_bar_t ** 0.5
            sigma_t = (1 - alpha_bar_t) ** 0.5
            alpha_next = alpha_bar_next ** 0.5
            sigma_next = (1 - alpha_bar_next) ** 0.5
            h = math.log(alpha_next / sigma_next) - math.log(alpha_t / sigma_t)
            D = x0
            if x0_last is not None:
                ratio = min(1, h / h_last)
                D = x0 + (x0 - x0_last) * (ratio / 2)
            x = sigma_next / sigma_t * x - alpha_next * math.expm1(-h) * D
            x0_last = x0
            h_last = h
        yield x, x0

SAMPLERS = {"dpm": dpm, "ddim": ddim, "ddpm": ddpm}
DEFAULT_SAMPLER = "dpm"

# --------------------------------------------------------------------------------------------------
# both stages together

class ClipFormat(NamedTuple):
    """How clips are cut from the training videos."""
    size: int        # pixels a side
    frames: int
    stride: int      # frames of the video from one frame of the clip to the next
    fps: float       # frames a second that the videos were brought to; 0: as they are

class LatentDiffusion:
    """Everything that turns noise into videos: U-Net, diffusion, stage 1 (None with --pixels), and
    the statistics of the latents.

    encode(videos) -> latents and decode(latents) -> videos are inverses, up to what stage 1 loses.
    Latents are z of stage 1, before quantisation, shifted and scaled per channel to mean 0 and
    standard deviation 1; videos are float (B, 3, T, H, W) in [-1, 1].
    shape: (C, T, H, W) of one latent. clip_format: a ClipFormat, or such a tuple. classes: names or
    None.
    """
    def __init__(self, config, vqgan, clip_format, classes, device):
        c = self.config = config
        self.vqgan = vqgan
        self.classes = classes
        self.clip_format = ClipFormat(*clip_format)
        self.device = device
        self.step = 0
        size, frames, _, _ = self.clip_format
        self.shape = vqgan.latent_shape() if vqgan else (3, frames, size, size)
        C, T, H, W = self.shape
        self.frames_per_latent = frames // T
        if H != W:
            raise UserError(f"the U-Net needs square latents, and those of stage 1 are {H} x {W}: "
                            "train it with the same --down for height and width")
        self.diffusion = Diffusion(c.timesteps, c.noise_schedule, c.predict, c.noise_shift, device)
        num_classes = len(classes or [])
        self.unet = UNet(c, C, T, H, num_classes).to(device)
        self.set_statistics(torch.zeros(C), torch.ones(C), 1.0)

    def set_statistics(self, mean, std, bound):
        """mean, std (C,) of z, and the largest absolute value of normalised latents"""
        self.statistics = mean, std, bound                       # as a checkpoint holds them
        self.mean = mean.view(-1, 1, 1, 1).to(self.device)
        self.std = std.view(-1, 1, 1, 1).to(self.device)
        self.bound = bound

    def normalize(self, z):
        return (z - self.mean) / self.std

    def encode(self, x):
        z = self.vqgan.encode(x) if self.vqgan else x
        return self.normalize(z)

    def decode(self, latents):
        z = latents * self.std + self.mean
        if self.vqgan is None:
            return z
        z_q, _, _ = self.vqgan.quantize(z)
        return self.vqgan.decode(z_q)

    @torch.no_grad()
    def sample(self, seeds, labels=None, guidance=1.0, sampler=DEFAULT_SAMPLER, steps=25,
               autocast=nullcontext, progress=None, cond_frames=None):
        """One latent per seed: (N, C, T, H, W). Each seed has its own stream of noise, so a sample
        does not depend on the batch it is in.

        seeds: numbers, or torch.Generators, whose streams then go on. sampler: a name in
        SAMPLERS. cond_frames (N, C, K, H, W): the first K frames, given.
        progress(x, x_0) is called after each step.
        """
        if not 1 <= steps <= self.diffusion.timesteps:
            raise UserError(f"--steps {steps}: must be from 1 to {self.diffusion.timesteps}, the "
                            "--timesteps of training")
        streams = [noise_stream(seed) for seed in seeds]
        def randn():
            noise = [torch.randn(self.shape, generator=stream) for stream in streams]
            return torch.stack(noise).to(self.device)
        x = randn()
        if labels is not None:
            labels = labels.to(self.device)
        if cond_frames is None:
            cond_frames = x[:, :, :0]
        K = cond_frames.shape[2]
        T = self.shape[1]
        network = classifier_free_guidance(self.unet, labels, guidance)
        def denoise(x, t):
            x = torch.cat([cond_frames, x[:, :, K:]], 2)
            frame_times = torch.full((len(x), T), t, device=self.device)
            frame_times[:, :K] = 0
            with autocast():
                output = network(x, frame_times)
            t_last = frame_times[:, -1]                          # this frame is never given
            return self.diffusion.predict_x0_eps(x, output, t_last, self.bound)
        times = self.diffusion.sampling_times(steps)
        sampler = SAMPLERS[sampler]
        with reuse_biases(self.unet, T):
            for x, x0 in sampler(denoise, self.diffusion, x, times, randn):
                if progress:
                    progress(x, x0)
        return torch.cat([cond_frames, x[:, :, K:]], 2)

def noise_stream(seed):
    """The noise of one sample, from a number or from a torch.Generator, which goes on. The offset
    keeps it apart from the training steps of all --seed below 2999."""
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(3_000_000_000 + int(seed))

def load_diffusion(path, device="cpu"):
    """The LatentDiffusion of a checkpoint: averaged weights, stage 1 included, in eval mode. Its
    .step is how long it was trained."""
    checkpoint = load_checkpoint(path)
    if "ema" not in checkpoint:
        raise UserError(f"{path} is a stage 1: train stage 2 on it (diffusion.py) and give the "
                        "diffusion.pt")
    device = torch.device(device)
    try:
        vqgan = build_vqgan(checkpoint["vqgan"], path, device) if checkpoint["vqgan"] else None
        config = Config(**checkpoint["config"])
        model = LatentDiffusion(config, vqgan, checkpoint["clip"], checkpoint["classes"], device)
        model.unet.load_state_dict(checkpoint["ema"])
        model.set_statistics(*checkpoint["statistics"])
    except (TypeError, KeyError, AttributeError, RuntimeError) as e:
        if explain(e):                                           # a full GPU: no fault of the file
            raise
        raise UserError(f"{path} does not fit stage 2 as it is written now ({first_line(e)}): "
                        "train anew with --fresh")
    model.unet.eval().requires_grad_(False)
    model.step = checkpoint["step"]
    return model

# --------------------------------------------------------------------------------------------------
# the latents to train on

class Latents:
    """Batches of latents of random windows: encoded once and kept on disk, or anew at each step.

    num_latents: how many windows to encode once; 0: none.
    """
    def __init__(self, model, videos, num_latents, folder, run):
        self.model = model
        self.videos = videos
        self.run = run
        self.z = None
        if model.vqgan and num_latents:
            self.z, self.labels = encode_dataset(model, videos, num_latents, folder, run.autocast)

    def batch(self, n, rng, share=slice(None)):
        """-> n examples for to_latents(), or a share of them; labels (n,)"""
        if self.z is None:
            return self.videos.batch(n, rng, share)
        chosen = np.sort(rng.integers(len(self.z), size=n))
        return torch.from_numpy(self.z[chosen[share]]), self.labels[chosen]

    def fetch(self, step):
        """This process's share of the random draws of a step, except dropout: examples for
        to_latents(), then the output of random_draws()."""
        cfg = self.model.config
        rng = np.random.default_rng((cfg.seed, step))
        share = self.run.share
        examples, labels = self.batch(cfg.batch_size, rng, share)
        stream = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        draws = random_draws(cfg, self.model, labels, stream)
        return examples, *[draw[share] for draw in draws]

    @torch.no_grad()
    def to_latents(self, examples):
        """uint8 videos (n, T, H, W, 3), or z (n, C, T, H, W) -> normalised latents"""
        examples = examples.to(self.model.device)
        if examples.dtype == torch.uint8:
            with self.run.autocast():
                return self.model.encode(to_float(examples))
        return self.model.normalize(examples.float())

    def fit_statistics(self, seed):
        """Set the model's statistics from z of 1024 random windows."""
        z = []
        for i in range(16):
            rng = np.random.default_rng((seed, i))
            examples, _ = self.batch(64, rng)
            z.append(self.to_latents(examples))                  # not yet shifted or scaled
        z = torch.cat(z)
        mean = z.mean((0, 2, 3, 4))                                          # (C,)
        std = z.std((0, 2, 3, 4)) + 1e-6
        self.model.set_statistics(mean, std, 1.0)
        bound = self.model.normalize(z).abs().max().item()
        self.model.set_statistics(mean, std, bound)
        print(f"latents: mean {mean.cpu().numpy().round(3)}, standard deviation "
              f"{std.cpu().numpy().round(3)}; normalised, at most {bound:.1f}")

def encode_dataset(model, videos, n, folder, autocast):
    """z of n random windows in a float16 memory map (n, C, T, H, W), and labels (n,).

    Every video comes once before any comes twice. The file is named by what determines it, and
    written under another name first: a file that exists is a finished one. Before one is written,
    those of other settings in the folder are deleted.
    """
    rng = np.random.default_rng(0)
    windows = videos.draw(n, rng)
    mirrored = (rng.integers(2, size=n) == 1) & videos.flip
    labels = torch.tensor([videos.videos[i].label for i, _ in windows])
    settings = f"{videos.fingerprint} {tuple(model.clip_format)} {videos.flip} {n}"
    key = hashlib.sha256(settings.encode())
    for weight in model.vqgan.state_dict().values():
        key.update(weight.cpu().numpy().tobytes())
    path = folder / f"latents-{key.hexdigest()[:16]}.npy"
    if open_array(path, np.float16) is None:
        for old in folder.glob(f"latents-{'[0-9a-f]' * 16}.npy"):
            old.unlink(missing_ok=True)
        with replacing(path) as temporary:
            z = new_array(temporary, np.float16, (n, *model.shape))
            for k in tqdm(range(0, n, 16), desc="encoding", unit_scale=16, unit=" clips"):
                part = slice(k, k + 16)
                clips = np.stack([videos.window(*window) for window in windows[part]])
                flips = mirrored[part]
                clips[flips] = clips[flips, :, :, ::-1]
                with torch.no_grad(), autocast():
                    batch = model.vqgan.encode(to_float(clips).to(model.device))
                z[part] = batch.cpu().numpy()
            z.flush()
            del z
    return np.load(path, mmap_mode="r"), labels

# --------------------------------------------------------------------------------------------------
# training

def load_stage1(cfg, checkpoint, out, device):
    """-> dict(config, step, model) of stage 1, and its VQGAN; a resumed run keeps those it began
    with. (None, None) with --pixels."""
    if cfg.pixels:
        return None, None
    path = Path(cfg.vqgan or out / "vqgan.pt")
    if checkpoint:
        stage1 = checkpoint["vqgan"]
        found = load_checkpoint(path) if path.exists() else stage1
        pairs = zip(stage1["model"].values(), found["model"].values())
        if not all(torch.equal(old, new) for old, new in pairs):
            print(f"note: {path} ({found['step']} steps) is not the stage 1 that this run began "
                  f"with ({stage1['step']} steps). The run keeps its own; --fresh starts anew with "
                  "the new one")
        path = out / "diffusion.pt"                              # which holds the run's own
    else:
        found = load_checkpoint(path)
        stage1 = {key: found[key] for key in ("config", "step", "model")}
    vqgan = build_vqgan(stage1, path, device)
    if not vqgan.quantizer.started:
        raise UserError(f"{path}: stage 1 stopped before --vq_start, so its codebook is not "
                        "trained yet: train it longer")
    c = stage1["config"]
    print(f"inherited from stage 1, trained for {stage1['step']} steps: {c['frames']} frames of "
          f"{c['size']} x {c['size']}, stride {c['stride']}. Without --pixels the flags --size, "
          "--frames, --stride, --fps and --flip have no effect")
    if stage1["step"] < c["steps"]:
        print(f"note: stage 1 stopped before its {c['steps']} steps; to finish them, run "
              "vqgan3d.py again")
    if c["data"] != cfg.data:
        print(f"note: stage 1 was trained on {c['data']}, this stage is on {cfg.data}")
    return stage1, vqgan

def noise_held_out(model, latents, videos):
    """-> x_t, t, labels and target of 128 held-out clips, with fixed noise and times, so that the
    losses of two steps compare"""
    clips, labels = videos.fixed(128)
    x0 = torch.cat([latents.to_latents(part) for part in clips.split(16)])
    stream = torch.Generator().manual_seed(0)
    eps = torch.randn(x0.shape, generator=stream).to(x0.device)
    u = torch.arange(128) / 128
    t = model.diffusion.times(u).to(x0.device)
    x_t, target = model.diffusion.add_noise(x0, eps, t)
    return x_t, t, labels.to(x0.device), target

@torch.no_grad()
def evaluate_and_preview(model, held_out, guidance, autocast, path):
    """-> dict(held_out_loss) of the output of noise_held_out(); writes a GIF of samples from fixed
    noise, a row for each of at most 12 classes."""
    x_t, t, labels, target = held_out
    batches = zip(x_t.split(32), t.split(32), labels.split(32))
    with autocast():
        outputs = [model.unet(*batch) for batch in batches]
    loss = F.mse_loss(torch.cat(outputs), target).item()
    rows = min(model.unet.num_classes, 12) or 4
    labels = torch.arange(rows).repeat_interleave(3)
    steps = min(25, model.diffusion.timesteps)
    videos = []
    for seeds in torch.arange(3 * rows).split(16):
        latents = model.sample(seeds.tolist(), labels[seeds], guidance, steps=steps,
                               autocast=autocast)
        with autocast():
            videos.append(to_uint8(model.decode(latents)))
    save_grid(path, np.concatenate(videos), columns=3)
    return dict(held_out_loss=loss)

def random_draws(cfg, model, labels, stream):
    """The random draws of a step besides clips and dropout, for the whole batch: u (B,) in [0, 1),
    and what denoising_loss() takes: t, eps, labels, num_cond. stream: a torch.Generator."""
    B = len(labels)
    T = model.shape[1]
    # u spread evenly over [0, 1) gives less variance than independent ones (Kingma et al. 2021)
    offset = torch.rand(1, generator=stream)
    places = torch.randperm(B, generator=stream) / B
    u = (offset + places) % 1
    eps = torch.randn(B, *model.shape, generator=stream)
    if model.classes:                                            # the null label is trained here
        drop = torch.rand(B, generator=stream) < cfg.label_drop
        labels = torch.where(drop, -1, labels)
    has_cond = torch.rand(B, generator=stream) < cfg.cond_prob
    num_cond = torch.randint(T, (B,), generator=stream)
    num_cond = num_cond * has_cond
    return u, model.diffusion.times(u), eps, labels, num_cond

def loss_by_time(history):
    """Mean loss in each quarter of the times, from nearly clean to nearly noise.

    history: (losses (b,), u (b,)) of the last 20 steps, or of fewer after a start; u in [0, 1): the
    time, divided by timesteps.
    """
    losses = torch.cat([losses for losses, _ in history])                    # (N,)
    u = torch.cat([u for _, u in history])
    index = (4 * u).long()
    quarter = F.one_hot(index, 4).float()                                    # (N, 4)
    sums = losses @ quarter                                                  # (4,)
    means = sums / quarter.sum(0).clamp_min(1)
    return {f"loss_t{i + 1}": mean for i, mean in enumerate(means)}

def train_step(cfg, unet, model, opts, batch, latents, step, run):
    """One update of unet and of its average, model.unet -> losses (b,), u (b,) of this process

    batch: examples for to_latents(), and the output of random_draws().
    """
    losses = []
    us = []
    for part in run.micro_batches:
        on_device = [v[part].to(run.device, non_blocking=True) for v in batch]
        examples, u, t, eps, labels, num_cond = on_device
        x0 = latents.to_latents(examples)                                    # (b, C, T, H, W)
        with run.autocast():
            loss = denoising_loss(unet, model.diffusion, x0, t, eps, labels, num_cond)   # (b,)
        mean = loss.mean() / len(run.micro_batches)
        run.scaler.scale(mean).backward()
        losses.append(loss.detach())
        us.append(u)
    average_gradients(unet)
    run.update(opts, cfg.lr * cosine_lr(step, cfg.steps))
    run.scaler.update()
    decay = min(cfg.ema, (1 + step) / (10 + step))               # at first a shorter average
    update_average = get_ema_multi_avg_fn(decay)
    averages = list(model.unet.parameters())
    weights = list(unet.parameters())
    update_average(averages, weights, None)                      # None: not used
    return torch.cat(losses), torch.cat(us)

def build_networks(cfg, vqgan, clip_format, classes, run):
    """-> LatentDiffusion, U-Net, optimisers. The U-Net is trained; model.unet, its moving average,
    is what is evaluated, sampled from and exported."""
    model = LatentDiffusion(cfg, vqgan, clip_format, classes, run.device)
    unet = model.unet
    model.unet = copy.deepcopy(unet).requires_grad_(False).eval()
    opts = make_optimizers(unet, cfg.lr)
    if set_up_compile(cfg.compile, run.device):
        unet.compile(dynamic=False)
    num_params = sum(p.numel() for p in unet.parameters())
    shape = " x ".join(map(str, model.shape))
    print(f"U-Net {num_params / 1e6:.1f}M parameters on {shape}, {unet.num_classes} classes")
    return model, unet, opts

def main():
    cfg = parse_flags(Config, PRESETS)
    suffix = "-pixels" if cfg.pixels else ""
    out = Path(cfg.out or f"runs/{run_name(cfg.data)}{suffix}")
    run = Run(out / "diffusion", cfg)
    torch.manual_seed(cfg.seed)
    checkpoint = run.resume(cfg, FIXED_PIXELS if cfg.pixels else FIXED)

    # stage 1, and clips of the size and length that it was trained on
    stage1, vqgan = load_stage1(cfg, checkpoint, out, run.device)
    c = vqgan.config if vqgan else cfg
    clip_format = c.size, c.frames, c.stride, c.fps
    with main_process_first():
        train = Videos(cfg.data, cfg.data_dir, "train", *clip_format, c.flip)
        test = Videos(cfg.data, cfg.data_dir, "test", *clip_format, classes=train.classes or [])

    if checkpoint and checkpoint["classes"] != train.classes:
        raise UserError(f"{run.path} was trained with the classes {checkpoint['classes']}, and now "
                        f"there are {train.classes}: give another --out, or --fresh to start anew")
    model, unet, opts = build_networks(cfg, vqgan, clip_format, train.classes, run)
    with main_process_first():
        latents = Latents(model, train, cfg.num_latents, out, run)

    # where an earlier run stopped
    first_step = run.restore(
        checkpoint, train, opts,
        model=unet,
        ema=model.unet,
        scaler=run.scaler,
    )
    if checkpoint:
        model.set_statistics(*checkpoint["statistics"])
    elif stage1:
        latents.fit_statistics(cfg.seed)

    def save(step):
        run.save(
            step,
            config=vars(cfg),
            model=unet.state_dict(),                             # the weights that are trained
            ema=model.unet.state_dict(),                         # their average, used to sample
            opts=[opt.state_dict() for opt in opts],
            scaler=run.scaler.state_dict(),
            statistics=model.statistics,
            vqgan=stage1,
            classes=train.classes,
            clip=clip_format,
            fingerprint=train.fingerprint,
        )

    held_out = noise_held_out(model, latents, test)

    history = deque(maxlen=LOG_EVERY)
    batches = run.prefetch(latents.fetch, first_step, cfg.steps)
    for step in run.steps(first_step, cfg.steps, "stage 2"):
        # once in a while: evaluate, preview and save
        if run.evaluation_due(step, cfg.eval_every):
            if not RANK:
                scores = evaluate_and_preview(model, held_out, cfg.guidance, run.autocast,
                                              out / "diffusion.gif")
                run.log_evaluation(step, scores)
            if step > 0:
                save(step)
        if step == cfg.steps:
            break
        if run.stop_requested(step):
            save(step)
            print(f"stopped after step {step} and saved {run.path}; the same command goes on, "
                  "without --fresh")
            return

        # one optimiser step; every random draw of it follows from (seed, step)
        torch.manual_seed(cfg.seed * 1_000_003 + step * WORLD + RANK)        # of dropout
        batch = next(batches)
        losses, u = train_step(cfg, unet, model, opts, batch, latents, step, run)

        # log
        history.append((losses, u))
        by_time = loss_by_time(history)
        lr = opts[0].param_groups[0]["lr"]
        run.log(step, dict(loss=losses.mean()), **by_time, lr=lr)
    print(f"done: {run.path}, the log {run.log_path}, samples {out / 'diffusion.gif'}")

# --------------------------------------------------------------------------------------------------
# workarounds, torch 2.13: without them GroupNorm would be nn.GroupNorm, attend() torch's fused
# kernel, and reuse_biases() not there

class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm of each frame, with at least 4 channels a group. On a GPU it stays in x's type:
    autocast would compute it in float32 and keep 1.5 times the memory. On a CPU, below 1024
    positions, torch's kernel for channels_last takes 4 times as long as copying to the other layout
    and back."""
    def __init__(self, C):
        super().__init__(math.gcd(32, C // 4, C), C)

    def forward(self, x):
        if x.device.type == "cpu":
            if x.shape[2] * x.shape[3] >= 1024:
                return super().forward(x)
            x = super().forward(x.contiguous())
            return x.contiguous(memory_format=torch.channels_last)
        weight = self.weight.to(x.dtype)
        bias = self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):       # which would compute in float32
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)

def attend(q, k, v, bias):
    """softmax(q k' / sqrt(D) + bias) v; q, k, v (N, heads, L, D), bias (heads, L, L).

    On a CPU the written-out form takes half the time of the fused kernel. On a GPU it is better for
    short sequences, as in time: the kernel computes tiles of 64 x 64, and its backward pass fails
    for more than 65,535 sequences if the bias needs a gradient.
    """
    L, D = q.shape[-2:]
    if q.device.type == "cpu" or L <= 64:
        weights = (q * D ** -0.5) @ k.mT + bias                                # (N, heads, L, L)
        return weights.softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias[None])

@contextmanager
def reuse_biases(unet, T):
    """While sampling clips of T latent frames, weights and length do not change. So each attention
    gathers its biases once, here, and not in every call: torch.compile's CUDA graph then finds them
    at one address. A reuse_biases() inside another one changes nothing.
    """
    layers = []
    for m in unet.modules():
        if isinstance(m, Attention) and m.reused is None:
            m.reused = m.relative_bias(T)
            layers.append(m)
    try:
        yield
    finally:
        for layer in layers:
            layer.reused = None

if __name__ == "__main__":
    run_main(main)
