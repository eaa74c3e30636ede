"""Several processes, and a batch in several parts: the same training as one process with the whole batch."""
import os, subprocess, sys
import pytest
import torch
from conftest import ROOT, STAGE1, STAGE2, same

WATCHED = """
import sys
sys.path.insert(0, {root!r})
import torch, data, vqgan3d, {module} as module
average = vqgan3d.average_gradients
def watched(*modules):                                      # what this process holds before the last step
    average(*modules)
    torch.save([m.state_dict() for m in modules if m], f"process{{vqgan3d.RANK}}.pt")
module.average_gradients = watched
sys.argv[0] = "{module}.py"
data.run(module.main)
"""

def train(folder, module, processes, *flags):
    """-> the final checkpoint, and what each process held in the last step"""
    folder.mkdir()
    (folder / "watched.py").write_text(WATCHED.format(root=str(ROOT), module=module))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    result = subprocess.run([sys.executable, *launcher, "watched.py", *map(str, flags), "--out", "run", "--dtype", "float32"], cwd=folder,
                            env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return [torch.load(folder / name, weights_only=True) for name in (f"run/{'vqgan' if module == 'vqgan3d' else module}.pt", *(f"process{i}.pt" for i in range(processes)))]

def furthest(a, b):
    """Largest difference of two state dicts, against the largest value of its tensor"""
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max().clamp_min(1e-3)).item() for k in a if a[k].is_floating_point())

def test_stage_1_on_two_processes(clips, stage1, tmp_path):
    """Gradients summed or left alone, codes revived from a share of the batch, usage counted twice, batch norm or the GAN's
    limit of half a batch; processes whose codebooks drift apart."""
    flags = ["--data", clips, "--data_dir", stage1.home, *STAGE1, "--batch_size", 4, "--steps", 6, "--eval_every", 6,
             "--vq_start", 0.2, "--disc_start", 0.3, "--gan_start", 0.5, "--lr", 1e-3]
    one, (alone, disc) = train(tmp_path / "one", "vqgan3d", 1, *flags)
    two, *ranks = train(tmp_path / "two", "vqgan3d", 2, *flags)
    same(ranks[0], ranks[1])
    assert furthest(one["model"], two["model"]) < 1e-3 and furthest(one["disc"], two["disc"]) < 1e-3
    log = (tmp_path / "two" / "run" / "vqgan.jsonl").read_text().splitlines()
    assert len(log) == 3                                                           # of one process: steps 0 (scores, losses) and 6

def test_stage_2_on_two_processes_and_in_parts(clips, stage1, stage2, tmp_path):
    """Every process or part with the same noise, times or clips; losses that count twice."""
    flags = ["--data", clips, "--data_dir", stage1.home, *STAGE2, "--dropout", 0, "--steps", 6, "--eval_every", 6, "--vqgan", stage1.path]
    one, alone = train(tmp_path / "one", "diffusion", 1, *flags)
    two, *ranks = train(tmp_path / "two", "diffusion", 2, *flags)
    parts, _ = train(tmp_path / "parts", "diffusion", 1, *flags, "--accumulate", 4)
    same(ranks[0], ranks[1])
    for other in (two, parts):
        assert furthest(one["model"], other["model"]) < 1e-3 and furthest(one["ema"], other["ema"]) < 1e-3
        same(one["statistics"], other["statistics"])

def test_stage_1_in_parts(clips, stage1, tmp_path):
    """A loss of the parts that is not the mean of the whole."""
    flags = ["--data", clips, "--data_dir", stage1.home, *STAGE1, "--batch_size", 4, "--steps", 4, "--eval_every", 4, "--gan", 0, "--feature", 0, "--lr", 1e-3, "--vq_start", 1]
    one, alone = train(tmp_path / "one", "vqgan3d", 1, *flags)
    parts, _ = train(tmp_path / "parts", "vqgan3d", 1, *flags, "--accumulate", 2)
    assert furthest(one["model"], parts["model"]) < 1e-3

@pytest.mark.parametrize("flags", [["--accumulate", 3], ["--accumulate", 0]])
def test_a_batch_that_cannot_be_divided_is_said(stage1, main, flags):
    """A part of the batch that nobody computes; a division by zero."""
    import vqgan3d
    result = main(vqgan3d, *stage1.flags, "--out", "run", *flags)
    assert result.code == 1 and "--accumulate" in result.err
