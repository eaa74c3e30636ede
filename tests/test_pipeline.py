"""The scripts from end to end, as a user runs them, and what sample.py makes of their checkpoints."""
import json, shlex
from pathlib import Path
import imageio.v3 as iio
import numpy as np
import pytest
import data, diffusion, evaluate, results, sample, vqgan3d
from data import read_video, to_float, to_uint8
from diffusion import load_diffusion
from conftest import STAGE1, STAGE2, script

def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]

def test_stage_1_learns_and_says_so(stage1):
    """A loop that runs and learns nothing; a loss that is not logged; progress pictures that are not written."""
    log, folder = rows(stage1.path.with_suffix(".jsonl")), stage1.path.parent
    scores = [r for r in log if "psnr" in r]
    assert [r["step"] for r in scores] == [0, 20, 40, 60] and scores[-1]["psnr"] > scores[0]["psnr"] + 1 and scores[-1]["usage"] > 0.2
    steps = {r["step"]: r for r in log if "mse" in r}
    assert list(steps) == [0, 20, 40] and {"codebook", "commitment", "lr", "seconds_a_step", "dead_codes", "memory_gb"} <= set(steps[0])
    assert {"gan", "feature", "disc", "D_real", "D_fake"} <= set(steps[40]) and "disc" not in steps[20]   # 60 x 0.5, 60 x 0.6
    assert steps[0]["codebook"] == 0 < steps[20]["codebook"]                      # the codes enter at 60 x 0.1
    assert iio.imread(folder / "vqgan.gif", plugin="pillow").shape[0] == 8 and not list(folder.glob("*.tmp"))
    assert "--size 16   (instead of 128)" in stage1.out and "held-out PSNR" in stage1.out

def test_stage_2_inherits_learns_and_says_so(stage2):
    """The same of stage 2: loss by quarter of the times, samples of both classes."""
    log = rows(stage2.path.with_suffix(".jsonl"))
    held = [r["held_out_loss"] for r in log if "held_out_loss" in r]
    assert len(held) == 3 and 0.9 < held[0] < 1.1 and held[-1] < held[0] - 0.02
    assert {"loss_t1", "loss_t2", "loss_t3", "loss_t4", "lr", "seconds_a_step", "memory_gb"} <= set(log[1])
    assert "inherited from stage 1, trained for 60 steps: 8 frames of 16 x 16" in stage2.out and "2 classes" in stage2.out
    assert iio.imread(stage2.path.with_suffix(".gif"), plugin="pillow").shape[0] == 8

def test_samples_and_their_protocol(stage2, main):
    """Arrays of another range or order than announced, labels that are not those asked for, files that are not written."""
    result = main(sample, "--checkpoint", stage2.path, "--out", "s", "--n", 6, "--steps", 4, "--seed", 3, "--mp4", "--guidance", 1.5)
    assert result.code == 0, result.err
    videos, protocol = np.load("s/samples.npy"), json.loads(Path("s/samples.json").read_text())
    assert videos.shape == (6, 8, 16, 16, 3) and videos.dtype == np.uint8 and videos.std() > 5
    assert all((videos[i] != videos[j]).any() for i in range(6) for j in range(i))
    assert protocol["labels"] == [0, 0, 0, 1, 1, 1] and protocol["classes"] == ["spin", "wave"]
    expected = dict(n=6, frames=8, size=16, stride=1, steps=4, guidance=1.5, seed=3, sampler="dpm", checkpoint_step=24)
    assert {k: protocol[k] for k in expected} == expected
    assert iio.imread("s/samples.gif", plugin="pillow").shape[0] == 8
    films = sorted(p.name for p in Path("s/samples").glob("*.mp4"))
    assert films[0] == "0000-spin.mp4" and films[-1] == "0005-wave.mp4" and len(films) == 6
    assert len(iio.imread("s/samples/0000-spin.mp4", plugin="pyav")) == 8

def test_same_seed_same_video_in_any_batch(stage2, main):
    """Noise that depends on the batch size, so that a sample cannot be made again alone."""
    def videos(out, *flags):
        assert main(sample, "--checkpoint", stage2.path, "--out", out, "--steps", 5, "--dtype", "float32", "--grid", 0, *flags).code == 0
        assert not Path(out, "samples.gif").exists()
        return np.load(f"{out}/samples.npy").astype(int)
    five = videos("a", "--n", 5, "--classes", "wave", "--batch_size", 5)
    assert abs(five - videos("b", "--n", 5, "--classes", "wave", "--batch_size", 2)).max() <= 1
    assert abs(five[3:] - videos("c", "--n", 2, "--classes", "wave", "--seed", 3)).max() <= 1
    ddpm = videos("d", "--n", 5, "--sampler", "ddpm", "--batch_size", 5)
    assert abs(ddpm - videos("e", "--n", 5, "--sampler", "ddpm", "--batch_size", 3)).max() <= 1 and (ddpm != five).any()

def test_classes_by_name_and_by_number(stage2, main):
    """A class taken for another; a wrong name taken for class 0."""
    def labels(text):
        assert main(sample, "--checkpoint", stage2.path, "--out", "s", "--n", 4, "--steps", 1, "--grid", 0, "--classes", text).code == 0
        return json.loads(Path("s/samples.json").read_text())["labels"]
    assert labels("wave") == labels("1") == [1] * 4 and labels("wave, 0") == [1, 1, 0, 0]
    for text, name in (("wiggle", "wiggle"), ("spin,2", "2"), ("-1", "-1")):
        result = main(sample, "--checkpoint", stage2.path, "--out", "s", f"--classes={text}")
        assert result.code == 1 and f"no class {name}" in result.err and "0 spin, 1 wave" in result.err

