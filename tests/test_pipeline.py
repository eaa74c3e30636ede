"""The scripts from end to end, as a user runs them, and what sample.py makes of their checkpoints.
Each test names the bug that it catches."""
import json
import shlex
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import data
import diffusion
import evaluate
import sample
import vqgan3d
from conftest import ROOT, STAGE1, STAGE2, load, read_log, same, script
from data import read_video, to_float, to_uint8
from diffusion import load_diffusion
from tests.experiments import export, reproduce

# --------------------------------------------------------------------------------------------------
# training

def test_stage_1_learns_and_says_so(stage1):
    """A loop that runs and learns nothing; a loss that is not logged; progress pictures that are
    not written."""
    log, folder = read_log(stage1.path), stage1.path.parent
    scores = {row["step"]: row for row in log if "psnr" in row}
    assert list(scores) == [0, 20, 40, 60]
    assert scores[60]["psnr"] > scores[0]["psnr"] + 1
    assert scores[60]["codes_used"] > 0.2
    losses = {row["step"]: row for row in log if "mse" in row}
    assert list(losses) == [0, 20, 40]
    assert {"codebook", "commitment", "lr", "dead_codes"} <= set(losses[0])
    assert {"seconds_a_step", "waiting", "memory_gb"} <= set(losses[0])
    assert "disc" not in losses[20]                                   # which begins at 60 x 0.5
    assert {"gan", "feature", "disc", "D_real", "D_fake"} <= set(losses[40])
    assert losses[0]["codebook"] == 0                                 # codes begin at 60 x 0.1
    assert losses[20]["codebook"] > 0
    assert iio.imread(folder / "vqgan.gif", plugin="pillow").shape[0] == 8
    assert not list(folder.glob("*.tmp"))
    assert "--size 16   (instead of 128)" in stage1.out
    assert "step 60: psnr" in stage1.out

def test_stage_2_inherits_learns_and_says_so(stage2):
    """The same of stage 2: loss by quarter of the times, samples of both classes."""
    log = read_log(stage2.path)
    scores = [row["held_out_loss"] for row in log if "held_out_loss" in row]
    assert len(scores) == 3
    assert 0.6 < scores[0] < 1.5                            # of a network that predicts nearly 0
    assert scores[-1] < scores[0] - 0.02
    assert {"loss_t1", "loss_t2", "loss_t3", "loss_t4", "lr", "seconds_a_step"} <= set(log[1])
    assert "inherited from stage 1, trained for 60 steps: 8 frames of 16 x 16" in stage2.out
    assert "2 classes" in stage2.out
    assert iio.imread(stage2.path.with_suffix(".gif"), plugin="pillow").shape[0] == 8

@pytest.mark.parametrize("module, file, steps", [
    (vqgan3d, "vqgan.pt", 21), (diffusion, "diffusion.pt", 6)])
def test_float16_trains_as_float32_does(stage1, stage2, main, stop_at, module, file, steps):
    """Gradients that are scaled twice, never or only in part: other losses than in float32. The
    scale of the losses lost on resuming. (The discriminator may differ after the first step: the
    scale is halved until its gradients are finite, and it misses those steps.)"""
    if module is vqgan3d:                                             # all losses from step 0 on
        flags = [*stage1.flags, "--disc_start", 0, "--gan_start", 0, "--vq_start", 0]
    else:
        flags = [*stage2.flags, "--vqgan", stage1.path]
    flags += ["--steps", steps, "--eval_every", steps]
    def train(out, dtype):
        result = main(module, *flags, "--out", out, "--dtype", dtype)
        assert result.code == 0, result.err
        return load(f"{out}/{file}"), read_log(Path(out, file))
    state16, log16 = train("float16", "float16")
    _, log32 = train("float32", "float32")
    assert state16["scaler"]
    for row16, row32 in zip(log16, log32, strict=True):
        names = {"mse", "codebook", "psnr", "loss", "held_out_loss"}
        if row16["step"] == 0:
            names |= {"gan", "feature", "disc"}
        for name in names & set(row32):
            assert row16[name] == pytest.approx(row32[name], rel=0.02), (row16["step"], name)
    stop_at(module, 3)
    train("resumed", "float16")
    assert load(f"resumed/{file}")["step"] == 4
    resumed, _ = train("resumed", "float16")
    del state16["config"]["out"], resumed["config"]["out"]
    same(state16, resumed)

