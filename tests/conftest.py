"""What the tests share: the scripts run as a user runs them, a folder of tiny clips, and one tiny run of each stage."""
import os, signal, subprocess, sys, types
from pathlib import Path
import imageio.v3 as iio
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data

STAGE1 = ("--size 16 --frames 8 --down 2,4,4 --width 16 --blocks 1 --codes 16 --disc_width 4 --perceptual 0 "
          "--steps 60 --batch_size 2 --eval_every 20 --eval_clips 8 --device cpu").split()
STAGE2 = ("--width 16 --mults 1,2 --blocks 1 --head_dim 8 --attention 16 --dropout 0.1 --timesteps 50 --ema 0.9 --lr 3e-3 "
          "--steps 24 --batch_size 8 --latents 32 --eval_every 12 --device cpu").split()

def launch(script, *flags, cwd):
    """A script in a process of its own. Networks this small are fastest on one thread."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, flags)], cwd=cwd, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def script(name, *flags, cwd):
    """Run a script to its end: code, out, err. An error is one line on stderr, below whatever the progress bars left."""
    process = launch(name, *flags, cwd=cwd)
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return types.SimpleNamespace(code=process.returncode, out=out, err=err)

@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """main(module, *flags): the same, in this process and an empty folder: saves the seconds that importing torch takes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    def main(module, *flags):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        code, message = 0, ""
        try:
            data.run(module.main)
        except SystemExit as e:                                    # sys.exit("text") prints the text and exits with 1
            code, message = (1, e.code) if isinstance(e.code, str) else (e.code, "")
        assert "\n" not in message                                 # a failure is one line
        return types.SimpleNamespace(code=code, out=capsys.readouterr().out, err=message)
    yield main
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)

@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(module, step): the next run of this stage gets one SIGTERM in the middle of that step."""
    def stop_at(module, step):
        schedule, left = module.schedule, [signal.SIGTERM]
        def schedule_and_signal(now, steps):
            if now == step and left:
                signal.raise_signal(left.pop())
            return schedule(now, steps)
        monkeypatch.setattr(module, "schedule", schedule_and_signal)
    return stop_at

@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder of 12 tiny videos of 12 frames in two classes, GIF and mp4; the tenth is the test split."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    videos, labels = data.toy_videos(12, 12, 16, seed=5)
    for i, video in enumerate(videos):
        path = folder / ("spin", "wave")[i % 2] / f"{i:02d}.{'mp4' if i % 6 == 0 else 'gif'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        data.save_grid(path, video[None], zoom=1)
    assert len(iio.imread(folder / "spin" / "00.mp4", plugin="pyav")) == 12
    return folder

@pytest.fixture(scope="session")
def stage1(clips):
    """python vqgan3d.py --data clips: the run's folder, which also holds the cache; .flags repeats the command."""
    home = clips.parent
    flags = ["--data", clips, "--data_dir", home, *STAGE1]
    result = script("vqgan3d.py", *flags, "--out", "run", cwd=home)
    assert result.code == 0, result.err
    return types.SimpleNamespace(path=home / "run" / "vqgan.pt", home=home, flags=flags, out=result.out)

@pytest.fixture(scope="session")
def stage2(stage1, clips):
    """python diffusion.py --data clips, after stage 1 and in the same folder."""
    home = clips.parent
    flags = ["--data", clips, "--data_dir", home, *STAGE2]
    result = script("diffusion.py", *flags, "--out", "run", cwd=home)
    assert result.code == 0, result.err
    return types.SimpleNamespace(path=home / "run" / "diffusion.pt", home=home, flags=flags, out=result.out)

def same(a, b, path=""):
    """Are two checkpoints equal, bit for bit? Names the first place where they are not."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{path} differs"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{path}: {set(a) ^ set(b)}"
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{path}[{i}]")
    else:
        assert a == b, f"{path}: {a} is not {b}"
