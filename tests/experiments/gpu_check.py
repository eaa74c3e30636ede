"""Everything that a first hour on a GPU should measure, in one command.

    python -m tests.experiments.gpu_check                         # on a machine with a GPU
    python -m tests.experiments.gpu_check --only vqgan3d,i3d      # some of it: where time is short
    python -m tests.experiments.gpu_check --device cpu --small    # rehearsal: tiny networks

It needs no network, no weights and no PyAV: it draws its own clips of 16 x 128 x 128. With the
presets of sky both stages are trained for some steps, eager, compiled and in float16 (the losses at
the end must agree), stopped and resumed; then come the rate of I3D and the speed table of the
paper, not compiled, as compiling takes minutes (benchmark.py compiles). A command that takes over
four minutes is stopped, and the next one begins.
Writes runs/gpu_check/: gpu_check.json, a log of each command, and the previews of both stages.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import evaluate
from data import FlagParser, UserError, output_folder, run_main, toy_videos
from tests.experiments.benchmark import seconds
from vqgan3d import VGG16

ROOT = Path(__file__).resolve().parents[2]
SMALL1 = ("--size 32 --width 16 --codes 64 --disc_width 4 --batch_size 4 --blocks 1").split()
SMALL2 = ("--width 16 --mults 1,2 --blocks 1 --head_dim 8 --batch_size 8 "
          "--grad_accum_steps 2").split()
STAGE1 = "--width 128 --batch_size 16 --flip".split()            # the sky presets
STAGE2 = "--grad_accum_steps 2 --noise_shift 4".split()

class Check:
    """The commands run so far, and what was measured."""
    def __init__(self, args):
        self.device, self.small = args.device, args.small
        self.folder = output_folder(args.out)
        self.results = dict(device=self.device, torch=torch.__version__, commands=[])
        self.failed = []
        path = self.folder / "gpu_check.json"
        if path.exists():                                        # other parts, of earlier calls
            self.results = json.loads(path.read_text()) | self.results
        if self.device == "cuda":
            self.results["gpu"] = torch.cuda.get_device_name()
            self.results["cudnn"] = torch.backends.cudnn.version()

    def run(self, name, *command, **environment):
        """Run a script from the project's root, its output to a log -> whether it worked."""
        began = time.time()
        log = self.folder / f"{name}.log"
        with open(log, "w") as file:
            try:
                status = subprocess.call([sys.executable, *map(str, command)], cwd=ROOT,
                                         stdout=file, stderr=subprocess.STDOUT, timeout=240,
                                         env=os.environ | environment)
            except subprocess.TimeoutExpired:
                status = "stopped after 240 s"
        if status:
            self.failed.append(name)
        took = time.time() - began
        self.results["commands"].append(dict(name=name, status=status, seconds=round(took, 1)))
        last = log.read_text(errors="replace").splitlines()[-1:]
        print(f"{'ok    ' if status == 0 else 'FAILED'} {took:6.1f} s  {name}: "
              f"{last[0][-100:] if last else ''}", flush=True)
        self.save()
        return status == 0

    def train(self, name, script, steps, *flags, out="", **environment):
        """Train a stage -> its log rows by step; {} if it failed"""
        out = self.folder / (out or name)
        data = ["--data", self.folder / "clips.npy", "--out", out, "--device", self.device]
        worked = self.run(name, script, *data, "--steps", steps, *flags, **environment)
        log = out / f"{'vqgan' if script == 'vqgan3d.py' else 'diffusion'}.jsonl"
        rows = {}
        if worked:
            for line in log.read_text().splitlines():
                row = json.loads(line)
                rows.setdefault(row["step"], {}).update(row)
        return rows

    def save(self):
        path = self.folder / "gpu_check.json"
        path.write_text(json.dumps(self.results, indent=1))

def summarize(rows, batch_size, loss):
    """Throughput and memory of a training run, after the steps in which it warms up."""
    timed = [row for step, row in rows.items() if step > 20 and "seconds_a_step" in row]
    if not timed:
        return {}
    step = float(np.median([row["seconds_a_step"] for row in timed]))
    return dict(seconds_a_step=step, clips_a_second=batch_size / step,
                waiting=timed[-1]["waiting"], memory_gb=timed[-1]["memory_gb"],
                last_step=timed[-1]["step"], loss=timed[-1][loss])

