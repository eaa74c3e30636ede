"""Stage 1: a 3D VQGAN compresses a video to a small grid of codes and reconstructs it.

    video (3, 16, 128, 128) -> encoder -> z (6, 4, 32, 32) -> nearest codes -> decoder -> video

    python vqgan3d.py                                        # the toy; 5 minutes on two cores
    python vqgan3d.py --data sky                             # 16 x 128 x 128, one GPU
    torchrun --nproc_per_node 4 vqgan3d.py --data sky        # 4 GPUs, a part of each batch on each
    python vqgan3d.py --data sky --steps 300 --batch_size 2 --width 32 --perceptual 0  # without GPU

Five losses; the weight of each is the flag of its name:
    mse         squared error of the pixels
    perceptual  distance of VGG16 features of single frames
    vq          --codebook and --commitment (van den Oord et al. 2017)
    gan         adversarial, from D, DCGAN's discriminator with three-dimensional kernels
    feature     matching of the discriminator's internal features
Writes runs/<data>/: vqgan.pt (the same command again resumes from it, bit for bit on a CPU),
vqgan.jsonl (the log), vqgan.gif (held-out clips over their reconstructions).
"""
import math
import sys
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import (LOG_EVERY, RANK, WORLD, UserError, Videos, all_reduce_sum, average_gradients,
                  divide_batch, load_checkpoint, load_states, log,
                  main_process_first, parse_flags, prefetch, progress, restore, resume,
                  run_main, run_name, save_checkpoint, save_grid, start,
                  stop_requested, to_float, to_uint8)

@dataclass
class Config:
    data: str = "toy"             # toy, sky, ucf101, a folder of videos, or an .npy file
    data_dir: str = "datasets"    # where the raw sets and the cache lie
    out: str = ""                 # folder of this run; empty: runs/<data>
    size: int = 128               # pixels a side
    frames: int = 16              # frames of a clip
    stride: int = 1               # frames of the video from one frame of a clip to the next
    crop: int = 0                 # train on random squares of this many pixels; 0: whole frames
    flip: bool = False            # mirror half of the training clips; not if a class is a direction
    # the network
    down: tuple = (4, 4, 4)       # downsampling in time, height and width: powers of two
    width: int = 64               # channels at the finest level; each next has 3 times, up to 384
    blocks: int = 2               # residual blocks at each level, in encoder and decoder
    codes: int = 4096             # entries of the codebook
    code_dim: int = 6             # channels of the latent; any from 3 to 16 uses equally many codes
    # weights of the losses
    mse: float = 1.0              # squared error of the pixels
    perceptual: float = 0.03      # distance of VGG16 features; 0 leaves VGG16 out
    codebook: float = 1.0         # moves the codes to the encoder's outputs
    commitment: float = 0.25      # keeps the encoder's outputs near their codes
    gan: float = 0.1              # adversarial loss; if it and --feature are 0, D is not trained
    feature: float = 1.0          # L1 between the discriminator's features of video and output
    gan_ratio: float = 0.3        # limit of |gradient of gan + feature| / |of mse + perceptual|
    # training
    steps: int = 50_000           # updates of the autoencoder
    vq_start: float = 0.1         # fraction of the steps after which the latents are quantised
    disc_start: float = 0.5       # fraction of the steps after which the discriminator is trained
    gan_start: float = 0.6        # fraction of the steps after which it teaches the autoencoder
    disc_width: int = 64          # channels of the discriminator's first layer
    batch_size: int = 8           # clips a step
    grad_accum_steps: int = 1     # parts of a batch, to save memory; D's batch norm sees one part
    lr: float = 2e-3              # peak of Muon and Adam: 2% linear warm-up, then cosine to zero
    disc_lr: float = 2e-4         # the discriminator's Adam, constant (DCGAN's value)
    seed: int = 0                 # everything random follows from (seed, step)
    # running
    eval_every: int = 2000        # steps between evaluations, previews and checkpoints
    eval_clips: int = 64          # held-out clips of an evaluation
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (the fastest here), float32, bfloat16, float16
    compile: bool = False         # torch.compile: takes a minute, then steps are faster on a GPU
    fresh: bool = False           # start anew instead of resuming

