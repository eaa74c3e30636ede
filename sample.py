"""From noise to videos: draws from a trained system and paints what it drew.

    python sample.py                                        # the toy: a grid of videos, one row per class
    python sample.py --data sky --n 16 --mp4                # 16 videos of the model in runs/sky
    python sample.py --data ucf101 --classes Bend,JumpingJack --guidance 3
    python sample.py --data sky --n 2048 --grid 0           # enough for python evaluate.py --data sky
    python sample.py --frames 128                           # longer than the clips of training, window by window
    python sample.py --start clip.mp4 --n 4                 # four ways in which a given video may go on
    python sample.py --trajectory                           # how a video comes out of noise
    python sample.py --sheet 1,2,4                          # a row per class, a column per guidance scale
    python sample.py --data sky --reconstruct               # held-out clips through stage 1, no diffusion
    python sample.py --benchmark                            # seconds a video, against pixel-space diffusion

Writes runs/<data>/: samples.npy (uint8 N, T, H, W, 3), samples.json (how they were made, and the class asked for of each),
samples.gif (a grid of some), and with --mp4 a file per video in samples/.
"""
import functools, json, math, time
from dataclasses import dataclass
from pathlib import Path
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from data import SETS, UserError, Videos, new_array, parse, read_video, run, run_name, save_grid, to_float, to_uint8
import diffusion, vqgan3d
from diffusion import SAMPLERS, load_diffusion
from vqgan3d import cast_once, compiles, load_vqgan, peak_memory, pick_device, psnr

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
    eta: float = 0.0              # of ddim: from 0, no noise is added, to 1, as much as in ddpm
    frames: int = 0               # length of the videos, also beyond the training's; 0: the training's, or twice that with --start
    start: str = ""               # a video to go on from; its last frames stand at the beginning of each sample
    seed: int = 0                 # sample i is drawn with seed + i, whatever the batch it is in
    batch_size: int = 16          # videos at once
    grid: int = 64                # videos in the GIF, spread evenly over all; 0: none
    mp4: bool = False             # one mp4 per video as well
    trajectory: bool = False      # a GIF of how four samples came out of noise instead: a column per step
    sheet: str = ""               # guidance scales: a GIF of one sample per class (row) and scale (column) instead
    reconstruct: bool = False     # held-out clips over their reconstructions instead
    benchmark: bool = False       # time untrained networks of full size against pixel-space diffusion instead
    data_dir: str = "datasets"    # where the held-out clips lie
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "auto"           # auto (bfloat16 where the hardware multiplies it), float32, bfloat16
    compile: str = "auto"         # torch.compile, a minute before the first sample: auto (on a GPU, from 256 videos on), on, off

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
    save_grid(out / "reconstructions.gif", np.concatenate([clips, to_uint8(y)], axis=2), columns=min(8, len(y)))
    print(f"PSNR {psnr(to_float(clips), y):.2f} dB on {len(y)} held-out clips: {out}/reconstructions.gif, reconstructions.npy")