def check_stage(check, script, steps, flags, batch_size, loss):
    """Train one stage in three ways, and once with an interruption."""
    name = script.removesuffix(".py")
    ways = {"eager": ["--compile", "off"], "compiled": ["--compile", "on"],
            "float16": ["--compile", "off", "--dtype", "float16"]}
    if check.device == "cpu":                                    # both take minutes there
        del ways["compiled"], ways["float16"]
    for way, more in ways.items():
        log = dict(TORCH_LOGS="graph_breaks,recompiles") if way == "compiled" else {}
        rows = check.train(f"{name}-{way}", script, steps, "--fresh", *flags, *more, **log)
        result = check.results[f"{name} {way}"] = summarize(rows, batch_size, loss)
        expected = check.results[f"{name} eager"]
        if result and expected and abs(result["loss"] / expected["loss"] - 1) > 0.2:
            check.failed.append(f"{name}: the losses, {way} and eager")
        if way == "compiled":
            text = (check.folder / f"{name}-{way}.log").read_text(errors="replace")
            for words in "Graph break", "Recompiling", "torch.compile does not work here":
                result[words] = text.count(words)
    eager = ways["eager"]
    half = check.train(f"{name}-half", script, 30, "--fresh", *flags, *eager, out="resumed")
    rows = check.train(f"{name}-rest", script, 60, *flags, *eager, out="resumed")
    resumed = bool(half) and max(rows, default=0) == 60
    check.results[f"{name} resumed"] = resumed
    check.save()

def check_i3d(check):
    """Clips a second through I3D, whose weights do not matter for that."""
    device = torch.device(check.device)
    i3d = evaluate.I3D().eval().requires_grad_(False).to(device)
    batch = 2 if check.small else 32
    size = 32 if check.small else 128
    clips = np.zeros((batch, 16, size, size, 3), np.uint8)
    for dtype in ("float32", "bfloat16"):
        def features():
            evaluate.i3d_logits(i3d, clips, batch, dtype=dtype)
        rate = batch / seconds(features, device, repeats=2).mean()
        check.results[f"I3D clips a second, {dtype}"] = float(rate)
        print(f"       I3D: {rate:.1f} clips a second in {dtype}", flush=True)
    check.save()

def main():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cpu [cuda]")
    parser.add_argument("--small", action="store_true", help="tiny networks, for a rehearsal")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--only", default="tests,vqgan3d,diffusion,i3d,benchmark",
                        help="parts, separated by commas; diffusion needs vqgan3d [all]")
    args = parser.parse_args()
    parts = args.only.split(",")
    unknown = set(parts) - set(parser.get_default("only").split(","))
    if unknown:
        raise UserError(f"--only: there is no part {', '.join(sorted(unknown))}")
    args.out = args.out.resolve()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU here: rehearse with --device cpu --small")
    check = Check(args)
    os.environ["PYTHONPATH"] = str(ROOT)
    size, n = (32, 24) if args.small else (128, 96)
    clips, _ = toy_videos(n, 16, size, seed=0)
    np.save(args.out / "clips.npy", clips)
    weights = {f"features.{k}": v.numpy() for k, v in VGG16().features.state_dict().items()}
    np.savez(args.out / "vgg.npz", **weights)                    # untrained, to time it

    if args.device == "cuda" and "tests" in parts:
        if importlib.util.find_spec("pytest"):
            check.run("tests", "-m", "pytest", "-q", "-m", "cuda", "tests/test_devices.py")
        else:
            print("pytest is not installed: its tests for GPUs were left out")
    all_losses = ["--vgg", args.out / "vgg.npz", "--vq_start", 0.1, "--disc_start", 0.2,
                  "--gan_start", 0.3, "--eval_clips", 8, "--eval_every", 10_000]
    steps = 60 if args.small else 100
    flags1, batch1 = (SMALL1, 4) if args.small else (["--size", 128, *STAGE1], 16)
    flags2, batch2 = (SMALL2, 8) if args.small else (STAGE2, 64)
    if "vqgan3d" in parts:
        check_stage(check, "vqgan3d.py", steps, [*flags1, *all_losses], batch1, "mse")
    stage1 = ["--vqgan", args.out / "vqgan3d-eager" / "vqgan.pt", "--eval_every", 10_000]
    if "diffusion" in parts:
        check_stage(check, "diffusion.py", steps, [*flags2, *stage1], batch2, "loss")
        model = args.out / "diffusion-eager" / "diffusion.pt"
        check.run("sample", "sample.py", "--checkpoint", model, "--n", 4, "--steps", 10,
                  "--device", args.device)
    if "i3d" in parts:
        check_i3d(check)
    if "benchmark" in parts:
        table = ["--preset", "toy", "--batch", "1"] if args.small else ["--batch", "1,4,16"]
        check.run("benchmark", "-m", "tests.experiments.benchmark", *table, "--compile", "off",
                  "--device", args.device, "--out", args.out / "benchmark.json")
    for name, value in check.results.items():
        print(f"{name}: {value}")
    failed = ", ".join(check.failed)
    print(f"saved: {args.out}/gpu_check.json; {'FAILED: ' + failed if failed else 'ok'}")
    sys.exit(bool(failed))

if __name__ == "__main__":
    run_main(main)
