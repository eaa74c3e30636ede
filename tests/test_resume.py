"""Stopped, killed, diverging, changed: nothing is lost. Each test names the bug that it catches."""
import itertools
import math
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import diffusion
import vqgan3d
from conftest import launch, load, read_log, same, write_video

BOTH = pytest.mark.parametrize("module, name", [(vqgan3d, "vqgan.pt"),
                                                (diffusion, "diffusion.pt")])

@pytest.fixture
def train(stage1, stage2, main):
    """train(module, *flags): go on, or begin, in run/ with the flags of the session's run."""
    def train(module, *flags, code=0):
        trained = stage1
        if module is diffusion:
            trained = stage2
            Path("run").mkdir(exist_ok=True)
            if not Path("run/vqgan.pt").exists():
                shutil.copy(stage1.path, "run")
        return main(module, *trained.flags, "--out", "run", *flags, code=code)
    return train

@pytest.fixture
def finished(stage1, stage2, main):
    """run/: a copy of the finished runs of both stages."""
    shutil.copytree(stage1.path.parent, "run")

def assert_as_undisturbed(name, stage1):
    """Checkpoint, log and preview must be those of the session's run, to which nothing happened."""
    path, undisturbed = Path("run", name), stage1.path.with_name(name)
    same(load(path), load(undisturbed))
    assert read_log(path) == read_log(undisturbed)
    assert path.with_suffix(".gif").read_bytes() == undisturbed.with_suffix(".gif").read_bytes()

@pytest.mark.parametrize("module, name, step", [
    (vqgan3d, "vqgan.pt", 3),            # before the codes are used
    (vqgan3d, "vqgan.pt", 19),           # an evaluation is due when it stops
    (vqgan3d, "vqgan.pt", 47),           # with the GAN
    (diffusion, "diffusion.pt", 20)])
def test_resume_is_exact_to_the_bit(stage1, train, stop_at, module, name, step):
    """An optimiser, the discriminator, the codebook's state, the average, the statistics, the
    learning rate or a random draw that a resumed run lacks; an evaluation that neither the stopped
    run nor the one that goes on makes; status 0, so that `vqgan3d.py && diffusion.py` goes on to
    stage 2 with a half-trained stage 1."""
    stop_at(module, step)
    train(module, code=130)
    assert load(f"run/{name}")["step"] == step + 1
    result = train(module)
    assert f"resuming run/{name} at step {step + 1}" in result.out
    assert_as_undisturbed(name, stage1)

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped_or_killed_goes_on(stage1, train, tmp_path, number):
    """The same of a real process, wherever the signal finds it: a checkpoint torn or lost, a log
    that has rows twice or half a row."""
    path = tmp_path / "run" / "vqgan.pt"
    process = launch("vqgan3d.py", *stage1.flags, "--out", "run", cwd=tmp_path)
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), err
    assert "Traceback" not in err
    assert 20 <= load(path)["step"] < 60
    with open(path.with_suffix(".jsonl"), "a") as log:                # as SIGKILL can leave it
        log.write('{"step": 57, "loss": 0.1}\n{"step": 58, "lo')
    train(vqgan3d)
    assert_as_undisturbed("vqgan.pt", stage1)

@BOTH
def test_a_finished_run_repeated_changes_nothing_and_fresh_starts_anew(finished, train, module,
                                                                       name):
    """A second run that trains on, or evaluates again; --fresh that keeps the old log."""
    def contents():
        return {path.name: path.read_bytes() for path in Path("run").iterdir()}
    before = contents()
    result = train(module)
    assert f"done: run/{name}" in result.out
    assert contents() == before
    result = train(module, "--fresh", "--seed", 1, "--steps", 2)
    assert "resuming" not in result.out
    assert load(f"run/{name}")["step"] == 2
    assert {row["step"] for row in read_log(Path("run", name))} == {0, 2}

@pytest.mark.parametrize("module, name, steps", [
    (vqgan3d, "vqgan.pt", 21), (diffusion, "diffusion.pt", 4)])
