"""How many generated toy videos show the class that they were made for?

    python -m tests.experiments.toy_accuracy                      # of runs/toy/samples.npy
    python -m tests.experiments.toy_accuracy --samples runs/g1/samples.npy
    python -m tests.experiments.toy_accuracy --predict runs/toy/diffusion.pt     # continue clips

Shape and motion are measured, nothing is trained. A template is a circle, column or bar of one of
several sizes. The shape is that of the template that overlaps best with the bright pixels, each
frame at its best place on the torus, on average over the frames. The motion is the direction in
which this place moves. The first line is the same measurement on real clips: it shows how far the
measurement can be trusted. Longer videos are measured in windows of 16 frames: the class must be
right, and the colour must stay.
"""
import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import (TOY_CLASSES, TOY_MOTIONS, TOY_SHAPES, UserError, Videos, run_main,
                  to_float, to_uint8, toy_distance, toy_videos)
from diffusion import DEFAULT_STEPS, load_diffusion
from sample import encode_cond_frames
from vqgan3d import psnr

WINDOW = 16                                        # frames that are measured at once

# --------------------------------------------------------------------------------------------------
# shape and motion of a video

def shape_templates(S):
    """Masks of the three shapes at R sizes, centred at (0, 0) of the torus: (3, R, S, S)"""
    y, x = (np.mgrid[:S, :S] + S // 2) % S - S // 2
    templates = []
    for shape in TOY_SHAPES:
        for radius in S * np.linspace(0.19, 0.26, 8):
            templates.append(np.clip(0.5 - toy_distance(shape, x, y, radius) / 2, 0, 1))
    return np.array(templates).reshape(3, -1, S, S)

def shape_mask(videos):
    """Where the shape is, from 0 to 1: (..., S, S, 3) -> (..., S, S). Shapes are bright, the ground
    is dark."""
    return np.clip((np.asarray(videos).max(-1) / 255 - 0.5) / 0.4, 0, 1)

def best_overlaps(mask, templates):
    """Intersection over union of each frame's mask (T, S, S) and each template at its best place:
    (T, 3, R), and these places (x, y) on the torus: (T, 3, R, 2)"""
    S = mask.shape[-1]
    spectra = np.conj(np.fft.rfft2(templates))                               # (3, R, S, S/2 + 1)
    shared = np.fft.rfft2(mask)[:, None, None] * spectra                     # (T, 3, R, S, S/2 + 1)
    shared = np.fft.irfft2(shared, (S, S))                                   # at each of S*S places
    place = shared.reshape(*shared.shape[:3], -1).argmax(-1)                 # (T, 3, R)
    shared = shared.max((-2, -1))                                            # (T, 3, R)
    energy = (templates ** 2).sum((-2, -1))                                  # (3, R)
    union = (mask ** 2).sum((1, 2))[:, None, None] + energy - shared
    return shared / union, np.stack([place % S, place // S], -1)

def classify(videos, min_overlap=0.6):
    """The class that uint8 videos (N, T, S, S, 3) show, 4 * shape + motion: int (N,), and -1 where
    no template overlaps enough."""
    S = videos.shape[2]
    templates = shape_templates(S)
    directions = np.array(list(TOY_MOTIONS.values()))                        # (4, 2)
    classes = []
    for video in videos:
        overlap, place = best_overlaps(shape_mask(video), templates)
        overlap = overlap.mean(0)                                            # (3, R)
        shape, size = np.unravel_index(overlap.argmax(), overlap.shape)
        steps = np.diff(place[:, shape, size], axis=0)                       # (T-1, 2)
        step = ((steps + S // 2) % S - S // 2).mean(0)                       # the short way round
        motion = (directions @ step).argmax()
        is_clear = overlap[shape, size] >= min_overlap
        classes.append(4 * shape + motion if is_clear else -1)
    return np.array(classes)

def shape_colours(videos):
    """Mean colour of the shape, from 0 to 1: (N, 3)"""
    mask = shape_mask(videos)[..., None]                                     # (N, T, S, S, 1)
    colours = (np.asarray(videos) / 255 * mask).sum((1, 2, 3))
    return colours / mask.sum((1, 2, 3)).clip(1)

# --------------------------------------------------------------------------------------------------
# how many of a set are right

class Accuracy(NamedTuple):
    """Fractions of a set of videos."""
    label: float       # that show the class of their label
    shape: float       # the shape of their label
    motion: float      # its motion

def accuracy(videos, labels):
    """The Accuracy of uint8 videos (N, T, S, S, 3) with labels (N,)"""
    found = classify(videos)
    clear = found >= 0
    return Accuracy(
        label=(found == labels).mean(),
        shape=(clear & (found // 4 == labels // 4)).mean(),
        motion=(clear & (found % 4 == labels % 4)).mean())

class LongAccuracy(NamedTuple):
    """Fractions of a set of long videos that show the class of their label."""
    first: float       # in the first window
    last: float        # in the last window
    always: float      # in all windows
    coloured: float    # in all windows, with the colour of the first

def long_accuracy(videos, labels):
    """The LongAccuracy of uint8 videos (N, T, S, S, 3) with labels (N,)"""
    starts = range(0, videos.shape[1] - WINDOW + 1, WINDOW)
    windows = [videos[:, start:start + WINDOW] for start in starts]
    right = np.stack([classify(window) == labels for window in windows])     # (windows, N)
    colours = np.stack([shape_colours(window) for window in windows])        # (windows, N, 3)
    steady = (abs(colours - colours[0]) < 0.15).all((0, 2))                  # (N,)
    always = right.all(0)
    return LongAccuracy(right[0].mean(), right[-1].mean(), always.mean(), (always & steady).mean())

def report_samples(path):
    """Print the accuracy of the samples in a file, after that of real clips of the same shape."""
    videos = np.load(path)
    made = json.loads(path.with_suffix(".json").read_text())
    if made["classes"] != TOY_CLASSES:
        raise UserError(f"{path} was not made by a model of the toy, and only the toy's classes "
                        "can be measured")
    labels = np.array(made["labels"])
    real_videos, real_labels = toy_videos(256, *videos.shape[1:3], seed=99)
    for name, v, y in (("real clips", real_videos, real_labels), (str(path), videos, labels)):
        if videos.shape[1] > WINDOW:
            found = long_accuracy(v, y)
            print(f"{name}: {len(v)} videos of {v.shape[1]} frames; class right in the first "
                  f"{WINDOW} frames {found.first:.1%}, in the last {found.last:.1%}, in all "
                  f"{found.always:.1%}, and with the colour of the first {found.coloured:.1%}")
        else:
            found = accuracy(v, y)
            print(f"{name}: {len(v)} videos; class right {found.label:.1%}, shape "
                  f"{found.shape:.1%}, motion {found.motion:.1%}")

# --------------------------------------------------------------------------------------------------
# prediction

@torch.no_grad()
def report_prediction(checkpoint, n=64):
    """Print the PSNR of held-out clips that are continued from their first latent frame: with and
    without the label, and by repeating the last given frame."""
    model = load_diffusion(checkpoint)
    frames = model.clip_format[1]
    given = model.video_frames(1)                                # frames of one latent frame
    c = model.config
    clips, labels = Videos(c.data, c.data_dir, "test", *model.clip_format).fixed(n)
    x = to_float(clips)                                                      # (n, 3, T, H, W)
    cond_frames = encode_cond_frames(model, x[:, :, :given])
    print(f"PSNR of the last {frames - given} of {frames} frames, {n} held-out clips")
    repeated = x[:, :, given - 1:given].expand(-1, -1, frames - given, -1, -1)
    real = to_uint8(x[:, :, given:])
    for name, y in ("without the label", None), ("with the label", labels):
        latents = model.sample(range(n), y, 1.0, "dpm", DEFAULT_STEPS, cond_frames=cond_frames)
        video = to_uint8(model.decode(latents)[:, :, given:])
        print(f"continued {name}: {psnr(video, real).mean():.2f} dB")
    print(f"the last given frame repeated: {psnr(to_uint8(repeated), real).mean():.2f} dB")

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=Path, default=Path("runs/toy/samples.npy"),
                        help="the videos, with their .json beside them [%(default)s]")
    parser.add_argument("--predict", metavar="CHECKPOINT", help="continue held-out clips instead")
    args = parser.parse_args()
    if args.predict:
        report_prediction(args.predict)
    else:
        report_samples(args.samples)

if __name__ == "__main__":
    run_main(main)
