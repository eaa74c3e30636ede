"""The speedrun: the toy's quick start, timed and scored.

    python -m tests.experiments.speedrun                    # seed 0 in runs/speedrun-0
    python -m tests.experiments.speedrun --seed 1 --n 512   # FVD of 512 samples: faster, and biased

Runs the three commands of the quick start as they are printed in the README, with a seed and a
folder of their own, then measures what they made: PSNR, codes and rFVD of stage 1; FVD, KVD and
the class of n samples; the class of 64 videos of 128 frames. Records: README.md beside this file.
The numbers are also written to speedrun.json in the folder.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.experiments.toy_accuracy import accuracy, long_accuracy

def timed(*command):
    """Run a script of this project with flags -> minutes"""
    began = time.time()
    subprocess.run([sys.executable, *map(str, command)], check=True)
    return (time.time() - began) / 60

def measure(out, n, i3d):
    """Sample and score the model in a folder -> {name: number}"""
    scores = {}
    flags = ["--i3d", i3d] if i3d else []
    timed("evaluate.py", "--vqgan", out / "vqgan.pt", "--n", 256, *flags)
    report = json.loads((out / "vqgan-reconstruction.json").read_text())
    scores |= report["scores"]
    timed("sample.py", "--checkpoint", out / "diffusion.pt", "--n", n, "--grid", 0)
    labels = json.loads((out / "samples.json").read_text())["labels"]
    scores["class"] = accuracy(np.load(out / "samples.npy"), np.array(labels)).label
    timed("evaluate.py", "--fake", out / "samples.npy", "--n", n, *flags)
    report = json.loads((out / "samples-evaluation.json").read_text())
    scores |= {name: values[0] for name, values in report["scores"].items()}
    scores["protocol"] = report["protocol"]
    flags = ["--n", 64, "--frames", 128, "--grid", 0, "--out", out / "long"]
    timed("sample.py", "--checkpoint", out / "diffusion.pt", *flags)
    labels = json.loads((out / "long" / "samples.json").read_text())["labels"]
    found = long_accuracy(np.load(out / "long" / "samples.npy"), np.array(labels))
    scores |= dict(long_class=found.always, long_colour=found.coloured)
    return scores

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of both stages [%(default)s]")
    parser.add_argument("--n", type=int, default=2048, help="samples that are scored [%(default)s]")
    parser.add_argument("--i3d", default="", help="I3D weights, .npz [downloaded]")
    args = parser.parse_args()
    out = Path(f"runs/speedrun-{args.seed}")
    flags = ["--out", out, "--seed", args.seed]
    subprocess.run([sys.executable, "data.py"], check=True)      # not a part of the time
    minutes = {}
    minutes["vqgan3d.py"] = timed("vqgan3d.py", *flags, "--fresh")
    minutes["diffusion.py"] = timed("diffusion.py", *flags, "--fresh")
    minutes["sample.py"] = timed("sample.py", "--checkpoint", out / "diffusion.pt")
    print({name: f"{value:.2f} min" for name, value in minutes.items()})
    scores = dict(minutes=minutes, total=sum(minutes.values())) | measure(out, args.n, args.i3d)
    (out / "speedrun.json").write_text(json.dumps(scores, indent=1))
    print(json.dumps(scores, indent=1))

if __name__ == "__main__":
    main()