# --------------------------------------------------------------------------------------------------
# sampling

def read_samples(folder):
    """-> the array and the protocol"""
    protocol = json.loads(Path(folder, "samples.json").read_text())
    return np.load(f"{folder}/samples.npy"), protocol

def test_samples_and_their_protocol(stage2, main):
    """Arrays of another range or order than announced, labels that are not those asked for, files
    that are not written."""
    result = main(sample, "--checkpoint", stage2.path, "--out", "s", "--n", 6, "--steps", 4,
                  "--seed", 3, "--mp4", "--guidance", 1.5)
    assert result.code == 0, result.err
    videos, protocol = read_samples("s")
    assert videos.shape == (6, 8, 16, 16, 3)
    assert videos.dtype == np.uint8
    assert videos.std() > 5
    assert len({video.tobytes() for video in videos}) == 6
    assert protocol["labels"] == [0, 0, 0, 1, 1, 1]
    assert protocol["data"] == str(stage2.home / "clips")
    assert protocol["classes"] == ["spin", "wave"]
    expected = dict(n=6, frames=8, size=16, stride=1, steps=4, guidance=1.5, seed=3, sampler="dpm",
                    checkpoint_step=24)
    assert expected.items() <= protocol.items()
    assert iio.imread("s/samples.gif", plugin="pillow").shape[0] == 8
    films = sorted(path.name for path in Path("s/samples").glob("*.mp4"))
    assert films == [f"000{i}-{label}.mp4" for i, label in enumerate(["spin"] * 3 + ["wave"] * 3)]
    assert len(iio.imread("s/samples/0000-spin.mp4", plugin="pyav")) == 8

def test_same_seed_same_video_in_any_batch(stage2, main):
    """Noise that depends on the batch size, so that a sample cannot be made again alone."""
    def videos(*flags):
        result = main(sample, "--checkpoint", stage2.path, "--out", "s", "--steps", 5,
                      "--dtype", "float32", "--grid", 0, *flags)
        assert result.code == 0, result.err
        assert not Path("s/samples.gif").exists()
        return np.load("s/samples.npy").astype(int)
    wave = ["--classes", "wave"]
    five = videos("--n", 5, "--batch_size", 5, *wave)
    assert abs(five - videos("--n", 5, "--batch_size", 2, *wave)).max() <= 1
    assert abs(five[3:] - videos("--n", 2, "--seed", 3, *wave)).max() <= 1
    ddpm = videos("--n", 5, "--batch_size", 5, "--sampler", "ddpm")
    assert abs(ddpm - videos("--n", 5, "--batch_size", 3, "--sampler", "ddpm")).max() <= 1
    assert (ddpm != five).any()

def test_classes_by_name_and_by_number(stage2, main):
    """A class taken for another; a wrong name taken for class 0."""
    flags = ["--checkpoint", stage2.path, "--out", "s", "--n", 4, "--steps", 1, "--grid", 0]
    for text, labels in ("wave", [1, 1, 1, 1]), ("1", [1, 1, 1, 1]), ("wave, 0", [1, 1, 0, 0]):
        assert main(sample, *flags, "--classes", text).code == 0
        _, protocol = read_samples("s")
        assert protocol["labels"] == labels
    flags[flags.index("--n") + 1] = 0                                 # four of each class asked for
    assert main(sample, *flags, "--classes", "wave").code == 0
    _, protocol = read_samples("s")
    assert protocol["labels"] == [1, 1, 1, 1]
    for text, name in ("wiggle", "wiggle"), ("spin,2", "2"), ("-1", "-1"):
        result = main(sample, *flags, f"--classes={text}")
        assert result.code == 1
        assert f"no class {name}" in result.err
        assert "0 spin, 1 wave" in result.err

