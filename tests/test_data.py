"""The toy, the cache, windows and batches, flags. Each test names the bug that it catches."""
import multiprocessing
import os
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data
import diffusion
import vqgan3d
from conftest import write_frames

def write_set(folder, **values):
    """A set of frame folders: train/NAME of these grey values, and some other video in test/"""
    for name, video in values.items():
        write_frames(folder / "train" / name, video)
    write_frames(folder / "test" / "other", [0] * 20)

def open_set(folder, frames=1, data_dir=None, **more):
    return data.Videos(str(folder), data_dir or folder.parent, "train", 16, frames, **more)

def all_values(videos):
    """{name: the values of all frames} of a Videos with windows of one frame"""
    found = {}
    for i, video in enumerate(videos.videos):
        windows = [videos.window(i, t) for t in range(video.frames)]
        found[video.name] = [int(window[0, 0, 0, 0]) for window in windows]
    return found

def write_pattern(folder, size, rows, columns):
    """A video of 4 frames whose pixel (y, x) is rows * y + columns * x, 100 more in odd frames."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:size, :size]
    for t in range(4):
        frame = rows * y + columns * x + 100 * (t % 2)
        iio.imwrite(folder / f"{t}.png", frame.astype(np.uint8)[..., None].repeat(3, -1))

def centroid(bright, axis):
    """Position of the bright pixels (N, T, H, W) along an axis, on a torus: a mean of angles."""
    size = bright.shape[-1]
    circle = np.exp(2j * np.pi * np.arange(size) / size)
    return np.angle((bright.sum(5 - axis) * circle).sum(-1)) * size / (2 * np.pi)     # (N, T)

def test_toy_labels_name_the_motion_and_the_shape():
    """A label off by one, x and y exchanged, a direction reversed; a draw not of the seed."""
    size = 64
    videos, labels = data.toy_videos(48, 6, size, seed=3)
    again, _ = data.toy_videos(48, 6, size, seed=3)
    assert (videos == again).all()
    assert (np.bincount(labels) == 4).all()
    bright = videos.max(-1) > 185                        # the ground is below 115, the shape 255
    x, y = centroid(bright, 3), centroid(bright, 2)
    for i, label in enumerate(labels):
        shape, motion = data.TOY_CLASSES[label].split("-")
        dx, dy = ((np.diff(c[i]) + size / 2) % size - size / 2 for c in (x, y))
        along = dict(right=dx, left=-dx, down=dy, up=-dy)[motion]
        across = dy if motion in ("right", "left") else dx
        assert abs(along - size / 32).max() < 1
        assert abs(across).max() < 0.5
        height, width = bright[i, 0].any(1).sum(), bright[i, 0].any(0).sum()
        limits = dict(column=(1.8, 9), circle=(0.9, 1.1), bar=(1 / 9, 1 / 1.8))[shape]
        assert limits[0] < height / width < limits[1]

def test_a_changed_drawing_function_draws_anew(tmp_path, monkeypatch):
    """A student who changes the toy trains on the old one, from the cache; labels of others."""
    def grey_videos(n, frames=16, size=32, seed=0):
        labels = np.arange(n) % 2
        videos = np.empty((n, frames, size, size, 3), np.uint8)
        videos[:] = 100 * labels[:, None, None, None, None]
        return videos, labels
    few = dict(train=(256, 0), test=(256, 1))
    for draw, classes in (data.toy_videos, data.TOY_CLASSES), (grey_videos, ["dark", "light"]):
        monkeypatch.setitem(data.DRAWN_SETS, "toy", data.DrawnSet(draw, classes, few))
        for _ in range(2):                               # drawn, then from the cache
            videos = data.Videos("toy", tmp_path, "train", 8, 2)
            assert len(videos) == 256
            assert videos.classes == classes
    values = [videos.window(i)[0, 0, 0, 0] for i in range(256)]
    assert [100 * label for label in videos.labels] == values
    assert len(list(tmp_path.rglob("toy-train*.npy"))) == 2

def test_every_grey_level_survives_float_and_back():
    """Truncation instead of rounding, a factor 127 or 128, [0, 1] for [-1, 1], exchanged axes."""
    videos = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7, 3), dtype=np.uint8)
    videos.flat[:256] = np.arange(256)
    x = data.to_float(videos)
    assert x.shape == (2, 3, 3, 5, 7)
    assert (x.min(), x.max()) == (-1, 1)
    assert (data.to_uint8(x) == videos).all()
    colour = torch.tensor([-3.0, 0, 3]).view(1, 3, 1, 1, 1)
    assert data.to_uint8(colour).flatten().tolist() == [0, 128, 255]             # clipped

def test_resize_keeps_the_aspect():
    """A wide frame squeezed into a square; a crop from a corner instead of the centre."""
    y, x = np.mgrid[:120, :200]
    disc = np.hypot(x - 99.5, y - 59.5) < 40
    disc = disc[..., None].repeat(3, -1).astype(np.uint8) * 255
    for frame in (disc, disc.transpose(1, 0, 2)):
        small = data.resize_crop(frame, 48)[..., 0] > 127
        rows, columns = np.flatnonzero(small.any(1)), np.flatnonzero(small.any(0))
        assert small.shape == (48, 48)
        assert 31 <= len(rows) == len(columns) <= 33
        assert rows[0] + rows[-1] == columns[0] + columns[-1] == 47

def test_only_what_changed_is_decoded_again(tmp_path, monkeypatch):
    """Videos rendered anew under the same names and not noticed, by their time or by their size; a
    set decoded from the beginning because one video was added."""
    decoded, read_frames = [], data.read_frames
    def record_and_read(path, *more):
        decoded.append(path.name)
        return read_frames(path, *more)
    monkeypatch.setattr(data, "read_frames", record_and_read)
    root = tmp_path / "v"
    write_set(root, a=[0, 1, 2], b=[1, 2, 3], c=[2, 3, 4])
    assert all_values(open_set(root)) == {"a": [0, 1, 2], "b": [1, 2, 3], "c": [2, 3, 4]}
    assert sorted(decoded) == ["a", "b", "c"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    write_set(root, d=[5, 6], b=[3, 2, 1])               # b: other times, equal sizes
    larger = root / "train" / "c" / "frame_1.png"        # c: equal times, another size
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    noise[0, 0] = 99
    iio.imwrite(larger, noise)
    os.utime(larger, ns=(times[larger], times[larger]))
    assert all_values(open_set(root)) == {"a": [0, 1, 2], "b": [3, 2, 1], "c": [2, 99, 4],
                                          "d": [5, 6]}
    assert sorted(decoded[3:]) == ["b", "c", "d"]

def prepare_together(barrier, folder, data_dirs):
    """Open a set once with each of data_dirs, each time at the same moment as another process."""
    for data_dir in data_dirs:
        barrier.wait(100)
        open_set(folder, data_dir=data_dir)

def test_two_processes_prepare_one_set_at_once(tmp_path):
    """Two that write to the same file: a wrong cache that is accepted, or a stack trace."""
    expected = {f"{i:02d}": [*range(i, i + 6)] for i in range(20)}
    write_set(tmp_path / "v", **expected)
    data_dirs = [tmp_path / f"try{attempt}" for attempt in range(3)]
    spawn = multiprocessing.get_context("spawn")          # a fork would inherit locks of threads
    barrier = spawn.Barrier(2)
    process = spawn.Process(target=prepare_together, args=(barrier, tmp_path / "v", data_dirs))
    process.start()
    prepare_together(barrier, tmp_path / "v", data_dirs)
    process.join(100)
    assert process.exitcode == 0
    for data_dir in data_dirs:
        assert all_values(open_set(tmp_path / "v", data_dir=data_dir)) == expected
        assert len([*data_dir.rglob("*.npy*")]) == 20

def test_folders_of_one_name_do_not_share_a_cache(tmp_path):
    """Two sets called "v" in different places: the second one gets the first one's videos."""
    for place, values in (("here", [3, 4]), ("there", [4, 3])):       # files of the same sizes
        write_set(tmp_path / place / "v", a=values)
        for path in (tmp_path / place / "v" / "train" / "a").iterdir():
            os.utime(path, (1, 1))                                    # and times
        videos = open_set(tmp_path / place / "v", data_dir=tmp_path)
        assert all_values(videos) == {"a": values}

