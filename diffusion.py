"""Stage 2: a diffusion model of videos, in the latent space of stage 1. Noise in, latents out, and stage 1 paints them.

    python diffusion.py                                     # the toy, after python vqgan3d.py (CPU: about 7 minutes)
    python diffusion.py --data sky                          # latents of 16 x 128 x 128, one GPU
    python diffusion.py --data toy --pixels                 # the same U-Net on pixels, without stage 1: the VDM baseline

A 3D U-Net factorised into space and time (VDM, Ho et al. 2022) learns to predict the noise in a noisy latent (DDPM, Ho et al.
2020). Of the labels a tenth is dropped, so that one network learns the conditional and the unconditional distribution, and
sampling can exaggerate their difference (classifier-free guidance, Ho & Salimans 2021).
Writes runs/<data>/: diffusion.pt (stage 1 included: that one file makes videos; the same command again resumes from it),
diffusion.jsonl (the log), diffusion.gif (samples from fixed noise, one row per class, remade at every evaluation).
"""
import copy, functools, hashlib, json, math, sys, time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from data import UserError, Videos, first_line, new_array, parse, run, run_name, save_grid, to_float, to_uint8
from vqgan3d import (RANK, Conv, ahead, average_gradients, build_vqgan, catch_signals, check_finite, compiles, load, lock, look,
                     one_after_the_other, optimisers, parts, pick_device, restore, resume, save, schedule, update, write_log)

@dataclass
class Config:
    data: str = "toy"             # toy, sky, ucf101, or a folder of videos
    data_dir: str = "datasets"    # where the raw sets and the caches lie
    out: str = ""                 # folder of this run; empty: runs/<data>, or runs/<data>-pixels
    vqgan: str = ""               # the stage-1 checkpoint; empty: vqgan.pt in the folder of this run
    pixels: bool = False          # no stage 1: diffuse the pixels themselves
    size: int = 64                # with --pixels: pixels a side   (otherwise stage 1 knows,
    frames: int = 16              # with --pixels: frames of a clip            as it knows
    stride: int = 1               # with --pixels: source frames from one to the next   the stride)
    # the network
    width: int = 128              # channels at the finest level
    mults: tuple = (1, 2, 4)      # channels of each level in widths; every level halves height and width, never time
    blocks: int = 2               # residual blocks at each level, on each side
    attention: int = 1024         # attention over space and time at once where a level has at most this many positions
    head_dim: int = 64            # channels of an attention head
    dropout: float = 0.0          # in the residual blocks
    # the diffusion
    timesteps: int = 1000         # T of DDPM
    noise: str = "cosine"         # schedule of the noise: cosine (Nichol & Dhariwal 2021) or linear (Ho et al. 2020)
    predict: str = "eps"          # what the network predicts: eps, the noise, or v (Salimans & Ho 2022)
    label_drop: float = 0.1       # part of the labels replaced by the null label, which guidance needs
    context: float = 0.25         # part of the clips that are trained with their first frames given, which continuing a video needs
    # training
    steps: int = 200_000          # updates
    batch_size: int = 64          # clips a step
    accumulate: int = 1           # parts that a batch is computed in, one after the other, to save memory
    lr: float = 1e-3              # peak learning rate of Muon and Adam: 2% linear warm-up, then cosine to zero
    ema: float = 0.9999           # decay of the averaged weights, which are the ones that sample; faster in the beginning
    latents: int = 20_000         # clips encoded once, before training; 0 encodes fresh windows at every step
    seed: int = 0                 # everything random follows from (seed, step)
    # running
    eval_every: int = 5000        # steps between evaluations, previews and checkpoints
    guidance: float = 2.0         # of the previews
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (bfloat16 where the hardware multiplies it), float32, bfloat16
    compile: str = "auto"         # torch.compile: auto (on a GPU), on, off
    fresh: bool = False           # start anew instead of resuming

PRESETS = {
    "toy":    dict(width=48, mults=(1, 2), blocks=1, head_dim=32, predict="v", steps=2500, batch_size=16, lr=4e-3, latents=8192, ema=0.99, eval_every=1000),
    "sky":    dict(accumulate=4),              # so that 16 GB suffice; on a larger GPU --accumulate 1 is faster
    "ucf101": dict(accumulate=4),
}
MAY_CHANGE = {"data_dir", "out", "vqgan", "steps", "accumulate", "eval_every", "guidance", "device", "compile", "fresh"}   # and still be the same run

