"""How many generated toy videos show the class that was asked for?

    python tests/judge.py                       # runs/toy/samples.npy, its labels from samples.json
    python tests/judge.py --samples other.npy   # with other.json beside it

A small 3D convolutional classifier is trained on real toy clips (90 s on 2 CPU cores, kept in runs/judge.pt), its accuracy is
measured on real clips that it has not seen, and then on the samples. Neither stage ever sees it.
"""
import argparse, json, sys
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import TOY_CLASSES, to_float, toy_videos

def network():
    layers, C = [], 3
    for D in (32, 64, 128):
        layers += [nn.Conv3d(C, D, 3, stride=2, padding=1), nn.BatchNorm3d(D), nn.ReLU()]
        C = D
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d((2, 2, 2)), nn.Flatten(), nn.Linear(8 * C, len(TOY_CLASSES)))

def train(frames, size, steps=400, batch_size=32):
    torch.manual_seed(0)
    net = network()
    opt = torch.optim.AdamW(net.parameters(), 2e-3)
    for step in tqdm(range(steps), desc="judge"):
        clips, labels = toy_videos(batch_size, frames, size, seed=(7, step))              # fresh clips at every step
        x = to_float(clips)
        x = x + torch.randn(len(x), 1, 1, 1, 1) * 0.1 + torch.randn_like(x) * torch.rand(len(x), 1, 1, 1, 1) * 0.2   # not by noise
        loss = F.cross_entropy(net(x), torch.from_numpy(labels))
        opt.zero_grad()
        loss.backward()
        opt.step()
        for group in opt.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
    return net.eval()

@torch.no_grad()
def accuracy(net, videos, labels):
    guess = torch.cat([net(to_float(np.array(videos[i:i + 64]))).argmax(1) for i in range(0, len(videos), 64)])
    good = guess == torch.as_tensor(labels)
    motion, shape = guess % 4 == torch.as_tensor(labels) % 4, guess // 4 == torch.as_tensor(labels) // 4
    return good.double().mean().item(), shape.double().mean().item(), motion.double().mean().item()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=Path("runs/toy/samples.npy"))
    args = parser.parse_args()
    videos = np.load(args.samples, mmap_mode="r")
    protocol = json.loads(args.samples.with_suffix(".json").read_text())
    kept, shape = Path("runs/judge.pt"), list(videos.shape[1:3])
    state = torch.load(kept, weights_only=True) if kept.exists() else {}
    if state.get("shape") != shape:
        state = dict(shape=shape, net=train(*shape).state_dict())
        kept.parent.mkdir(exist_ok=True)
        torch.save(state, kept)
    net = network()
    net.load_state_dict(state["net"])
    net.eval()
    real = accuracy(net, *toy_videos(1024, *shape, seed=99))
    fake = accuracy(net, videos, protocol["labels"])
    for name, n, (both, s, m) in (("real clips", 1024, real), (f"samples, guidance {protocol['guidance']:g}", len(videos), fake)):
        print(f"{name} ({n}): class {both:.1%}, shape {s:.1%}, motion {m:.1%}")
