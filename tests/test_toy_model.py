"""The trained toy model of assets/, sampled from end to end."""
import json
from pathlib import Path

import numpy as np

import sample
from conftest import ROOT
from tests.experiments.toy_accuracy import accuracy

def test_the_trained_toy_shows_the_class_asked_for(main):
    """A sampler, a table, a statistic or a layer that no longer does what the model learnt with."""
    model = ROOT / "assets" / "toy.pt"
    assert model.stat().st_size < 6e6
    result = main(sample, "--checkpoint", model, "--n", 48, "--device", "cpu", "--grid", 0)
    assert result.code == 0, result.err
    videos = np.load("runs/toy/samples.npy")
    labels = json.loads(Path("runs/toy/samples.json").read_text())["labels"]
    assert accuracy(videos, np.array(labels)).label >= 0.95
