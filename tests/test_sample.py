"""sample.py, and the scripts one after the other. Each test names the bug that it catches."""
import json
from contextlib import nullcontext
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data
import diffusion
import sample
import vqgan3d
from conftest import STAGE1, STAGE2, script
from test_diffusion import make_model, record_inputs

@pytest.fixture
def draw(stage2, main):
    """draw(*flags): run sample.py with five steps, or those given -> the videos, their protocol"""
    def draw(*flags):
        result = main(sample, "--checkpoint", stage2.path, "--out", "s", "--device", "cpu",
                      "--dtype", "float32", "--steps", 5, *flags)
        protocol = json.loads(Path("s/samples.json").read_text())
        return np.load("s/samples.npy"), dict(protocol, printed=result.out)
    return draw

def test_windows_follow_from_given_frames():
    """Windows that continue another sample's, or none; guidance beyond 1; a wrong length."""
    model = make_model()
    inputs = record_inputs(model.unet)
    labels = torch.tensor([0, 1, 1])
    def draw(seeds, labels, guidance):
        return sample.sample_long(model, seeds, labels, guidance, "dpm", 4, nullcontext, length=7)
    long = draw([5, 6, 7], labels, 1.0)                     # windows of 4, 2 + 2 and 2 + 2 frames
    assert long.shape == (3, 3, 7, 8, 8)
    assert len(inputs) == 3 * 4
    short = model.sample([5, 6, 7], labels, 1.0, "dpm", 4)
    assert torch.allclose(long[:, :, :4], short, atol=1e-4)
    for x, t in inputs[4:8]:
        assert torch.equal(x[:, :, :2], long[:, :, 2:4].clamp(-1, 1))         # as pixels are
        assert (t[:, :2] == 0).all()
    assert torch.allclose(long[1:2], draw([6], labels[1:2], 1.0), atol=1e-3)
    inputs.clear()
    draw([5], labels[:1], 3.0)                              # two rows a sample where it is guided
    assert [len(x) for x, t in inputs] == [2] * 4 + [1] * 8

def test_a_window_continues_what_the_encoder_makes_of_the_decoded_video(stage2):
    """Generated latents given as they are, not normalised, or of an encoder that saw the end."""
    model = diffusion.load_diffusion(stage2.path)
    vqgan, T = model.vqgan, model.shape[1]
    inputs = record_inputs(model.unet)
    latents = sample.sample_long(model, [3, 4], torch.tensor([0, 0]), 1.0, "dpm", 2, nullcontext,
                                 length=T + 1)
    z_q, _, _ = vqgan.quantize(latents[:, :, :T] * model.std + model.mean)
    video = vqgan.decode(z_q).clamp(-1, 1)                            # 8 frames, 4 latent frames
    z = vqgan.encode(video[:, :, [4, 5, 6, 7, 7, 6, 5, 4]])
    given = (z[:, :, :2] - model.mean) / model.std
    assert len(inputs) == 4
    for x, _ in inputs[2:]:
        assert torch.allclose(x[:, :, :2], given, atol=1e-4)
        assert not torch.allclose(x[:, :, :2], latents[:, :, 2:4], atol=1e-2)

def test_longer_videos_and_a_given_start(draw, stage2, clips, main):
    """Frames promised and not made; a given video that is not the start of what comes out, or whose
    first frames are taken; two samples that go on alike; a picture refused as too short."""
    videos, _ = draw("--n", 2, "--frames", 21)
    assert videos.shape == (2, 21, 16, 16, 3)
    start = clips / "spin" / "00.mp4"                                 # 12 frames, the clips have 8
    frames = np.stack([*data.read_frames(start, 16)])
    iio.imwrite("start.png", frames[3])
    still = frames[3:4].repeat(8, 0)
    for path, length, shown, kept, free in (
            (start, 16, frames[-8:], 4, 8),                 # the decoder sees new frames from 4 on
            ("start.png", 8, still, 2, 4)):                 # of a picture, from 2 on
        videos, protocol = draw("--n", 2, "--start", path, "--frames", length)
        videos = videos.astype(int)
        assert videos.shape == (2, length, 16, 16, 3)
        assert protocol["labels"] == [-1, -1]                         # of a class not named
        assert protocol["guidance"] <= 1
        vqgan = diffusion.load_diffusion(stage2.path).vqgan
        expected, _, _ = vqgan(data.to_float(shown[None]))
        expected = data.to_uint8(expected)[:, :kept]
        assert abs(videos[:, :kept] - expected).mean() < 3
        assert abs(videos[0, free:] - videos[1, free:]).mean() > 1
    assert len(draw("--start", start, "--n", 1)[0][0]) == 16          # twice as long by default
    result = main(sample, "--checkpoint", stage2.path, "--start", start, "--frames", 8, code=1)
    assert "--start count too" in result.err

def test_samples_and_their_protocol(draw, stage2):
    """Arrays of another range or order than announced, other labels, files not written."""
    videos, protocol = draw("--n", 6, "--steps", 4, "--seed", 3, "--guidance", 1.5)
    assert videos.shape == (6, 8, 16, 16, 3)
    assert videos.dtype == np.uint8
    assert videos.std() > 5
    assert len({video.tobytes() for video in videos}) == 6
    expected = dict(n=6, frames=8, size=16, stride=1, steps=4, guidance=1.5, seed=3, sampler="dpm",
                    checkpoint_step=24, classes=["spin", "wave"], labels=[0, 0, 0, 1, 1, 1],
                    data=str(stage2.home / "clips"))
    assert expected.items() <= protocol.items()
    assert "classes: ['spin', 'wave']" in protocol["printed"]
    assert iio.imread("s/samples.gif", plugin="pillow").shape[0] == 8

