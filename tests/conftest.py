"""What the tests share: the scripts run as users run them, tiny clips, a tiny run of each stage."""
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data

STAGE1 = ("--size 16 --crop 0 --frames 8 --down 2,4,4 --width 16 --blocks 1 --codes 16 "
          "--disc_width 4 --perceptual 0 --steps 60 --batch_size 2 --eval_every 20 --eval_clips 8 "
          "--device cpu").split()
STAGE2 = ("--width 16 --mults 1,2 --blocks 1 --head_dim 8 --full_attention_tokens 16 "
          "--timesteps 50 --ema 0.9 --lr 3e-3 --steps 24 --batch_size 8 --eval_every 12 "
          "--device cpu").split()

Result = namedtuple("Result", "code out err")            # exit status, and what a script printed
Trained = namedtuple("Trained", "path home flags out")   # a finished run: its checkpoint, where its
# cache is, the flags with which (and --out) the command does the same again, what it printed

ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1")      # fastest for networks this small

# ---- running a script

def launch(script, *flags, cwd):
    """Start a script in a process of its own."""
    command = [sys.executable, ROOT / script, *map(str, flags)]
    return subprocess.Popen(command, cwd=cwd, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def script(name, *flags, cwd):
    """Run a script to its end -> Result. It must not print a stack trace."""
    process = launch(name, *flags, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return Result(process.returncode, out, err)

def torchrun(folder, text, fails=False):
    """Run a program on two processes -> Result"""
    (folder / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{text}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", "--", "script.py"]
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True,
                            timeout=300)
    assert (result.returncode != 0) == fails, result.stderr
    return Result(result.returncode, result.stdout, result.stderr)

@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """main(module, *flags, code=0): the same in this process and in an empty folder, which saves
    the seconds of importing torch. It must end with that status; an error must be one line."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    def main(module, *flags, code=0):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        capsys.readouterr()
        status, error = 0, ""
        try:
            data.run_main(module.main)
        except SystemExit as e:
            status = e.code
            if isinstance(status, str):          # sys.exit("text") prints the text, the status is 1
                status, error = 1, e.code
        finally:
            signal.signal(signal.SIGINT, handlers[0])
            signal.signal(signal.SIGTERM, handlers[1])
            data.signals.clear()
        assert "\n" not in error
        assert status == code, error
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

# ---- videos

def write_video(path, video):
    """uint8 (T, H, W, 3) -> a GIF or an mp4"""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(plugin="pillow", loop=0)
    if path.suffix == ".mp4":
        options = dict(plugin="pyav", codec="libx264", fps=8)
    iio.imwrite(path, video, **options)

def write_frames(folder, values, name="frame_{}.png"):
    """A folder of grey frames, frame i of value values[i], which the cache keeps at size 16."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        iio.imwrite(folder / name.format(i), np.full((16, 16, 3), value, np.uint8))

# ---- what is made once for all tests

@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of 12 tiny videos of 12 frames in two classes, GIF and mp4."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    videos, _ = data.toy_videos(12, 12, 16, seed=5)
    for i, video in enumerate(videos):
        suffix = "gif" if i % 6 else "mp4"
        write_video(folder / ("spin", "wave")[i % 2] / f"{i:02d}.{suffix}", video)
    return folder

def train(name, checkpoint, clips, stage_flags):
    """Run a stage to its end -> Trained"""
    flags = ["--data", clips, "--data_dir", clips.parent, *stage_flags]
    result = script(name, *flags, "--out", "run", cwd=clips.parent)
    assert result.code == 0, result.err
    return Trained(clips.parent / "run" / checkpoint, clips.parent, flags, result.out + result.err)

@pytest.fixture(scope="session")
def stage1(clips):
    """A finished run of python vqgan3d.py --data clips."""
    return train("vqgan3d.py", "vqgan.pt", clips, STAGE1)

@pytest.fixture(scope="session")
def stage2(stage1, clips):
    """A finished run of python diffusion.py --data clips, after stage 1 and in the same folder."""
    return train("diffusion.py", "diffusion.pt", clips, STAGE2)

# ---- checkpoints and logs

def read_log(path):
    """The rows of the log beside a checkpoint: a list of dicts"""
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]

def load(path):
    return torch.load(path, weights_only=True)

def same(a, b, where="checkpoint"):
    """Two checkpoints must be equal, bit for bit. The error names the first difference."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        same(dict(enumerate(a)), dict(enumerate(b)), where)
    else:
        assert a == b, where
