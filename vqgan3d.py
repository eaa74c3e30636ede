"""Stage 1: a 3D VQGAN. It compresses a video to a small grid of codes and paints it back.

    video (3, 16, 128, 128) -> encoder -> z (6, 4, 32, 32) -> nearest codes -> decoder -> video

    python vqgan3d.py                                        # the toy, on anything (CPU: about 3 minutes)
    python vqgan3d.py --data sky                             # 16 x 128 x 128, one GPU
    torchrun --nproc_per_node 4 vqgan3d.py --data sky        # four of them, a part of each batch on each
    python vqgan3d.py --data sky --steps 300 --batch_size 2 --width 32 --perceptual 0 --device cpu

It is trained by five losses, each a named term whose weight is a flag:
    mse         the pixels                                          perceptual  VGG16's features of single frames
    vq          codebook and commitment (van den Oord et al. 2017)  gan         a DCGAN discriminator, in three dimensions
    feature     matching of the discriminator's internal features
Writes runs/<data>/: vqgan.pt (the same command again resumes from it, bit for bit), vqgan.jsonl (the log), vqgan.gif (held-out
clips over their reconstructions, remade at every evaluation).
"""
import atexit, fcntl, json, math, os, resource, signal, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.nn.functional import all_gather, all_reduce
from tqdm import tqdm
from data import UserError, Videos, first_line, parse, read_json, run, run_name, save_grid, to_float, to_uint8

@dataclass
class Config:
    data: str = "toy"             # toy, sky, ucf101, or a folder of videos
    data_dir: str = "datasets"    # where the raw sets and the caches lie
    out: str = ""                 # folder of this run; empty: runs/<data>
    size: int = 128               # pixels a side
    frames: int = 16              # frames of a clip
    stride: int = 1               # source frames from one frame of a clip to the next
    crop: int = 0                 # train on random squares of so many pixels a side, more of them for the same time; 0: on whole frames
    flip: bool = False            # mirror half of the training clips; never where a class means a direction
    # the network
    down: tuple = (4, 4, 4)       # downsampling in time, height and width: powers of two
    width: int = 64               # channels at the finest level; each coarser one has three times as many, 384 at most
    blocks: int = 2               # residual blocks at each level, on each side
    codes: int = 4096             # entries of the codebook
    code_dim: int = 6             # channels of the latent; a low dimension keeps all codes in use
    # the losses' weights
    mse: float = 1.0              # squared error of the pixels
    perceptual: float = 0.03      # distance of VGG16 features; 0 leaves VGG16 out
    codebook: float = 1.0         # moves the codes to the encoder's outputs
    commitment: float = 0.25      # keeps the encoder's outputs near their codes
    gan: float = 0.1              # the generator's half of the DCGAN game; with --feature 0 too there is no discriminator
    feature: float = 1.0          # L1 between the discriminator's features of video and reconstruction
    gan_ratio: float = 0.3        # gan and feature together push the pixels at most this fraction as hard as mse and perceptual
    # training
    steps: int = 50_000           # updates of the autoencoder
    vq_start: float = 0.1         # the latents pass unquantised for this part of the steps; then the codebook starts from data
    disc_start: float = 0.5       # the discriminator begins to learn after this part of the steps ...
    gan_start: float = 0.6        # ... and from here its judgement reaches the generator
    disc_width: int = 64          # channels of the discriminator's first layer
    batch_size: int = 8           # clips a step
    accumulate: int = 1           # parts that a batch is computed in, one after the other, to save memory
    lr: float = 2e-3              # peak learning rate of Muon and Adam: 2% linear warm-up, then cosine to zero
    disc_lr: float = 2e-4         # the discriminator's Adam, constant (DCGAN's value)
    seed: int = 0                 # everything random follows from (seed, step)
    # running
    vgg: str = ""                 # VGG16 weights (.pth or .npz); empty: torchvision's, downloaded once, hash checked
    eval_every: int = 2000        # steps between evaluations, previews and checkpoints
    eval_clips: int = 64          # held-out clips of an evaluation
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (bfloat16 where the hardware multiplies it), float32, bfloat16
    compile: str = "auto"         # torch.compile: auto (on a GPU), on, off
    fresh: bool = False           # start anew instead of resuming

PRESETS = {
    "toy":    dict(width=32, codes=2048, perceptual=0.0, steps=3000, disc_start=0.75, gan_start=0.8, batch_size=4, disc_width=16, eval_every=500, eval_clips=128),
    "sky":    dict(),
    "ucf101": dict(),
}
MAY_CHANGE = {"data_dir", "out", "steps", "accumulate", "vgg", "eval_every", "eval_clips", "device", "compile", "fresh"}   # and still be the same run