# ----------------------------------------------------------------------------------------------------------------------
# the U-Net. Frames are images to a convolution in space, x is (B * T, C, H, W) throughout

class ResBlock(nn.Module):
    """A convolution in space, one in time, and one in space; noise level and label scale and shift what comes between them.

    That the time is mixed before the label has its say matters: "what was to the left a frame ago" must be a channel for
    "moving right" to switch on. With attention alone to mix the frames, the toy's directions stayed at chance.
    """
    def __init__(self, C, D, E, dropout):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(C), nn.Conv2d(C, D, 3, padding=1)
        self.time = Conv(D, D, (3, 1, 1), padding=(1, 0, 0))
        self.emb = nn.Linear(E, 2 * D)
        self.norm2, self.conv2 = GroupNorm(D), nn.Conv2d(D, D, 3, padding=1)
        self.skip = nn.Conv2d(C, D, 1) if C != D else nn.Identity()
        self.dropout = dropout
        nn.init.zeros_(self.conv2.weight)                                     # the block starts as the identity

    def forward(self, x, emb, T):                                             # (B*T, C, H, W), (B*T, E)
        h = self.conv1(F.silu(self.norm1(x)))                                 # (B*T, D, H, W)
        h = self.time(h.unflatten(0, (-1, T)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)
        scale, shift = self.emb(emb)[:, :, None, None].chunk(2, 1)            # (B*T, D, 1, 1)
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.skip(x) + self.conv2(F.dropout(h, self.dropout, self.training))

class Attention(nn.Module):
    """Multi-head self-attention over "time", the frames at each position; "space", the positions of each frame; or "both", all
    positions of all frames, which is what lets a thing that moves keep its colour.

    A learned bias for each head and relative position (as in VDM; here in time, height and width) tells before from after. In
    time it is the same for all distances beyond `reach`, so that any number of frames will do.
    """
    def __init__(self, C, head_dim, over, grid):
        super().__init__()
        self.heads, self.over = max(1, C // head_dim), over
        self.reach, self.grid = 0 if over == "space" else 16, 1 if over == "time" else grid
        self.norm, self.qkv, self.proj = GroupNorm(C), nn.Linear(C, 3 * C), nn.Linear(C, C)
        nn.init.zeros_(self.proj.weight)
        distance = torch.arange(-self.reach, self.reach + 1)[:, None]
        focus = torch.arange(self.heads) % 3 - 1                              # heads begin with the frame before, this one, the one after
        bias = -(distance - focus).abs().float()                              # (2 * reach + 1, heads)
        self.kept = None, None
        self.bias = nn.Parameter(bias.T.repeat_interleave((2 * self.grid - 1) ** 2, 1))   # (heads, one for each (time, height, width) distance)

    def table(self, T, dtype):
        """The bias of each pair of positions (heads, L, L). Weights that are only sampled from stay the same: it is looked up once."""
        key = T, dtype, self.bias.device, self.bias._version                  # the version counts what was written into the weights
        keep = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if keep and self.kept[0] == key:
            return self.kept[1]
        rows = distances(T, self.grid, self.reach, self.bias.device)          # (L, L)
        table = self.bias.gather(1, rows.flatten().expand(self.heads, -1)).view(self.heads, *rows.shape).to(dtype)
        if keep:
            self.kept = key, table
        return table

    def forward(self, x, T):                                                  # (B*T, C, H, W)
        N, C, H, W = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(-1, T, H * W, C)         # (B, T, HW, C)
        h = dict(time=h.transpose(1, 2).flatten(0, 1), space=h.flatten(0, 1), both=h.flatten(1, 2))[self.over].contiguous()   # (., L, C)
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # (., heads, L, C / heads) each
        bias = self.table(1 if self.over == "space" else T, q.dtype)          # (heads, L, L)
        if x.device.type == "cpu":                                            # written out it is twice as fast there
            h = (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1) @ v       # (., heads, L, C / heads)
        else:
            h = F.scaled_dot_product_attention(q, k, v, bias)
        h = self.proj(h.transpose(1, 2).flatten(2))                           # (., L, C)
        h = h.view(-1, H * W, T, C).transpose(1, 2) if self.over == "time" else h
        return x + h.reshape(N, H, W, C).permute(0, 3, 1, 2)

@functools.lru_cache
def distances(T, grid, reach, device):
    """Number of the bias for each pair of the T * grid * grid positions: (L, L)"""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in (T, grid, grid)), indexing="ij")
    t, y, x = (a.flatten() - a.flatten()[:, None] for a in axes)              # (L, L) each
    return ((t.clamp(-reach, reach) + reach) * (2 * grid - 1) + y + grid - 1) * (2 * grid - 1) + x + grid - 1