def test_float16_trains_as_float32_does(train, stop_at, monkeypatch, module, name, steps):
    """Gradients that are scaled twice, never or only in part: other losses than in float32. The
    scale of the losses lost on resuming. (The discriminator may differ after the first step: the
    scale is halved until its gradients are finite, and it misses those steps.)"""
    flags = ["--steps", steps, "--eval_every", steps]
    if module is vqgan3d:                                             # all losses from step 0 on
        flags += ["--disc_start", 0, "--gan_start", 0, "--vq_start", 0]
    else:                                                             # on a CPU it is slow
        flags += ["--pixels", "--size", 8, "--frames", 4]
        monkeypatch.setattr(diffusion, "evaluate_and_preview", lambda *_: dict(held_out_loss=1))
    path = Path("run", name)
    def run(dtype, *more):
        train(module, *flags, "--dtype", dtype, *more)
        return load(path), read_log(path)
    _, log32 = run("float32")
    state16, log16 = run("float16", "--fresh")
    assert state16["scaler"]
    for row16, row32 in zip(log16, log32, strict=True):
        names = {"mse", "codebook", "psnr", "loss"}
        if row16["step"] == 0:
            names |= {"gan", "feature", "disc"}
        for name in names & set(row32):
            assert row16[name] == pytest.approx(row32[name], rel=0.02), (row16["step"], name)
    stop_at(module, 2)
    train(module, *flags, "--dtype", "float16", "--fresh", code=130)
    resumed, _ = run("float16")
    del state16["config"]["fresh"], resumed["config"]["fresh"]
    same(state16, resumed)

def test_a_loss_that_breaks_is_no_checkpoint_and_the_last_good_step_remains(stage1, train,
                                                                             monkeypatch):
    """A loss that is NaN from step 45 on: weights of NaN saved over the good ones of step 40."""
    generator_loss = vqgan3d.generator_loss
    step = itertools.count(36)                                        # gan_start is 0.6 of 60 steps
    def break_at_45(*args):
        losses = generator_loss(*args)
        if next(step) >= 45:
            losses["gan"] = losses["gan"] * math.nan
        return losses
    with monkeypatch.context() as patch:
        patch.setattr(vqgan3d, "generator_loss", break_at_45)
        result = train(vqgan3d, code=1)
    assert "not finite" in result.err
    assert "run/vqgan.pt" in result.err
    assert load("run/vqgan.pt")["step"] == 40
    train(vqgan3d)
    assert_as_undisturbed("vqgan.pt", stage1)

@BOTH
def test_a_run_that_diverges_never_replaces_a_checkpoint(train, module, name):
    """A run that breaks between two looks at its losses and saves what is left of it."""
    result = train(module, "--lr", 1e30, "--steps", 15, "--eval_every", 5, code=1)
    assert "not finite" in result.err
    assert "--lr" in result.err
    assert not Path("run", name).exists()

def test_a_checkpoint_with_nan_in_any_network_is_not_written(tmp_path):
    """A discriminator that broke while it learnt alone: the autoencoder's losses are fine."""
    path, cfg = tmp_path / "vqgan.pt", vqgan3d.Config()
    path.with_suffix(".jsonl").touch()
    good, broken = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    data.save_checkpoint(path, cfg, dict(model=good, disc=broken), step=6)
    broken.bias.data[1] = math.nan
    with pytest.raises(data.UserError, match="step 7: "):
        data.save_checkpoint(path, cfg, dict(model=good, disc=broken), step=7)
    assert load(path)["step"] == 6
    with pytest.raises(data.UserError, match="step 8: loss is not finite"):
        data.log(path, 8, dict(lr=1.0, loss=torch.tensor(math.inf)))
    assert read_log(path) == []