# ----------------------------------------------------------------------------------------------------------------------
# the autoencoder: convolutions factorised into space and time, on patches

class Norm(nn.Module):
    """Layer norm over the channels of each position. No place sees the statistics of another, so that the decoder gives the
    same frames whatever the length of the video around them."""
    def __init__(self, C):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(C)), nn.Parameter(torch.zeros(C))
    def forward(self, x):                                                     # (B, C, T, H, W)
        gain, bias = self.gain.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):                    # stay in x's dtype: this is bound by memory
            return F.layer_norm(x.movedim(1, -1), gain.shape, gain, bias).movedim(-1, 1)

class Conv(nn.Conv3d):
    """Over exactly two frames oneDNN's padding of a time kernel makes nonsense of bfloat16 gradients (torch 2.13): pad by hand."""
    def forward(self, x):
        if x.shape[2] == 2 and self.padding[0]:
            return F.conv3d(F.pad(x, (0, 0, 0, 0, 1, 1)), self.weight, self.bias, self.stride, (0, *self.padding[1:]))
        return super().forward(x)

class Linear(nn.Linear):
    """A 1x1x1 convolution as the matrix product that it is: oneDNN's convolution makes NaN of the bfloat16 gradients of wide
    ones on CPUs with AMX (torch 2.13)."""
    def forward(self, x):                                                     # (B, C, T, H, W)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)

class Block(nn.Module):
    """Residual block: a convolution in space, then one in time."""
    def __init__(self, C):
        super().__init__()
        self.norm = Norm(C)
        self.space, self.time = Conv(C, C, (1, 3, 3), padding=(0, 1, 1)), Conv(C, C, (3, 1, 1), padding=(1, 0, 0))
        nn.init.zeros_(self.time.weight)                                      # the block starts as the identity
    def forward(self, x):                                                     # (B, C, T, H, W)
        return x + self.time(F.silu(self.space(self.norm(x))))

class Down(nn.Module):
    """Cuts patches and makes channels of them: (B, C, T, H, W) -> (B, D, T / pt, H / ph, W / pw)"""
    def __init__(self, C, D, p):
        super().__init__()
        self.p, self.proj = p, Linear(C * math.prod(p), D)
    def forward(self, x):
        (B, C, T, H, W), (pt, ph, pw) = x.shape, self.p
        x = x.movedim(1, -1).view(B, T // pt, pt, H // ph, ph, W // pw, pw, C)   # channels last, as they lie in memory
        return self.proj(x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4).movedim(-1, 1))

class Up(nn.Module):
    """Makes patches of channels and puts them together: the inverse of Down."""
    def __init__(self, C, D, p):
        super().__init__()
        self.p, self.proj = p, Linear(C, D * math.prod(p))
    def forward(self, x):
        (B, _, T, H, W), (pt, ph, pw) = x.shape, self.p
        x = self.proj(x).movedim(1, -1).view(B, T, H, W, pt, ph, pw, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)   # (B, T, pt, H, ph, W, pw, D)
        return x.reshape(B, T * pt, H * ph, W * pw, -1).movedim(-1, 1)

