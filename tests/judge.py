"""How many generated toy videos show the class that was asked for?

    python tests/judge.py                       # runs/toy/samples.npy, its labels from samples.json
    python tests/judge.py --samples other.npy   # with other.json beside it
    python tests/judge.py --predict runs/toy/diffusion.pt   # held-out clips, continued from their first latent frame

Nothing is trained: shape and motion are measured. The shape is the template (circle, column or bar, at several sizes) that
overlaps best with the bright pixels, at the best place on the torus, over all frames; the motion is the way that its place goes
from frame to frame. The same measurement on real clips tells how far it can be trusted. Of videos longer than 16 frames every 16
frames are judged, and the colour must stay too.
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

def colours(videos):
    """Mean colour of the shape, 0 ... 1: (N, 3)"""
    v = np.asarray(videos) / 255
    mask = np.clip((v.max(-1, keepdims=True) - 0.5) / 0.4, 0, 1)                          # (N, T, S, S, 1)
    return (v * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clip(1)

def lasting(videos, labels, window=16):
    """-> parts of the videos that show their class in the first window, in the last, in all, and in all with the first one's colour"""
    parts = [videos[:, i:i + window] for i in range(0, videos.shape[1] - window + 1, window)]
    right = np.stack([judge(part)[0] == np.asarray(labels) for part in parts])            # (windows, N)
    colour = np.stack([colours(part) for part in parts])                                  # (windows, N, 3)
    steady = (abs(colour - colour[0]) < 0.15).all((0, 2))
    return right[0].mean(), right[-1].mean(), right.all(0).mean(), (right.all(0) & steady).mean()

def predict(checkpoint, n=64):
    """PSNR of n held-out clips after their first latent frame: continued by the model, and by repeating the last given frame"""
    import torch
    from data import Videos, to_float
    from diffusion import load_diffusion
    from sample import as_given
    from vqgan3d import psnr
    system = load_diffusion(checkpoint)
    frames, size, stride = system.clip
    slot = frames // system.shape[1]                                                      # frames of a latent frame
    clips, labels = Videos(system.config.data, system.config.data_dir, "test", size, frames, stride).fixed(n)
    truth = to_float(clips)
    with torch.no_grad():
        given = as_given(system, truth[:, :, :slot])
        for name, y in ("without the label", None), ("with it", labels):
            video = system.decode(system.sample(range(n), y, 1.0, "dpm", 25, given=given))
            print(f"{n} clips, {slot} of {frames} frames given, {name}: PSNR of the rest {psnr(video[:, :, slot:], truth[:, :, slot:]):.2f} dB")
    still = truth[:, :, slot - 1:slot].expand(-1, -1, frames - slot, -1, -1)
    print(f"repeating the last given frame: {psnr(still, truth[:, :, slot:]):.2f} dB")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=Path("runs/toy/samples.npy"))
    parser.add_argument("--predict", metavar="CHECKPOINT")
    args = parser.parse_args()
    if args.predict:
        sys.exit(predict(args.predict))
    videos, protocol = np.load(args.samples, mmap_mode="r"), json.loads(args.samples.with_suffix(".json").read_text())
    real = toy_videos(256, *videos.shape[1:3], seed=99)
    if videos.shape[1] > 16:
        for name, (v, labels) in (("real", real), ("samples", (videos, protocol["labels"]))):
            print(f"{name} ({len(v)} of {v.shape[1]} frames): class right in the first 16 frames {{:.1%}}, in the last {{:.1%}}, in all {{:.1%}}, and the colour kept {{:.1%}}".format(*lasting(v, labels)))
        sys.exit()
    for name, (v, labels) in (("real clips", real), (f"samples, guidance {protocol['guidance']:g}", (videos, protocol["labels"]))):
        print(f"{name} ({len(v)}): class {{:.1%}}, shape {{:.1%}}, motion {{:.1%}}".format(*accuracy(v, labels)))