def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    """Half a checkpoint in the place of the last good one, or one not yet on the disk."""
    path, cfg, done = tmp_path / "vqgan.pt", vqgan3d.Config(), []
    path.with_suffix(".jsonl").touch()
    for module, name in (torch, "save"), (data.os, "fsync"), (data.os, "replace"):
        def record(*args, function=getattr(module, name), name=name):
            done.append(name)
            return function(*args)
        monkeypatch.setattr(module, name, record)
    data.save_checkpoint(path, cfg, {}, step=1)
    assert done == ["save", "fsync", "replace"]
    def write_half(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="No space left"):
        data.save_checkpoint(path, cfg, {}, step=2)
    assert load(path)["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))

def test_a_hostile_checkpoint_is_not_executed(tmp_path, monkeypatch):
    """Code in a checkpoint that runs when somebody reads it."""
    monkeypatch.chdir(tmp_path)
    class Payload(dict):
        def __reduce__(self):
            return Path.touch, (Path("executed"),)
    torch.save(dict(config={}, step=1, model=Payload()), "vqgan.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        data.load_checkpoint("vqgan.pt")
    assert not Path("executed").exists()

@BOTH
def test_a_flag_that_makes_no_other_network_may_change(finished, train, module, name):
    """A run that cannot be given more steps or another learning rate; a network of another width
    that is filled with what fits, a seed that is not protected; stage 2 that goes on with a newer
    stage 1, whose latents it was not trained on."""
    before = load(f"run/{name}")
    steps = before["step"]
    if module is diffusion:
        newer = load("run/vqgan.pt")
        newer["model"]["quantizer.codebook"] += 1
        torch.save(newer, "run/vqgan.pt")
    train(module, "--steps", steps + 2, "--lr", 0.001)
    state = load(f"run/{name}")
    assert (state["step"], state["config"]["lr"]) == (steps + 2, 0.001)
    same(state.get("vqgan"), before.get("vqgan"))
    scored = [row["step"] for row in read_log(Path("run", name))
              if "psnr" in row or "held_out_loss" in row]
    assert scored == [*range(0, steps, state["config"]["eval_every"]), steps, steps + 2]
    for flag in ("--width", 32), ("--seed", 5), ("--blocks", 2):
        result = train(module, *flag, code=1)
        assert f"{flag[0]} " in result.err
        assert "--fresh" in result.err

@BOTH
def test_a_changed_script_says_so(finished, train, module, name):
    """A student edits the code and runs it again: the old weights "finish", in silence."""
    note = "the script has changed"
    assert note not in train(module).out
    state = load(f"run/{name}")
    state["source"] = "of other code"
    torch.save(state, f"run/{name}")
    result = train(module)
    line, = [line for line in result.out.splitlines() if note in line]
    assert "--fresh" in line
    assert data.source_hash(module.Config()) != data.source_hash(data.Config())

@BOTH
def test_a_checkpoint_of_another_network_is_one_line(finished, train, module, name):
    """A stack trace of hundreds of keys where the code was changed since the checkpoint."""
    state = load(f"run/{name}")
    state["model"].popitem()
    torch.save(state, f"run/{name}")
    result = train(module, code=1)
    assert f"model of run/{name} does not fit the code" in result.err
    assert "--fresh" in result.err
    assert len(result.err) < 1000

def test_two_folders_of_one_name_are_not_one_run(main):
    """Another set's run is taken over: projB/videos resumes, trains on and overwrites the model of
    projA/videos, with a note at most. The same videos elsewhere, and more videos, are this run."""
    def train(folder, steps, code=0):
        return main(vqgan3d, "--data", folder, "--size", 8, "--frames", 4, "--width", 8, "--codes",
                    16, "--perceptual", 0, "--gan", 0, "--feature", 0, "--eval_clips", 2,
                    "--device", "cpu", "--steps", steps, code=code)
    for folder, seed in ("projA/videos", 0), ("projB/videos", 1):
        rng = np.random.default_rng(seed)
        for k in range(3):
            video = rng.integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
            write_video(Path(folder, f"{folder[:5]}-{k}.gif"), video)
    train("projA/videos", 2)
    before = Path("runs/videos/vqgan.pt").read_bytes()
    result = train("projB/videos", 3, code=1)
    for words in (Path("projA/videos").absolute(), Path("projB/videos").absolute(), "--out"):
        assert str(words) in result.err
    assert Path("runs/videos/vqgan.pt").read_bytes() == before
    shutil.copytree("projA/videos", "moved/videos")
    train("moved/videos", 3)
    shutil.copy("projB/videos/projB-0.gif", "moved/videos")
    result = train("moved/videos", 4)
    assert "have changed since this run began" in result.out