class Quantizer(nn.Module):
    """Nearest-neighbour quantisation with a learned codebook (van den Oord et al. 2017, eq. 1-3), in float32.

    Until it is started it lets z pass. At its first step the codebook takes latents of that batch for its codes; later a code
    that is hardly ever used moves to a random latent of the batch at hand. All of that state is in buffers: it is saved, and a
    resumed run does not initialise again.
    """
    def __init__(self, codes, code_dim):
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(codes, code_dim))
        self.register_buffer("started", torch.tensor(False))
        self.register_buffer("usage", torch.zeros(codes))                     # moving average of uses; 1 is the average code

    def forward(self, z):
        """z (B, D, T, H, W) -> z_q likewise, its gradient going straight to z; codes (B, T, H, W); codebook, commitment loss"""
        B, D, T, H, W = z.shape
        if not self.started:
            return z, torch.zeros(B, T, H, W, dtype=torch.long, device=z.device), (z.new_zeros(()), z.new_zeros(()))
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().movedim(1, -1).reshape(-1, D)                    # (N, D)
            if self.training:
                self.revive(flat.detach())
            # |z - e|^2 for all pairs (N, K), less |z|^2, which is the same for all codes; so many rows at a time as the cache holds
            part, norms = max(1, 2 ** 21 // len(self.codebook)), self.codebook.square().sum(1)
            codes = torch.cat([torch.addmm(norms, rows, self.codebook.T, alpha=-2).min(1).indices for rows in flat.split(part)])   # (N,)
            e = F.embedding(codes, self.codebook)                             # (N, D)
            losses = F.mse_loss(e, flat.detach()), F.mse_loss(flat, e.detach())
            if self.training:
                count = total(torch.bincount(codes, minlength=len(self.codebook)).float())
                self.usage.lerp_(count * (len(count) / (len(codes) * WORLD)), 0.02)
            z_q = flat + (e - flat).detach()                                  # straight through: dz_q / dz = 1
        return z_q.view(B, T, H, W, D).movedim(-1, 1), codes.view(B, T, H, W), losses

    @torch.no_grad()
    def revive(self, flat):
        """Move the codes that are hardly used, at the first call all of them, to random latents (N, D)."""
        flat = torch.cat(all_gather(flat.contiguous())) if WORLD > 1 else flat   # of all processes
        dead = self.usage < 0.05
        pick = torch.randint(len(flat), self.usage.shape, device=flat.device)
        jitter = 0.01 * flat.std(0) * torch.randn_like(self.codebook)         # there may be fewer latents than codes
        self.codebook.copy_(torch.where(dead[:, None], flat[pick] + jitter, self.codebook))
        self.usage.masked_fill_(dead, 1.0)

class VQGAN(nn.Module):
    """encode(x) -> z, continuous; quantize(z) -> (z_q, codes, losses); decode(z_q) -> x. x (B, 3, T, H, W) in [-1, 1],
    z (B, code_dim, T / down, H / down, W / down)."""
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if len(c.down) != 3 or any(d < 1 or d & (d - 1) for d in c.down):
            raise UserError(f"--down {','.join(map(str, c.down))}: three powers of two are wanted, as in 4,8,8")
        for side in (c.size, c.crop or c.size):
            if c.frames % c.down[0] or side % c.down[1] or side % c.down[2]:
                raise UserError(f"{c.frames} frames of {side} x {side} cannot be divided by --down {','.join(map(str, c.down))}: "
                                "change --frames, --size, --crop or --down")
        levels = max(1, int(math.log2(max(c.down))))
        # down (4, 8, 8) takes strides (1, 2, 2), (2, 2, 2), (2, 2, 2): time, which moves little, is halved last
        strides = [tuple(2 if d >= 2 ** (levels - i) else 1 for d in c.down) for i in range(levels)]
        widths = [min(c.width * 3 ** i, max(c.width, 384)) for i in range(levels)]
        encoder, decoder, last = [], [], 3
        for stride, C in zip(strides, widths):                                # a stage: patches to channels, then blocks
            encoder += [Down(last, C, stride), *(Block(C) for _ in range(c.blocks))]
            decoder = [*(Block(C) for _ in range(c.blocks)), Up(C, last, stride)] + decoder
            last = C
        self.encoder = nn.Sequential(*encoder, Norm(C), Linear(C, c.code_dim))
        self.quantizer = Quantizer(c.codes, c.code_dim)
        self.decoder = nn.Sequential(Conv(c.code_dim, C, 3, padding=1), *decoder)
        self.to(memory_format=torch.channels_last_3d)                         # the layout that convolutions are fastest in

    def encode(self, x):
        return self.encoder(x.contiguous(memory_format=torch.channels_last_3d)).float()

    def quantize(self, z):
        return self.quantizer(z)

    def decode(self, z_q):
        return self.decoder(z_q.contiguous(memory_format=torch.channels_last_3d)).float()

    def forward(self, x):
        z_q, codes, losses = self.quantize(self.encode(x))
        return self.decode(z_q), codes, losses

    def compile(self, **how):
        """torch.compile of encode and decode, each as one piece; of an nn.Sequential it would compile every block by itself."""
        self.encode, self.decode = torch.compile(self.encode, **how), torch.compile(self.decode, **how)

# ----------------------------------------------------------------------------------------------------------------------
# the discriminator

class BatchNorm(nn.BatchNorm3d):
    """Batch norm over the clips of all processes, so that the game is the same on any number of GPUs."""
    def forward(self, x):
        if WORLD == 1:
            return super().forward(x)
        axes, shape, n = (0, 2, 3, 4), (1, -1, 1, 1, 1), x.numel() // x.shape[1] * WORLD
        x = x.float()
        x = x - (total(x.sum(axes)) / n).view(shape)
        scale = self.weight * (total(x.square().sum(axes)) / n + self.eps).rsqrt()
        return x * scale.view(shape) + self.bias.view(shape)

class Discriminator(nn.Module):
    """DCGAN's discriminator (Radford et al. 2016) with 4x4x4 kernels: stride 2, batch norm except in the first and the last
    layer, LeakyReLU 0.2, weights N(0, 0.02), one logit. x (B, 3, T, H, W) -> logit (B,), list of internal features."""
    def __init__(self, frames, size, width):
        super().__init__()
        shape, C, layers = (frames, size, size), 3, []
        while max(shape) > 4:                                                 # an axis of 4 is left alone till all are there
            D = min(width * 2 ** len(layers), 8 * width)
            halve = [n > 4 for n in shape]
            conv = Conv(C, D, tuple(4 if h else 3 for h in halve), tuple(2 if h else 1 for h in halve), 1, bias=not layers)
            norm = BatchNorm(D, track_running_stats=False) if layers else nn.Identity()
            layers.append(nn.Sequential(conv, norm, nn.LeakyReLU(0.2)))
            shape, C = tuple(n // 2 if h else n for n, h in zip(shape, halve)), D
        self.layers, self.head = nn.ModuleList(layers), nn.Conv3d(C, 1, shape)
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.normal_(m.weight, 0, 0.02)
        self.to(memory_format=torch.channels_last_3d)

    def forward(self, x):
        x, features = x.contiguous(memory_format=torch.channels_last_3d), []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return self.head(x).flatten().float(), features

# ----------------------------------------------------------------------------------------------------------------------
# training

def schedule(step, steps):
    """Factor of the learning rate: linear warm-up over 2% of the steps, then a cosine to zero."""
    return min(1, (step + 1) / (0.02 * steps + 1)) * 0.5 * (1 + math.cos(math.pi * min(1, step / max(1, steps))))

def psnr(x, y):
    """PSNR in dB of clips in [-1, 1], clipped, averaged over the clips."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().flatten(1).mean(1) / 4    # of a range of 1
    return (-10 * mse.clamp_min(1e-10).log10()).mean().item()

@torch.no_grad()
def validate(vqgan, clips, autocast, batch_size):
    """Held-out uint8 clips through the bottleneck and back: dict(psnr, usage, perplexity), reconstructions (float)."""
    vqgan.eval()
    x, device = to_float(clips), vqgan.quantizer.usage.device
    with autocast():
        y, codes = map(torch.cat, zip(*([v.cpu() for v in vqgan(part.to(device))[:2]] for part in x.split(batch_size))))
    p = torch.bincount(codes.flatten(), minlength=vqgan.config.codes).double() / codes.numel()
    vqgan.train()
    return dict(psnr=psnr(x, y), usage=(p > 0).double().mean().item(), perplexity=torch.special.entr(p).sum().exp().item()), y

def main():
    cfg = parse(Config, PRESETS)
    out = Path(cfg.out or f"runs/{run_name(cfg.data)}")
    path, log = out / "vqgan.pt", out / "vqgan.jsonl"
    alone = lock(path)
    device, autocast = pick_device(cfg.device, cfg.dtype)
    torch.manual_seed(cfg.seed)

    # nets and optimisers
    vqgan = VQGAN(cfg).to(device)
    disc = Discriminator(cfg.frames, cfg.crop or cfg.size, cfg.disc_width).to(device) if cfg.gan or cfg.feature else None
    vgg = cast_once(load_vgg(cfg.vgg).to(device), autocast) if cfg.perceptual else None
    opts = optimisers(vqgan, cfg.lr)
    disc_opt = adam(disc.parameters(), cfg.disc_lr, (0.5, 0.999)) if disc else None
    if compiles(cfg.compile, device):
        for module in (vqgan, disc, vgg):
            module and module.compile(dynamic=False)

    learners = dict(model=vqgan, opts=opts, disc=disc, disc_opt=disc_opt)     # what a checkpoint holds the state of
    start = restore(learners, resume(path, cfg, MAY_CHANGE, log))

    with one_after_the_other():
        train = Videos(cfg.data, cfg.data_dir, "train", cfg.size, cfg.frames, cfg.stride, cfg.flip, cfg.crop)
        test = Videos(cfg.data, cfg.data_dir, "test", cfg.size, cfg.frames, cfg.stride)
    clips, mine = test.fixed(cfg.eval_clips)[0], parts(cfg.batch_size, cfg.accumulate)
    batches = ahead(lambda step: train.batch(cfg.batch_size, np.random.default_rng((cfg.seed, step)))[0], range(start, cfg.steps))
    print(f"{sum(p.numel() for p in vqgan.parameters()) / 1e6:.1f}M parameters, latent {cfg.code_dim} x " +
          " x ".join(str(n // d) for n, d in zip((cfg.frames, cfg.size, cfg.size), cfg.down)) + f", {device}, writing {out}/")

    asked_to_stop, recent, clock = catch_signals(device), [], time.time()
    bar = tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, desc="stage 1", mininterval=1 if sys.stderr.isatty() else 20, disable=RANK > 0)
    for step in bar:
        if not RANK and (step % cfg.eval_every == 0 or step == cfg.steps):
            scores, y = validate(vqgan, clips, autocast, cfg.batch_size)
            check_finite([*recent, scores], step, path)
            save_grid(out / "vqgan.gif", np.concatenate([clips[:8], to_uint8(y[:8])], axis=2), columns=min(8, len(y)))
            write_log(log, dict(step=step, **scores))
            bar.write(f"step {step}: held-out PSNR {scores['psnr']:.2f} dB, codes used {scores['usage']:.1%}, perplexity {scores['perplexity']:.0f}")
            if step > start:
                save(path, dict(config=vars(cfg), step=step, **learners))
            recent, clock = [], time.time()                                   # training time alone is timed
        if step == cfg.steps:
            break
        torch.manual_seed(cfg.seed * 1_000_003 + step)                        # every draw of this step follows from here
        lr = cfg.lr * schedule(step, cfg.steps)
        if step >= cfg.vq_start * cfg.steps:
            vqgan.quantizer.started.fill_(True)

        batch, waited = next(batches)                                         # uint8 (B, T, H, W, 3)
        frame = torch.randint(cfg.frames, (cfg.batch_size,))                  # one of each clip, for the perceptual loss
        learn, play = (disc and step >= start * cfg.steps for start in (cfg.disc_start, cfg.gan_start))
        losses = {}
        for part in mine:
            x = to_float(batch[part].to(device, non_blocking=True))           # (B, 3, T, H, W)

            # the autoencoder, and what the reconstruction losses ask of its pixels y
            with autocast():
                y, codes, (codebook, commitment) = vqgan(x)
            terms = dict(mse=F.mse_loss(y, x), codebook=codebook, commitment=commitment)
            loss = cfg.mse * terms["mse"]
            if vgg:
                with autocast():
                    i = range(len(x)), slice(None), frame[part]               # the same frame of both
                    terms["perceptual"] = vgg(x[i], y[i])
                loss = loss + cfg.perceptual * terms["perceptual"]
            pull, = torch.autograd.grad(loss, y)

            # the discriminator looks at both. What it sees is cut off from the autoencoder, which will feel nothing but the push
            if learn or play:
                seen = y.detach().requires_grad_()
                with autocast():
                    (real, real_features), (fake, fake_features) = disc(x), disc(seen)
            if play:
                terms["gan"] = F.softplus(-fake).mean()                       # -log D(y): the non-saturating game
                terms["feature"] = sum(F.l1_loss(f.float(), r.float().detach()) for f, r in zip(fake_features, real_features)) / len(real_features)
                push, = torch.autograd.grad(cfg.gan * terms["gan"] + cfg.feature * terms["feature"], seen, retain_graph=True)
                # its arrival must not wreck the reconstruction: however it shouts, its gradient stays shorter than theirs
                length = total(torch.stack([pull.square().sum(), push.square().sum()])).sqrt()
                pull = pull + push * (cfg.gan_ratio * length[0] / length[1].clamp_min(1e-12)).clamp(max=1)
            if learn:                                                         # log D(x) + log(1 - D(y))
                terms["disc"] = F.softplus(-real).mean() + F.softplus(fake).mean()
                (terms["disc"] / len(mine)).backward(inputs=list(disc.parameters()))
                terms.update(D_real=real.sigmoid().mean(), D_fake=fake.sigmoid().mean())

            # one backward pass through decoder and encoder for all that was asked of the pixels, and for the codebook
            vq = cfg.codebook * codebook + cfg.commitment * commitment
            outputs, gradients = ([y, vq], [pull, torch.ones_like(vq)]) if vq.requires_grad else ([y], [pull])
            torch.autograd.backward(outputs, [g / len(mine) for g in gradients])
            for k, v in terms.items():
                losses[k] = losses.get(k, 0) + v.detach() / len(mine)
        average_gradients(vqgan, disc)
        update(opts, lr)
        update([disc_opt] if disc else [], cfg.disc_lr)

        recent.append(losses | dict(waiting=waited))
        stop = asked_to_stop(step)
        if step % 20 == 0 or stop:
            look(recent, step, path, clock, device, bar, lr=lr, dead_codes=(vqgan.quantizer.usage < 0.05).sum().item())
            recent, clock = [], time.time()
        if stop:
            save(path, dict(config=vars(cfg), step=step + 1, **learners))
            raise UserError(f"stopped after step {step + 1} and saved {path}; the same command goes on from there")
    print(f"done: {path}, the log {log}, held-out clips over their reconstructions {out / 'vqgan.gif'}")

def load_vqgan(path, device="cpu"):
    """The trained stage 1 of a checkpoint, frozen, in eval mode; its settings are in .config."""
    return build_vqgan(load(path, device), device)

def build_vqgan(state, device="cpu"):
    try:
        vqgan = VQGAN(Config(**state["config"]))
        vqgan.load_state_dict(state["model"])
    except (TypeError, KeyError, AttributeError, RuntimeError) as e:
        raise UserError(f"this checkpoint does not fit stage 1 as it is written now ({first_line(e)}): train anew with --fresh")
    return vqgan.to(device).eval().requires_grad_(False)

# ----------------------------------------------------------------------------------------------------------------------
# the optimiser of the kernels

class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), scaled to the size of Adam's (Liu et al. 2025).

    All directions of a kernel, seen as a matrix (out, in * kernel), get the same step, not only those with a large gradient.
    torch.optim.Muon does this for matrices only; here nearly every parameter is a convolution kernel.
    """
    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        group, kernels = self.param_groups[0], {}                             # kernels of one shape are done at once: on a GPU that counts
        for p in group["params"]:
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            m.lerp_(p.grad, 1 - group["momentum"])
            u = p.grad.lerp(m, group["momentum"]).reshape(len(p), -1)         # Nesterov; (out, in * kernel)
            kernels.setdefault(u.shape, []).append((p, u))
        for shape, pairs in kernels.items():
            for (p, _), step in zip(pairs, orthogonalise(torch.stack([u for _, u in pairs]))):
                p.add_(step.reshape(p.shape), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

def orthogonalise(u):
    """Newton-Schulz iteration towards the nearest matrices with singular values of about 1; u (..., m, n).

    Each step is u <- p(u u') u. All these p are polynomials in the first u u', a small matrix, so they are multiplied together
    there, and u itself, which is often ten times as long, is touched only at the beginning and the end.
    """
    if u.shape[-2] > u.shape[-1]:
        return orthogonalise(u.mT).mT
    u = u.float() / (u.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, q, eye = u @ u.mT, None, torch.eye(u.shape[-2], device=u.device)
    for i in range(5):
        p = 3.4445 * eye - 4.7750 * a + 2.0315 * a @ a                        # the quintic of Jordan et al.
        q = p @ q if i else p
        a = p @ a @ p if i < 4 else None                                      # of the next u; they commute
    return q @ u

MATRICES = nn.Conv2d, nn.Conv3d, nn.Linear

def optimisers(model, lr):
    """Muon for kernels and matrices; Adam for biases, gains, embeddings and the codebook, whose rows are points, not maps."""
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, MATRICES)}
    matrices, others = ([p for p in model.parameters() if (id(p) in kernels) == wanted] for wanted in (True, False))
    return [Muon(matrices, lr), adam(others, lr, (0.9, 0.99))]

def adam(parameters, lr, betas):
    """Adam in the form that is fastest where the parameters are."""
    parameters = list(parameters)
    return torch.optim.Adam(parameters, lr, betas, **{"fused" if parameters[0].is_cuda else "foreach": True})

# ----------------------------------------------------------------------------------------------------------------------
# plumbing, for both stages: device, processes, checkpoints, log. The lesson ends above

# torchrun starts several processes and tells each its number; without it there is one, and none of this does anything
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def pick_device(device="auto", dtype="auto"):
    """-> torch.device, and a function that opens the autocast context of the dtype; "auto" takes what is fastest here."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise UserError(f"--dtype {dtype}: auto, float32 or bfloat16 is wanted")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda" and WORLD > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device} cannot be used: {first_line(e)}. Try --device cpu")
    fast = {"cuda": lambda: torch.cuda.get_device_capability(device) >= (8, 0),   # where the hardware multiplies it: GPUs since 2020
            "cpu": lambda: any(getattr(torch.cpu, f"_is_{f}_supported", bool)() for f in ("amx_tile", "avx512_bf16"))}
    low = dtype == "bfloat16" or dtype == "auto" and fast.get(device.type, bool)()
    if WORLD > 1 and not dist.is_initialized():                               # the processes find one another
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))   # the others wait while one decodes
        atexit.register(dist.destroy_process_group)
        if RANK:                                                              # only process 0 speaks, and writes
            sys.stdout = open(os.devnull, "w")
    # a context for each forward: autocast keeps the weights it has cast until it closes, stale once the optimiser has stepped
    return device, lambda: torch.autocast(device.type, torch.bfloat16, enabled=low)

def cast_once(module, autocast):
    """A frozen network's kernels and matrices in the type to which autocast would otherwise cast them at every call."""
    with autocast():
        device = next(module.parameters()).device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    return module.apply(lambda m: m.to(dtype) if isinstance(m, MATRICES) else m)

def total(x):
    """Sum over the processes; gradients flow through it."""
    return all_reduce(x) if WORLD > 1 else x

def average_gradients(*modules):
    """All processes go on with the mean of their gradients: one message for all of them."""
    grads = [p.grad for m in modules if m and WORLD > 1 for p in m.parameters() if p.grad is not None]
    if grads:
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        for g, mean in zip(grads, (flat / WORLD).split([g.numel() for g in grads])):
            g.copy_(mean.view_as(g))

@contextmanager
def one_after_the_other():
    """Process 0 first, so that what it leaves on disk is there for the others."""
    RANK and dist.barrier()
    yield
    RANK or WORLD > 1 and dist.barrier()

def parts(n, accumulate):
    """Slices of a batch of n: this process's share, in `accumulate` parts."""
    size, rest = divmod(n, WORLD * accumulate)
    if rest or accumulate < 1:
        raise UserError(f"--batch_size {n} cannot be divided among {WORLD} process(es) x --accumulate {accumulate}")
    return [slice(i * size, (i + 1) * size) for i in range(RANK * accumulate, (RANK + 1) * accumulate)]

def ahead(fetch, steps):
    """fetch(step) for each of the steps, and the seconds waited for it; a thread has the next one ready while this one is used."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(fetch, steps[0]) if steps else None
        for step in steps:
            now, following, tick = following, thread.submit(fetch, step + 1), time.time()
            yield now.result(), time.time() - tick

def compiles(flag, device):
    """Whether to use torch.compile: --compile, and a trial that shows whether there is a compiler that works."""
    if flag not in ("auto", "on", "off"):
        raise UserError(f"--compile {flag}: auto, on or off is wanted")
    if flag == "off" or flag == "auto" and device.type != "cuda":
        return False
    try:                                                                      # with CUDA graphs, where there is CUDA: they begin at the third call
        f = torch.compile(lambda x: x.sin() + 1, mode="reduce-overhead")
        [f(torch.ones(8, device=device)) for _ in range(3)]
    except Exception as e:                                                    # no C compiler, no Triton
        print(f"torch.compile does not work here ({first_line(e)}): going on without")
        return False
    torch._dynamo.config.suppress_errors = True                               # what cannot be compiled runs as it is
    torch._dynamo.config.cache_size_limit = 64                                # shapes and modes of one network; the default 8 is soon passed
    torch._functorch.config.donated_buffer = False                            # the discriminator is passed backwards twice
    warnings.filterwarnings("ignore", "Dynamo detected a call to a .functools.lru_cache")
    return True

def lock(path):
    """Make the folder of path, and hold the returned file while training into it: a second process is refused. The system frees
    it, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    f = open(path.with_name(f".{path.stem}.lock"), "w")
    try:
        RANK or fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is training {path}: wait for it, stop it, or give another --out")
    return f

def save(path, state):
    """Write a checkpoint so that a crash at any moment leaves the old file or the new one, never half of one.

    state: plain values, networks, and under "opts" a list of optimisers; of networks and optimisers their state is written.
    """
    if RANK:
        return
    state = {k: [o.state_dict() for o in v] if k == "opts" else v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
    bad = [k for part in ("model", "ema", "disc") for k, v in (state.get(part) or {}).items() if not v.isfinite().all()]
    if bad:
        raise UserError(f"step {state['step']}: {bad[0]} is not finite; {path} still holds the last good step. Lower --lr, then run again")
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:                                      # torch turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {first_line(e)}. The checkpoint before it is intact: free some space, then run the same command again")

def load(path, device="cpu"):
    """Read a checkpoint without executing anything in it."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or not {"config", "step", "model"} <= set(state):
            raise ValueError("it is not one of ours")
        return state
    except FileNotFoundError:
        raise UserError(f"there is no {path}: train it first (python vqgan3d.py --data ..., then python diffusion.py --data ...)")
    except Exception as e:                                                    # a damaged or hostile file can raise anything
        raise UserError(f"{path} is not a usable checkpoint ({first_line(e)}): delete it, or train anew with --fresh")

def resume(path, cfg, may_change, log):
    """The state to go on from, or None. Refuses a checkpoint of another configuration; the log loses what came after it."""
    state, rows = load(path) if path.exists() and not cfg.fresh else None, []
    if state:
        differ = [f"--{k} {v} (now {getattr(cfg, k, None)})" for k, v in state["config"].items() if k not in may_change and getattr(cfg, k, None) != v]
        if differ:
            raise UserError(f"{path} was trained with {', '.join(differ)}: give the same flags, another --out, or --fresh to start anew")
        print(f"resuming {path} at step {state['step']}")
        for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
            row = read_json(line)                                             # None if it is damaged
            rows += [line + "\n"] if isinstance(row, dict) and type(row.get("step")) is int and row["step"] < state["step"] else []
    if not RANK:
        temporary = log.with_suffix(".tmp")
        temporary.write_text("".join(rows))
        os.replace(temporary, log)
    return state

def restore(learners, state):
    """Load into networks and optimisers what save() wrote of them -> the step to go on at"""
    for k, v in learners.items() if state else ():
        for one, saved in zip(v, state[k]) if k == "opts" else [(v, state[k])]:
            one and one.load_state_dict(saved)
    return state["step"] if state else 0

def update(opts, lr):
    for opt in opts:
        opt.param_groups[0]["lr"] = lr                                        # each has one group
        opt.step()
        opt.zero_grad()

def write_log(path, row):
    with open(os.devnull if RANK else path, "a") as f:
        f.write(json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}) + "\n")

def peak_memory(device):
    """Peak memory in GB: the GPU's where there is one, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9

def catch_signals(device):
    """-> a function of the step: did Ctrl-C or SIGTERM come, so that a loop should end after it and save? The second one kills.
    Several processes must agree on the step: every 20th they ask one another."""
    caught = []
    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)
    return lambda step: caught if WORLD == 1 else step % 20 == 0 and total(torch.tensor(float(len(caught)), device=device)).item()

def look(recent, step, path, clock, device, bar, **more):
    """recent: of each step up to this one its losses, all looked at here (every step would stall a GPU), and the seconds it waited
    for its batch. The log gets those of this step, what a step has cost since `clock`, and `more`."""
    check_finite(recent, step, path)
    losses, seconds = {k: float(v) for k, v in recent[-1].items() if k != "waiting"}, time.time() - clock
    write_log(path.with_suffix(".jsonl"), dict(step=step, **losses, **more, seconds_a_step=seconds / len(recent),
                                               waiting=sum(r["waiting"] for r in recent) / seconds, memory_gb=peak_memory(device)))
    first = next(iter(losses))
    bar.set_postfix({first: f"{losses[first]:.4f}", "GB": f"{peak_memory(device):.1f}"}, refresh=False)

def check_finite(recent, step, path):
    for at, losses in enumerate(recent, step + 1 - len(recent)):
        bad = [k for k, v in losses.items() if not math.isfinite(v)]
        if bad:
            raise UserError(f"step {at}: {', '.join(bad)} is not finite; {path} still holds the last good step. Lower --lr, or that loss's weight, then run again")

# ----------------------------------------------------------------------------------------------------------------------
# borrowed: VGG16 (Simonyan & Zisserman 2015), for the perceptual loss

VGG_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"            # 553 MB; the name carries the sha256's beginning

class VGG16(nn.Module):
    """Perceptual distance of frames (N, 3, H, W) in [-1, 1]: the mean squared difference of channel-normalised features after
    relu 1_2, 2_2, 3_3, 4_3 and 5_3, as in LPIPS (Zhang et al. 2018) but with all channels weighted alike."""
    def __init__(self):
        super().__init__()
        layers, C, self.taps = [], 3, {3, 8, 15, 22, 29}                      # in torchvision's numbering of `features`
        for D in (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512):
            layers += [nn.MaxPool2d(2)] if D == "pool" else [nn.Conv2d(C, C := D, 3, padding=1), nn.ReLU()]
        self.features = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def responses(self, x):
        h = (x * 0.5 + 0.5 - self.mean) / self.std
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                yield F.normalize(h.float(), dim=1, eps=1e-6)                 # (N, D, H, W)

    def forward(self, x, y):
        with torch.no_grad():                                                 # x is what y shall become
            wanted = list(self.responses(x))
        return sum((fx - fy).square().sum(1).mean() for fx, fy in zip(wanted, self.responses(y))) / len(wanted)

def load_vgg(path=""):
    """VGG16 with ImageNet weights, frozen: from a .pth or .npz file, or torchvision's, fetched once with its hash checked."""
    try:
        if not path:
            state = torch.hub.load_state_dict_from_url(VGG_URL, map_location="cpu", check_hash=True, weights_only=True)
        elif str(path).endswith(".npz"):
            with np.load(path, allow_pickle=False) as arrays:
                state = {k: torch.from_numpy(v).float() for k, v in arrays.items()}
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        vgg = VGG16()
        vgg.load_state_dict({k: v for k, v in state.items() if k.startswith("features.")})
    except Exception as e:                                                    # no network, a broken file, other names
        raise UserError(f"the perceptual loss needs VGG16's weights ({path or 'vgg16-397923af.pth'}: {first_line(e)}): download {VGG_URL} "
                        "and give --vgg PATH, or leave the loss out with --perceptual 0")
    return vgg.eval().requires_grad_(False)

if __name__ == "__main__":
    run(main)