PRESETS = {
    "toy": dict(                  # small enough for a CPU
        size=32,
        crop=24,                  # smaller clips, but more of them, are better in equal time
        width=32,
        perceptual=0.0,           # VGG16 knows photographs, and is a large download
        steps=2500,
        batch_size=6,
        vq_start=0.03,
        disc_width=16,
        disc_start=0.9,
        gan_start=0.93,
        eval_every=500,
        eval_clips=128,
    ),
    "sky": dict(                  # for one GPU; not run there yet
        width=128,
        batch_size=16,
        flip=True,                # skies have no left and right
    ),
    "ucf101": dict(
        width=128,
        batch_size=16,
    ),
}
# flags that may change when a run is resumed: none that make the network or the clips. --data may
# be the same set at another place
MAY_CHANGE = ("data", "data_dir", "out", "mse", "perceptual", "codebook", "commitment", "gan",
              "feature", "gan_ratio", "steps", "batch_size", "grad_accum_steps", "lr", "disc_lr",
              "eval_every", "eval_clips", "device", "dtype", "compile", "fresh")

# --------------------------------------------------------------------------------------------------
# the autoencoder: convolutions factorised into space and time, on patches. Inside it the channels
# are the last axis, (B, T, H, W, C): layer norm and matrix products want them there, and a
# convolution over two of the other axes takes them from there without a copy.

