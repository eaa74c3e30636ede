"""Stage 2: a diffusion model of videos in the latent space of stage 1.

    noise (6, 4, 32, 32) -> U-Net, many steps -> latents (6, 4, 32, 32) -> decoder of stage 1

    python diffusion.py                            # the toy, after vqgan3d.py; 9 minutes
    python diffusion.py --data sky                 # latents of 16 x 128 x 128, one GPU
    python diffusion.py --pixels                   # the same U-Net on pixels, without stage 1 (VDM)
    python diffusion.py --data sky --pixels --grad_accum_steps 16        # ... of 16 x 64 x 64

A 3D U-Net factorised into space and time (VDM, Ho et al. 2022) is trained on noisy latents (DDPM,
Ho et al. 2020) to predict v, a mixture of latent and noise (Salimans & Ho 2022). The latents are
those of stage 1 before quantisation. A tenth of the labels is dropped, so that one network learns
the conditional and the unconditional distribution, and sampling can go from the second to the first
and beyond it (classifier-free guidance, Ho & Salimans 2021).
Writes runs/<data>/, or runs/<data>-pixels/: diffusion.pt (stage 1 included: that one file makes
videos; the same command again resumes from it), diffusion.jsonl (the log), diffusion.gif (samples
from fixed noise, a row for each of at most 12 classes).
"""
import copy
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (LOG_EVERY, RANK, UserError, Videos, all_reduce_sum, average_gradients,
                  divide_batch, load_checkpoint, load_states, log, main_process_first, parse_flags,
                  prefetch, progress, restore, resume, run_main, run_name, save_checkpoint,
                  save_grid, start, stop_requested, text_hash, to_float, to_uint8)
from vqgan3d import VQGAN, build_vqgan, cosine_lr, make_optimizers, zero_init

@dataclass
class Config:
    data: str = "toy"             # toy, sky, ucf101, a folder of videos, or an .npy file
    data_dir: str = "datasets"    # where the raw sets and the cache lie
    out: str = ""                 # folder of this run; empty: runs/<data>, or runs/<data>-pixels
    vqgan: str = ""               # the stage-1 checkpoint; empty: vqgan.pt in the run's folder
    pixels: bool = False          # no stage 1: diffuse the pixels themselves
    size: int = 64                # pixels a side, with --pixels; otherwise that of stage 1
    frames: int = 16              # frames of a clip, with --pixels; otherwise those of stage 1
    stride: int = 1               # stride of the frames, with --pixels; otherwise that of stage 1
    flip: bool = False            # mirror half of the clips, with --pixels; otherwise as stage 1
    # the network
    width: int = 128              # channels at the finest level, an even number
    mults: tuple = (1, 2, 4)      # channels of each level, in widths; between two, size is halved
    blocks: int = 2               # residual blocks at each level, on the way down
    full_attention_tokens: int = 1024  # levels of so many positions or fewer attend to all at once
    head_dim: int = 64            # channels of an attention head
    # the diffusion
    timesteps: int = 1000         # noise levels
    noise_shift: float = 0.0      # multiplies sigma / alpha; 0: side of latents / 8, 1 for pixels
    predict_eps: bool = False     # the network predicts eps, the noise, not v (Salimans & Ho 2022)
    label_drop: float = 0.1       # fraction of labels replaced by the null label, for guidance
    cond_prob: float = 0.25       # fraction of clips with the first 0 ... T - 1 latent frames given
    # training
    steps: int = 200_000          # updates
    batch_size: int = 64          # clips a step
    grad_accum_steps: int = 2     # parts of a batch, computed one by one to save memory
    lr: float = 1e-3              # peak of Muon and Adam: 2% linear warm-up, then cosine to zero
    ema: float = 0.9999           # decay of the averaged weights, used to sample; at first lower
    seed: int = 0                 # everything random follows from (seed, step)
    # running
    eval_every: int = 5000        # steps between evaluations, previews and checkpoints
    guidance: float = 2.0         # of the previews, and what sample.py uses by default
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (the fastest here), float32, bfloat16, float16
    compile: bool = False         # torch.compile: takes a minute, then steps are faster on a GPU
    fresh: bool = False           # start anew instead of resuming