class GroupNorm(nn.GroupNorm):
    """Of a single frame, with at least 4 channels a group. On a CPU torch's kernel for channels_last is 4 times slower than there
    and back, below 1024 positions (torch 2.13)."""
    def __init__(self, C):
        super().__init__(math.gcd(32, C // 4), C)

    def forward(self, x):
        if x.device.type == "cpu" and x.shape[2] * x.shape[3] < 1024:
            return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return super().forward(x)

class Layer(nn.Module):
    """Residual block, then attention over each of `overs`."""
    def __init__(self, C, D, E, c, overs, grid):
        super().__init__()
        self.block = ResBlock(C, D, E, c.dropout)
        self.attention = nn.ModuleList([Attention(D, c.head_dim, over, grid) for over in overs])

    def forward(self, x, emb, T):
        x = self.block(x, emb, T)
        for attention in self.attention:
            x = attention(x, T)
        return x

class UNet(nn.Module):
    """(x (B, C, T, H, W), t (B,) or (B, T) in 0 ... timesteps - 1, label (B,) in 0 ... classes) -> prediction like x.

    Each frame may have a noise level of its own: given frames have t = 0. Label number `classes` is the null label: any class.
    With classes = 0 labels are not looked at.
    """
    def __init__(self, config, channels, frames, height, classes):
        super().__init__()
        c, self.classes = config, classes
        if height % 2 ** (len(c.mults) - 1):
            raise UserError(f"the U-Net halves its {height} x {height} grid {len(c.mults) - 1} times, which does not divide: give fewer --mults, or another size or --down in stage 1")
        E, widths = 2 * c.width, [c.width * m for m in c.mults]
        grids = [height >> i for i in range(len(widths))]
        # attention over everything is quadratic in positions: on finer levels time alone, and at the bottom space, then time
        overs = [["both"] if frames * g * g <= c.attention else ["time"] for g in grids]
        bottom = ["both"] if "both" in overs[-1] else ["space", "time"]
        self.width = c.width
        self.emb = nn.Sequential(nn.Linear(c.width, E), nn.SiLU(), nn.Linear(E, E))
        self.label = nn.Embedding(classes + 1, E) if classes else None
        self.stem = nn.Conv2d(channels, c.width, 3, padding=1)
        self.down, self.up, skips, C = nn.ModuleList(), nn.ModuleList(), [c.width], c.width
        for i, D in enumerate(widths):
            for _ in range(c.blocks):
                self.down.append(Layer(C, D, E, c, overs[i], grids[i]))
                skips.append(C := D)
            if i < len(widths) - 1:
                self.down.append(nn.Conv2d(C, C, 3, stride=2, padding=1))
                skips.append(C)
        self.middle = nn.ModuleList([Layer(C, C, E, c, bottom, grids[-1]) for _ in range(2)])
        for i, D in reversed(list(enumerate(widths))):
            for _ in range(c.blocks + 1):
                self.up.append(Layer(C + skips.pop(), D, E, c, overs[i], grids[i]))
                C = D
            if i:
                self.up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 3, padding=1)))
        self.out = nn.Sequential(GroupNorm(C), nn.SiLU(), nn.Conv2d(C, channels, 3, padding=1))
        nn.init.zeros_(self.out[-1].weight)
        for m in self.modules():                                              # the layout that convolutions are fastest in
            if isinstance(m, nn.Conv2d):
                m.to(memory_format=torch.channels_last)

    def forward(self, x, t, label=None):
        B, C, T, H, W = x.shape
        frequency = torch.exp(torch.arange(0, self.width, 2, device=x.device) * (-math.log(10000) / self.width))
        angle = t.view(B, -1, 1).float() * frequency                          # (B, 1 or T, width / 2)
        emb = self.emb(torch.cat([angle.cos(), angle.sin()], -1))             # (B, 1 or T, E)
        if self.label is not None:
            emb = emb + self.label(torch.full((B,), self.classes, device=x.device) if label is None else label)[:, None]
        emb = F.silu(emb).expand(B, T, -1).flatten(0, 1)                      # (B*T, E)
        h = x.transpose(1, 2).flatten(0, 1)                                   # (B*T, C, H, W)
        h = self.stem(h.contiguous(memory_format=torch.channels_last))        # (B*T, width, H, W)
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, T) if isinstance(layer, Layer) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, emb, T)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), emb, T) if isinstance(layer, Layer) else layer(h)
        return self.out(h).float().unflatten(0, (B, T)).transpose(1, 2)       # (B, C, T, H, W)

