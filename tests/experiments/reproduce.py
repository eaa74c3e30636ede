"""The commands behind the measured results, one after the other.

    python -m tests.experiments.reproduce toy                     # trained longer, and at 64 x 64
    python -m tests.experiments.reproduce sky actions             # an evening on two CPU cores
    python -m tests.experiments.reproduce losses latents          # ablations of stage 1, on actions
    python -m tests.experiments.reproduce denoiser                # of stage 2, after a quick start
    python -m tests.experiments.reproduce sky actions --budget gpu    # full width; not run yet
    python -m tests.experiments.reproduce sky --list              # only print the commands

The raw videos lie where the README says. After an interruption the same command goes on: training
resumes, and a command that has finished is not run again (runs/reproduce.done lists them). At the
end all numbers that evaluate.py wrote below runs/ are printed.
"""
import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from data import FlagParser, UserError, run_main

# --------------------------------------------------------------------------------------------------
# the flags

class Flags(NamedTuple):
    stage1: str          # of vqgan3d.py
    stage2: str          # of diffusion.py
    n: int               # samples

SKY = {
    "cpu": Flags("--crop 64 --width 32 --perceptual 0.03 --disc_width 16 --lr 3e-3 --batch_size 4 "
                 "--steps 9000 --eval_every 500 --eval_clips 12",
                 "--predict v --width 48 --blocks 1 --full_attention_tokens 256 --head_dim 48 "
                 "--batch_size 8 --grad_accum_steps 1 --lr 4e-3 --ema 0.995 --num_latents 578 "
                 "--steps 2000 --eval_every 300", 128),
    "gpu": Flags("--perceptual 0.03 --batch_size 16 --steps 5000 --eval_every 500",
                 "--predict v --steps 20000 --num_latents 578 --ema 0.999 --eval_every 2000", 2048),
}
ACTIONS = {
    "cpu": Flags("--size 64 --width 32 --codes 2048 --perceptual 0.02 --disc_width 16 --lr 3e-3 "
                 "--batch_size 4 --steps 800 --eval_every 200 --eval_clips 24",
                 "--predict v --width 48 --blocks 1 --full_attention_tokens 256 --head_dim 48 "
                 "--batch_size 16 --grad_accum_steps 1 --lr 4e-3 --ema 0.995 --num_latents 2880 "
                 "--noise_shift 2 --steps 2000 --eval_every 400", 256),
    "gpu": Flags("--size 64 --perceptual 0.02 --batch_size 16 --steps 4000 --eval_every 500",
                 "--predict v --noise_shift 2 --steps 15000 --num_latents 2880 --ema 0.999 "
                 "--eval_every 2000", 2048),
}

class ToyRun(NamedTuple):
    name: str            # runs/<name>
    size: int            # pixels a side
    stage1: str
    stage2: str

TOY = {
    "cpu": [ToyRun("ref", 32, "--steps 12000", "--steps 10000 --ema 0.998"),
            ToyRun("toy64", 64, "--size 64 --down 4,8,8 --width 16 --steps 8000",
                   "--steps 6000 --ema 0.998")],
    "gpu": [ToyRun("toy64", 64, "--size 64 --down 4,8,8 --batch_size 16 --steps 20000",
                   "--width 128 --blocks 2 --batch_size 64 --lr 1e-3 --ema 0.9995 --steps 40000")],
}
ABLATIONS = {            # {ablation: {name of the run: what is changed}}
    "losses": {"all": "", "no-perceptual": "--perceptual 0", "no-gan": "--gan 0",
               "no-feature": "--feature 0", "pixels-alone": "--perceptual 0 --gan 0 --feature 0"},
    "latents": {"down-4-8-8": "--down 4,8,8", "dim-3": "--code_dim 3", "dim-16": "--code_dim 16",
                "codes-512": "--codes 512", "codes-8192": "--codes 8192"},
    "denoiser": {"default": "", "eps": "--predict eps", "no-ema": "--ema 0"},
}
RESULTS = ["toy", "sky", "actions", *ABLATIONS]

# --------------------------------------------------------------------------------------------------
# the commands, as arguments of python

def toy_commands(budget):
    for run in TOY[budget]:
        out = f"runs/{run.name}"
        yield f"vqgan3d.py {run.stage1} --out {out}"
        yield f"diffusion.py {run.stage2} --out {out}"
        yield f"sample.py --checkpoint {out}/diffusion.pt --n 2048 --batch_size 32"
        yield f"-m tests.experiments.toy_accuracy --samples {out}/samples.npy"
        yield f"evaluate.py --data toy --size {run.size} --fake {out}/samples.npy --out {out}"