def zero_init(layer):
    """Make a layer's output zero, so that what it is added to is not changed at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)

class ResBlock(nn.Module):
    """Residual block, (B, T, H, W, C) -> likewise: a convolution in space, then one in time. Both
    are two-dimensional, over (H, W) and over (T, H*W). The layer norm is over the channels of each
    position: with statistics over time, a decoded frame would depend on the length of the video;
    with statistics over space, on --crop."""
    def __init__(self, C):
        super().__init__()
        self.norm = nn.LayerNorm(C)
        self.space = nn.Conv2d(C, C, 3, padding=1)
        self.time = nn.Conv2d(C, C, (3, 1), padding=(1, 0))
        zero_init(self.time)                                     # the block starts as the identity

    def forward(self, x):                                                    # (B, T, H, W, C)
        B, T, H, W, C = x.shape
        h = self.norm(x).flatten(0, 1)                                       # (B*T, H, W, C)
        h = F.silu(self.space(h.movedim(-1, 1)))                             # (B*T, C, H, W)
        h = h.movedim(1, -1).reshape(B, T, H * W, C)
        h = self.time(h.movedim(-1, 1))                                      # (B, C, T, H*W)
        return x + h.movedim(1, -1).reshape(x.shape)

class PatchDown(nn.Module):
    """Cuts patches of (pt, ph, pw) and maps each to D channels:
    (B, T, H, W, C) -> (B, T / pt, H / ph, W / pw, D)"""
    def __init__(self, C, D, patch):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(C * math.prod(patch), D)

    def forward(self, x):
        B, T, H, W, C = x.shape
        pt, ph, pw = self.patch
        x = x.reshape(B, T // pt, pt, H // ph, ph, W // pw, pw, C)
        x = x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)                     # (B, T', H', W', pC)
        return self.proj(x)

class PatchUp(nn.Module):
    """The reverse of PatchDown, in space only: (B, T, H, W, C) -> (B, T, H * ph, W * pw, D)"""
    def __init__(self, C, D, patch):
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(C, D * math.prod(patch))

    def forward(self, x):
        x = self.proj(x).unflatten(-1, (*self.patch, -1))                    # (B,T,H,W,ph,pw,D)
        x = x.transpose(3, 4)                                                # (B,T,H,ph,W,pw,D)
        return x.flatten(4, 5).flatten(2, 3)                                 # (B, T, H', W', D)

class TimeUp(nn.Module):
    """Linear interpolation to twice as many frames: (B, T, H, W, C) -> (B, 2T, H, W, C)

    A residual block follows. PatchUp is not used in time: the frames of one patch would hardly
    differ, and motion would jump from patch to patch. Resize, then convolve: Odena et al. 2016.
    """
    def forward(self, x):
        before = torch.cat([x[:, :1], x[:, :-1]], 1)                         # the frame before each
        after = torch.cat([x[:, 1:], x[:, -1:]], 1)
        first = torch.lerp(x, before, 0.25)
        second = torch.lerp(x, after, 0.25)
        x = torch.stack([first, second], 2)                                  # (B, T, 2, H, W, C)
        return x.flatten(1, 2)                                               # (B, 2T, H, W, C)

class Quantizer(nn.Module):
    """Replaces each latent vector by the nearest entry of a learned codebook, in float32
    (van den Oord et al. 2017, eq. 1-3).

    Until it is started it passes z on. In its first step the codebook is set to latents of that
    batch; later a code that is hardly used is moved to a random latent of the current batch. Both
    follow from usage, a buffer that is saved, so a resumed run does not initialise the codebook
    again. In training bincount and boolean indexing are avoided: the CPU would wait for the GPU.
    """
    def __init__(self, num_codes, code_dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(num_codes, code_dim))
        self.register_buffer("usage", torch.zeros(num_codes))    # moving average; its mean is 1
        self.started = False                # set by the training loop, and when a model is loaded

    def forward(self, z):
        """z (B, D, T, H, W) -> z_q likewise; codes (B, T, H, W), indices into the codebook; losses.

        The gradient at z_q goes straight to z: dz_q / dz = 1.
        """
        B, D, T, H, W = z.shape
        if not self.started:
            codes = torch.zeros(B, T, H, W, dtype=torch.long, device=z.device)
            zero = 0 * z.sum()
            return z, codes, dict(codebook=zero, commitment=zero)
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().movedim(1, -1).reshape(-1, D)                   # (N, D)
            if self.training:
                self.move_dead_codes(flat.detach())
            codes = nearest_codes(flat, self.codebook)                       # (N,)
            e = F.embedding(codes, self.codebook)                            # (N, D)
            losses = vq_loss(flat, e)
            if self.training:
                self.update_usage(codes)
            z_q = flat + (e - flat).detach()                                 # (N, D)
        z_q = z_q.view(B, T, H, W, D).movedim(-1, 1)
        return z_q, codes.view(B, T, H, W), losses

    def health(self):
        """For the log of training: how many codes are used less than a twentieth as often as the
        average one"""
        return dict(dead_codes=(self.usage < 0.05).sum())

    def statistics(self, codes):
        """Of the codes (N,) of held-out clips: codes_used, the fraction of the codebook that
        occurs; perplexity, exp of the entropy of their use"""
        count = torch.bincount(codes, minlength=len(self.codebook)).double()
        p = count / len(codes)
        used = (p > 0).double().mean()
        entropy = torch.special.entr(p).sum()                    # of -p log p
        return dict(codes_used=used.item(), perplexity=entropy.exp().item())

    @torch.no_grad()
    def move_dead_codes(self, flat):
        """Set the dead codes, at the first call all, to random latents (N, D): the same in all
        processes, which draw the same random numbers."""
        if WORLD > 1:                                            # the latents of all processes
            shares = [torch.empty_like(flat) for _ in range(WORLD)]
            dist.all_gather(shares, flat.contiguous())
            flat = torch.cat(shares)
        dead = self.usage < 0.05
        chosen = torch.randint(len(flat), dead.shape, device=flat.device)
        noise = 0.01 * flat.std(0) * torch.randn_like(self.codebook)
        new = flat[chosen] + noise                               # (K, D), no two alike
        self.codebook.copy_(torch.where(dead[:, None], new, self.codebook))
        self.usage.masked_fill_(dead, 1.0)

    @torch.no_grad()
    def update_usage(self, codes):
        """Moving average of how often each code is used, over all processes."""
        count = torch.zeros_like(self.usage)
        count.scatter_add_(0, codes, torch.ones_like(codes, dtype=count.dtype))
        all_reduce_sum(count)
        scale = len(count) / (len(codes) * WORLD)
        self.usage.lerp_(count * scale, 0.02)

def nearest_codes(flat, codebook):
    """Index of the codebook entry nearest to each vector: (N, D), (K, D) -> (N,); for 1024 vectors
    at a time, so that the distances stay in a CPU's cache"""
    return torch.cat([torch.cdist(rows, codebook).argmin(1) for rows in flat.split(1024)])