def as_given(system, frames):
    """Frames (N, 3, t, H, W) in [-1, 1] that are to be continued -> latents as the U-Net sees them.

    In training later frames stood after the given ones, and the encoder saw them. Here there are none yet: it sees the given
    ones backwards. With nothing there, its last latent would be biased, and a long video would change its colours.
    """
    if system.vqgan:
        frames = system.vqgan.encode(torch.cat([frames, frames.flip(2)], 2))[:, :, :frames.shape[2] // system.vqgan.config.down[0]]
    return (frames - system.mean) / system.std

@torch.no_grad()
def encode_start(system, path, autocast):
    """The last frames of a video file as the U-Net sees them: latents (1, C, up to T, H, W)"""
    frames, size, stride = system.clip
    clip = read_video(path, size)[::-stride][::-1]                                   # the last frame stays
    slot = frames // system.shape[1]                                                 # frames of one latent frame
    n = min(frames, len(clip)) // slot * slot
    if not n:
        raise UserError(f"--start {path} has {len(clip)} frames, and at least {slot} are needed")
    with autocast():
        return as_given(system, to_float(torch.from_numpy(clip[-n:].copy())[None]).to(system.device))

def renew(system, x, K):
    """The last K latent frames of x, decoded and encoded again: what the encoder makes of real frames is what the U-Net knows
    how to continue, and where generated latents differ from that, every window would add a little to the difference."""
    if not system.vqgan:
        return x[:, :, -K:]
    return as_given(system, system.decode(x[:, :, -system.shape[1]:]).clamp(-1, 1)[:, :, -K * system.vqgan.config.down[0]:])

@torch.no_grad()
def sample_long(system, seeds, labels, guidance, sampler, steps, autocast, progress=None, context=None, length=0):
    """System.sample of any length, (N, C, length, H, W); context (N, C, any, H, W): latents to begin with, which count for the length.

    The U-Net knows clips of T frames. What is longer is made window by window, each continuing the last half of what is there
    already, encoded anew; without guidance, because what is given knows its class, and guidance would push its colours on,
    window by window.
    """
    if length > system.shape[1] == 1:
        raise UserError("--frames: clips of a single latent frame leave no room for one to go on from; train with more --frames, or a smaller --down in time")
    T, streams = system.shape[1], [torch.Generator().manual_seed(s) for s in seeds]
    video = system.sample(streams, labels, guidance, sampler, steps, autocast, progress) if context is None else context
    while video.shape[2] < length:
        K = min(max(1, T // 2), video.shape[2])
        with autocast():
            given = video[:, :, -K:] if video is context else renew(system, video, K)        # (N, C, K, H, W)
        window = system.sample(streams, labels, min(guidance, 1.0), sampler, steps, autocast, progress, given)
        video = torch.cat([video, window[:, :, K:]], 2)
    return video[:, :, :length]

def reach(decoder):
    """Latent frames that its convolutions in time see to each side; frames that it makes of one"""
    halo, rate = 0, 1
    for layer in decoder:                                                            # from coarse to fine
        halo, rate = (halo, rate * layer.p[0]) if isinstance(layer, vqgan3d.Up) else (halo + 1 / rate, rate)
    return math.ceil(halo), rate

def decode_long(system, x, part):
    """System.decode of any length, `part` latent frames at a time, so that memory does not grow with it. Each part is decoded
    with all that the decoder can see on both sides: there is no seam."""
    videos, (halo, rate) = [], reach(system.vqgan.decoder if system.vqgan else ())
    for i in range(0, x.shape[2], part):
        start = max(0, i - halo)
        video = system.decode(x[:, :, start:i + part + halo])
        videos.append(video[:, :, (i - start) * rate:(i - start + part) * rate])
    return torch.cat(videos, 2)

def compile_system(system):
    """torch.compile, for sampling. On a GPU the U-Net becomes a CUDA graph besides: its hundreds of kernels start at once."""
    system.unet.compile(dynamic=False, mode="reduce-overhead")
    if system.vqgan:
        system.vqgan.compile(dynamic=False)

def trajectory(system, path, labels, guidance, cfg, sampler, steps, autocast):
    """Four samples, and x_0 as the network guesses it at eight of the steps, from noise (left) to the end (right)."""
    guesses = []
    system.sample(range(cfg.seed, cfg.seed + 4), labels, guidance, sampler, steps, autocast, lambda x, x0: guesses.append(x0))
    guesses = [guesses[i] for i in np.linspace(0, len(guesses) - 1, 8).round().astype(int)]
    with autocast():
        videos = np.stack([to_uint8(system.decode(z)) for z in guesses], 1)          # (4, 8, T, H, W, 3)
    save_grid(path, videos.reshape(-1, *videos.shape[2:]), columns=8)

def sheet(system, path, scales, cfg, sampler, steps, autocast):
    """The same noise for all: what guidance does to each class."""
    labels, rows = torch.arange(len(system.classes), device=system.device), []
    for scale in tqdm(scales, desc="guidance"):
        z = torch.cat([system.sample([cfg.seed] * len(y), y, scale, sampler, steps, autocast) for y in labels.split(cfg.batch_size)])
        with autocast():
            rows.append(np.concatenate([to_uint8(system.decode(part)) for part in z.split(cfg.batch_size)]))
    videos = np.stack(rows, 1)                                                       # (classes, scales, T, H, W, 3)
    save_grid(path, videos.reshape(-1, *videos.shape[2:]), columns=len(scales))

def benchmark(cfg, device, autocast):
    """The paper's speed table: 100 steps and the decoder of ours at 16 x 128 x 128, against the same U-Net on pixels at 16 x 64 x 64.

    The networks have the size of the sky preset and are untrained, which costs the same. On a CPU two steps are
    timed, and the hundred are fifty times as much. Each time is the mean and deviation of three after one for warming up.
    The share is that of what one large matrix product reaches on the same device in the same type.
    """
    def seconds(f):
        times = []
        for _ in range(4):
            device.type == "cuda" and torch.cuda.synchronize()
            start = time.perf_counter()
            f()
            device.type == "cuda" and torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return np.array(times[1:])
    def flops(f):
        with FlopCounterMode(display=False) as counter:
            f()
        return counter.get_total_flops()
    steps, rows, m = 100, [], torch.randn(8192 if device.type == "cuda" else 2048, 8192 if device.type == "cuda" else 2048, device=device)
    with autocast():
        peak = 2 * len(m) ** 3 / seconds(lambda: [m @ m for _ in range(8)]).min() * 8
    timed, batches = (steps, (1, 4, 16, 64)) if device.type == "cuda" else (2, (1, 4))
    stage2, compiled = diffusion.Config(**diffusion.PRESETS["sky"]), compiles(cfg.compile, device)
    print(f"{device}{'' if timed == steps else f', {timed} steps timed, the others extrapolated'}, a matrix product reaches {peak / 1e12:.2f} TFLOP/s; seconds a video, decoding included\n"
          f"{'':<40}{'batch':>6}{'GFLOP':>7}{'a step':>9}{'share':>7}{'decode':>9}{'GB':>6}{'100 steps':>17}{'ratio':>7}{'20 steps':>10}{'ratio':>7}")
    for kind, down in (("pixels, 16 x 64 x 64", None), ("latent, 16 x 128 x 128, down 4,4,4", (4, 4, 4)), ("latent, 16 x 128 x 128, down 4,8,8", (4, 8, 8))):
        vqgan = vqgan3d.VQGAN(vqgan3d.Config(**{**vqgan3d.PRESETS["sky"], "down": down})).to(device).eval() if down else None
        system = diffusion.System(stage2, vqgan, (16, 128 if down else 64, 1), None, device)
        system.unet.eval()
        if vqgan:
            vqgan.quantizer.started.fill_(True)                                      # or it would let everything pass
        with autocast():                                                             # before it is compiled, where nothing could be counted
            gflop = flops(lambda: system.unet(torch.randn(1, *system.shape, device=device), torch.zeros(1, dtype=torch.long, device=device))) / 1e9
        for module in (system.unet, *([vqgan.decoder] if vqgan else [])):
            cast_once(module.requires_grad_(False), autocast)
        compiled and compile_system(system)
        for batch in batches:
            compiled and torch.compiler.reset()                                       # graphs of other sizes would fill the memory
            device.type == "cuda" and torch.cuda.reset_peak_memory_stats()
            z = torch.randn(batch, *system.shape, device=device)
            try:
                with autocast():
                    a_step = seconds(lambda: system.sample(range(batch), None, 1.0, "ddim", timed, autocast)) / timed
                    decode = seconds(lambda: system.decode(z))
            except torch.OutOfMemoryError:
                print(f"{kind:<40}{batch:>6}  does not fit")
                break
            r = dict(kind=kind, batch=batch, gflop=gflop, a_step=a_step.mean(), share=gflop * 1e9 * batch / a_step.mean() / peak, decode=decode.mean(), peak_gb=peak_memory(device))
            for n in (100, 20):
                a_video = (n * a_step + decode) / batch
                pixels = next((p["100_steps"] for p in rows if p["batch"] == batch), a_video.mean() if n == 100 else r["100_steps"])
                r |= {f"{n}_steps": a_video.mean(), f"{n}_steps_std": a_video.std(), f"ratio_{n}": pixels / a_video.mean()}
            rows.append(r)
            print(f"{kind:<40}{batch:>6}{r['gflop']:>7.0f}{r['a_step']:>9.4f}{r['share']:>7.0%}{r['decode']:>9.4f}{r['peak_gb']:>6.1f}"
                  f"{r['100_steps']:>9.3f} ± {r['100_steps_std']:<5.3f}{r['ratio_100']:>7.1f}{r['20_steps']:>10.3f}{r['ratio_20']:>7.1f}")
        del system, vqgan
    print("published: VDM 35.26 s at 16 x 64 x 64, VQ-VDM 3.95 s at 16 x 128 x 128, both 100 steps: 8.9 times")
    path = Path(cfg.out or "runs") / "benchmark.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(device=str(device), timed_steps=timed, compiled=compiled, torch=torch.__version__, matmul_tflops=peak / 1e12, rows=rows), indent=1))
    print(f"saved: {path}")

@torch.no_grad()
def main():
    cfg = parse(Config, dict.fromkeys(SETS, dict(frames=0)))                         # the checkpoint knows the length of a clip
    path = Path(cfg.checkpoint or f"runs/{run_name(cfg.data)}/{'vqgan' if cfg.reconstruct else 'diffusion'}.pt")
    out = Path(cfg.out or path.parent)
    device, autocast = pick_device(cfg.device, cfg.dtype)
    if cfg.sampler not in SAMPLERS:
        raise UserError(f"--sampler {cfg.sampler}: one of {', '.join(SAMPLERS)} is wanted")
    if not 0 <= cfg.eta <= (cfg.sampler == "ddim"):
        raise UserError(f"--eta {cfg.eta:g} is for --sampler ddim, and from 0 to 1")
    sampler = functools.partial(diffusion.ddim, eta=cfg.eta) if cfg.eta else cfg.sampler
    if cfg.benchmark:
        return benchmark(cfg, device, autocast)
    if cfg.reconstruct:
        return reconstruct(cfg, path, out, device, autocast)

    if (cfg.trajectory or cfg.sheet) and (cfg.frames or cfg.start):
        raise UserError("--trajectory and --sheet show clips of the training's length, made from noise: leave out --frames and --start")
    system = load_diffusion(path, device)
    for module in (system.unet, *([system.vqgan.decoder] if system.vqgan else [])):
        cast_once(module, autocast)
    out.mkdir(parents=True, exist_ok=True)
    n = cfg.n or (4 * len(system.classes) if system.classes else 16)
    context = encode_start(system, cfg.start, autocast) if cfg.start else None
    labels = choose_classes(cfg.classes, system.classes, 4 if cfg.trajectory else n)
    if cfg.start and not cfg.classes:                                                # nobody said of which class it is
        labels = None
    guidance = system.config.guidance if cfg.guidance < 0 else cfg.guidance
    steps = cfg.steps or (system.diffusion.T if cfg.sampler == "ddpm" else 25)
    frames, size, _ = system.clip
    if cfg.trajectory:
        trajectory(system, out / "trajectory.gif", labels if labels is None else labels.to(device), guidance, cfg, sampler, steps, autocast)
        return print(f"from noise (left) to video (right): {out}/trajectory.gif")
    if cfg.sheet:
        if not system.classes:
            raise UserError("--sheet: this model was trained without classes")
        try:
            scales = [float(v) for v in cfg.sheet.split(",")]
        except ValueError:
            raise UserError(f"--sheet {cfg.sheet}: guidance scales are wanted, as in 1,2,4")
        sheet(system, out / "sheet.gif", scales, cfg, sampler, steps, autocast)
        return print(f"one row per class, guidance {cfg.sheet} from left to right: {out}/sheet.gif")
    slot = frames // system.shape[1]                                                 # frames of one latent frame
    frames = cfg.frames or frames * (2 if cfg.start else 1)
    length = -(-frames // slot)
    windows = max(1, -(-(length - (context.shape[2] if cfg.start else system.shape[1] // 2)) // (system.shape[1] - system.shape[1] // 2)))
    print(f"{n} videos of {frames} frames of {size} x {size} from {path}, trained for {system.step} steps; {cfg.sampler}, {steps} steps, guidance {guidance:g}, {device}")

    if compiles("off" if cfg.compile == "auto" and n < 256 else cfg.compile, device):
        compile_system(system)
    start = time.time()
    samples = new_array(out / "samples.npy", np.uint8, (n, frames, size, size, 3))   # not held in memory
    evaluations = -(-n // cfg.batch_size) * steps * windows
    with tqdm(total=evaluations, desc="sampling", unit=" steps") as bar:
        for i in range(0, n, cfg.batch_size):
            seeds = range(cfg.seed + i, cfg.seed + min(n, i + cfg.batch_size))
            y = labels[i:i + len(seeds)].to(device) if labels is not None else None
            given = context.expand(len(seeds), -1, -1, -1, -1) if cfg.start else None
            z = sample_long(system, seeds, y, guidance, sampler, steps, autocast, lambda *_: bar.update(), given, length)   # (B, C, T, h, w)
            with autocast():
                samples[i:i + len(seeds)] = to_uint8(decode_long(system, z, 4 * system.shape[1])[:, :, :frames])   # (B, T, H, W, 3)
    samples.flush()
    protocol = dict(data=cfg.data, n=n, frames=frames, size=size, stride=system.clip[2], sampler=cfg.sampler, eta=cfg.eta, steps=steps, guidance=guidance, seed=cfg.seed, start=cfg.start,
                    checkpoint=str(path), checkpoint_step=system.step, classes=system.classes, labels=labels.tolist() if labels is not None else None)
    (out / "samples.json").write_text(json.dumps(protocol, indent=1))
    if cfg.grid:
        shown = np.arange(min(n, cfg.grid)) * n // min(n, cfg.grid)                           # of all classes, if not all of each
        rows = len(labels[shown].unique()) if labels is not None else 0                       # one row per class, while they fit
        save_grid(out / "samples.gif", samples[shown], columns=len(shown) // rows if rows and len(shown) % rows == 0 else 0)
    if cfg.mp4:
        for i in tqdm(range(n), desc="mp4"):
            save_grid(out / "samples" / f"{i:04d}{'-' + system.classes[labels[i]] if labels is not None else ''}.mp4", samples[i:i + 1], columns=1)
    seconds = time.time() - start
    print(f"{seconds:.1f} s, {seconds / n:.2f} s a video, peak {peak_memory(device):.1f} GB: {out}/samples.npy, samples.json{', samples.gif' if cfg.grid else ''}{', samples/*.mp4' if cfg.mp4 else ''}")

if __name__ == "__main__":
    run(main)