def test_the_fingerprint_is_that_of_the_videos(tmp_path):
    """A fingerprint of where or when the files were written: two people who compare against the
    same videos see different ones. Or one that other videos share."""
    def fingerprint(folder):
        return open_set(folder, data_dir=tmp_path / "datasets").fingerprint
    write_set(tmp_path / "v", a=[1, 2], b=[3, 4])
    here = fingerprint(tmp_path / "v")
    shutil.copytree(tmp_path / "v", tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert fingerprint(tmp_path / "elsewhere") == here
    write_set(tmp_path / "elsewhere", c=[3, 4])
    assert fingerprint(tmp_path / "elsewhere") != here

def test_windows_are_consecutive_at_the_stride(tmp_path):
    """A stride that is ignored, a window over the end of a video, a last window never drawn."""
    values = {f"clip{i}": np.arange(12) + 80 * i for i in range(3)}
    write_set(tmp_path / "v", **values)
    videos = open_set(tmp_path / "v", frames=4, stride=3)
    clips, labels = videos.batch(200, np.random.default_rng(0))
    values = clips[:, :, 0, 0, 0].int()                                          # (N, T)
    assert (values.diff(dim=1) == 3).all()
    assert set(values[:, 0].tolist()) == {0, 1, 2, 80, 81, 82, 160, 161, 162}
    assert (labels == -1).all()

def test_drawn_windows_are_distinct_while_there_are_enough(tmp_path):
    """Starts drawn with replacement: of 300 windows of 333 a third came twice, and KVD, which is
    without bias for distinct clips only, was 0.019 between equal distributions."""
    write_set(tmp_path / "v", a=range(6), b=range(5), c=range(2))     # 5 + 4 + 1 windows
    videos = open_set(tmp_path / "v", frames=2)
    rng = np.random.default_rng(0)
    for n in (3, 7, 10):
        windows = videos.draw(n, rng)
        assert len(set(windows)) == n
        for i, start in windows:
            assert 0 <= start < videos.num_windows(i)
    assert {i for i, _ in videos.draw(3, rng)} == {0, 1, 2}           # each video once, then again
    assert len(set(videos.draw(25, rng))) == 10
    assert {i for i, _ in videos.draw(9, rng, among=[0, 1])} == {0, 1}
    starts = {window for _ in range(60) for window in videos.draw(3, rng)}
    assert len(starts) == 10                                          # not the first ones alone

def test_flip_mirrors_whole_clips_and_never_a_direction(tmp_path):
    """A flip in height or time, of single frames or of all clips; right and left in the toy."""
    write_pattern(tmp_path / "v" / "clip", 16, rows=1, columns=4)
    videos = open_set(tmp_path / "v", frames=4, flip=True)
    plain = videos.window(0)
    clips, _ = videos.batch(40, np.random.default_rng(0))
    flipped = 0
    for clip in clips.numpy():
        is_flipped = (clip != plain).any()
        flipped += is_flipped
        assert (clip == (plain[:, :, ::-1] if is_flipped else plain)).all()
    assert 5 < flipped < 35
    fixed, _ = videos.fixed(1)
    assert (fixed[0].numpy() == plain).all()
    with pytest.raises(data.UserError, match="--flip would turn right into left"):
        data.Videos("toy", tmp_path, "train", 16, 8, flip=True)

def test_crops_are_squares_from_everywhere(tmp_path):
    """A square that moves from frame to frame, edges never reached, evaluation on squares."""
    write_pattern(tmp_path / "v" / "clip", 8, rows=10, columns=1)
    videos = data.Videos(str(tmp_path / "v"), tmp_path, "train", 8, frames=4, crop=5)
    whole = videos.window(0)
    clips, _ = videos.batch(200, np.random.default_rng(0))
    corners = set()
    for clip in clips.numpy():
        y, x = divmod(int(clip[0, 0, 0, 0]), 10)
        assert (clip == whole[:, y:y + 5, x:x + 5]).all()
        corners.add((y, x))
    assert len(corners) == 16
    fixed, _ = videos.fixed(1)
    assert fixed.shape == (1, 4, 8, 8, 3)

def test_a_flag_comes_before_the_preset_and_that_before_the_default():
    """A flag that loses to a preset; a key of a preset that is mistyped and ignored in silence; a
    folder "sky" of one's own that trains into runs/sky with the presets of Sky Timelapse."""
    presets = {"sky": dict(stride=2, size=64), "mine": dict(frames=4)}
    cfg = data.parse_flags(data.Config, presets, ["--data", "sky", "--size", "16"])
    assert cfg == data.Config(data="sky", data_dir="datasets", size=16, frames=16, stride=2)
    cfg = data.parse_flags(data.Config, presets, ["--data", "here/mine/"])       # a folder's preset
    assert (cfg.frames, cfg.data) == (4, os.path.abspath("here/mine"))
    with pytest.raises(TypeError, match="farmes"):
        data.parse_flags(data.Config, {"sky": dict(farmes=8)}, ["--data", "sky"])
    for module in (vqgan3d, diffusion):                               # their own are right
        for name in ("toy", "sky", "ucf101"):
            data.parse_flags(module.Config, module.PRESETS, ["--data", name])
        assert set(module.MAY_CHANGE) < set(vars(module.Config()))
    assert data.run_name("clips/") == data.run_name("clips.npy") == "clips"