class VQGAN(nn.Module):
    """encode(x) -> z, continuous; quantize(z) -> (z_q, codes, losses); decode(z_q) -> x.
    All in one: vqgan(x) -> (reconstruction, codes, losses).

    x: (B, 3, T, H, W) in [-1, 1]; z and z_q: (B, code_dim, T / down, H / down, W / down).
    """
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        check_sizes(c)
        # down (4, 8, 8) takes patches (1, 2, 2), (2, 2, 2), (2, 2, 2): time, in which videos change
        # little, is halved last. A patch is one matrix product, far cheaper than a convolution with
        # stride
        levels = max(1, int(math.log2(max(c.down))))
        channels = [3]
        patches = []
        for i in range(levels):
            channels.append(min(c.width * 3 ** i, max(c.width, 384)))
            remaining = 2 ** (levels - i)                        # downsampling from here on
            patches.append(tuple(2 if d >= remaining else 1 for d in c.down))
        encoder = []
        for C_finer, C, patch in zip(channels, channels[1:], patches):
            encoder.append(PatchDown(C_finer, C, patch))
            encoder += [ResBlock(C) for _ in range(c.blocks)]
        encoder += [nn.LayerNorm(C), nn.Linear(C, c.code_dim)]
        decoder = [nn.Linear(c.code_dim, C)]
        for i in reversed(range(levels)):
            C_finer, C = channels[i:i + 2]
            decoder += [ResBlock(C) for _ in range(c.blocks - 1)]
            if patches[i][0] == 2:
                decoder.append(TimeUp())
            decoder.append(ResBlock(C))
            decoder.append(PatchUp(C, C_finer, patches[i][1:]))
        self.encoder = nn.Sequential(*encoder)
        self.quantizer = Quantizer(c.codes, c.code_dim)
        self.decoder = nn.Sequential(*decoder)
        self.to(memory_format=torch.channels_last)               # of the convolutions' kernels

    def encode(self, x):
        z = self.encoder(x.movedim(1, -1))                                   # (B, T', H', W', D)
        return z.movedim(-1, 1).float()

    def quantize(self, z):
        return self.quantizer(z)

    def decode(self, z_q):
        x = self.decoder(z_q.movedim(1, -1))                                 # (B, T, H, W, 3)
        return x.movedim(-1, 1).float()

    def forward(self, x):
        z = self.encode(x)
        z_q, codes, losses = self.quantize(z)
        return self.decode(z_q), codes, losses

    def latent_frames(self, n):
        """How many latent frames n frames of a video make"""
        return n // self.config.down[0]

    def video_frames(self, k):
        """How many frames of a video k latent frames make"""
        return k * self.config.down[0]

    def latent_shape(self):
        """(code_dim, T, H, W) of the latent of one clip"""
        c = self.config
        _, h, w = c.down
        return c.code_dim, self.latent_frames(c.frames), c.size // h, c.size // w

def check_sizes(c):
    """Refuse clips that the downsampling of a Config does not divide."""
    t, h, w = c.down
    side = math.gcd(c.size, c.crop)                              # gcd(size, 0) is size
    misfit = c.frames % t or side % h or side % w or any(d & (d - 1) for d in c.down)
    if misfit or c.crop > c.size:
        raise UserError(f"--down {t},{h},{w} must be powers of two that divide the {c.frames} "
                        f"frames and the sides (--size {c.size}, --crop {c.crop}), and a crop is "
                        "not larger than the whole: change one of them")

def load_vqgan(path, device="cpu"):
    """The trained stage 1 of a checkpoint, frozen, in eval mode; its settings are in .config."""
    return build_vqgan(load_checkpoint(path), path, device)

def build_vqgan(checkpoint, path, device):
    """load_vqgan() of a checkpoint that was loaded from path."""
    if "starts" not in checkpoint:
        raise UserError(f"{path} is no stage 1: give a vqgan.pt, which vqgan3d.py makes")
    vqgan = VQGAN(Config(**checkpoint["config"]))
    load_states(path, checkpoint, dict(model=vqgan))
    # was it started in the last step?
    vqgan.quantizer.started = checkpoint["step"] - 1 >= checkpoint["starts"]["vq_start"]
    return vqgan.to(device).eval().requires_grad_(False)

# --------------------------------------------------------------------------------------------------
# the discriminator

