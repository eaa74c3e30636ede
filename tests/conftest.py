"""What the tests share: the scripts run as users run them, tiny clips, a tiny run of each stage."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import imageio.v3 as iio
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data

STAGE1 = ("--size 16 --frames 8 --down 2,4,4 --width 16 --blocks 1 --codes 16 --disc_width 4 "
          "--perceptual 0 --steps 60 --batch_size 2 --eval_every 20 --eval_clips 8 "
          "--device cpu").split()
STAGE2 = ("--width 16 --mults 1,2 --blocks 1 --head_dim 8 --full_attention_tokens 16 "
          "--dropout 0.1 --timesteps 50 --ema 0.9 --lr 3e-3 --steps 24 --batch_size 8 "
          "--num_latents 32 --eval_every 12 --device cpu").split()

def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a GPU")

class Result(NamedTuple):
    """How a script ended."""
    code: int        # exit status
    out: str
    err: str

class Trained(NamedTuple):
    """A finished run of a stage."""
    path: Path       # its checkpoint
    home: Path       # where it ran; the cache of the clips is there
    flags: list      # with these and --out, the command does the same again
    out: str         # what it printed

# --------------------------------------------------------------------------------------------------
# running a script

def launch(script, *flags, cwd):
    """Start a script in a process of its own. Networks this small are fastest on one thread."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def script(name, *flags, cwd):
    """Run a script to its end -> Result. It must not print a stack trace."""
    process = launch(name, *flags, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return Result(process.returncode, out, err)

@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """main(module, *flags): the same in this process and in an empty folder, which saves the
    seconds of importing torch. The error, if there is one, must be one line."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    def main(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        capsys.readouterr()
        code, error = 0, ""
        try:
            data.run_main(module.main)
        except SystemExit as e:
            code = e.code
            if isinstance(code, str):            # sys.exit("text") prints the text, the status is 1
                code, error = 1, e.code
        finally:
            signal.signal(signal.SIGINT, handlers[0])
            signal.signal(signal.SIGTERM, handlers[1])
        assert "\n" not in error
        return Result(code, capsys.readouterr().out, error)
    yield main
    torch.set_num_threads(threads)

@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(module, step): a run of this stage gets one SIGTERM in the middle of that step."""
    def stop_at(module, step):
        cosine_lr, signals = module.cosine_lr, [signal.SIGTERM]
        def cosine_lr_and_signal(now, steps):
            if now == step and signals:
                signal.raise_signal(signals.pop())
            return cosine_lr(now, steps)
        monkeypatch.setattr(module, "cosine_lr", cosine_lr_and_signal)
    return stop_at

# --------------------------------------------------------------------------------------------------
# what is made once for all tests

@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of 12 tiny videos of 12 frames in two classes, GIF and mp4."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    videos, _ = data.toy_videos(12, 12, 16, seed=5)
    for i, video in enumerate(videos):
        label = ("spin", "wave")[i % 2]
        suffix = "gif" if i % 6 else "mp4"
        data.save_grid(folder / label / f"{i:02d}.{suffix}", video[None], zoom=1)
    assert len(iio.imread(folder / "spin" / "00.mp4", plugin="pyav")) == 12
    return folder

def train(name, checkpoint, clips, stage_flags):
    flags = ["--data", clips, "--data_dir", clips.parent, *stage_flags]
    result = script(name, *flags, "--out", "run", cwd=clips.parent)
    assert result.code == 0, result.err
    return Trained(clips.parent / "run" / checkpoint, clips.parent, flags, result.out)

@pytest.fixture(scope="session")
def stage1(clips):
    """A finished run of python vqgan3d.py --data clips."""
    return train("vqgan3d.py", "vqgan.pt", clips, STAGE1)

@pytest.fixture(scope="session")
def stage2(stage1, clips):
    """A finished run of python diffusion.py --data clips, after stage 1 and in the same folder."""
    return train("diffusion.py", "diffusion.pt", clips, STAGE2)

# --------------------------------------------------------------------------------------------------

def read_log(path):
    """The rows of the log beside a checkpoint: a list of dicts"""
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]

def load(path):
    return torch.load(path, weights_only=True)

def same(a, b, where="checkpoint"):
    """Two checkpoints must be equal, bit for bit. The error names the first difference."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, f"{where}: {a.dtype} is not {b.dtype}"
        assert torch.equal(a, b), f"{where} differs"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{where}: {set(a) ^ set(b)}"
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{where}: {len(a)} is not {len(b)}"
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]")
    else:
        assert a == b, f"{where}: {a} is not {b}"
