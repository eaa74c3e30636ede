"""Several processes, and a batch in several parts: the same training as one process with the whole
batch. On a CPU the processes talk through gloo; the code is that of several GPUs."""
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import diffusion
import sample
import vqgan3d
from conftest import STAGE1, load, read_log, same, torchrun

SCRIPT = """
import signal
import torch
import data
import {module} as module
average_gradients, cosine_lr = data.average_gradients, module.cosine_lr
def average_and_save(*networks):            # at last, what this process holds before the last step
    average_gradients(*networks)
    torch.save([network.state_dict() for network in networks], f"process{{data.RANK}}.pt")
def act_in_process_1(step, steps):
    if step == 2 and data.RANK == 1:
        {action}
    return cosine_lr(step, steps)
module.average_gradients, module.cosine_lr = average_and_save, act_in_process_1
sys.argv = ["{module}.py", *{flags}]
data.run_main(module.main)
"""

def run_two(folder, module, *flags, action=""):
    """Run a stage on two processes; `action` happens to the second one in step 2 -> Result"""
    flags = [str(flag) for flag in flags]
    text = SCRIPT.format(module=module.__name__, action=action or "pass", flags=flags)
    return torchrun(folder, text, fails=bool(action))

@pytest.fixture
def stage1_flags(clips, stage1):
    """Six steps of stage 1, from the second on with codes."""
    return ["--data", clips, "--data_dir", stage1.home, *STAGE1, "--batch_size", 4, "--steps", 6,
            "--eval_every", 6, "--lr", 1e-3, "--vq_start", 0.2, "--dtype", "float32"]

@pytest.fixture
def stage2_flags(stage1, stage2):
    """Six steps of stage 2"""
    return [*stage2.flags, "--steps", 6, "--eval_every", 6, "--timesteps", 20, "--vqgan",
            stage1.path, "--dtype", "float32"]

def assert_near(a, b):
    """Two state dicts must be equal up to rounding, relative to the largest value of a tensor. Muon
    makes all singular values of a step alike, so it enlarges the rounding of the small ones."""
    for name, value in a.items():
        assert (value - b[name]).abs().max() < 4e-3 * value.abs().max().clamp_min(1e-3), name

def assert_same_log(one, two):
    """The rows of two logs must be equal up to rounding: losses are means over all processes."""
    for a, b in zip(read_log(Path(one)), read_log(Path(two)), strict=True):
        assert b == pytest.approx(a, rel=2e-3)

def test_stage_1_on_two_processes(stage1_flags, main, tmp_path):
    """Gradients of a share of the batch, codes moved to latents of a share, usage counted twice; a
    log of the first share, or of each. Without a discriminator: on CPUs each process has a batch
    norm of its own."""
    flags = [*stage1_flags, "--gan", 0, "--feature", 0]
    main(vqgan3d, *flags, "--out", "one")
    run_two(tmp_path, vqgan3d, *flags, "--out", "two")
    same(load("process0.pt"), load("process1.pt"))
    assert_near(load("one/vqgan.pt")["model"], load("two/vqgan.pt")["model"])
    assert_same_log("one/vqgan.pt", "two/vqgan.pt")

def test_stage_2_on_two_processes(stage2_flags, main, tmp_path):
    """Both processes with the same noise, times or clips; losses that count twice."""
    main(diffusion, *stage2_flags, "--out", "one")
    run_two(tmp_path, diffusion, *stage2_flags, "--out", "two")
    same(load("process0.pt"), load("process1.pt"))
    one, two = load("one/diffusion.pt"), load("two/diffusion.pt")
    assert_near(one["model"], two["model"])
    assert_near(one["ema"], two["ema"])
    same(one["statistics"], two["statistics"])
    assert_same_log("one/diffusion.pt", "two/diffusion.pt")