class Discriminator(nn.Module):
    """DCGAN's discriminator (Radford et al. 2016) with 4x4x4 kernels: stride 2 (kernel 3, stride 1
    along an axis of at most 4), batch norm except in the first and the last layer, LeakyReLU 0.2,
    weights N(0, 0.02), one logit.

    x (B, 3, T, H, W) -> logits (B,), list of the internal features
    """
    def __init__(self, frames, size, width):
        super().__init__()
        shape = frames, size, size
        C = 3
        layers = []
        while max(shape) > 4:
            D = min(width * 2 ** len(layers), 8 * width)
            kernel = tuple(4 if n > 4 else 3 for n in shape)
            stride = tuple(2 if n > 4 else 1 for n in shape)
            conv = nn.Conv3d(C, D, kernel, stride, 1, bias=not layers)
            norm = nn.BatchNorm3d(D, track_running_stats=False) if layers else nn.Identity()
            layers.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
            shape = tuple(n // s for n, s in zip(shape, stride))
            C = D
        self.layers = nn.ModuleList(layers)
        self.head = nn.Conv3d(C, 1, shape)
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.normal_(m.weight, 0, 0.02)
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last_3d)
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.head(x).flatten().float(), features

# --------------------------------------------------------------------------------------------------
# the losses, unweighted. x: videos, y: their reconstructions, both (B, 3, T, H, W) in [-1, 1]

def reconstruction_loss(x, y, vgg=None, frame=None):
    """{"mse"}; with a VGG16 also {"perceptual"}, of frame[i] of each clip i; frame: (B,)"""
    losses = dict(mse=F.mse_loss(y, x))
    if vgg is not None:
        i = torch.arange(len(x), device=x.device)
        frame_x = x[i, :, frame]                                             # (B, 3, H, W)
        frame_y = y[i, :, frame]
        losses["perceptual"] = vgg(frame_x, frame_y)
    return losses

def vq_loss(z, e):
    """{"codebook", "commitment"} of latents z (N, D) and their nearest codebook entries e (van den
    Oord et al. 2017, eq. 3): the first moves e to z, the second z to e."""
    codebook = F.mse_loss(e, z.detach())
    commitment = F.mse_loss(z, e.detach())
    return dict(codebook=codebook, commitment=commitment)

def generator_loss(fake_logits, fake_features, real_features):
    """{"gan", "feature"}: -log D(y), the non-saturating loss (Goodfellow et al. 2014), and the mean
    L1 distance of the discriminator's features of video and reconstruction, over all its layers
    (Wang et al. 2018, pix2pixHD, eq. 4)."""
    gan = F.softplus(-fake_logits).mean()
    feature = 0
    for fake, real in zip(fake_features, real_features):
        feature = feature + F.l1_loss(fake.float(), real.float().detach())
    return dict(gan=gan, feature=feature / len(real_features))

def discriminator_loss(real_logits, fake_logits):
    """{"disc"}: -log D(x) - log(1 - D(y)); and, to look at, the means of D(x) and of D(y)"""
    real = F.softplus(-real_logits).mean()
    fake = F.softplus(fake_logits).mean()
    D_real = real_logits.sigmoid().mean()
    D_fake = fake_logits.sigmoid().mean()
    return dict(disc=real + fake, D_real=D_real, D_fake=D_fake)

def weighted_sum(cfg, losses):
    """The sum of losses by name, each times its weight in the Config."""
    return sum(getattr(cfg, name) * loss for name, loss in losses.items())

def average_losses(rows):
    """{name: mean over the micro-batches, a list of {name: loss}, and over the processes}"""
    means = {}
    for name in rows[0]:
        losses = torch.stack([row[name].detach() for row in rows])
        means[name] = all_reduce_sum(losses.mean()) / WORLD
    return means

def join_gradients(grad_rec, grad_adv, gan_ratio):
    """grad_rec + w grad_adv, two gradients at the reconstruction: that of mse and perceptual, and
    that of gan and feature. w is the largest number up to 1 for which w grad_adv is at most
    gan_ratio times as long as grad_rec.

    VQGAN (Esser et al. 2021, eq. 7) sets w to the ratio of the two norms at the decoder's last
    layer. Here it is a limit, measured at the pixels, which needs no extra backward pass. The
    discriminator cannot ruin the reconstruction then, whatever its loss. A common factor of both
    gradients, such as float16's loss scale, does not change w.
    """
    square_rec = grad_rec.square().sum()
    square_adv = grad_adv.square().sum()
    squares = torch.stack([square_rec, square_adv])
    norm_rec, norm_adv = all_reduce_sum(squares).sqrt()
    weight = gan_ratio * norm_rec / norm_adv.clamp_min(1e-12)
    return grad_rec + grad_adv * weight.clamp(max=1)