PRESETS = {
    "toy": dict(                  # small enough for a CPU
        size=32,
        width=48,
        mults=(1, 2),
        blocks=1,
        head_dim=32,
        steps=1400,
        batch_size=16,
        grad_accum_steps=1,
        cond_prob=0.5,            # long videos keep class and colour better than with 0.25
        lr=4e-3,
        ema=0.99,                 # for few steps, a short average
        eval_every=700,
    ),
}
# flags that may change when a run is resumed: none that make the network or the clips. --data may
# be the same set at another place. The stage 1 of a run is in its checkpoint: --vqgan cannot change
MAY_CHANGE = ("data", "data_dir", "out", "label_drop", "cond_prob", "steps", "batch_size",
              "grad_accum_steps", "lr", "ema", "eval_every", "guidance", "device", "dtype",
              "compile", "fresh")

# --------------------------------------------------------------------------------------------------
# the U-Net. A convolution in space sees frames as images, so x is (B*T, C, H, W) throughout.
# attend(), softmax attention with a bias, is at the end of the file

def group_norm(C):
    """Group norm of each frame, with at least 4 channels a group"""
    return nn.GroupNorm(math.gcd(32, C // 4, C), C)

class Attention(nn.Module):
    """Multi-head self-attention in windows of frames x size x size positions: the whole clip, so
    that a moving thing keeps its colour; each frame, where frames is 1; or the frames at each
    position, where size is 1.

    Each head has a learned bias for each offset between two positions in time, height and width
    (VDM: in time only), so it can tell before from after.
    """
    def __init__(self, C, head_dim, frames, size):
        super().__init__()
        self.frames = frames
        self.heads = math.gcd(C, max(1, C // head_dim))          # a divisor of C
        self.norm = group_norm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        zero_init(self.proj)                                     # starts as the identity
        # At first a third of the heads prefers the frame before, a third the same frame, a third
        # the next: with equal biases no head would tell them apart
        offset = torch.arange(1 - frames, frames)
        preferred = torch.arange(self.heads)[:, None] % 3 - 1
        bias = -(offset - preferred).abs().float()                           # (heads, offsets)
        sides = 2 * size - 1                                     # offsets in height, and in width
        self.bias = nn.Parameter(bias.repeat_interleave(sides ** 2, 1))
        # The column of the bias for each pair of positions. place numbers the positions so that two
        # pairs have the same difference only if they have the same offset
        ranges = [torch.arange(n) for n in (frames, size, size)]
        t, y, x = torch.cartesian_prod(*ranges).T                            # (L,) each
        place = (t * sides + y) * sides + x
        index = place - place[:, None] + place[-1]                           # (L, L), from 0
        self.register_buffer("index", index, persistent=False)

    def forward(self, x):                                                    # (B*T, C, H, W)
        N, C, H, W = x.shape
        L = len(self.index)
        h = self.norm(x).movedim(1, -1)                                      # (B*T, H, W, C)
        if L == self.frames:                                     # size is 1: attend over time only
            h = h.reshape(-1, L, H * W, C).transpose(1, 2)                   # (B, HW, T, C)
        h = h.reshape(-1, L, C)                                              # (., L, C)
        h = self.qkv(h).unflatten(-1, (3, self.heads, -1))                   # (., L, 3, heads, D)
        q, k, v = h.permute(2, 0, 3, 1, 4)                                   # (., heads, L, D)
        bias = self.bias.index_select(1, self.index.flatten())               # (heads, L * L)
        bias = bias.view(-1, L, L).to(q.dtype)                               # (heads, L, L)
        h = attend(q, k, v, bias)                                            # (., heads, L, D)
        h = self.proj(h.transpose(1, 2).flatten(2))                          # (., L, C)
        if L == self.frames:
            h = h.view(-1, H * W, L, C).transpose(1, 2)                      # (B, T, HW, C)
        h = h.reshape(N, H, W, C).movedim(-1, 1)                             # (B*T, C, H, W)
        return x + h

class UNetBlock(nn.Module):
    """A residual block: a convolution in space, one in time, and one in space; what comes
    between the last two is scaled and shifted by noise level and label. Then self-attention: over
    the whole clip where it has few positions; else over time, and in the middle of the U-Net first
    over space, then over time.

    The label acts after the convolution in time. Only there can a channel mean "it was further
    left a frame ago", which the label "moving right" can then amplify. When attention alone mixed
    the frames, the toy's directions were no better than chance.
    C, D: channels in and out; E: channels of emb, of noise level and label; frames, size: here.
    """
    def __init__(self, C, D, E, config, frames, size, middle=False):
        super().__init__()
        self.frames = frames
        self.norm1 = group_norm(C)
        self.conv1 = nn.Conv2d(C, D, 3, padding=1)
        self.time = nn.Conv2d(D, D, (3, 1), padding=(1, 0))
        self.emb = nn.Linear(E, 2 * D)
        self.norm2 = group_norm(D)
        self.conv2 = nn.Conv2d(D, D, 3, padding=1)
        self.skip = nn.Conv2d(C, D, 1) if C != D else nn.Identity()
        zero_init(self.conv2)                                    # the block starts as the skip
        windows = [(1, size), (frames, 1)] if middle else [(frames, 1)]
        if frames * size ** 2 <= config.full_attention_tokens:   # the cost is quadratic in them
            windows = [(frames, size)]
        attention = [Attention(D, config.head_dim, *window) for window in windows]
        self.attention = nn.Sequential(*attention)

    def forward(self, x, emb):                                   # (B*T, C, H, W), (B*T, E)
        h = self.conv1(F.silu(self.norm1(x)))                                # (B*T, D, H, W)
        h = h.unflatten(0, (-1, self.frames)).transpose(1, 2)                # (B, D, T, H, W)
        h = self.time(h.flatten(3)).unflatten(3, x.shape[2:])                # as (T, H*W) images
        h = h.transpose(1, 2).flatten(0, 1)                                  # (B*T, D, H, W)
        emb = self.emb(emb)[:, :, None, None]                                # (B*T, 2D, 1, 1)
        scale, shift = emb.chunk(2, 1)                                       # (B*T, D, 1, 1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.skip(x) + self.conv2(F.silu(h))
        return self.attention(h)                                             # (B*T, D, H, W)

class UNet(nn.Module):
    """(x (B, C, T, H, W), t (B, T), label (B,)) -> prediction like x

    Each frame has a noise level t of its own: given frames have 0. Labels are from 0 to
    num_classes - 1; -1 is the null label: of no known class. With num_classes = 0 there are none.
    """
    def __init__(self, config, channels, frames, size, num_classes):
        super().__init__()
        c = config
        self.width = c.width
        self.num_classes = num_classes
        levels = [(c.width * mult, size >> i) for i, mult in enumerate(c.mults)]
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
        for D, n in levels:
            if n < size:
                self.down.append(nn.Conv2d(C, C, 3, stride=2, padding=1))
                skips.append(C)
            for _ in range(c.blocks):
                self.down.append(UNetBlock(C, D, E, c, frames, n))
                C = D
                skips.append(C)
        C, n = levels[-1]
        for _ in range(2):
            self.middle.append(UNetBlock(C, C, E, c, frames, n, middle=True))
        for D, n in reversed(levels):
            for _ in range(c.blocks + 1):
                C += skips.pop()                                 # concatenated
                self.up.append(UNetBlock(C, D, E, c, frames, n))
                C = D
            if n < size:
                self.up.append(nn.Sequential(
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(C, C, 3, padding=1),
                ))
        self.out = nn.Sequential(
            group_norm(C),
            nn.SiLU(),
            nn.Conv2d(C, channels, 3, padding=1),
        )
        nn.init.zeros_(self.out[-1].weight)
        self.to(memory_format=torch.channels_last)               # fastest for convolutions

    def embed(self, t, label):
        """Sinusoidal embedding of t (B, T), plus that of the label (B,) -> (B, T, E)"""
        i = torch.arange(0, self.width, 2, device=t.device)
        frequency = torch.exp(i * (-math.log(10000) / self.width))
        angle = t[:, :, None].float() * frequency                            # (B, T, width / 2)
        features = torch.cat([angle.cos(), angle.sin()], -1)                 # (B, T, width)
        emb = self.emb(features)
        if self.num_classes:
            emb = emb + self.label.weight[label][:, None]                    # -1: the last row
        return emb

    def forward(self, x, t, label):
        B, C, T, H, W = x.shape
        emb = F.silu(self.embed(t, label)).flatten(0, 1)                     # (B*T, E)
        h = x.transpose(1, 2).flatten(0, 1)                                  # (B*T, C, H, W)
        h = h.contiguous(memory_format=torch.channels_last)                  # (B*T, C, H, W)
        h = self.stem(h)                                                     # (B*T, width, H, W)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, UNetBlock) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb)
        for layer in self.up:
            if isinstance(layer, UNetBlock):
                h = torch.cat([h, skips.pop()], 1)
                h = layer(h, emb)
            else:
                h = layer(h)
        h = self.out(h).float()                                              # (B*T, C, H, W)
        return h.unflatten(0, (B, T)).transpose(1, 2)                        # (B, C, T, H, W)

# --------------------------------------------------------------------------------------------------
# the diffusion: noise levels, loss, guidance, and the samplers side by side

class Diffusion:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), where t runs from 0, nearly
    clean, to timesteps - 1, nearly noise (Ho et al. 2020, eq. 4). In the code alpha_t is
    sqrt(alpha_bar_t), and sigma_t is sqrt(1 - alpha_bar_t).

    noise_shift multiplies sigma / alpha at all times (Chen 2023; Hoogeboom et al. 2023). The mean
    colour of many positions stays visible under noise that hides each of them. With too little
    noise the first step decides it, and all samples look alike. side: height and width of
    the latents; a noise_shift of 0 stands for side / 8.
    """
    def __init__(self, config, device="cpu", side=8):
        self.timesteps = config.timesteps
        self.predict_eps = config.predict_eps
        t = torch.linspace(0, 1, self.timesteps + 1, dtype=torch.float64)
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2    # Nichol & Dhariwal 2021, eq. 17
        beta = 1 - f[1:] / f[:-1]
        alpha_bar = torch.cumprod(1 - beta.clamp(max=0.999), 0)              # (timesteps,) float64
        shift = config.noise_shift or side / 8
        self.alpha_bar = alpha_bar / (alpha_bar + shift ** 2 * (1 - alpha_bar))
        shape = -1, 1, 1, 1, 1                                               # multiplies videos
        self.alpha = self.alpha_bar.sqrt().float().view(shape).to(device)
        self.sigma = (1 - self.alpha_bar).sqrt().float().view(shape).to(device)

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
        if self.predict_eps:
            first = (self.alpha_bar >= 0.03 ** 2).sum().item() - 1
        times = torch.linspace(first, 0, steps, dtype=torch.float64)
        times = times.round().long().tolist()
        return list(dict.fromkeys(times))                        # none of them twice

    def add_noise(self, x0, eps, t):
        """-> x_t, and the target of the network"""
        alpha = self.alpha[t]
        sigma = self.sigma[t]
        target = eps if self.predict_eps else alpha * eps - sigma * x0
        return alpha * x0 + sigma * eps, target

    def predict_x0_eps(self, x_t, output, t, bound):
        """Output of the network at times t, (B,) or one number -> (x_0, eps). x_0 is clipped to the
        range of the data, -bound ... bound, and eps is the noise that then remains in x_t."""
        alpha = self.alpha[t]
        sigma = self.sigma[t]
        if self.predict_eps:
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
    frame_times = t[:, None] * ~is_cond                                      # (B, T)
    output = unet(x_t, frame_times, labels)
    error = (output - target).square().mean((1, 3, 4))                       # (B, T)
    return (error * ~is_cond).sum(1) / (~is_cond).sum(1)

def classifier_free_guidance(unet, labels, scale):
    """The function (x, t) -> null + scale * (conditional - null), both in one batch (Ho & Salimans
    2021, eq. 6, whose w is scale - 1). Scale 1 is the conditional model, 0 the unconditional one.
    """
    def network(x, t):
        if scale == 1 or not unet.num_classes:
            return unet(x, t, labels)
        both_labels = torch.cat([labels, torch.full_like(labels, -1)])
        x_twice = torch.cat([x, x])
        t_twice = torch.cat([t, t])
        output = unet(x_twice, t_twice, both_labels)
        conditional, null = output.chunk(2)
        return torch.lerp(null, conditional, scale)
    return network

# A sampler yields (x, x_0) after each step. denoise(x, t) -> (x_0, eps); randn() -> noise like x.
# Symbols mean the same in all three: beta_t = 1 - alpha_bar_t / alpha_bar_next is the noise between
# two of the times, alpha_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 - alpha_bar_t), and so for _next.
# (DDPM writes alpha_t for 1 - beta_t, DDIM for alpha_bar_t.)

def ddpm(denoise, diffusion, x, times, randn):
    """Ancestral sampling (Ho et al. 2020, eq. 6-7), of all times or of some: x is drawn from
    q(x_next | x_t, x_0)"""
    for t, alpha_bar_t, alpha_bar_next in diffusion.transitions(times):
        x0, _ = denoise(x, t)
        beta_t = 1 - alpha_bar_t / alpha_bar_next
        x0_weight = alpha_bar_next ** 0.5 * beta_t
        x_weight = (alpha_bar_t / alpha_bar_next) ** 0.5 * (1 - alpha_bar_next)
        x = (x0_weight * x0 + x_weight * x) / (1 - alpha_bar_t)              # mean
        if alpha_bar_next < 1:
            variance = beta_t * (1 - alpha_bar_next) / (1 - alpha_bar_t)
            x = x + variance ** 0.5 * randn()
        yield x, x0

def ddim(denoise, diffusion, x, times, randn=None):
    """DDIM (Song et al. 2021, eq. 12) without new noise: eps of this time is used at the next"""
    for t, alpha_bar_t, alpha_bar_next in diffusion.transitions(times):
        x0, eps = denoise(x, t)
        x = alpha_bar_next ** 0.5 * x0 + (1 - alpha_bar_next) ** 0.5 * eps
        yield x, x0

def dpm(denoise, diffusion, x, times, randn=None):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), multistep, of second order in lambda =
    log(alpha / sigma), with the corrector of order 1 of UniPC (Zhao et al. 2023): when x_0 at the
    end of a step is known, the step is made once more with the mean of x_0 at both ends. Only x_0
    is new there, so it costs no further call of the network.

    D is x_0 extrapolated from this step and the last. min(1, .) is ours: the last steps are much
    longer in lambda than those before, and an extrapolation so far ahead overshoots.
    """
    x_last = None
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
            if x_last is not None:
                D_last = (x0_last + x0) / 2                      # the last step, corrected
                x = sigma_t / sigma_last * x_last - alpha_t * math.expm1(-h_last) * D_last
                D = x0 + (x0 - x0_last) * (min(1, h / h_last) / 2)
            x_last = x
            x0_last = x0
            h_last = h
            sigma_last = sigma_t
            x = sigma_next / sigma_t * x - alpha_next * math.expm1(-h) * D
        yield x, x0

SAMPLERS = {"dpm": dpm, "ddim": ddim, "ddpm": ddpm}
DEFAULT_SAMPLER = "dpm"
DEFAULT_STEPS = 12

# --------------------------------------------------------------------------------------------------
# both stages together

@dataclass
class LatentDiffusion:
    """Everything that turns noise into videos.

    encode(videos) -> latents and decode(latents) -> videos are inverses, up to what stage 1 loses.
    Latents are z of stage 1, before quantisation, shifted and scaled per channel to mean 0 and
    standard deviation 1; videos are float (B, 3, T, H, W) in [-1, 1].
    .shape: (C, T, H, W) of one latent. .unet, .diffusion; .step: how long it was trained.
    """
    config: Config
    vqgan: VQGAN                  # stage 1; None with --pixels
    clip_format: tuple            # of training: size, frames, stride
    classes: list                 # names, [] if there are none
    device: torch.device
    step: int = 0

    def __post_init__(self):
        size, frames, _ = self.clip_format
        self.shape = self.vqgan.latent_shape() if self.vqgan else (3, frames, size, size)
        C, T, H, W = self.shape
        if H != W or H % 2 ** (len(self.config.mults) - 1):
            raise UserError(f"latents of {H} x {W}: they must be square, and their side is halved "
                            "between two of --mults: change --mults, --size or stage 1's --down")
        self.diffusion = Diffusion(self.config, self.device, side=H if self.vqgan else 8)
        self.unet = UNet(self.config, C, T, H, len(self.classes)).to(self.device)
        self.set_statistics(torch.tensor(0.0), torch.tensor(1.0), 1.0)

    def set_statistics(self, mean, std, bound):
        """mean, std (1, C, 1, 1, 1) of z, and the largest absolute value of normalised latents"""
        self.statistics = mean, std, bound                       # as a checkpoint holds them
        self.mean = mean.to(self.device)
        self.std = std.to(self.device)
        self.bound = bound

    @property
    def default_guidance(self):
        """--guidance; 1, no guidance, if training dropped no labels: the null label is untrained"""
        return self.config.guidance if self.config.label_drop else 1.0

    def latent_frames(self, n):
        """The number of latent frames of n frames"""
        return self.vqgan.latent_frames(n) if self.vqgan else n

    def video_frames(self, k):
        """The number of frames of k latent frames"""
        return self.vqgan.video_frames(k) if self.vqgan else k

    def encode(self, x):
        z = self.vqgan.encode(x) if self.vqgan else x
        return (z - self.mean) / self.std

    def decode(self, latents):
        z = latents * self.std + self.mean
        if self.vqgan is None:
            return z
        z_q, _, _ = self.vqgan.quantize(z)
        return self.vqgan.decode(z_q)

    @torch.no_grad()
    def sample(
        self,
        seeds,
        labels=None,
        guidance=1.0,
        sampler=DEFAULT_SAMPLER,
        steps=DEFAULT_STEPS,
        autocast=nullcontext,
        cond_frames=None,
    ):
        """One latent per seed: (N, C, T, H, W). Each seed has its own stream of noise, so a sample
        does not depend on the batch it is in.

        seeds: numbers, pairs (seed, i), or torch.Generators, whose streams then go on. labels: one
        for each seed, from -1 (the null label) to num_classes - 1. sampler: a name in SAMPLERS.
        steps: at most the timesteps of training are made. cond_frames (N, C, K, H, W): the first K
        frames, given.
        """
        if labels is None:
            labels = [-1] * len(seeds)
        labels = torch.as_tensor(labels, device=self.device)
        is_unknown = (labels < -1) | (labels >= len(self.classes))
        if len(labels) != len(seeds) or is_unknown.any():
            raise ValueError(f"labels must be from -1 to num_classes - 1, one a seed: {labels}")
        streams = [noise_stream(seed) for seed in seeds]
        def randn():
            noise = [torch.randn(self.shape, generator=stream) for stream in streams]
            return torch.stack(noise).to(self.device)
        x = randn()
        if cond_frames is None:
            cond_frames = x[:, :, :0]
        K = cond_frames.shape[2]
        network = classifier_free_guidance(self.unet, labels, guidance)
        def denoise(x, t):
            x = torch.cat([cond_frames, x[:, :, K:]], 2)
            N, C, T, H, W = x.shape
            frame_times = torch.full((N, T), t, device=self.device)
            frame_times[:, :K] = 0
            with autocast():
                output = network(x, frame_times)
            return self.diffusion.predict_x0_eps(x, output, t, self.bound)
        times = self.diffusion.sampling_times(steps)
        for x, _ in SAMPLERS[sampler](denoise, self.diffusion, x, times, randn):
            pass
        return torch.cat([cond_frames, x[:, :, K:]], 2)

def noise_stream(seed):
    """The noise of one sample: a stream of its own for each seed, a number or (seed, i), by the
    hash of how it is printed. A torch.Generator goes on where it is."""
    if isinstance(seed, torch.Generator):
        return seed
    return torch.Generator().manual_seed(int(text_hash(f"noise {seed}")[:15], 16))

def load_diffusion(path, device="cpu"):
    """The LatentDiffusion of a checkpoint: averaged weights, stage 1 included, in eval mode. Its
    .step is how long it was trained."""
    checkpoint = load_checkpoint(path)
    if "ema" not in checkpoint:
        raise UserError(f"{path} is a stage 1: train stage 2 on it and give the diffusion.pt")
    config = Config(**checkpoint["config"])
    stage1 = checkpoint["vqgan"]
    vqgan = build_vqgan(stage1, path, device) if stage1 else None
    model = LatentDiffusion(
        config,
        vqgan,
        checkpoint["clip"],
        checkpoint["classes"],
        device,
        checkpoint["step"],
    )
    load_states(path, checkpoint, dict(ema=model.unet))
    model.unet.eval().requires_grad_(False)
    model.set_statistics(*checkpoint["statistics"])
    return model

# --------------------------------------------------------------------------------------------------
# the latents to train on

@torch.no_grad()
def fit_statistics(model, videos, seed, autocast):
    """Set the model's statistics from z of 1024 random windows of a data.Videos."""
    z = []
    for i in range(16):
        clips, _ = videos.batch(64, np.random.default_rng((seed, i)))
        with autocast():
            z.append(model.encode(to_float(clips.to(model.device))))     # not yet shifted or scaled
    z = torch.cat(z)
    dims = 0, 2, 3, 4
    mean = z.mean(dims, keepdim=True)                                        # (1, C, 1, 1, 1)
    std = z.std(dims, keepdim=True) + 1e-6
    bound = ((z - mean) / std).abs().max().item()
    model.set_statistics(mean, std, bound)

def random_draws(cfg, model, labels, stream):
    """The random draws of a step besides the clips, for the whole batch, as denoising_loss() takes
    them: t, eps, labels, num_cond. stream: a torch.Generator."""
    B = len(labels)
    T = model.shape[1]
    # u spread evenly over [0, 1) gives less variance than independent ones (Kingma et al. 2021)
    offset = torch.rand(1, generator=stream)
    u = (offset + torch.randperm(B, generator=stream) / B) % 1               # (B,)
    eps = torch.randn(B, *model.shape, generator=stream)
    if model.classes:                                            # the null label is trained here
        drop = torch.rand(B, generator=stream) < cfg.label_drop
        labels = torch.where(drop, -1, labels)
    has_cond = torch.rand(B, generator=stream) < cfg.cond_prob
    num_cond = torch.randint(T, (B,), generator=stream) * has_cond
    return model.diffusion.times(u), eps, labels, num_cond

# --------------------------------------------------------------------------------------------------
# training

@torch.no_grad()
def evaluate_and_preview(model, clips, labels, autocast, path):
    """Held-out uint8 clips (N, T, H, W, 3) and labels (N,) -> dict(held_out_loss), always with the
    same times and noise, no label dropped and no frames given. Writes a GIF of samples from fixed
    noise, a row for each of at most 12 classes."""
    cfg = Config(label_drop=0.0, cond_prob=0.0)
    draws = random_draws(cfg, model, labels, torch.Generator().manual_seed(0))
    losses = []
    for k in range(0, len(clips), 16):
        x, *part = [tensor[k:k + 16].to(model.device) for tensor in (clips, *draws)]
        with autocast():
            x0 = model.encode(to_float(x))                                   # (16, C, T, H, W)
            losses.append(denoising_loss(model.unet, model.diffusion, x0, *part))
    rows = range(len(model.classes))[:12] or [-1] * 4
    labels = np.repeat(rows, 3)
    seeds = range(len(labels))
    latents = model.sample(seeds, labels, model.default_guidance, autocast=autocast)
    with autocast():
        videos = to_uint8(model.decode(latents))
    save_grid(path, videos, columns=3)
    return dict(held_out_loss=torch.cat(losses).mean())

def loss_by_time(history, timesteps):
    """{"loss", "loss_t1" ... "loss_t4"}: the mean over all clips, and over those in each quarter of
    the times, from nearly clean to nearly noise. A quarter without clips is left out.

    history: (losses (b,), t (b,)) of the last micro-batches of this process; the means are over
    those of all processes.
    """
    losses, t = map(torch.cat, zip(*history))                                # (N,) each
    quarter = 4 * t // timesteps
    sums = all_reduce_sum(quarter.bincount(losses, 4))
    counts = all_reduce_sum(quarter.bincount(minlength=4))
    means = dict(loss=sums.sum() / counts.sum())
    for i in range(4):
        if counts[i]:
            means[f"loss_t{i + 1}"] = sums[i] / counts[i]
    return means

def main():
    cfg = parse_flags(Config, PRESETS)
    suffix = "-pixels" if cfg.pixels else ""
    path = Path(cfg.out or f"runs/{run_name(cfg.data)}{suffix}") / "diffusion.pt"
    device, autocast, scaler = start(cfg)
    share, micro_batches = divide_batch(cfg.batch_size, cfg.grad_accum_steps)
    checkpoint = resume(path, cfg, MAY_CHANGE)

    # stage 1: a resumed run keeps the one that it began with
    stage1 = vqgan = None
    c = cfg
    if not cfg.pixels:
        vqgan_path = cfg.vqgan or path.with_name("vqgan.pt")
        found = checkpoint["vqgan"] if checkpoint else load_checkpoint(vqgan_path)
        vqgan = build_vqgan(found, vqgan_path, device)
        stage1 = {name: found[name] for name in ("config", "step", "starts", "model")}
        c = vqgan.config
        print(f"inherited from stage 1 ({c.data}, {found['step']} of {c.steps} steps): {c.frames} "
              f"frames of {c.size} x {c.size}, stride {c.stride}, flip {c.flip}")

    # data
    clip_format = c.size, c.frames, c.stride
    with main_process_first():
        train = Videos(cfg.data, cfg.data_dir, "train", *clip_format, c.flip)
        test = Videos(cfg.data, cfg.data_dir, "test", *clip_format)
    if checkpoint and checkpoint["classes"] != train.classes:
        raise UserError(f"{path} was trained with the classes {checkpoint['classes']}, and now "
                        f"there are {train.classes}: give another --out, or --fresh")
    def fetch(step):
        """This process's clips of a step, and the output of random_draws(); model: below"""
        rng = np.random.default_rng((cfg.seed, step))
        clips, labels = train.batch(cfg.batch_size, rng, share)
        stream = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        draws = random_draws(cfg, model, labels, stream)
        return clips, *[draw[share] for draw in draws]

    # networks and optimisers: unet is trained, and ema is its moving average, the one to use
    torch.manual_seed(cfg.seed)
    model = LatentDiffusion(cfg, vqgan, clip_format, train.classes, device)
    unet = model.unet
    ema = model.unet = copy.deepcopy(unet).requires_grad_(False).eval()
    muon, adam = make_optimizers(unet, cfg.lr)
    learners = dict(
        model=unet,
        ema=ema,
        muon=muon,
        adam=adam,
        scaler=scaler)
    if cfg.compile:
        unet.compile(dynamic=False)

    # where an earlier run stopped
    first_step = restore(path, checkpoint, cfg, train, learners)
    if checkpoint:
        model.set_statistics(*checkpoint["statistics"])
    elif vqgan:
        fit_statistics(model, train, cfg.seed, autocast)

    history = []                                                 # losses since the last row
    batches = prefetch(fetch, first_step, cfg.steps)
    bar = progress(first_step, cfg.steps, "stage 2")
    for step in bar:
        # once in a while: evaluate, preview and save; stop if a signal asked for it
        stop = stop_requested(step)
        due = step % cfg.eval_every == 0 or step == cfg.steps
        if due and not RANK and (step == 0 or step > first_step):
            scores = evaluate_and_preview(model, *test.fixed(128), autocast,
                                          path.with_suffix(".gif"))
            bar.write(f"step {step}: {log(path, step, scores)}")
        if step > first_step and (due or stop):
            save_checkpoint(
                path, cfg, learners,
                step=step,
                statistics=model.statistics,
                vqgan=stage1,
                classes=train.classes,
                clip=clip_format,
                fingerprint=train.fingerprint)
        if step == cfg.steps:
            break
        if stop:
            sys.exit(130)

        # forward and backward, micro-batch by micro-batch; every random draw of a step follows from
        # (seed, step)
        draws = next(batches)
        for part in micro_batches:
            on_device = [draw[part].to(device) for draw in draws]
            clips, t, eps, labels, num_cond = on_device
            with autocast():
                x0 = model.encode(to_float(clips))                           # (b, C, T, H, W)
                losses = denoising_loss(unet, model.diffusion, x0, t, eps, labels, num_cond)
            loss = losses.mean() / len(micro_batches)
            scaler.scale(loss).backward()
            history.append((losses.detach(), t))

        # average the gradients of the processes, then one step of each optimiser
        average_gradients(unet)
        lr = cfg.lr * cosine_lr(step, cfg.steps)
        for opt in (muon, adam):
            opt.param_groups[0]["lr"] = lr
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()
        decay = min(cfg.ema, (1 + step) / (10 + step))           # at first a shorter average
        with torch.no_grad():
            for average, weight in zip(ema.parameters(), unet.parameters()):
                average.lerp_(weight, 1 - decay)

        # log
        if step % LOG_EVERY == 0:
            row = log(path, step, loss_by_time(history, cfg.timesteps))
            bar.set_postfix(loss=row["loss"])
            history.clear()
    print(f"done: {path}; beside it the log .jsonl, and samples .gif")

# --------------------------------------------------------------------------------------------------
# for speed only: F.scaled_dot_product_attention alone computes the same (torch 2.13)

def attend(q, k, v, bias):
    """softmax(q k' / sqrt(D) + bias) v; q, k, v (N, heads, L, D), bias (heads, L, L).

    On a CPU the written-out form takes half the time of the fused kernel. On a GPU it is better for
    short sequences, as in time: the kernel computes tiles of 64 x 64, and its backward pass fails
    for more than 65,535 sequences if the bias needs a gradient.
    """
    L, D = q.shape[-2:]
    if q.is_cuda and L > 64:
        return F.scaled_dot_product_attention(q, k, v, bias[None])
    weights = (q * D ** -0.5) @ k.mT + bias                                  # (N, heads, L, L)
    return weights.softmax(-1) @ v

if __name__ == "__main__":
    run_main(main)
