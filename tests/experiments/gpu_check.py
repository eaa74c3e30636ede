"""The first ten minutes on a GPU: does everything run, how fast, in how much memory?

    python -m tests.experiments.gpu_check                        # the sky networks, on random clips
    python -m tests.experiments.gpu_check --device cpu --small   # a rehearsal, with tiny networks

Trains each stage for some steps plainly, compiled, and in float16, and once interrupted and
resumed; samples; then times sampling (tests.experiments.benchmark). Losses of the three ways must
agree. A run of few and one of more steps are timed: their difference is the time of a step, without
that of starting and compiling. Writes runs/gpu_check/gpu_check.json and a log of each command.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from data import run_main, toy_videos

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "vqgan3d": "--size 32 --width 8 --codes 64 --batch_size 4 --disc_width 4 --perceptual 0".split(),
    "diffusion": "--width 16 --mults 1,2 --blocks 1 --head_dim 8 --batch_size 8".split(),
}
LARGE = {
    "vqgan3d": "--size 128 --width 128 --batch_size 16 --perceptual 0".split(),
    "diffusion": "--batch_size 64 --grad_accum_steps 2".split(),
}
LOSSES = "--vq_start 0.1 --disc_start 0.2 --gan_start 0.3".split()      # all of them early

class Check:
    """Runs commands, keeps their logs and what they measured."""
    def __init__(self, folder):
        self.folder = folder
        self.results = {}
        self.failed = []

    def run(self, name, *command):
        """Run a script of this project -> seconds, None if it failed"""
        began = time.time()
        with open(self.folder / f"{name}.log", "w") as log:
            command = [sys.executable, *map(str, command)]
            code = subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, timeout=600).returncode
        seconds = time.time() - began
        print(f"{'ok    ' if code == 0 else 'FAILED'} {name}: {seconds:.0f} s", flush=True)
        if code:
            self.failed.append(name)
            return None
        return seconds

    def last_loss(self, folder, script, name):
        rows = (folder / f"{script}.jsonl").read_text().splitlines()
        return [json.loads(row)[name] for row in rows if f'"{name}"' in row][-1]

    def stage(self, script, loss, flags, few, many):
        """Train a stage in three ways, then interrupted and resumed."""
        ways = {"plain": [], "compiled": ["--compile"], "float16": ["--dtype", "float16"]}
        for way, more in ways.items():
            times = []
            for steps in (few, many):
                out = self.folder / f"{script}-{way}"
                times.append(self.run(f"{script}-{way}-{steps}", f"{script}.py", *flags, *more,
                                      "--steps", steps, "--out", out, "--fresh"))
            if None not in times:
                step = (times[1] - times[0]) / (many - few)
                value = self.last_loss(out, script, loss)
                self.results[f"{script} {way}"] = dict(seconds_a_step=step, loss=value)
        values = [r["loss"] for name, r in self.results.items() if name.startswith(script)]
        if values and max(values) > 1.2 * min(values):
            self.failed.append(f"{script}: losses of the three ways {values}")
        out = self.folder / f"{script}-resumed"
        self.run(f"{script}-first", f"{script}.py", *flags, "--steps", few, "--out", out, "--fresh")
        self.run(f"{script}-rest", f"{script}.py", *flags, "--steps", many, "--out", out)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu [cuda]")
    parser.add_argument("--small", action="store_true", help="tiny networks, for a rehearsal")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    args = parser.parse_args()
    folder = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PYTHONPATH"] = str(ROOT)
    size = 32 if args.small else 128
    clips, _ = toy_videos(96, 16, size, seed=0)
    np.save(folder / "clips.npy", clips)
    networks = SMALL if args.small else LARGE
    few, many = (20, 40) if args.small else (40, 120)
    common = ["--data", folder / "clips.npy", "--device", args.device, "--eval_every", 10_000]
    check = Check(folder)
    check.stage("vqgan3d", "mse", [*common, *networks["vqgan3d"], *LOSSES, "--eval_clips", 8],
                few, many)
    vqgan = folder / "vqgan3d-plain" / "vqgan.pt"
    check.stage("diffusion", "loss", [*common, *networks["diffusion"], "--vqgan", vqgan], few, many)
    model = folder / "diffusion-plain" / "diffusion.pt"
    check.run("sample", "sample.py", "--checkpoint", model, "--n", 4, "--device", args.device)
    preset = "toy" if args.small else "sky"
    check.run("benchmark", "-m", "tests.experiments.benchmark", "--preset", preset, "--device",
              args.device, "--out", folder / "benchmark.json")
    for name, value in check.results.items():
        print(f"{name}: {value}")
    (folder / "gpu_check.json").write_text(json.dumps(check.results, indent=1))
    if check.failed:
        sys.exit(f"FAILED: {check.failed}; the logs are in {folder}")
    print(f"saved: {folder}/gpu_check.json")

if __name__ == "__main__":
    run_main(main)