# --------------------------------------------------------------------------------------------------
# training

@torch.no_grad()
def reconstruct(vqgan, clips, batch_size, autocast=nullcontext):
    """Reconstruct uint8 clips (N, T, H, W, 3) -> uint8 likewise; dict(psnr, and what the quantiser
    tells of the codes, such as codes_used and perplexity)"""
    device = next(vqgan.parameters()).device
    outputs = []
    codes = []
    for k in tqdm(range(0, len(clips), batch_size), "reconstructing", leave=False):
        x = to_float(clips[k:k + batch_size]).to(device)                     # (B, 3, T, H, W)
        with autocast():
            y, code, _ = vqgan(x)
        outputs.append(to_uint8(y))
        codes.append(code.cpu().flatten())
    outputs = np.concatenate(outputs)
    scores = vqgan.quantizer.statistics(torch.cat(codes))
    mean_psnr = psnr(clips, outputs).mean()
    return outputs, dict(psnr=mean_psnr.item(), **scores)

def psnr(x, y):
    """Peak signal-to-noise ratio in dB of each uint8 video: (N, T, H, W, 3), likewise -> (N,)"""
    error = torch.as_tensor(x).float() - torch.as_tensor(y).float()
    mse = error.square().flatten(1).mean(1) / 255 ** 2
    return -10 * mse.clamp_min(1e-10).log10()

def evaluate_and_preview(vqgan, clips, autocast, batch_size, path):
    """Reconstruct held-out uint8 clips -> scores of reconstruct(); writes a GIF."""
    vqgan.eval()
    outputs, scores = reconstruct(vqgan, clips, batch_size, autocast)
    vqgan.train()
    pairs = np.concatenate([clips[:8], outputs[:8]], axis=2)                 # original above
    save_grid(path, pairs, columns=len(pairs))
    return scores

