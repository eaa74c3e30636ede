"""The worked examples are diffs: each must still apply, and what it makes must train and sample."""
import shutil
import subprocess

import pytest

from conftest import ROOT, STAGE1, STAGE2, script

FORKS = sorted((ROOT / "tests" / "forks").glob("*.diff"))

def test_the_readme_names_every_fork():
    """A worked example that nobody finds, or one that is named and not there."""
    readme = (ROOT / "README.md").read_text()
    assert len(FORKS) >= 3
    for fork in FORKS:
        assert f"`{fork.name}`" in readme

@pytest.mark.parametrize("fork", FORKS, ids=[fork.stem for fork in FORKS])
def test_the_fork_applies_and_runs(fork, clips, tmp_path):
    """A diff that no longer fits the code, or whose result does not train, resume or sample."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    subprocess.run(["git", "apply", fork], cwd=tmp_path, check=True)
    shutil.copytree(clips, tmp_path / "clouds")              # the name of the preset in own_preset
    stage1 = [*STAGE1, "--steps", 4]
    stage2 = [*STAGE2, "--steps", 2, "--eval_every", 2]
    for name, flags, preset in (("vqgan3d.py", stage1, "--steps 4   (instead of 4000)"),
                                ("diffusion.py", stage2, "--steps 2   (instead of 1000)")):
        result = script(tmp_path / name, "--data", "clouds", *flags, cwd=tmp_path)
        assert result.code == 0, result.err
        assert (preset in result.out) == (fork.stem == "own_preset")
    flags = ["--data", "clouds", "--n", 2, "--steps", 2, "--device", "cpu"]
    result = script(tmp_path / "sample.py", *flags, cwd=tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "runs" / "clouds" / "samples.gif").exists()