def test_a_sample_follows_from_seed_and_number(draw):
    """Noise that depends on the batch size or on --n, so that a sample cannot be made again alone;
    --seed 1 that is --seed 0 moved by one place: an error bar over seeds then measures nothing."""
    flags = ["--grid", 0, "--classes", "wave"]
    def videos(*more):
        return draw(*flags, *more)[0].astype(int)
    five = videos("--n", 5, "--batch_size", 5)
    assert not Path("s/samples.gif").exists()
    assert abs(five - videos("--n", 5, "--batch_size", 2)).max() <= 1
    assert abs(five[:3] - videos("--n", 3)).max() <= 1
    for seed in (1, 2, 2 ** 40):
        others = videos("--n", 5, "--seed", seed)
        distance = abs(five[:, None] - others).mean((2, 3, 4, 5))                # (5, 5)
        assert distance.min() > 1
    ddpm = videos("--n", 5, "--batch_size", 5, "--sampler", "ddpm")
    assert abs(ddpm - videos("--n", 5, "--batch_size", 3, "--sampler", "ddpm")).max() <= 1
    assert (ddpm != five).any()

@pytest.mark.parametrize("classes, text, n, labels", [
    (["spin", "wave"], "wave", 4, [1, 1, 1, 1]), (["spin", "wave"], "wave,spin", 4, [1, 1, 0, 0]),
    (["spin", "wave"], "", 0, [0] * 4 + [1] * 4), (["1", "2", "3"], "1,3", 2, [0, 2]),
    (["3", "4", "5"], "", 3, [0, 1, 2]), ([], "", 3, [-1] * 3)])
def test_classes_by_name(classes, text, n, labels):
    """Folders called 1, 2, 3, of which --classes 0,2 drew "1" as a number, "2" as a name."""
    assert sample.choose_labels(text, classes, n).tolist() == labels
    for wrong in ("0,2", "wiggle", "-1"):
        with pytest.raises(data.UserError, match="no class is called"):
            sample.choose_labels(wrong, classes[:2], n)

@pytest.mark.parametrize("num_classes, n", [(8, 100), (8, 20), (3, 64), (12, 48), (1, 16), (0, 10)])
def test_rows_of_the_grid_show_one_class_each(monkeypatch, num_classes, n):
    """Where --n does not divide evenly, 4 of 8 rows began with the class before."""
    classes = [f"c{i}" for i in range(num_classes)]
    labels = sample.choose_labels("", classes, n).tolist()
    grids = []
    monkeypatch.setattr(sample, "save_grid", lambda *args: grids.append(args))
    marks = np.array(labels).reshape(n, 1, 1, 1, 1)         # each "video" shows its class
    sample.write_grid(Path(), marks, labels, 64)
    (_, shown, columns), = grids
    shown = shown.ravel()
    assert len(shown) <= 64
    if num_classes > 1:
        rows = shown.reshape(-1, columns)
        assert [*rows[:, 0]] == [*range(num_classes)]
        assert (rows == rows[:, :1]).all()

def test_without_dropped_labels_there_is_no_guidance(stage1, stage2, main):
    """Guidance 2 of a model of --label_drop 0: away from a null label that is not trained."""
    main(diffusion, *stage2.flags, "--out", "run", "--vqgan", stage1.path, "--label_drop", 0,
         "--steps", 2, "--eval_every", 2, "--timesteps", 4)
    flags = ["--checkpoint", "run/diffusion.pt", "--n", 2, "--grid", 0, "--device", "cpu"]
    main(sample, *flags)
    assert json.loads(Path("run/samples.json").read_text())["guidance"] == 1
    result = main(sample, *flags, "--guidance", 2, code=1)
    assert "--label_drop 0" in result.err
    assert "--guidance 1" in result.err

def test_toy_from_nothing_to_videos(main, monkeypatch):
    """The quick start, smaller: default folders, each stage finding the one before."""
    few = data.DRAWN_SETS["toy"]._replace(splits=dict(train=(256, 0), test=(256, 1)))
    monkeypatch.setitem(data.DRAWN_SETS, "toy", few)
    for module, flags in ((vqgan3d, [*STAGE1, "--steps", 10]),
                          (diffusion, [*STAGE2, "--timesteps", 4, "--steps", 4]),
                          (sample, ["--steps", 3, "--n", 24, "--device", "cpu"])):
        main(module, *flags)
    run = Path("runs/toy")
    assert {path.name for path in run.iterdir()} == {
        "vqgan.pt", "vqgan.jsonl", "vqgan.gif", "diffusion.pt", "diffusion.jsonl", "diffusion.gif",
        "samples.npy", "samples.json", "samples.gif"}
    protocol = json.loads((run / "samples.json").read_text())
    assert protocol["labels"] == [i // 2 for i in range(24)]
    assert (protocol["data"], len(protocol["classes"])) == ("toy", 12)
    assert {path.name for path in Path().iterdir()} == {"runs", "datasets"}

def test_a_real_process_prints_one_line_and_exits_with_1(tmp_path):
    """A stack trace where the user needs to know which command comes first; a status of 0."""
    result = script("sample.py", cwd=tmp_path)
    assert result.code == 1
    last_line = result.err.splitlines()[-1]
    assert last_line.startswith("there is no file runs/toy/diffusion.pt")
    assert "python diffusion.py" in last_line