def main():
    cfg = parse_flags(Config, PRESETS)
    path = Path(cfg.out or f"runs/{run_name(cfg.data)}") / "vqgan.pt"
    device, autocast, scaler = start(cfg)
    scale = scaler.scale
    share, micro_batches = divide_batch(cfg.batch_size, cfg.grad_accum_steps)
    fraction = 1 / len(micro_batches)
    checkpoint = resume(path, cfg, MAY_CHANGE)

    # data
    clip_format = cfg.size, cfg.frames, cfg.stride
    with main_process_first():
        train = Videos(cfg.data, cfg.data_dir, "train", *clip_format, cfg.flip, cfg.crop)
        test = Videos(cfg.data, cfg.data_dir, "test", *clip_format)
    test_clips, _ = test.fixed(cfg.eval_clips)
    def fetch(step):
        """This process's clips of a step, and the frame of each that VGG16 sees"""
        rng = np.random.default_rng((cfg.seed, step))
        clips, _ = train.batch(cfg.batch_size, rng, share)
        frame = rng.integers(cfg.frames, size=cfg.batch_size)
        return clips, torch.from_numpy(frame[share])

    # networks and optimisers
    torch.manual_seed(cfg.seed)
    vqgan = VQGAN(cfg).to(device)
    disc = Discriminator(cfg.frames, cfg.crop or cfg.size, cfg.disc_width).to(device)
    vgg = load_vgg().to(device) if cfg.perceptual else None
    muon, adam = make_optimizers(vqgan, cfg.lr)
    disc_opt = torch.optim.Adam(disc.parameters(), cfg.disc_lr, (0.5, 0.999), foreach=True)
    learners = dict(
        model=vqgan,
        disc=disc,
        muon=muon,
        adam=adam,
        disc_opt=disc_opt,
        scaler=scaler)
    if cfg.compile:
        vqgan.compile(dynamic=False)

    # where an earlier run stopped; the steps at which phases begin were decided when it began
    first_step = restore(path, checkpoint, cfg, train, learners)
    phases = "vq_start", "disc_start", "gan_start"
    starts = {name: getattr(cfg, name) * cfg.steps for name in phases}
    if checkpoint:
        starts = checkpoint["starts"]

    batches = prefetch(fetch, first_step, cfg.steps)
    bar = progress(first_step, cfg.steps, "stage 1")
    for step in bar:
        # once in a while: evaluate, preview and save; stop if a signal asked for it
        stop = stop_requested(step)
        due = step % cfg.eval_every == 0 or step == cfg.steps
        if due and not RANK and (step == 0 or step > first_step):
            scores = evaluate_and_preview(vqgan, test_clips, autocast, cfg.batch_size,
                                          path.with_suffix(".gif"))
            bar.write(f"step {step}: {log(path, step, scores)}")
        if step > first_step and (due or stop):
            save_checkpoint(
                path, cfg, learners,
                step=step,
                starts=starts,
                fingerprint=train.fingerprint)
        if step == cfg.steps:
            break
        if stop:
            sys.exit(130)

        vqgan.quantizer.started = step >= starts["vq_start"]
        train_disc = cfg.gan + cfg.feature > 0 and step >= starts["disc_start"]
        use_gan = train_disc and step >= starts["gan_start"]

        # forward and backward, micro-batch by micro-batch; every random draw of a step follows from
        # (seed, step). Autoencoder and discriminator are separated at y: each learns from its own
        # losses only. The scaler multiplies all by the same number, with float16 only
        torch.manual_seed(cfg.seed * 1_000_003 + step)
        clips, frame = next(batches)
        rows = []
        for part in micro_batches:
            x = to_float(clips[part].to(device))                             # (B, 3, T, H, W)
            with autocast():
                y, _, vq_losses = vqgan(x)                                   # (B, 3, T, H, W)
                rec_losses = reconstruction_loss(x, y, vgg, frame[part].to(device))
            grad_y, = torch.autograd.grad(scale(weighted_sum(cfg, rec_losses)), y)
            losses = rec_losses | vq_losses
            if train_disc:
                fake = y.detach().requires_grad_()
                with autocast():
                    real_logits, real_features = disc(x)
                    fake_logits, fake_features = disc(fake)
                losses |= discriminator_loss(real_logits, fake_logits)
                disc_loss = scale(losses["disc"] * fraction)
                disc_loss.backward(inputs=[*disc.parameters()], retain_graph=use_gan)
            if use_gan:
                gan_losses = generator_loss(fake_logits, fake_features, real_features)
                grad_adv, = torch.autograd.grad(scale(weighted_sum(cfg, gan_losses)), fake)
                grad_y = join_gradients(grad_y, grad_adv, cfg.gan_ratio)
                losses |= gan_losses
            # one backward pass through decoder and encoder: from y, and from the VQ loss
            quantizer_loss = scale(weighted_sum(cfg, vq_losses) * fraction)
            torch.autograd.backward([y, quantizer_loss], [grad_y * fraction, None])
            rows.append(losses)

        # average the gradients of the processes, then one step of each optimiser
        average_gradients(vqgan, disc)
        lr = cfg.lr * cosine_lr(step, cfg.steps)
        updates = [(muon, lr), (adam, lr)]
        if train_disc:
            updates.append((disc_opt, cfg.disc_lr))
        for opt, rate in updates:
            opt.param_groups[0]["lr"] = rate
            scaler.step(opt)
            opt.zero_grad()
        scaler.update()

        # log
        if step % LOG_EVERY == 0:
            row = log(path, step, average_losses(rows) | vqgan.quantizer.health())
            bar.set_postfix(mse=row["mse"])
    print(f"done: {path}; beside it the log .jsonl, and reconstructions .gif")

# --------------------------------------------------------------------------------------------------
# the optimisers, of both stages

def cosine_lr(step, steps):
    """Factor of the learning rate: a cosine from 1 to 0, times a linear warm-up over 2% of the
    steps."""
    warm_up = min(1, (step + 1) / (0.02 * steps + 1))
    return warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))