def test_longer_videos_and_a_given_start(stage2, clips, main):
    """Frames promised and not made; a given video that is not the start of what comes out, or
    whose first frames are taken; two samples that go on in the same way."""
    flags = ["--checkpoint", stage2.path, "--out", "s", "--steps", 10, "--n", 2]
    assert main(sample, *flags, "--frames", 21).code == 0
    assert np.load("s/samples.npy").shape == (2, 21, 16, 16, 3)
    start = clips / "spin" / "00.mp4"                                 # 12 frames, the clips have 8
    result = main(sample, *flags, "--start", start)
    assert result.code == 0, result.err
    videos, protocol = read_samples("s")
    assert videos.shape == (2, 16, 16, 16, 3)
    assert protocol["labels"] is None
    assert protocol["start"] == str(start)
    assert protocol["guidance"] == 0                                  # of a class not named
    assert "without --classes" in result.out
    result = main(sample, *flags, "--start", start, "--frames", 8)
    assert "give more" in result.err
    result = main(sample, *flags[:-2], "--start", start)              # no --n, and no classes
    assert result.code == 0, result.err
    assert len(np.load("s/samples.npy")) == 16
    last_frames = to_float(read_video(start, 16)[None, -8:])
    reconstruction, _, _ = load_diffusion(stage2.path).vqgan(last_frames)
    expected = to_uint8(reconstruction)[:, :4]              # the decoder sees nothing new there
    assert abs(videos[:, :4].astype(int) - expected).mean() < 3
    assert abs(videos[0, 8:].astype(int) - videos[1, 8:]).mean() > 1

def test_an_exported_model_makes_the_same_videos(stage2, main):
    """A file that cannot be sampled; one that takes the place of a checkpoint of training."""
    shutil.copy(stage2.path, "good.pt")
    assert main(export, "good.pt", "small.pt").code == 0
    flags = ["--n", 2, "--steps", 5, "--grid", 0]
    for name in "good", "small":
        assert main(sample, "--checkpoint", f"{name}.pt", "--out", name, *flags).code == 0
    good, small = (np.load(f"{name}/samples.npy").astype(int) for name in ("good", "small"))
    assert abs(good - small).mean() < 1
    assert "would lose what training needs" in main(export, "small.pt", "good.pt").err
    same(load("good.pt"), load(stage2.path))

def test_a_picture_to_start_from(stage2, clips, main):
    """A picture that is refused as too short, or that is not what the video begins with."""
    picture = read_video(clips / "spin" / "00.mp4", 16)[3]
    iio.imwrite("start.png", picture)
    flags = ["--checkpoint", stage2.path, "--out", "s", "--steps", 10, "--n", 2]
    result = main(sample, *flags, "--start", "start.png", "--frames", 8)
    assert result.code == 0, result.err
    videos, _ = read_samples("s")
    still = to_float(picture[None, None].repeat(8, 1))
    reconstruction, _, _ = load_diffusion(stage2.path).vqgan(still)
    expected = to_uint8(reconstruction)[:, :2]
    assert abs(videos[:, :2].astype(int) - expected).mean() < 3
    assert abs(videos[0, 4:].astype(int) - videos[1, 4:]).mean() > 1

def test_a_second_process_and_another_s_videos_do_no_harm(stage2, main):
    """The samples of one command under the settings of another; videos of the user's deleted."""
    flags = ["--checkpoint", stage2.path, "--out", "s", "--steps", 2, "--n", 2, "--mp4"]
    holiday = Path("s/samples/2024-holiday.mp4")
    holiday.parent.mkdir(parents=True)
    lock = data.lock_output(Path("s/samples.npy"))
    result = main(sample, *flags)
    assert "another process is writing s/samples.npy" in result.err
    lock.close()
    Path("s/samples/0001.mp4").touch()
    assert "holds videos that sample.py did not make" in main(sample, *flags).err
    Path("s/samples/0001.mp4").unlink()
    assert main(sample, *flags, "--n", 4).code == 0
    holiday.touch()
    assert main(sample, *flags).code == 0
    made = sorted(path.name for path in Path("s/samples").glob("*.mp4"))
    assert made == ["0000-spin.mp4", "0001-wave.mp4", "2024-holiday.mp4"]

