"""The worked examples of the README are diffs: each must still apply, and what it makes must train and sample."""
import re, shutil, subprocess
from pathlib import Path
import pytest
from conftest import ROOT, STAGE1, STAGE2, script

EXAMPLES = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)

def test_there_are_three_of_at_most_twenty_lines():
    assert len(EXAMPLES) == 3
    for diff in EXAMPLES:
        assert 0 < len(re.findall(r"^[+-](?!\+\+|--)", diff, re.M)) <= 20

@pytest.mark.parametrize("diff", EXAMPLES, ids=["quantiser", "denoiser", "own videos"])
def test_the_fork_applies_and_runs(diff, clips, tmp_path):
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, check=True)
    shutil.copytree(clips, tmp_path / "clouds")                    # the name that the third example has a preset for
    for name, flags, preset in (("vqgan3d.py", [*STAGE1, "--steps", 4], "--steps 4   (instead of 4000)"),
                                ("diffusion.py", [*STAGE2, "--steps", 2, "--eval_every", 2], "--steps 2   (instead of 1000)")):
        result = script(tmp_path / name, "--data", "clouds", *flags, cwd=tmp_path)
        assert result.code == 0, result.err
        assert (preset in result.out) == ('"clouds"' in diff)
    result = script(tmp_path / "sample.py", "--data", "clouds", "--n", 2, "--steps", 2, "--device", "cpu", cwd=tmp_path)
    assert result.code == 0 and (tmp_path / "runs/clouds/samples.gif").exists(), result.err
