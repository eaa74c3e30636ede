"""How many generated toy videos show the class that was asked for?

    python tests/judge.py                       # runs/toy/samples.npy, its labels from samples.json
    python tests/judge.py --samples other.npy   # with other.json beside it

Nothing is trained: shape and motion are measured. The shape is the template (circle, column or bar, at several sizes) that
overlaps best with the bright pixels, at the best place on the torus, over all frames; the motion is the way that its place goes
from frame to frame. The same measurement on real clips tells how far it can be trusted.
"""
import argparse, json, sys
from pathlib import Path
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import MOTIONS, SHAPES, toy_distance, toy_videos

def judge(videos, at_least=0.6):
    """uint8 videos (N, T, S, S, 3) -> class 4 * shape + motion of each, -1 if the best overlap is below at_least; overlaps (N,)"""
    S = videos.shape[2]
    y, x = (np.mgrid[:S, :S] + S // 2) % S - S // 2                                       # centred at (0, 0), on the torus
    radii = S * np.linspace(0.19, 0.26, 8)
    templates = np.array([[np.clip(0.5 - toy_distance(shape, x, y, r) / 2, 0, 1) for r in radii] for shape in SHAPES])
    spectra, energy = np.conj(np.fft.rfft2(templates)), (templates ** 2).sum((-2, -1))    # (3, R, S, S/2 + 1), (3, R)
    classes, overlaps = [], []
    for video in videos:
        mask = np.clip((np.asarray(video).max(-1) / 255 - 0.5) / 0.4, 0, 1)              # (T, S, S): the shape is bright, the ground dark
        shared = np.fft.irfft2(np.fft.rfft2(mask)[:, None, None] * spectra, (S, S))      # (T, 3, R, S, S): overlap at every place
        place = shared.reshape(*shared.shape[:3], -1).argmax(-1)                         # (T, 3, R)
        shared = shared.max((-2, -1))
        overlap = shared / ((mask ** 2).sum((1, 2))[:, None, None] + energy - shared)    # intersection over union, of soft masks
        shape, r = np.unravel_index(overlap.mean(0).argmax(), energy.shape)
        at = np.stack([place[:, shape, r] % S, place[:, shape, r] // S], 1)              # (T, 2): x, y
        step = ((np.diff(at, axis=0) + S // 2) % S - S // 2).mean(0)                     # mean step on the torus
        motion = (np.array(list(MOTIONS.values())) @ step).argmax()
        overlaps.append(overlap.mean(0)[shape, r])
        classes.append(4 * shape + motion if overlaps[-1] >= at_least else -1)
    return np.array(classes), np.array(overlaps)

def accuracy(videos, labels):
    """-> parts of the videos in which class, shape and motion are those of the labels"""
    guess, labels = judge(videos)[0], np.asarray(labels)
    seen = guess >= 0
    return (guess == labels).mean(), (seen & (guess // 4 == labels // 4)).mean(), (seen & (guess % 4 == labels % 4)).mean()

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=Path("runs/toy/samples.npy"))
    args = parser.parse_args()
    videos, protocol = np.load(args.samples, mmap_mode="r"), json.loads(args.samples.with_suffix(".json").read_text())
    real = toy_videos(256, *videos.shape[1:3], seed=99)
    for name, (v, labels) in (("real clips", real), (f"samples, guidance {protocol['guidance']:g}", (videos, protocol["labels"]))):
        print(f"{name} ({len(v)}): class {{:.1%}}, shape {{:.1%}}, motion {{:.1%}}".format(*accuracy(v, labels)))