@pytest.mark.parametrize("flags, words", [
    ("", "there is no runs/toy/diffusion.pt|python diffusion.py"),
    ("--step 3", "did you mean --steps?"),
    ("--n many", "invalid int value: 'many'"),
    ("--checkpoint cut.pt", "cut.pt is not a usable checkpoint"),
    ("--checkpoint .", "is a folder: give the .pt file in it"),
    ("--checkpoint good.pt --seed 99999999999", "--seed: 99999999999 is too large"),
    ("--checkpoint good.pt --sampler euler", "--sampler euler: must be one of dpm, ddim, ddpm"),
    ("--checkpoint good.pt --steps 51", "from 1 to 50"),
    ("--checkpoint good.pt --n -3", "argument --n"),
    ("--checkpoint vqgan.pt", "vqgan.pt is a stage 1"),
    ("--checkpoint good.pt --frames -1", "argument --frames"),
    ("--checkpoint good.pt --start no.mp4", "cannot read no.mp4"),
    ("--checkpoint good.pt --start good.pt", "cannot read good.pt")])
def test_wrong_input_ends_in_one_line(stage1, stage2, main, flags, words):
    """A stack trace where the user needs to know which command comes first."""
    shutil.copy(stage1.path, "vqgan.pt")
    shutil.copy(stage2.path, "good.pt")
    Path("cut.pt").write_bytes(stage2.path.read_bytes()[:9999])
    result = main(sample, *flags.split())
    assert result.code == 1
    assert result.err.startswith("error: ")
    for text in words.split("|"):
        assert text in result.err

# --------------------------------------------------------------------------------------------------
# one after the other

def test_toy_from_nothing_to_videos(tmp_path):
    """The three lines of the README, with smaller numbers: default folders, each stage finding the
    one before."""
    stages = {
        "vqgan3d.py": [*STAGE1, "--steps", 10],
        "diffusion.py": [*STAGE2, "--mults", 1, "--steps", 4, "--eval_every", 100],
        "sample.py": ["--steps", 3, "--n", 24],
    }
    for name, flags in stages.items():
        result = script(name, *flags, cwd=tmp_path)
        assert result.code == 0, result.err
    run = tmp_path / "runs" / "toy"
    for name in ("vqgan.pt", "vqgan.jsonl", "vqgan.gif", "diffusion.pt", "diffusion.jsonl",
                 "diffusion.gif", "samples.npy", "samples.json", "samples.gif"):
        assert (run / name).exists(), name
    _, protocol = read_samples(run)
    assert protocol["labels"] == [i // 2 for i in range(24)]
    assert len(protocol["classes"]) == 12
    assert protocol["data"] == "toy"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "datasets"}

@pytest.mark.parametrize("budget", ["cpu", "gpu"])
@pytest.mark.parametrize("result", reproduce.RESULTS)
def test_the_commands_of_the_results_are_understood(result, budget):
    """A flag or a script that was renamed, in a command that takes an evening to get to it."""
    modules = {f"{m.__name__}.py": m for m in (vqgan3d, diffusion, sample, evaluate)}
    for command in reproduce.commands(result, budget, "vgg.npz"):
        name, *flags = shlex.split(command)
        if name == "-m":
            path = flags[0].replace(".", "/")
            assert (ROOT / f"{path}.py").exists()
        else:
            config = data.parse_flags(modules[name].Config, {}, flags)
            assert config.data in ("toy", "sky", "ucf101")