def test_longer_videos_and_given_beginnings(stage2, clips, main):
    """Frames promised and not made; a given video that is not the beginning of what comes out, or whose first frames are taken."""
    common = ["--checkpoint", stage2.path, "--out", "s", "--steps", 2, "--n", 2]
    assert main(sample, *common, "--frames", 21).code == 0
    assert np.load("s/samples.npy").shape == (2, 21, 16, 16, 3)
    start = clips / "spin" / "00.mp4"                                                 # 12 frames, the clips have 8
    result = main(sample, *common, "--start", start)
    assert result.code == 0, result.err
    videos, protocol = np.load("s/samples.npy"), json.loads(Path("s/samples.json").read_text())
    assert videos.shape == (2, 16, 16, 16, 3) and protocol["labels"] is None and protocol["start"] == str(start)
    system = load_diffusion(stage2.path)
    clip = read_video(start, 16)[-8:]
    own = to_uint8(system.vqgan(to_float(clip[None]))[0])[0]
    assert abs(videos[:, :4].astype(int) - own[:4]).mean() < 3                         # before what follows is seen by the decoder
    assert abs(videos[0, 8:].astype(int) - videos[1, 8:]).mean() > 1
    for flags, words in (["--start", "no.mp4"], "no.mp4"), (["--start", stage2.path], "cannot read"), (["--frames", "-1"], "--frames"):
        result = main(sample, *common, *flags)
        assert result.code == 1 and words in result.err

def test_pictures_for_teaching(stage2, main):
    """Pictures that are not written; a sheet with classes and scales exchanged; a flag that is silently passed over."""
    common = ["--checkpoint", stage2.path, "--out", "s", "--steps", 10]
    assert main(sample, *common, "--trajectory").code == 0
    assert iio.imread("s/trajectory.gif", plugin="pillow").shape[0] == 8
    assert main(sample, *common, "--sheet", "1,2,4").code == 0
    T, H, W, _ = iio.imread("s/sheet.gif", plugin="pillow").shape
    assert T == 8 and W / H == pytest.approx(3 / 2, rel=0.05)                             # 2 classes, 3 scales
    result = main(sample, *common, "--sheet", "1,2", "--frames", 16)
    assert result.code == 1 and "leave out --frames" in result.err
    result = main(sample, *common, "--sheet", "much")
    assert result.code == 1 and "--sheet much" in result.err

def test_reconstruct(stage1, clips, main):
    """Reconstructions of training clips, or of another stage 1 than the one named."""
    result = main(sample, "--data", clips, "--data_dir", stage1.home, "--checkpoint", stage1.path, "--out", "s", "--reconstruct", "--n", 8)
    assert result.code == 0 and Path("s/reconstructions.gif").exists(), result.err
    assert np.load("s/reconstructions.npy").shape == (8, 8, 16, 16, 3)
    logged = rows(stage1.path.with_suffix(".jsonl"))[-1]["psnr"]
    assert float(result.out.split("PSNR ")[1].split(" dB")[0]) == pytest.approx(logged, abs=0.05)   # the same 8 held-out clips

@pytest.mark.parametrize("flags, words", [
    ([], "there is no runs/toy/diffusion.pt|python diffusion.py"), (["--reconstruct"], "runs/toy/vqgan.pt|python vqgan3d.py"),
    (["--sampler", "euler"], "dpm"), (["--eta", "1"], "for --sampler ddim"), (["--step", "3"], "did you mean --steps?"), (["--n", "many"], "invalid int value: 'many'"),
    (["--checkpoint", "cut.pt"], "cut.pt is not a usable checkpoint"), (["--steps", "51"], "from 1 to 50"), (["--n", "-3"], "--n")])
def test_wrong_input_ends_in_one_line(stage2, main, flags, words):
    """A traceback where the user needs to know which command comes first."""
    Path("cut.pt").write_bytes(stage2.path.read_bytes()[:9999])
    if {"--steps", "--n"} & set(flags):
        flags = ["--checkpoint", stage2.path, "--out", "s", *flags]
    result = main(sample, *flags)
    assert result.code == 1 and result.err.startswith("error: ") and all(w in result.err for w in words.split("|")), result.err

def test_toy_from_nothing_to_videos(tmp_path):
    """The three lines of the README, with smaller numbers: default folders, each stage finding the one before."""
    lines = {"vqgan3d.py": [*STAGE1, "--steps", 10], "diffusion.py": [*STAGE2, "--mults", 1, "--steps", 4, "--eval_every", 100],
             "sample.py": ["--steps", 3, "--n", 24]}
    for name, flags in lines.items():
        result = script(name, *flags, cwd=tmp_path)
        assert result.code == 0, result.err
    run = tmp_path / "runs" / "toy"
    assert {"vqgan.pt", "vqgan.jsonl", "vqgan.gif", "diffusion.pt", "diffusion.jsonl", "diffusion.gif", "samples.npy", "samples.json",
            "samples.gif"} <= {p.name for p in run.iterdir()}
    protocol = json.loads((run / "samples.json").read_text())
    assert protocol["labels"] == [i // 2 for i in range(24)] and len(protocol["classes"]) == 12 and protocol["data"] == "toy"
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "datasets"}

@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_the_commands_of_the_results_are_understood(budget):
    """A flag that was renamed, in a script that takes an evening to get to it."""
    for command in [c for what in ("toy", "sky", "actions", *results.CHANGES) for c in results.commands(what, budget, "vgg.npz")]:
        script, *flags = shlex.split(command)
        module = {m.__name__ + ".py": m for m in (vqgan3d, diffusion, sample, evaluate)}.get(script)
        if module:
            config = data.parse(module.Config, getattr(module, "PRESETS", {}), flags)
            assert config.data in ("toy", "sky", "ucf101")
