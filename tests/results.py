"""The commands behind the README's results, one after the other.

    python tests/results.py sky actions                     # what two CPU cores carry in an evening
    python tests/results.py toy                             # the toy trained longer, and at 64 x 64
    python tests/results.py losses latents                  # stage 1 on the actions, one thing changed at a time
    python tests/results.py denoiser                        # stage 2 on the toy likewise, after the quickstart
    python tests/results.py sky actions --budget gpu        # the same at full width; written for one GPU, not run yet
    python tests/results.py sky --list                      # only print the commands

Raw data lie where the README says. Every command resumes, and one that is done is not run again, so after an interruption the
same command goes on. At the end the measured numbers are collected from the run folders.
"""
import argparse, json, shlex, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKY = {
    "cpu": ("--width 32 --perceptual 0.03 --disc_width 16 --lr 3e-3 --batch_size 2 --steps 1500 --eval_every 500 --eval_clips 12",
            "--predict v --width 48 --blocks 1 --attention 256 --head_dim 48 --batch_size 8 --lr 4e-3 --ema 0.995 --latents 578 --steps 1500 --eval_every 500", 128),
    "gpu": ("--perceptual 0.03 --batch_size 16 --steps 5000 --eval_every 500", "--predict v --steps 20000 --latents 578 --ema 0.999 --eval_every 2000", 2048)}
ACTIONS = {
    "cpu": ("--size 64 --width 32 --codes 2048 --perceptual 0.02 --disc_width 16 --lr 3e-3 --batch_size 4 --steps 800 --eval_every 200 --eval_clips 24",
            "--predict v --width 48 --blocks 1 --attention 256 --head_dim 48 --batch_size 16 --lr 4e-3 --ema 0.995 --latents 2880 --steps 2000 --eval_every 500", 256),
    "gpu": ("--size 64 --perceptual 0.02 --batch_size 16 --steps 4000 --eval_every 500", "--predict v --steps 15000 --latents 2880 --ema 0.999 --eval_every 2000", 2048)}
TOY = {                                                     # name of the run: stage 1, stage 2, pixels a side
    "cpu": {"ref": ("--steps 12000", "--steps 10000 --ema 0.998", 32),
            "toy64": ("--size 64 --down 4,8,8 --width 16 --steps 8000", "--steps 6000 --ema 0.998", 64)},
    "gpu": {"toy64": ("--size 64 --down 4,8,8 --batch_size 16 --steps 20000", "--width 128 --blocks 2 --batch_size 64 --lr 1e-3 --ema 0.9995 --steps 40000", 64)}}
CHANGES = {                                                 # name of the run: what is changed, all else as in ACTIONS
    "losses": {"all": "", "no-perceptual": "--perceptual 0", "no-gan": "--gan 0", "no-feature": "--feature 0", "pixels-alone": "--perceptual 0 --gan 0 --feature 0"},
    "latents": {"down-4-8-8": "--down 4,8,8", "dim-3": "--code_dim 3", "dim-16": "--code_dim 16", "codes-512": "--codes 512", "codes-8192": "--codes 8192"},
    "denoiser": {"default": "", "eps": "--predict eps", "no-ema": "--ema 0"}}

def commands(what, budget, vgg):
    for name, (stage1, stage2, size) in TOY[budget].items() if what == "toy" else ():
        yield f"vqgan3d.py {stage1} --out runs/{name}"
        yield f"diffusion.py {stage2} --out runs/{name}"
        yield f"sample.py --checkpoint runs/{name}/diffusion.pt --n 2048 --batch_size 32"
        yield f"tests/judge.py --samples runs/{name}/samples.npy"
        yield f"evaluate.py --data toy --size {size} --fake runs/{name}/samples.npy --out runs/{name}"
    stage1, stage2, n = {"sky": SKY}.get(what, ACTIONS)[budget]
    vgg = f" --vgg {vgg}" if vgg else ""
    i3d = " --dtype bfloat16" if budget == "cpu" else ""
    for name, change in CHANGES.get(what, {}).items():
        out = f"runs/{what}/{name}"
        if what == "denoiser":
            yield f"diffusion.py {change} --vqgan runs/toy/vqgan.pt --out {out}"
            yield f"tests/sweep.py --checkpoint {out}/diffusion.pt --n 256 --steps 10 --guidance 2 --out {out}/sweep.json{i3d}"
        else:
            yield f"vqgan3d.py --data ucf101 {stage1} {change} --out {out}{vgg}"
            yield f"evaluate.py --data ucf101 --vqgan {out}/vqgan.pt --n 256{i3d}"
    if what == "sky":
        yield f"vqgan3d.py --data sky {stage1}{vgg}"
        yield f"vqgan3d.py --data sky {stage1} --perceptual 0 --gan 0 --feature 0 --out runs/sky-plain"
        for run in "sky", "sky-plain":
            yield f"evaluate.py --data sky --vqgan runs/{run}/vqgan.pt{i3d}"
        yield f"diffusion.py --data sky {stage2}"
        yield f"sample.py --data sky --n {n} --grid 16 --batch_size 8"
        yield f"evaluate.py --data sky --n {n}{i3d}"
        yield "sample.py --data sky --n 2 --frames 64 --out runs/sky/long"
        yield "tests/figures.py --neighbours runs/sky/samples.npy"
    if what == "actions":
        yield f"vqgan3d.py --data ucf101 {stage1}{vgg}"
        yield f"evaluate.py --data ucf101 --vqgan runs/ucf101/vqgan.pt --n 256{i3d}"
        yield f"diffusion.py --data ucf101 {stage2}"
        for g in 1, 2, 3:
            yield f"sample.py --data ucf101 --n {n} --guidance {g} --grid 16 --out runs/ucf101/g{g}"
            yield f"evaluate.py --data ucf101 --size 64 --n {n} --fake runs/ucf101/g{g}/samples.npy --out runs/ucf101/g{g}{i3d}"
        yield "tests/classify.py --data ucf101 --size 64 --samples " + " ".join(f"runs/ucf101/g{g}/samples.npy" for g in (1, 2, 3))

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["toy", "sky", "actions", *CHANGES])
    parser.add_argument("--budget", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--vgg", help="VGG16 weights; else torchvision's are downloaded")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    done = Path("runs/results.done")
    done.parent.mkdir(exist_ok=True)
    done.touch()
    for command in [c for what in args.what for c in commands(what, args.budget, args.vgg)]:
        print(f"$ python {command}", flush=True)
        if args.list or command in done.read_text().splitlines():
            continue
        script, *flags = shlex.split(command)
        if subprocess.run([sys.executable, ROOT / script, *flags]).returncode:
            sys.exit("error: the command above failed; mend what it says and run this again: it goes on there")
        with open(done, "a") as f:
            f.write(command + "\n")
    for path in sorted(Path("runs").glob("**/*.json")):
        found = json.loads(path.read_text())
        if isinstance(found, dict) and "metrics" in found:
            print(path, ", ".join(f"{m['metric']} {m['mean']:.4g}" for m in found["metrics"]), f"({found['metrics'][0]['protocol']})")

if __name__ == "__main__":
    main()