# ----------------------------------------------------------------------------------------------------------------------
# the diffusion: noise levels, and the samplers side by side

class Diffusion:
    """q(x_t | x_0) = N(sqrt(ab_t) x_0, (1 - ab_t) I), with ab_t = alpha-bar of DDPM, for t = 0 (nearly clean) ... T - 1 (noise)."""
    def __init__(self, timesteps, noise, predict):
        if noise not in ("cosine", "linear") or predict not in ("eps", "v"):
            raise UserError(f"--noise {noise} must be cosine or linear, --predict {predict} eps or v")
        self.T, self.predict = timesteps, predict
        if noise == "linear":                                                 # beta from 1e-4 to 0.02 for T = 1000
            beta = torch.linspace(0.1 / timesteps, 20 / timesteps, timesteps, dtype=torch.float64)
        else:                                                                 # Nichol & Dhariwal 2021, eq. 17
            f = torch.cos((torch.linspace(0, 1, timesteps + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = 1 - f[1:] / f[:-1]
        self.ab = torch.cumprod(1 - beta.clamp(max=0.999), 0)                 # (T,) float64
        self.a, self.s = self.ab.sqrt().float(), (1 - self.ab).sqrt().float()

    def levels(self, t, like):
        """sqrt(ab_t), sqrt(1 - ab_t) for a batch of times, shaped to multiply `like`"""
        return (v.to(t.device)[t].view(-1, *[1] * (like.dim() - 1)) for v in (self.a, self.s))

    def add_noise(self, x0, eps, t):
        """x_t, and what the network should answer to it"""
        a, s = self.levels(t, x0)
        return a * x0 + s * eps, eps if self.predict == "eps" else a * eps - s * x0

    def split(self, x, out, t, bound):
        """Network output -> (x_0, eps), x_0 clipped to +-bound, where no data lie beyond"""
        a, s = self.levels(t, x)
        x0 = ((x - s * out) / a if self.predict == "eps" else a * x - s * out).clamp(-bound, bound)
        return x0, (x - a * x0) / s

    def times(self, steps):
        """`steps` times from T - 1 down to 0, evenly spaced"""
        return torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).round().long().tolist()

    def steps(self, times):
        """(t, ab_t, ab_s) for each step from a time t to the next one, s; the last step ends at clean data, where ab is 1"""
        ab = [*self.ab[times].tolist(), 1.0]
        return zip(times, ab, ab[1:])

def guided(unet, labels, scale):
    """The network under classifier-free guidance: null + scale * (label - null), both halves in one call (Ho & Salimans 2021).

    Scale 1 is the conditional model, 0 the unconditional one; without labels there is nothing to guide.
    """
    def network(x, t):
        if labels is None or not unet.classes:
            return unet(x, t)
        if scale == 1:
            return unet(x, t, labels)
        null = torch.full_like(labels, unet.classes)
        label, null = unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null])).chunk(2)
        return torch.lerp(null, label, scale)
    return network

