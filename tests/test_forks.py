"""The worked examples are diffs: each must still apply, and what it makes must train and sample."""
import shutil
import subprocess

import pytest

from conftest import ROOT, STAGE1, STAGE2, script

FOLDER = ROOT / "tests" / "forks"
RUNS = [                     # applied together are diffs of different places: a run costs 8 seconds
    ("fsq_quantizer", "transformer_denoiser"),
    ("kl_latents", "flow_matching"),
    ("own_preset", "edm"),
    ("few_steps",),
]
ALL = """import sys
import data, diffusion, sample, vqgan3d
for sys.argv in {}:
    data.run_main(sys.modules[sys.argv[0]].main)
"""

def test_every_fork_is_run_and_in_the_readme():
    """A worked example that nobody finds or tries, or one that is named and not there."""
    readme = (ROOT / "README.md").read_text()
    assert {f"{name}.diff" for run in RUNS for name in run} == {f.name for f in FOLDER.iterdir()}
    assert all(f"`{fork.name}`" in readme for fork in FOLDER.iterdir())

@pytest.mark.parametrize("forks", RUNS, ids="+".join)
def test_the_forks_apply_and_run(forks, clips, tmp_path):
    """A diff that no longer fits the code, or whose result does not train or sample."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    for fork in forks:
        subprocess.run(["git", "apply", FOLDER / f"{fork}.diff"], cwd=tmp_path, check=True)
    data = ["--data", shutil.copytree(clips, tmp_path / "clouds").name]     # as in own_preset
    commands = [["vqgan3d", *data, *STAGE1, "--steps", "4"],
                ["diffusion", *data, *STAGE2, "--steps", "2"],
                ["sample", *data, "--n", "2", "--steps", "2", "--device", "cpu"]]
    if forks == ("few_steps",):                              # the student takes its teacher's place
        commands.insert(2, [*commands[1], "--fresh", "--distill", "runs/clouds/diffusion.pt"])
    (tmp_path / "all.py").write_text(ALL.format(commands))
    result = script(tmp_path / "all.py", cwd=tmp_path)
    assert result.code == 0, result.err
    for setting in ("gan=0.0", "cond_prob=0.5"):             # of stage 1, and of stage 2
        assert (setting in result.out) == ("own_preset" in forks)
