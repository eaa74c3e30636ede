"""Do generated videos show the class that they were made for? A small classifier decides.

    python -m tests.experiments.action_accuracy --samples runs/ucf101/samples.npy
    python -m tests.experiments.action_accuracy --data ~/my_videos --size 128 --samples a.npy b.npy

It is trained on the real clips for a few minutes. The first line is its accuracy on held-out real
videos: if that is low, a number for generated videos means little. The labels of the samples are
those in samples.json.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import UserError, Videos, run_main, to_float

class Classifier(nn.Module):
    """(B, 3, T, H, W) -> logits (B, classes)

    It sees shades of grey at half the resolution, so that neither colour nor fine noise can reveal
    a class.
    """
    def __init__(self, classes, width=16):
        super().__init__()
        layers, C = [], 1
        for D in (width, 2 * width, 4 * width):
            layers += [nn.Conv3d(C, D, 3, (1, 2, 2), 1), nn.GroupNorm(4, D), nn.ReLU(),
                       nn.Conv3d(D, D, 3, 1, 1), nn.GroupNorm(4, D), nn.ReLU()]
            C = D
        head = nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(C, classes)
        self.layers = nn.Sequential(*layers, *head)

    def forward(self, x):
        grey = x.mean(1, keepdim=True)                                       # (B, 1, T, H, W)
        return self.layers(F.avg_pool3d(grey, (1, 2, 2)))

def augment(x):
    """Shift videos (B, 3, T, S, S) by up to an eighth, change brightness and contrast, blur half of
    the batches, and add noise."""
    B, S = len(x), x.shape[-1]
    shift = S // 8
    x = F.pad(x, (shift, shift, shift, shift, 0, 0), "replicate")
    top, left = torch.randint(2 * shift + 1, (2, B)).tolist()
    x = torch.stack([v[:, :, i:i + S, j:j + S] for v, i, j in zip(x, top, left)])
    if torch.rand(()) < 0.5:
        x = F.avg_pool3d(F.pad(x, (1, 1, 1, 1, 0, 0), "replicate"), (1, 3, 3), 1)
    gain, bias = 1 + 0.4 * (torch.rand(2, B, 1, 1, 1, 1) - 0.5)
    return x * gain + bias - 1 + 0.1 * torch.rand(()) * torch.randn_like(x)

def train_classifier(videos, steps):
    """A Classifier of the classes of a data.Videos, in eval mode."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    classifier = Classifier(len(videos.classes))
    opt = torch.optim.AdamW(classifier.parameters(), 2e-3, weight_decay=0.05)
    lr = torch.optim.lr_scheduler.OneCycleLR(opt, 4e-3, steps)
    for _ in tqdm(range(steps), desc="classifier"):
        clips, labels = videos.batch(16, rng)
        loss = F.cross_entropy(classifier(augment(to_float(clips))), labels)
        loss.backward()
        opt.step()
        opt.zero_grad()
        lr.step()
    return classifier.eval()

@torch.inference_mode()
def classify(classifier, videos, frames):
    """The class of the first frames of uint8 videos (N, T, H, W, 3): int (N,)"""
    found = []
    for i in range(0, len(videos), 16):
        x = to_float(np.array(videos[i:i + 16, :frames]))
        found.append(classifier(x).argmax(1))
    return torch.cat(found).numpy()

def report(name, found, labels, classes):
    """Print which fraction of the videos was recognised as the class of its label."""
    by_class = []
    for label, class_name in enumerate(classes):
        chosen = labels == label
        if chosen.any():
            by_class.append(f"{class_name} {(found[chosen] == label).mean():.1%}")
    print(f"{name}: {(found == labels).mean():.1%} of {len(labels)} recognised "
          f"({', '.join(by_class)})", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ucf101", help="a set with classes [%(default)s]")
    parser.add_argument("--data_dir", default="datasets", help="[%(default)s]")
    parser.add_argument("--size", type=int, default=64, help="pixels a side [%(default)s]")
    parser.add_argument("--frames", type=int, default=16, help="of a clip [%(default)s]")
    parser.add_argument("--steps", type=int, default=400, help="of training [%(default)s]")
    parser.add_argument("--samples", nargs="*", type=Path, default=[], help="one or more .npy")
    args = parser.parse_args()
    train = Videos(args.data, args.data_dir, "train", args.size, args.frames)
    test = Videos(args.data, args.data_dir, "test", args.size, args.frames)
    if not train.classes:
        raise UserError(f"--data {args.data} has no classes")
    settings = [json.loads(path.with_suffix(".json").read_text()) for path in args.samples]
    for path, made in zip(args.samples, settings):
        if made["size"] != args.size or made["classes"] != train.classes:
            raise UserError(f"{path} was made with --size {made['size']} and the classes "
                            f"{made['classes']}, not {args.size} and {train.classes}")

    classifier = train_classifier(train, args.steps)
    clips, labels = test.fixed(16 * len(test))
    found = classify(classifier, clips.numpy(), args.frames)
    report(f"held-out real clips of {len(test)} videos", found, labels.numpy(), train.classes)
    for path, made in zip(args.samples, settings):
        found = classify(classifier, np.load(path), args.frames)
        name = f"{path}, guidance {made['guidance']:g}"
        report(name, found, np.array(made["labels"]), train.classes)

if __name__ == "__main__":
    run_main(main)