class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), scaled to the size of Adam's
    (Liu et al. 2025, eq. 4).

    All directions of a kernel, seen as a matrix (out, in * kernel), get the same step, not only
    those with a large gradient. torch.optim.Muon takes matrices only; here nearly every parameter
    is a convolution kernel.
    """
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        updates = defaultdict(list)                              # by the smaller side
        for p in group["params"]:
            if p.grad is None:                                   # frozen, or not used
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            m = state["momentum"]
            m.lerp_(p.grad, 1 - 0.95)
            u = p.grad.lerp(m, 0.95)                                         # Nesterov
            u = u.reshape(len(p), -1)                                        # (out, in * kernel)
            updates[min(u.shape)].append((p, u))
        for pairs in updates.values():
            params, matrices = zip(*pairs)
            for p, u in zip(params, orthogonalize(matrices)):
                step_size = group["lr"] * 0.2 * max(u.shape) ** 0.5
                p.sub_(u.view_as(p), alpha=step_size)

def orthogonalize(matrices):
    """About U V' of each matrix u = U S V', its singular value decomposition: all singular values
    become roughly 1. The smaller side of all matrices must be the same.

    Five iterations u <- p(u u') u with the quintic of Jordan et al. 2024, in float32. To save time
    the small square matrices p, of all u at once, are multiplied together first, and u, often ten
    times as long, once at the end.
    """
    units = [u / (u.norm() + 1e-7) for u in matrices]
    squares = [u @ u.mT if len(u) <= u.shape[1] else u.mT @ u for u in units]
    a = torch.stack(squares)                                                 # (., m, m)
    eye = torch.eye(a.shape[-1], device=a.device)
    q = eye
    for _ in range(5):
        p = 3.4445 * eye - 4.7750 * a + 2.0315 * a @ a
        q = p @ q
        a = p @ a @ p                                            # u u' of the next u; all commute
    return [q_u @ u if len(u) <= u.shape[1] else u @ q_u for q_u, u in zip(q, units)]

def make_optimizers(model, lr):
    """Muon for kernels and matrices; Adam for biases, gains, embeddings and the codebook -> both"""
    layers = nn.Conv2d, nn.Conv3d, nn.Linear
    kernels = [m.weight for m in model.modules() if isinstance(m, layers)]
    ids = {id(p) for p in kernels}
    others = [p for p in model.parameters() if id(p) not in ids]
    adam = torch.optim.Adam(others, lr, (0.9, 0.99), foreach=True)   # 3 times as fast on a CPU
    return Muon(kernels, lr), adam

# --------------------------------------------------------------------------------------------------
# borrowed: VGG16 (Simonyan & Zisserman 2015), for the perceptual loss

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"   # 553 MB; sha256 397923af...

VGG16_CHANNELS = (                   # of each convolution; 0: max pooling
    64, 64, 0,
    128, 128, 0,
    256, 256, 256, 0,
    512, 512, 512, 0,
    512, 512, 512,
)

class VGG16(nn.Module):
    """Perceptual distance of frames (N, 3, H, W) in [-1, 1]: the squared distance of
    channel-normalised features, averaged over the positions and over the layers relu 1_2, 2_2, 3_3,
    4_3 and 5_3. LPIPS (Zhang et al. 2018) sums over the layers and learns weights of the channels,
    which are equal here."""
    def __init__(self):
        super().__init__()
        layers = []
        C = 3
        for D in VGG16_CHANNELS:
            if D:
                layers += [nn.Conv2d(C, D, 3, padding=1), nn.ReLU()]
                C = D
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def normalized_features(self, x):
        """Yield the five features (N, D, H, W), of length 1 along D."""
        mean = x.new_tensor([0.485, 0.456, 0.406]).view(3, 1, 1)             # of ImageNet's pixels
        std = x.new_tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        h = (x * 0.5 + 0.5 - mean) / std
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in (3, 8, 15, 22, 29):                          # relu 1_2, 2_2, 3_3, 4_3, 5_3
                yield F.normalize(h.float(), dim=1, eps=1e-6)

    def forward(self, x, y):
        with torch.no_grad():                                    # only y gets a gradient
            targets = list(self.normalized_features(x))
        distance = 0
        for target, feature in zip(targets, self.normalized_features(y)):
            squared = (target - feature).square().sum(1)                     # (N, H, W)
            distance = distance + squared.mean()
        return distance / len(targets)

def load_vgg():
    """VGG16 with torchvision's ImageNet weights, frozen; they are downloaded once."""
    try:
        with main_process_first():
            state = torch.hub.load_state_dict_from_url(VGG_URL, check_hash=True, weights_only=True)
    except OSError as e:
        raise UserError(f"cannot download {VGG_URL} ({e}): put the file into {torch.hub.get_dir()}"
                        "/checkpoints, or leave the perceptual loss out with --perceptual 0")
    weights = {k: v for k, v in state.items() if k.startswith("features.")}
    vgg = VGG16()
    vgg.load_state_dict(weights)
    return vgg.eval().requires_grad_(False)

if __name__ == "__main__":
    run_main(main)