def test_a_signal_to_one_process_stops_both(stage1_flags, tmp_path):
    """One process stops and the other waits for its gradients; or they stop at different steps.
    And, with the GAN: autoencoders, codebooks or discriminators that drift apart."""
    flags = [*stage1_flags, "--steps", 30, "--eval_every", 30, "--disc_start", 0, "--gan_start", 0]
    run_two(tmp_path, vqgan3d, *flags, "--out", "run",
            action="signal.raise_signal(signal.SIGTERM)")
    assert load(tmp_path / "run" / "vqgan.pt")["step"] == 20
    same(load(tmp_path / "process0.pt"), load(tmp_path / "process1.pt"))

def test_an_error_of_one_process_ends_both(stage1_flags, tmp_path):
    """The other process waits for the failed one, for a day; or the error is silent."""
    began = time.time()
    result = run_two(tmp_path, vqgan3d, *stage1_flags, "--out", "run",
                     action='raise data.UserError("only here")')
    assert "only here" in result.err
    assert time.time() - began < 100                                  # most of it starts torch

def test_gradients_are_combined_over_all_processes(tmp_path):
    """The limit of the GAN computed from the norms of half a batch: another weight of the GAN in
    each process. Gradients that are summed, which Adam and Muon would hide."""
    torch.manual_seed(0)
    grad_rec, grad_adv = torch.randn(2, 4, 3, 8, 16, 16)
    grad_adv[:2] *= 100                                               # of the first process
    torch.save((grad_rec, grad_adv), tmp_path / "gradients.pt")
    torchrun(tmp_path, """
import torch
import data
import vqgan3d
data.start(vqgan3d.Config(device="cpu"))
half = slice(2 * data.RANK, 2 * data.RANK + 2)
grad_rec, grad_adv = torch.load("gradients.pt")
joined = vqgan3d.join_gradients(grad_rec[half], grad_adv[half], 0.3)
network = torch.nn.Linear(2, 2)             # its weight has no gradient
network.bias.grad = torch.tensor([1.0, 2.0]) * (1 + data.RANK)
data.average_gradients(network)
torch.save([joined, network.bias.grad], f"process{data.RANK}.pt")
""")
    joined0, mean0 = load(tmp_path / "process0.pt")
    joined1, mean1 = load(tmp_path / "process1.pt")
    whole = vqgan3d.join_gradients(grad_rec, grad_adv, 0.3)
    assert torch.allclose(torch.cat([joined0, joined1]), whole, rtol=1e-4)
    assert not torch.allclose(whole, grad_rec + grad_adv)             # the limit is in force
    assert mean0.tolist() == mean1.tolist() == [1.5, 3.0]

@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_in_parts(stage1_flags, stage2_flags, main, stage):
    """A loss of the parts that is not the mean of the whole; every part with the same noise."""
    module, path, flags = diffusion, "diffusion.pt", stage2_flags
    if stage == 1:                       # without codes, which move to latents of the first part
        module, path = vqgan3d, "vqgan.pt"
        flags = [*stage1_flags, "--gan", 0, "--feature", 0, "--vq_start", 1]
    for out, parts in ("whole", 1), ("parts", 4):
        main(module, *flags, "--out", out, "--grad_accum_steps", parts)
    assert_near(load(f"whole/{path}")["model"], load(f"parts/{path}")["model"])
    assert_same_log(f"whole/{path}", f"parts/{path}")

def test_samples_of_two_processes_are_those_of_one(stage2, main, tmp_path):
    """Both processes with the same seeds; videos that are missing, or in another's place."""
    flags = ["--checkpoint", stage2.path, "--n", 5, "--batch_size", 2, "--steps", 4, "--seed", 3,
             "--dtype", "float32", "--device", "cpu"]
    main(sample, *flags, "--out", "one")
    argv = [str(flag) for flag in ("sample.py", *flags, "--out", "two")]
    torchrun(tmp_path, f"import data, sample\nsys.argv = {argv}\ndata.run_main(sample.main)")
    first, second = np.load("one/samples.npy"), np.load("two/samples.npy")
    assert len({video.tobytes() for video in first}) == 5
    assert abs(first.astype(int) - second).max() <= 1
    assert (tmp_path / "two" / "samples.json").exists()
