"""Reads the samples.npy and samples.json of sample.py, for the other programs of this folder."""
import json

import numpy as np

from data import UserError, first_line, open_array

def open_samples(path):
    """The videos of a samples.npy as a memory map, uint8 (N, T, H, W, 3)."""
    if not path.exists():
        raise UserError(f"there is no {path}: make it with sample.py")
    videos = open_array(path, np.uint8)
    if videos is None or videos.ndim != 5 or videos.shape[-1] != 3 or not len(videos):
        raise UserError(f"{path} does not hold videos, uint8 (N, T, H, W, 3): make them anew with "
                        "sample.py")
    return videos

def read_settings(path):
    """How the videos of a samples.npy were made: the dict in the .json file beside it."""
    path = path.with_suffix(".json")
    needed = {"data", "size", "frames", "stride", "guidance", "classes", "labels"}
    try:
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict) or not needed <= set(settings):
            raise ValueError("it is not one of sample.py's")
    except (OSError, ValueError) as e:
        raise UserError(f"cannot read {path} ({first_line(e)}): sample.py writes it beside the "
                        "samples; keep the two files together")
    return settings

def read_labels(path, count):
    """The class that each of the `count` videos of a samples.npy was made for: int (N,)"""
    labels = read_settings(path)["labels"]
    if not isinstance(labels, list) or len(labels) != count:
        raise UserError(f"{path.with_suffix('.json')} does not hold the labels of the {count} "
                        f"videos in {path.name}: make samples of a model with classes")
    return np.array(labels)