def sky_commands(budget, vgg, i3d):
    stage1, stage2, n = SKY[budget]
    yield f"vqgan3d.py --data sky {stage1} {vgg}"
    yield f"vqgan3d.py --data sky {stage1} --perceptual 0 --gan 0 --feature 0 --out runs/sky-plain"
    yield f"evaluate.py --data sky --vqgan runs/sky/vqgan.pt {i3d}"
    yield f"evaluate.py --data sky --vqgan runs/sky-plain/vqgan.pt {i3d}"
    yield f"diffusion.py --data sky {stage2}"
    yield f"sample.py --data sky --n {n} --grid 16 --batch_size 8"
    yield f"evaluate.py --data sky --n {n} {i3d}"
    yield "sample.py --data sky --n 2 --frames 64 --out runs/sky/long"
    yield "-m tests.experiments.nearest_neighbours runs/sky/samples.npy"

def actions_commands(budget, vgg, i3d):
    stage1, stage2, n = ACTIONS[budget]
    yield f"vqgan3d.py --data ucf101 {stage1} {vgg}"
    yield f"evaluate.py --data ucf101 --vqgan runs/ucf101/vqgan.pt --n 256 {i3d}"
    yield f"diffusion.py --data ucf101 {stage2}"
    samples = []
    for guidance in 1, 2, 3:
        out = f"runs/ucf101/g{guidance}"
        samples.append(f"{out}/samples.npy")
        yield f"sample.py --data ucf101 --n {n} --guidance {guidance} --grid 16 --out {out}"
        yield (f"evaluate.py --data ucf101 --size 64 --n {n} --fake {out}/samples.npy --out {out} "
               f"{i3d}")
    yield ("-m tests.experiments.action_accuracy --data ucf101 --size 64 --samples "
           f"{' '.join(samples)}")

def ablation_commands(ablation, budget, vgg, i3d):
    for name, change in ABLATIONS[ablation].items():
        out = f"runs/{ablation}/{name}"
        if ablation == "denoiser":
            yield f"diffusion.py {change} --vqgan runs/toy/vqgan.pt --out {out}"
            yield (f"-m tests.experiments.sampling_sweep --checkpoint {out}/diffusion.pt --n 256 "
                   f"--steps 10 --guidance 2 --out {out}/sweep.json {i3d}")
        else:
            stage1 = ACTIONS[budget].stage1
            yield f"vqgan3d.py --data ucf101 {stage1} {change} --out {out} {vgg}"
            yield f"evaluate.py --data ucf101 --vqgan {out}/vqgan.pt --n 256 {i3d}"

def commands(result, budget, vgg=None):
    """The commands of one of RESULTS. budget: cpu or gpu; vgg: a file of VGG16 weights, or None"""
    vgg = f"--vgg {shlex.quote(vgg)}" if vgg else ""
    i3d = "--dtype bfloat16" if budget == "cpu" else ""
    if result == "toy":
        found = toy_commands(budget)
    elif result == "sky":
        found = sky_commands(budget, vgg, i3d)
    elif result == "actions":
        found = actions_commands(budget, vgg, i3d)
    else:
        found = ablation_commands(result, budget, vgg, i3d)
    return [" ".join(command.split()) for command in found]

# --------------------------------------------------------------------------------------------------

def print_metrics():
    """Print the metrics of all evaluations below runs/."""
    for path in sorted(Path("runs").glob("**/*.json")):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "metrics" in found:
            metrics = [f"{m['metric']} {m['mean']:.4g}" for m in found["metrics"]]
            print(f"{path}: {', '.join(metrics)} ({found['metrics'][0]['protocol']})")

def main():
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", choices=RESULTS)
    parser.add_argument("--budget", choices=["cpu", "gpu"], default="cpu", help="[%(default)s]")
    parser.add_argument("--vgg", help="VGG16 weights [torchvision's, downloaded]")
    parser.add_argument("--list", action="store_true", help="only print the commands")
    args = parser.parse_args()
    chosen = []
    for result in args.results:
        chosen += commands(result, args.budget, args.vgg)
    if args.list:
        for command in chosen:
            print(f"python {command}")
        return

    done = Path("runs/reproduce.done")
    done.parent.mkdir(exist_ok=True)
    done.touch()
    for command in chosen:
        print(f"$ python {command}", flush=True)
        if command in done.read_text().splitlines():
            continue
        if subprocess.run([sys.executable, *shlex.split(command)]).returncode:
            raise UserError("the command above failed: fix what it says, then run this again; it "
                            "goes on there")
        with open(done, "a") as file:
            file.write(command + "\n")
    print_metrics()

if __name__ == "__main__":
    run_main(main)
