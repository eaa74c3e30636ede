"""Several processes, and a batch in several parts: the same training as one process with the whole
batch. On a CPU the processes talk through gloo; the code is that of several GPUs."""
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import diffusion
import sample
import vqgan3d
from conftest import ROOT, STAGE1, Result, load, read_log, same

SCRIPT = """
import signal
import sys
sys.path.insert(0, {root!r})
import torch
import data
import {module} as module
sys.argv[0] = "{module}.py"
{patch}
data.run_main(module.main)
"""

SAVE_NETWORKS = """
average_gradients = module.average_gradients
def average_and_save(*networks):            # at last, what this process holds before the last step
    average_gradients(*networks)
    states = [network.state_dict() for network in networks if network is not None]
    torch.save(states, f"process{data.RANK}.pt")
module.average_gradients = average_and_save
"""

FAIL_IN_PROCESS_1 = """
train_step = module.train_step
def train_or_fail(cfg, nets, clips, frame, step, *rest):
    if step == 2 and data.RANK == 1:
        raise data.UserError("only here")
    return train_step(cfg, nets, clips, frame, step, *rest)
module.train_step = train_or_fail
"""

STOP_PROCESS_1 = """
train_step = module.train_step
def train_and_signal(cfg, nets, clips, frame, step, *rest):
    if step == 2 and data.RANK == 1:
        signal.raise_signal(signal.SIGTERM)
    return train_step(cfg, nets, clips, frame, step, *rest)
module.train_step = train_and_signal
"""

COMBINE_GRADIENTS = """
data.start_processes(torch.device("cpu"))
half = slice(2 * data.RANK, 2 * data.RANK + 2)
grad_rec, grad_adv = torch.load("gradients.pt")
joined = module.join_gradients(grad_rec[half], grad_adv[half], 0.3)
network = torch.nn.Linear(2, 2)
network.bias.grad = torch.tensor([1.0, 2.0]) * (1 + data.RANK)
data.average_gradients(network, None)       # the weight has no gradient
torch.save([joined, network.bias.grad], f"process{data.RANK}.pt")
sys.exit()
"""

def run_two(folder, module, patch, *flags):
    """Run a script on two processes, each of which first executes `patch` -> Result"""
    text = SCRIPT.format(root=str(ROOT), module=module.__name__, patch=patch)
    (folder / "script.py").write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", "--", "script.py", *map(str, flags)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True,
                            timeout=300)
    return Result(result.returncode, result.stdout, result.stderr)

def largest_difference(a, b):
    """Of two state dicts, relative to the largest value of each tensor."""
    differences = []
    for name, value in a.items():
        if value.is_floating_point():
            scale = value.abs().max().clamp_min(1e-3)
            differences.append(((value - b[name]).abs().max() / scale).item())
    return max(differences)

@pytest.fixture
def stage1_flags(clips, stage1):
    """Six steps of stage 1, from the second on with codes."""
    return ["--data", clips, "--data_dir", stage1.home, *STAGE1, "--batch_size", 4, "--steps", 6,
            "--eval_every", 6, "--lr", 1e-3, "--vq_start", 0.2, "--dtype", "float32"]

@pytest.fixture
def stage2_flags(stage1, stage2):
    """Six steps of stage 2. Dropout would differ."""
    return [*stage2.flags, "--dropout", 0, "--steps", 6, "--eval_every", 6,
            "--vqgan", stage1.path, "--dtype", "float32"]

# --------------------------------------------------------------------------------------------------
# training

def test_stage_1_on_two_processes(stage1_flags, main, tmp_path):
    """Gradients of a share of the batch, codes moved to latents of a share, usage counted twice.
    Without a discriminator: on CPUs each process has a batch norm of its own."""
    flags = [*stage1_flags, "--gan", 0, "--feature", 0]
    one = main(vqgan3d, *flags, "--out", "one")
    assert one.code == 0, one.err
    two = run_two(tmp_path, vqgan3d, SAVE_NETWORKS, *flags, "--out", "two")
    assert two.code == 0, two.err
    same(load("process0.pt"), load("process1.pt"))
    assert largest_difference(load("one/vqgan.pt")["model"], load("two/vqgan.pt")["model"]) < 1e-3

def test_the_gan_on_two_processes(stage1_flags, tmp_path):
    """Processes whose autoencoders, codebooks or discriminators drift apart; a log of each."""
    flags = [*stage1_flags, "--disc_start", 0.3, "--gan_start", 0.5]
    result = run_two(tmp_path, vqgan3d, SAVE_NETWORKS, *flags, "--out", "run")
    assert result.code == 0, result.err
    autoencoder, discriminator = load(tmp_path / "process0.pt")
    same([autoencoder, discriminator], load(tmp_path / "process1.pt"))
    log = read_log(tmp_path / "run" / "vqgan.pt")
    assert [row["step"] for row in log] == [0, 0, 6]                  # scores, losses, scores