def ddpm(denoise, d, x, times, randn):
    """Ancestral sampling (Ho et al. 2020, eq. 6-7), of all times or of some: denoise(x, t) -> (x_0, eps); randn() -> noise like x"""
    for t, ab_t, ab_s in d.steps(times):
        x0, _ = denoise(x, t)
        beta = 1 - ab_t / ab_s
        x = (ab_s ** 0.5 * beta * x0 + (ab_t / ab_s) ** 0.5 * (1 - ab_s) * x) / (1 - ab_t)     # posterior mean
        if ab_s < 1:
            x = x + (beta * (1 - ab_s) / (1 - ab_t)) ** 0.5 * randn()                          # posterior variance
        yield x, x0

def ddim(denoise, d, x, times, randn=None, eta=0.0):
    """DDIM (Song et al. 2021, eq. 12 and 16): eta 0 adds no noise, eta 1 is ddpm"""
    for t, ab_t, ab_s in d.steps(times):
        x0, eps = denoise(x, t)
        sigma = eta * ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)) ** 0.5
        x = ab_s ** 0.5 * x0 + (1 - ab_s - sigma ** 2) ** 0.5 * eps
        if sigma:
            x = x + sigma * randn()
        yield x, x0

def dpm(denoise, d, x, times, randn=None):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order in lambda = log(alpha / sigma), data prediction.

    min(1, .) is ours: the last steps are far longer in lambda than those before, and a line drawn so far ahead overshoots.
    """
    before = None
    for t, ab_t, ab_s in d.steps(times):
        x0, _ = denoise(x, t)
        if ab_s == 1:
            x = x0
        else:
            (a_t, s_t), (a_s, s_s) = ((ab ** 0.5, (1 - ab) ** 0.5) for ab in (ab_t, ab_s))
            h = math.log(a_s / s_s) - math.log(a_t / s_t)
            D = x0 if before is None else x0 + (x0 - before[0]) * (min(1, h / before[1]) / 2)
            x = s_s / s_t * x - a_s * math.expm1(-h) * D
            before = x0, h
        yield x, x0

SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm}

# ----------------------------------------------------------------------------------------------------------------------
# both stages together

class System:
    """Everything that turns noise into videos: U-Net, diffusion, stage 1 (None with --pixels), and the latents' statistics.

    The U-Net sees z of stage 1 shifted and scaled per channel to mean 0 and deviation 1. shape: (C, T, H, W) of one sample.
    """
    def __init__(self, config, vqgan, clip, classes, device):
        c = self.config = config
        self.vqgan, self.classes, self.clip, self.device, self.step = vqgan, classes, clip, device, 0
        frames, size, _ = clip
        (t, h, w), C = (vqgan.config.down, vqgan.config.code_dim) if vqgan else ((1, 1, 1), 3)
        self.shape = C, frames // t, size // h, size // w
        if h != w:
            raise UserError(f"the U-Net wants square latents, and stage 1 has --down {t},{h},{w}: train it with the same for height and width")
        self.diffusion = Diffusion(c.timesteps, c.noise, c.predict)
        self.unet = UNet(c, *self.shape[:3], len(classes or [])).to(device)
        self.set_statistics(torch.zeros(self.shape[0]), torch.ones(self.shape[0]), 1.0)

    def set_statistics(self, mean, std, bound):
        self.mean, self.std, self.bound = mean.view(-1, 1, 1, 1).to(self.device), std.view(-1, 1, 1, 1).to(self.device), bound

    def encode(self, clips):
        """uint8 (N, T, H, W, 3) -> latents as stage 1 gives them, or the pixels in [-1, 1]"""
        x = to_float(clips.to(self.device))
        return self.vqgan.encode(x) if self.vqgan else x

    def decode(self, x):
        """What the U-Net made -> videos (N, 3, T, H, W) in [-1, 1]: scale back, quantise, decode"""
        z = x * self.std + self.mean
        return self.vqgan.decode(self.vqgan.quantize(z)[0]) if self.vqgan else z

    @torch.no_grad()
    def sample(self, seeds, labels=None, guidance=1.0, sampler="dpm", steps=20, autocast=None, progress=None, given=None):
        """One latent per seed, (N, C, T, H, W). Each has its own stream of noise: the batch it is in does not matter.

        A seed may also be such a stream, a torch.Generator, which then goes on. given (N, C, K, H, W): latents to begin with.
        sampler: a name in SAMPLERS, or a function like those. progress(x, x_0) is called after each step.
        """
        if not 1 <= steps <= self.diffusion.T:
            raise UserError(f"--steps {steps}: from 1 to {self.diffusion.T}, the steps it was trained with")
        autocast = autocast or (lambda: torch.autocast(self.device.type, enabled=False))
        streams = [s if isinstance(s, torch.Generator) else torch.Generator().manual_seed(int(s)) for s in seeds]
        randn = lambda: torch.stack([torch.randn(self.shape, generator=g) for g in streams]).to(self.device)
        given = torch.empty(len(streams), self.shape[0], 0, *self.shape[2:], device=self.device) if given is None else given
        K, network = given.shape[2], guided(self.unet, labels, guidance)
        def denoise(x, t):
            x, times = torch.cat([given, x[:, :, K:]], 2), torch.full((len(x), self.shape[1]), t, device=self.device)
            times[:, :K] = 0                                                  # they are clean
            with autocast():
                out = network(x, times)
            return self.diffusion.split(x, out, times[:, -1], self.bound)
        for x, x0 in SAMPLERS.get(sampler, sampler)(denoise, self.diffusion, randn(), self.diffusion.times(steps), randn):
            if progress:
                progress(x, x0)
        return torch.cat([given, x[:, :, K:]], 2)

def load_diffusion(path, device="cpu"):
    """The System of a checkpoint: averaged weights, stage 1 included, in eval mode. Its .step is how long it was trained."""
    state, device = load(path, device), torch.device(device)
    try:
        vqgan = build_vqgan(state["vqgan"], device) if state["vqgan"] else None
        system = System(Config(**state["config"]), vqgan, tuple(state["clip"]), state["classes"], device)
        system.unet.load_state_dict(state["ema"])
        system.set_statistics(*state["statistics"])
    except (TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path} does not fit stage 2 as it is written now ({first_line(e)}): train anew with --fresh")
    system.unet.eval().requires_grad_(False)
    system.step = state["step"]
    return system

# ----------------------------------------------------------------------------------------------------------------------
# training

def encode_once(system, videos, n, path, key, autocast):
    """Latents of n random windows, every video once before any twice, in a float16 memory map: (n, C, T, H, W), labels (n,).

    The file is kept and used again as long as stage 1 and the data, whose hash is its key, stay the same.
    """
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(len(videos)) for _ in range(-(-n // len(videos)))])[:n]
    starts = [int(rng.integers(videos.videos[i][1] - videos.span + 1)) for i in order]
    turn = rng.integers(2, size=n) if videos.flip else np.zeros(n)
    labels = torch.tensor([videos.videos[i][2] for i in order])
    note = path.with_suffix(".json")
    try:
        latents = np.load(path, mmap_mode="r", allow_pickle=False) if note.read_text() == key else None
    except Exception:                                                         # absent, or damaged
        latents = None
    if not isinstance(latents, np.ndarray) or latents.shape != (n, *system.shape) or latents.dtype != np.float16:
        note.unlink(missing_ok=True)
        latents = new_array(path, np.float16, (n, *system.shape))
        for i in tqdm(range(0, n, 16), desc="encoding", unit_scale=16, unit=" clips"):
            clips = [videos.window(order[k], starts[k])[0][:, :, ::-1 if turn[k] else 1] for k in range(i, min(n, i + 16))]
            with torch.no_grad(), autocast():
                latents[i:i + 16] = system.encode(torch.from_numpy(np.stack(clips))).cpu().numpy()
        latents.flush()
        note.write_text(key)
    return np.load(path, mmap_mode="r"), labels

def main():
    cfg = parse(Config, PRESETS)
    out = Path(cfg.out or f"runs/{run_name(cfg.data)}{'-pixels' if cfg.pixels else ''}")
    path, log = out / "diffusion.pt", out / "diffusion.jsonl"
    alone = lock(path)
    device, autocast = pick_device(cfg.device, cfg.dtype)
    torch.manual_seed(cfg.seed)

    # stage 1, and the data it was trained on
    config, state, stage1 = dict(vars(cfg)), resume(path, cfg, MAY_CHANGE, log), None   # config: as resume will compare it
    if not cfg.pixels:                                                        # a resumed run goes on with the stage 1 it began with
        stage1 = state["vqgan"] if state else {k: v for k, v in load(cfg.vqgan or out / "vqgan.pt").items() if k in ("config", "step", "model")}
        cfg.frames, cfg.size, cfg.stride = (stage1["config"][k] for k in ("frames", "size", "stride"))
        print(f"inherited from stage 1, trained for {stage1['step']} steps: {cfg.frames} frames of {cfg.size} x {cfg.size}, stride {cfg.stride}")
        if run_name(stage1["config"]["data"]) != run_name(cfg.data):
            print(f"note: stage 1 was trained on {stage1['config']['data']}, this stage is on {cfg.data}")
    vqgan = build_vqgan(stage1, device) if stage1 else None
    clip, flip = (cfg.frames, cfg.size, cfg.stride), bool(stage1 and stage1["config"]["flip"])
    with one_after_the_other():
        train = Videos(cfg.data, cfg.data_dir, "train", cfg.size, cfg.frames, cfg.stride, flip)
        test = Videos(cfg.data, cfg.data_dir, "test", cfg.size, cfg.frames, cfg.stride)

    # nets and optimisers; only the U-Net is trained
    system = System(cfg, vqgan, clip, train.classes, device)
    unet, diffusion, classes = system.unet, system.diffusion, len(train.classes or [])
    system.unet = ema = copy.deepcopy(unet).requires_grad_(False).eval()      # which samples, and is measured
    opts = optimisers(unet, cfg.lr)
    if compiles(cfg.compile, device):
        unet.compile(dynamic=False)

    # the latents, and their statistics
    fetch = train.batch
    if stage1 and cfg.latents:
        weights = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in stage1["model"].values())).hexdigest()
        key = json.dumps([weights, train.fingerprint, clip, flip, cfg.latents])
        with one_after_the_other():
            latents, labels = encode_once(system, train, cfg.latents, out / "latents.npy", key, autocast)
        def fetch(n, rng):
            i = np.sort(rng.integers(len(latents), size=n))
            return torch.from_numpy(latents[i]), labels[i]
    def clean(x):
        """latents, or clips (uint8) that are to be encoded -> clean samples as the U-Net sees them"""
        with torch.no_grad(), autocast():
            z = system.encode(x) if x.dtype == torch.uint8 else x.to(device).float()
        return (z - system.mean) / system.std
    learners = dict(model=unet, ema=ema, opts=opts)                           # what a checkpoint holds the state of
    start = restore(learners, state)
    if state:
        system.set_statistics(*state["statistics"])
    elif stage1:
        z = torch.cat([clean(fetch(64, np.random.default_rng((cfg.seed, i)))[0]) for i in range(16)])          # (1024, C, T, H, W)
        mean, std = z.mean((0, 2, 3, 4)), z.std((0, 2, 3, 4)) + 1e-6
        bound = ((z - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1)).abs().max().item()
        system.set_statistics(mean, std, bound)
        print(f"latents: mean {[round(v, 3) for v in mean.tolist()]}, deviation {[round(v, 3) for v in std.tolist()]}, all within {bound:.1f} deviations")
    learners |= dict(statistics=[system.mean.flatten().cpu(), system.std.flatten().cpu(), system.bound], vqgan=stage1, classes=train.classes, clip=clip)

    # held-out latents with fixed noise and times, for the validation loss; fixed seeds for the previews
    clips, label = test.fixed(128)
    held, held_t = torch.cat([clean(c) for c in clips.split(16)]), (torch.arange(128) * diffusion.T // 128).to(device)
    noisy, held_target = diffusion.add_noise(held, torch.randn(held.shape, generator=torch.Generator().manual_seed(0)).to(device), held_t)
    held = [v.split(32) for v in (noisy, held_t, label.clamp(min=0).to(device))]   # without classes the labels are not looked at
    rows = min(classes, 12) or 4
    preview = torch.arange(rows, device=device).repeat_interleave(3)
    print(f"U-Net {sum(p.numel() for p in unet.parameters()) / 1e6:.1f}M parameters on {' x '.join(map(str, system.shape))}, {classes} classes, {device}, writing {out}/")

    mine, B = parts(cfg.batch_size, cfg.accumulate), cfg.batch_size
    batches = ahead(lambda step: fetch(B, np.random.default_rng((cfg.seed, step))), range(start, cfg.steps))
    asked_to_stop, recent, clock = catch_signals(device), [], time.time()
    quarters = torch.zeros(2, 4, device=device)                               # sums and counts of the loss by quarter of the times
    bar = tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, desc="stage 2", mininterval=1 if sys.stderr.isatty() else 20, disable=RANK > 0)
    for step in bar:
        if not RANK and (step % cfg.eval_every == 0 or step == cfg.steps):
            with torch.no_grad(), autocast():
                held_loss = F.mse_loss(torch.cat([ema(*part) for part in zip(*held)]), held_target).item()
            check_finite([*recent, dict(held_out_loss=held_loss)], step, path)
            z = torch.cat([system.sample(seeds.tolist(), preview[seeds], cfg.guidance, "dpm", 20, autocast) for seeds in torch.arange(3 * rows).split(16)])
            with torch.no_grad(), autocast():
                save_grid(out / "diffusion.gif", to_uint8(torch.cat([system.decode(part) for part in z.split(8)])), columns=3)
            write_log(log, dict(step=step, held_out_loss=held_loss))
            bar.write(f"step {step}: held-out loss {held_loss:.4f}")
            if step > start:
                save(path, dict(config=config, step=step, **learners))
            recent, clock = [], time.time()                                   # training time alone is timed
        if step == cfg.steps:
            break
        torch.manual_seed(cfg.seed * 1_000_003 + step)                        # every draw of this step follows from here
        lr = cfg.lr * schedule(step, cfg.steps)

        (samples, label), waited = next(batches)
        # what is random is drawn for the whole batch, whatever the parts: times spread evenly have less variance (Kingma et al. 2021)
        t = ((torch.rand(1) + torch.randperm(B) / B) % 1 * diffusion.T).long().clamp(max=diffusion.T - 1)
        eps, T = torch.randn(B, *system.shape), system.shape[1]
        label = torch.where(torch.rand(B) < cfg.label_drop, classes, label) if classes else label   # the null label is trained here
        count = torch.where(torch.rand(B) < cfg.context, torch.randint(T, (B,)), 0)                 # frames that are given, clean
        known = torch.arange(T) < count[:, None]                              # (B, T)
        losses = []
        for part in mine:
            x0, times, clean_frames = clean(samples[part]), t[part].to(device), known[part].to(device)
            noisy, target = diffusion.add_noise(x0, eps[part].to(device), times)
            noisy = torch.where(clean_frames[:, None, :, None, None], x0, noisy)
            with autocast():
                prediction = unet(noisy, times[:, None].masked_fill(clean_frames, 0), label[part].to(device) if classes else None)
            error = (prediction - target).square().mean((1, 3, 4)).masked_fill(clean_frames, 0)      # (b, T): given frames do not count
            losses.append(error.sum(1) / (~clean_frames).sum(1))              # (b,)
            (losses[-1].mean() / len(mine)).backward()
            losses[-1] = losses[-1].detach()
        losses = torch.cat(losses)
        average_gradients(unet)
        update(opts, lr)
        with torch.no_grad():                                                 # the average is young at first: forget faster
            decay = min(cfg.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)
            quarter = F.one_hot(t[mine[0].start:mine[-1].stop].to(device) * 4 // diffusion.T, 4).float()
            quarters += torch.stack([losses, torch.ones_like(losses)]) @ quarter

        recent.append(dict(loss=losses.mean(), waiting=waited))
        stop = asked_to_stop(step)
        if step % 20 == 0 or stop:
            by_time = (quarters[0] / quarters[1].clamp_min(1)).tolist()
            look(recent, step, path, clock, device, bar, **{f"loss_t{i + 1}": v for i, v in enumerate(by_time)}, lr=lr)
            quarters.zero_()
            recent, clock = [], time.time()
        if stop:
            save(path, dict(config=config, step=step + 1, **learners))
            raise UserError(f"stopped after step {step + 1} and saved {path}; the same command goes on from there")
    print(f"done: {path}, the log {log}, samples from fixed noise {out / 'diffusion.gif'}")

if __name__ == "__main__":
    run(main)
