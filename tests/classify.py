"""Do generated videos show the class that was asked for? A small classifier, trained on the real clips, gives its opinion.

    python tests/classify.py --data ucf101 --size 64 --samples runs/ucf101/samples.npy

It is trained on the train split for a few minutes and has to prove itself on the held-out videos first: a number for generated
videos means little if it is not right there. Labels of the samples come from samples.json.
"""
import argparse, json, sys
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import Videos, run, to_float

def network(classes, width=16):
    """(B, 3, T, H, W) -> logits; it sees shades of grey at half the resolution, so neither colour nor grain can tell a class"""
    layers, C = [], 1
    for D in (width, 2 * width, 4 * width):
        layers += [nn.Conv3d(C, D, 3, (1, 2, 2), 1), nn.GroupNorm(4, D), nn.ReLU(), nn.Conv3d(D, D, 3, 1, 1), nn.GroupNorm(4, D), nn.ReLU()]
        C = D
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(C, classes))
    grey = lambda x: F.avg_pool3d(x.mean(1, keepdim=True), (1, 2, 2))
    return body, lambda x: body(grey(x))

def augment(x):
    """Shifted by up to an eighth, brightness and contrast changed, a little blurred or noisy"""
    B, S = len(x), x.shape[-1]
    k = S // 8
    x = F.pad(x, (k, k, k, k, 0, 0), "replicate")
    top, left = torch.randint(2 * k + 1, (2, B)).tolist()
    x = torch.stack([v[:, :, a:a + S, b:b + S] for v, a, b in zip(x, top, left)])
    if torch.rand(()) < 0.5:
        x = F.avg_pool3d(F.pad(x, (1, 1, 1, 1, 0, 0), "replicate"), (1, 3, 3), 1)
    gain, bias = 1 + 0.4 * (torch.rand(2, B, 1, 1, 1, 1) - 0.5)
    return x * gain + bias - 1 + 0.1 * torch.rand(()) * torch.randn_like(x)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ucf101")
    parser.add_argument("--data_dir", default="datasets")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", nargs="*", type=Path, default=[])
    args = parser.parse_args()
    torch.manual_seed(0)
    train, test = (Videos(args.data, args.data_dir, split, args.size, args.frames) for split in ("train", "test"))
    body, classify = network(len(train.classes))
    opt, rng = torch.optim.AdamW(body.parameters(), 2e-3, weight_decay=0.05), np.random.default_rng(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, args.steps)
    for _ in tqdm(range(args.steps), desc="classifier"):
        clips, labels = train.batch(16, rng)
        F.cross_entropy(classify(augment(to_float(clips))), labels).backward()
        opt.step(), opt.zero_grad(), schedule.step()
    body.eval()

    def guesses(videos):
        with torch.inference_mode():
            return torch.cat([classify(to_float(np.array(videos[i:i + 16, :args.frames]))).argmax(1) for i in range(0, len(videos), 16)]).numpy()
    def tell(name, found, labels):
        by_class = ", ".join(f"{c} {(found[labels == i] == i).mean():.1%}" for i, c in enumerate(train.classes) if (labels == i).any())
        print(f"{name}: {(found == labels).mean():.1%} of {len(labels)} recognised ({by_class})", flush=True)
    clips, labels = test.fixed(16 * len(test))
    tell(f"held-out real clips of {len(test)} videos", guesses(clips), labels.numpy())
    for path in args.samples:
        protocol = json.loads(path.with_suffix(".json").read_text())
        tell(f"{path}, guidance {protocol['guidance']:g}", guesses(np.load(path, mmap_mode="r")), np.array(protocol["labels"]))

if __name__ == "__main__":
    run(main)