def test_gradients_are_combined_over_all_processes(tmp_path):
    """The limit of the GAN computed from the norms of half a batch: another weight of the GAN in
    each process. Gradients that are summed, which Adam and Muon would hide."""
    torch.manual_seed(0)
    grad_rec, grad_adv = torch.randn(4, 3, 8, 16, 16), torch.randn(4, 3, 8, 16, 16)
    grad_adv[:2] *= 100                                               # of the first process
    torch.save((grad_rec, grad_adv), tmp_path / "gradients.pt")
    result = run_two(tmp_path, vqgan3d, COMBINE_GRADIENTS)
    assert result.code == 0, result.err
    joined0, mean0 = load(tmp_path / "process0.pt")
    joined1, mean1 = load(tmp_path / "process1.pt")
    joined = torch.cat([joined0, joined1])
    whole = vqgan3d.join_gradients(grad_rec, grad_adv, 0.3)
    assert torch.allclose(joined, whole, rtol=1e-4)
    assert not torch.allclose(joined, grad_rec + grad_adv)            # the limit is in force
    assert mean0.tolist() == mean1.tolist() == [1.5, 3.0]

def test_stage_2_on_two_processes(stage2_flags, main, tmp_path):
    """Both processes with the same noise, times or clips; losses that count twice."""
    one = main(diffusion, *stage2_flags, "--out", "one")
    assert one.code == 0, one.err
    two = run_two(tmp_path, diffusion, SAVE_NETWORKS, *stage2_flags, "--out", "two")
    assert two.code == 0, two.err
    same(load("process0.pt"), load("process1.pt"))
    one, two = load("one/diffusion.pt"), load("two/diffusion.pt")
    assert largest_difference(one["model"], two["model"]) < 1e-3
    assert largest_difference(one["ema"], two["ema"]) < 1e-3
    same(one["statistics"], two["statistics"])

@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_in_parts(stage1_flags, stage2_flags, main, stage):
    """A loss of the parts that is not the mean of the whole; every part with the same noise, times
    or clips."""
    if stage == 1:                       # without codes, which move to latents of the first part
        module, path = vqgan3d, "vqgan.pt"
        flags = [*stage1_flags, "--gan", 0, "--feature", 0, "--vq_start", 1]
    else:
        module, path = diffusion, "diffusion.pt"
        flags = stage2_flags
    for out, parts in ("whole", 1), ("parts", 4):
        result = main(module, *flags, "--out", out, "--grad_accum_steps", parts)
        assert result.code == 0, result.err
    whole, parts = load(f"whole/{path}"), load(f"parts/{path}")
    assert largest_difference(whole["model"], parts["model"]) < 1e-3

@pytest.mark.parametrize("parts", [3, 0])
def test_a_batch_that_cannot_be_divided_is_refused(stage1, main, parts):
    """A part of the batch that no process computes; a division by zero."""
    result = main(vqgan3d, *stage1.flags, "--out", "run", "--grad_accum_steps", parts)
    assert result.code == 1
    assert "--grad_accum_steps" in result.err

# --------------------------------------------------------------------------------------------------
# one process that fails or is asked to stop

def test_an_error_of_one_process_ends_both(stage1_flags, tmp_path):
    """The other process waits for the gradients of the failed one, for a day; or the error is
    silent, as process 0 prints for all."""
    began = time.time()
    result = run_two(tmp_path, vqgan3d, FAIL_IN_PROCESS_1, *stage1_flags, "--out", "run")
    assert result.code != 0
    assert "error: only here" in result.err
    assert time.time() - began < 100                                  # most of it starts torch

def test_a_signal_to_one_process_stops_both(stage1_flags, tmp_path):
    """One process stops and the other waits for its gradients; or they stop at different steps."""
    result = run_two(tmp_path, vqgan3d, STOP_PROCESS_1, *stage1_flags, "--steps", 30,
                     "--eval_every", 30, "--out", "run")
    assert result.code == 0, result.err
    assert "stopped after step 20 and saved run/vqgan.pt" in result.out
    assert load(tmp_path / "run" / "vqgan.pt")["step"] == 20

# --------------------------------------------------------------------------------------------------
# sampling

def test_samples_of_two_processes_are_those_of_one(stage2, main, tmp_path):
    """Both processes with the same seeds; videos that are missing, or in another's place."""
    flags = ["--checkpoint", stage2.path, "--n", 5, "--batch_size", 2, "--steps", 4, "--seed", 3,
             "--dtype", "float32", "--device", "cpu"]
    one = main(sample, *flags, "--out", "one")
    assert one.code == 0, one.err
    two = run_two(tmp_path, sample, "", *flags, "--out", "two")
    assert two.code == 0, two.err
    first, second = np.load("one/samples.npy"), np.load("two/samples.npy")
    assert len({video.tobytes() for video in first}) == 5
    assert (first == second).all()
    for name in ("samples.json", "samples.gif"):
        assert (tmp_path / "two" / name).exists()
