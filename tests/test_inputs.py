"""Inputs that users have: what a folder means, what a file says about itself, arrays, our outputs.
Each test names the mistake that would be made in silence."""
import errno
import os
import struct
import sys
from datetime import date, datetime, timedelta
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data

av = pytest.importorskip("av")

def grey(value, size=16):
    return np.full((size, size, 3), value, np.uint8)

def frames(folder, names, first=0):
    """A folder of grey pictures, the k-th with value first + 5 * k."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        iio.imwrite(folder / name, grey((first + 5 * k) % 256))

def gif(path, seed=0, length=12):
    """A GIF of noise"""
    path.parent.mkdir(parents=True, exist_ok=True)
    video = np.random.default_rng(seed).integers(0, 255, (length, 16, 16, 3), dtype=np.uint8)
    iio.imwrite(path, video, plugin="pillow", loop=0)

def videos(root, tmp_path, split="train"):
    return data.Videos(root, tmp_path / "datasets", split, 16, frames=8)

# ---- a folder of pictures is one video ----

@pytest.mark.parametrize("names", [
    ["{t}.png"], ["f_{t:05d}.png"], ["{t}_640x360.png"], ["{t}_of_20.png"], ["shot ({t}).png"],
    ["{s}.png"], ["00-00-{w:02d}-{ms:03d}.png"], ["2024-01-01_23-59-{u:02d}.png"], ["{day}.png"],
    ["{second}.png"]])
def test_one_sequence_is_one_video_in_order(tmp_path, names):
    """Frames 0, 1, 10, 11, 2; seconds 0.125 after 0.25; times that begin anew: two videos."""
    named = []
    for t in range(12):
        s = t / 8
        day = date(2023, 2, 22) + timedelta(t)                # over the end of February
        second = datetime(2023, 12, 31, 23, 59, 37) + timedelta(seconds=5 * t)
        named.append(names[0].format(t=t, s=s, w=int(s), ms=int(s * 1000) % 1000, u=40 + t,
                                     day=day, second=f"{second:%Y-%m-%d_%H-%M-%S}"))
    frames(tmp_path / "v", named)
    values = data.read_video(tmp_path / "v", 16)[:, 0, 0, 0]
    assert values.tolist() == [5 * t for t in range(12)]

@pytest.mark.parametrize("one, two", [
    ("v_Archery_g01_c01_{t:04d}.png", "v_Typing_g02_c03_{t:04d}.png"),
    ("v_Archery_g01_c01_{t:04d}.png", "v_Archery_g01_c02_{t:04d}.png"),
    ("img_{t:05d}.png", "x_{t:05d}.png"), ("{t}.png", "-{t}.png"), ("a{t}.png", "a{t}.jpg"),
    ("a1.{t:04d}.png", "a2.{t:04d}.png"), ("a1_{t}.png", "a2_{u}.png"), ("1.{t}.png", "1.{t}0.png")])
def test_several_sequences_in_a_folder_are_refused(tmp_path, capsys, one, two):
    """Two videos, or colour and optical flow, mixed into one."""
    for name in one, two:
        names = [name.format(t=t, u=7 + t) for t in range(60)]
        frames(tmp_path / "set" / "mixed", names)
    frames(tmp_path / "set" / "good", [f"{t}.png" for t in range(12)])
    assert [v.name for v in videos(tmp_path / "set", tmp_path).videos] == ["good"]
    out = capsys.readouterr().out
    assert "mixed sequences of frames" in out
    assert one.format(t=0) in out or two.format(t=0, u=7) in out

def test_missing_frames_are_said_and_a_bad_frame_costs_what_follows(tmp_path, capsys):
    """A jump in time that nobody notices; a whole clip lost by its last frame."""
    frames(tmp_path / "set" / "gap", [f"{t}.png" for t in range(14) if t != 6])
    frames(tmp_path / "set" / "cut", [f"{t:02d}.png" for t in range(14)])
    (tmp_path / "set" / "cut" / "10.png").write_bytes(b"")
    for _ in range(2):                                     # the second time from the cache
        found = data.prepare(tmp_path / "set", tmp_path, "train", 16)[0]
        assert {v.name: v.frames for v in found} == {"cut": 10, "gap": 13}
        out = capsys.readouterr().out
        assert "used, though frames are missing: gap (after 5.png)" in out
        assert "used up to its first damaged frame: cut (10 frames, then it is damaged" in out
    assert "10.png" in out

def test_pictures_beside_videos_are_no_video(tmp_path, capsys):
    """A cover that becomes a clip of one frame and turns the classes off."""
    for i in range(4):
        gif(tmp_path / "set" / ("cat", "dog")[i % 2] / f"{i}.gif", i)
    iio.imwrite(tmp_path / "set" / "cover.jpg", grey(9))
    iio.imwrite(tmp_path / "set" / "cat" / "thumb.png", grey(9))
    found = videos(tmp_path / "set", tmp_path)
    assert found.classes == ["cat", "dog"]
    assert "pictures beside videos" in capsys.readouterr().out

# ---- classes and splits ----

@pytest.mark.parametrize("train, test", [("train", "val"), ("Train", "Test"), ("train", "valid"),
                                         ("training", "testing"), ("train", "validation")])
def test_folders_of_splits(tmp_path, train, test):
    """A validation set that is trained on, because its folder is not called test."""
    for split in train, test:
        for i in range(4):
            gif(tmp_path / "set" / split / ("cat", "dog")[i % 2] / f"{i}.gif", i)
    assert [v.name[:6] for v in videos(tmp_path / "set", tmp_path).videos] == ["train/"] * 4
    assert [v.label for v in videos(tmp_path / "set", tmp_path, "test").videos] == [0, 0, 1, 1]

def test_a_test_split_of_one_class_keeps_its_label(tmp_path):
    """The rule that one folder makes no class, applied to each split alone."""
    for name in ("train/cat/0", "train/dog/1", "test/dog/2"):
        gif(tmp_path / "set" / f"{name}.gif")
    assert [v.label for v in videos(tmp_path / "set", tmp_path, "test").videos] == [1]

def test_what_looks_like_a_split_and_is_none_is_said(tmp_path, capsys):
    """A folder "train" alone, whose name becomes a class, without a word."""
    gif(tmp_path / "set" / "train" / "0.gif")
    gif(tmp_path / "set" / "more" / "1.gif", 1)
    videos(tmp_path / "set", tmp_path)
    assert "not taken for a split" in capsys.readouterr().out

def test_classes_are_those_of_usable_training_videos(tmp_path, capsys):
    """A class without videos; a class of the test split that becomes class 0."""
    for split, classes in (("train", "cat dog"), ("test", "cat Dog")):
        for name in classes.split():
            for i in range(2):
                gif(tmp_path / "set" / split / name / f"{i}.gif", i)
    (tmp_path / "set" / "train" / "bird").mkdir()
    (tmp_path / "set" / "train" / "__MACOSX").mkdir()
    gif(tmp_path / "set" / "train" / "short" / "0.gif", length=3)
    assert videos(tmp_path / "set", tmp_path).classes == ["cat", "dog"]
    held_out = videos(tmp_path / "set", tmp_path, "test")
    assert [v.label for v in held_out.videos] == [-1, -1, 0, 0]
    out = capsys.readouterr().out
    assert "2 classes: cat, dog" in out
    assert "2 used without a label" in out

def test_numbered_classes_count_as_numbers_and_a_folder_around_is_looked_through(tmp_path):
    """1, 10, 11, 2: class 3 is not number 3; the name of an archive taken for the only class."""
    for name in (1, 2, 10):
        for i in range(3):
            gif(tmp_path / "zip" / "set" / str(name) / f"{i}.gif", i)
    assert videos(tmp_path / "zip", tmp_path).classes == ["1", "2", "10"]

# ---- frame rates ----

def test_fps_takes_the_frames_that_are_shown_at_its_times(tmp_path):
    """24 frames a second learned as if they were 6; a rate that changes within a video."""
    video = np.stack([grey(10 * t, 32) for t in range(24)])
    iio.imwrite(tmp_path / "v.mp4", video, plugin="pyav", codec="libx264", fps=24)
    def shown(path, fps):
        values = data.read_video(path, 32, fps)[:, 16, 16, 0].astype(float)
        return np.rint(values / 10).astype(int).tolist()
    assert shown(tmp_path / "v.mp4", 0) == [*range(24)]
    assert shown(tmp_path / "v.mp4", 6) == [0, 4, 8, 12, 16, 20]
    assert shown(tmp_path / "v.mp4", 48) == np.repeat(np.arange(24), 2)[:-1].tolist()
    iio.imwrite(tmp_path / "v.gif", video[:4], plugin="pillow", duration=[100, 300, 100, 100])
    assert shown(tmp_path / "v.gif", 10) == [0, 1, 1, 1, 2, 3]

def test_rates_are_printed_and_fps_is_a_part_of_the_cache(tmp_path, capsys):
    """Rates that differ, without a word; frames of another --fps taken from the cache."""
    video = np.stack([grey(10 * t, 32) for t in range(24)])
    (tmp_path / "set").mkdir()
    for rate in 12, 24:
        iio.imwrite(tmp_path / "set" / f"{rate}.mp4", video, plugin="pyav", codec="libx264",
                    fps=rate)
    found = data.prepare(tmp_path / "set", tmp_path, size=32)[0]
    assert "12 to 24 frames a second" in capsys.readouterr().out
    assert [v.frames for v in found] == [24, 24]
    found = data.prepare(tmp_path / "set", tmp_path, size=32, fps=12)[0]
    assert [v.frames for v in found] == [24, 12]

def test_fps_of_what_has_no_times_is_refused(tmp_path, capsys):
    """A flag that does nothing, for folders of frames and arrays"""
    frames(tmp_path / "set" / "v", [f"{t}.png" for t in range(12)])
    with pytest.raises(data.UserError, match="no usable video"):
        data.prepare(tmp_path / "set", tmp_path, size=16, fps=8)
    assert "its frames have no times" in capsys.readouterr().out
    for name in "toy", "sky", "clips.npy":
        with pytest.raises(data.UserError, match="have no times"):
            data.prepare(name, tmp_path, size=16, fps=8)

def test_an_absurd_time_does_not_fill_the_disk():
    """A damaged time stamp: the frame before it again, for weeks."""
    shown = [data.Frame(grey(0), 1.0, seconds) for seconds in (0, 1e6)]
    with pytest.raises(ValueError, match="over ten minutes"):
        list(data.resample(shown, 8))

# ---- what a file says about itself ----

@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_turned_video_is_shown_upright(tmp_path, turn):
    """Videos of phones, which lie on their side. The matrix is that of the container's header."""
    upright = np.zeros((4, 64, 32, 3), np.uint8)
    upright[:, :32, :, 0] = 220                                  # red above, blue below
    upright[:, 32:, :, 2] = 220
    stored = np.rot90(upright, turn // 90, (1, 2))
    data.save_grid(tmp_path / "v.mp4", stored[None], zoom=1)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    one = 0x10000
    place = content.index(b"tkhd") + 44
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 0x40000000)
    content[place:place + 36] = matrix
    (tmp_path / "v.mp4").write_bytes(content)
    first = data.read_video(tmp_path / "v.mp4", 32)[0]
    assert first[4, 16].argmax() == 0
    assert first[-4, 16].argmax() == 2

def test_pixel_aspect_and_the_limit_of_wide_frames():
    """A frame of pixels twice as wide as high, shown too narrow; a limit that is not said."""
    wide = np.zeros((32, 32, 3), np.uint8)
    wide[:, 8:24] = 255                                          # 32 of 64 columns, as displayed
    assert (data.resize_crop(wide, 32, aspect=2.0)[:, :, 0] > 127).all()
    with pytest.raises(ValueError, match="2048 x 32 .* more than 32 times"):
        data.resize_crop(np.zeros((32, 2048, 3), np.uint8), 32)

def test_pictures_of_all_kinds(tmp_path):
    """16-bit grey cut at 255, hidden colours of transparent pixels, pictures on their side."""
    from PIL import Image
    ramp = np.linspace(0, 1, 16)[None].repeat(16, 0)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "grey16.png")
    rgba = np.full((16, 16, 4), 200, np.uint8)
    rgba[:8, :, 3] = 0
    rgba[8:, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    turned = Image.fromarray((ramp * 255).astype(np.uint8))
    exif = turned.getexif()
    exif[0x112] = 6                                              # turn clockwise to display
    turned.save(tmp_path / "exif.jpg", exif=exif, quality=98)
    grey16, *_ = data.read_picture(tmp_path / "grey16.png")
    alpha, *_ = data.read_picture(tmp_path / "alpha.png")
    exif, *_ = data.read_picture(tmp_path / "exif.jpg")
    assert abs(grey16[..., 0] - ramp * 255).max() <= 1
    assert (alpha[:8] == 0).all()
    assert (alpha[8:] == 200).all()
    assert abs(exif[..., 0].astype(int) - np.rot90(ramp * 255, -1)).max() < 6

@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(tmp_path, mode, orientation):
    """A mirrored picture that is turned the wrong way, or whose channels change places."""
    from PIL import Image, ImageOps
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    exif = image.getexif()
    exif[0x112] = orientation
    image.save(tmp_path / "picture.png", exif=exif)
    found, *_ = data.read_picture(tmp_path / "picture.png")
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "picture.png"))
    assert np.array_equal(found, np.array(shown.convert("RGB")))

def test_a_download_that_broke_off_is_named(tmp_path, capsys):
    """Half of a file, of which the decoder says nothing: a short video that nobody misses."""
    (tmp_path / "set").mkdir()
    video = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    for name in "half.mkv", "whole.mkv":
        iio.imwrite(tmp_path / "set" / name, video, plugin="pyav", codec="libx264", fps=8)
    whole = (tmp_path / "set" / "half.mkv").read_bytes()
    (tmp_path / "set" / "half.mkv").write_bytes(whole[:len(whole) // 2])
    data.prepare(tmp_path / "set", tmp_path, size=16)
    out = capsys.readouterr().out
    assert "1 used up to its first damaged frame: half.mkv (" in out
    assert "it ends, and should have 60)" in out

def test_a_cover_in_a_video_is_not_the_video():
    """Some programs write it as the first stream, of one frame."""
    disposition = av.stream.Disposition
    cover = SimpleNamespace(disposition=disposition.attached_pic | disposition.default)
    video = SimpleNamespace(disposition=disposition.default)
    container = SimpleNamespace(streams=SimpleNamespace(video=[cover, video]))
    assert data.video_stream(container) is video
    container.streams.video.pop()
    with pytest.raises(ValueError, match="no video stream"):
        data.video_stream(container)

@pytest.mark.parametrize("function", ["on_black", "resize_crop"])
def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, function):
    """A video that is cut in the cache for good, because memory was short for a moment."""
    frames(tmp_path / "set" / "0", [f"{i:02d}.png" for i in range(12)])
    def no_memory(*args):
        raise MemoryError
    with monkeypatch.context() as patch:
        patch.setattr(data, function, no_memory)
        with pytest.raises(MemoryError):
            videos(tmp_path / "set", tmp_path)
    assert videos(tmp_path / "set", tmp_path).videos[0].frames == 12

def test_many_fixed_clips_need_few_open_files(tmp_path):
    """More held-out clips than a process may have open files, and a stack trace."""
    resource = pytest.importorskip("resource")
    gif(tmp_path / "set" / "0.gif")
    found = data.Videos(tmp_path / "set", tmp_path, "train", 16, frames=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.open(tmp_path, os.O_RDONLY)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free + 10, hard))
    try:
        clips, _ = found.fixed(50)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert clips.shape == (50, 2, 16, 16, 3)

# ---- arrays ----

@pytest.mark.parametrize("shape", [(20, 12, 16, 16, 3), (20, 3, 12, 16, 16), (20, 12, 3, 16, 16),
                                   (20, 12, 16, 16), (20, 12, 16, 16, 1), (10, 1000, 16, 16),
                                   (16, 160, 16, 16)])
def test_arrays_of_videos(tmp_path, shape):
    """Axes taken for others: frames for videos, channels for frames."""
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "clips.npy", array)
    found = data.Videos(tmp_path / "clips.npy", tmp_path, "train", 16, frames=2)
    video = found.videos[0]
    clip = found.window(0, 0)
    expected = {5: array, 4: array[..., None]}[array.ndim]
    if shape == (10, 1000, 16, 16):                              # time first, as in Moving MNIST
        expected = expected.swapaxes(0, 1)
    for axis in (1, 2):
        if expected.shape[axis] == 3:
            expected = np.moveaxis(expected, axis, -1)
    assert 0.75 * len(expected) <= len(found) < len(expected)
    expected = expected[video.index, :2].repeat(3 // expected.shape[-1], -1)
    assert (clip == expected).all()

def test_arrays_are_resized_unpacked_and_refused(tmp_path, monkeypatch):
    """A video of another size than --size; an .npz; floats from 0 to 1 taken for black videos; a
    full disk taken for a wrong array."""
    np.savez(tmp_path / "clips.npz", data.toy_videos(12, 8, 32, 0)[0])
    found = data.Videos(tmp_path / "clips.npz", tmp_path, "train", 16, frames=8)
    assert found.batch(2, np.random.default_rng(0))[0].shape == (2, 8, 16, 16, 3)
    def disk_is_full(file, array):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", disk_is_full)
        os.utime(tmp_path / "clips.npz", (0, 0))
        with pytest.raises(OSError, match="No space left"):
            data.Videos(tmp_path / "clips.npz", tmp_path, "train", 16, frames=8)
    np.save(tmp_path / "floats.npy", np.zeros((4, 8, 16, 16, 3)))
    with pytest.raises(data.UserError, match="uint8 from 0 to 255"):
        data.Videos(tmp_path / "floats.npy", tmp_path, "train", 16, frames=8)
    np.save(tmp_path / "empty.npy", np.zeros((0, 8, 16, 16, 3), np.uint8))
    with pytest.raises(data.UserError, match="it is empty"):
        data.Videos(tmp_path / "empty.npy", tmp_path, "train", 16, frames=8)
    np.save(tmp_path / "one.npy", data.toy_videos(1, 16, 64)[0][0])
    with pytest.raises(data.UserError, match="one video alone is saved as array"):
        data.Videos(tmp_path / "one.npy", tmp_path, "train", 16, frames=8)

def test_caches_beside_the_videos_are_no_class(tmp_path, monkeypatch):
    """The folders that a first command makes inside the set: the second one finds no classes."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat/0", "cat/1", "dog/2"):
        gif(tmp_path / "arch" / f"{name}.gif")
    for _ in range(2):
        found = data.Videos(str(tmp_path), "datasets", "train", 16, frames=8)
        assert found.classes == ["cat", "dog"]

def test_lengths_that_containers_tell(tmp_path):
    """Sound that goes on after the picture: a whole video called damaged."""
    with av.open(tmp_path / "long_sound.mkv", "w") as container:
        picture = container.add_stream("mpeg4", rate=8)
        picture.width = picture.height = 32
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for _ in range(16):
            frame = av.VideoFrame.from_ndarray(grey(9, 32), "rgb24")
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        for k in range(8):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
            silence.sample_rate = 8000
            silence.pts = 8000 * k
            container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    frames_found, rate = data.probe(tmp_path / "long_sound.mkv")
    assert 15 <= frames_found <= 16
    assert rate == 8

# ---- our own outputs, links, lists ----

def test_our_own_outputs_are_not_data(tmp_path, main):
    """Previews and caches inside the data folder, trained on in the next run."""
    for i in range(12):
        gif(tmp_path / f"{i:02d}.gif", i)
    flags = ["--data", ".", "--size", 16, "--frames", 8]
    first = main(data, *flags)
    second = main(data, *flags)
    assert first.code == second.code == 0
    assert [line for line in first.out.splitlines() if "videos," in line] == [
        line for line in second.out.splitlines() if "videos," in line]

def test_a_link_upwards_ends_and_a_video_behind_a_link_counts_once(tmp_path):
    """A search that never ends, or that finds the same videos a thousand times."""
    gif(tmp_path / "set" / "a" / "0.gif")
    gif(tmp_path / "set" / "b" / "1.gif", 1)
    (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "set" / "a")
    sources, _ = data.find_sources(tmp_path / "set")
    assert [s.name for s in sources] == ["0.gif", "1.gif"]

def test_what_is_left_out_is_said(tmp_path, capsys):
    """A moved disk, whose links point to nothing: a stack trace; generated videos left out in
    silence; a test split inside the class folders, trained on."""
    gif(tmp_path / "set" / "cat" / "test" / "0.gif")
    gif(tmp_path / "set" / "dog" / "1.gif", 1)
    (tmp_path / "set" / "dog" / "2.gif").symlink_to(tmp_path / "gone.gif")
    gif(data.output_folder(tmp_path / "set" / "made") / "3.gif")
    videos(tmp_path / "set", tmp_path)
    out = capsys.readouterr().out
    assert "skipped 1 link to nothing: dog/2.gif" in out
    assert "skipped 1 output of these scripts: made" in out
    assert "note: cat/test/0.gif looks like a part of a split" in out

def test_lists_from_windows(tmp_path):
    """A byte-order mark that becomes a part of the first class, backslashes in paths."""
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    gif(tmp_path / "UCF-101" / "Bend" / "v.gif")
    (lists / "classInd.txt").write_bytes(b"\xef\xbb\xbf1 Bend\r\n 2\tJump \r\n\r\n")
    (lists / "trainlist01.txt").write_bytes(b"\xef\xbb\xbfBend\\v.gif 1\r\n bend/v.gif 1\r\n")
    listing = data.list_ucf101(tmp_path, "train")
    assert listing.classes == ["Bend", "Jump"]
    assert [s.class_name for s in listing.sources] == ["Bend"]
    (lists / "classInd.txt").write_text("1 Bend\nJump\n")
    with pytest.raises(data.UserError, match="lines of a number and a class"):
        data.list_ucf101(tmp_path, "train")

@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere all names are Unicode")
def test_names_that_are_no_utf8(tmp_path, main):
    """A name of Latin-1 from an old archive, which cannot be printed."""
    for i in range(4):
        gif(tmp_path / "set" / os.fsdecode((b"caf\xe9", b"tea")[i % 2]) / f"{i}.gif", i)
    result = main(data, "--data", "set", "--size", 16, "--frames", 8)
    assert result.code == 0
    assert "2 classes: caf" in result.out

def test_a_folder_called_like_a_set_is_not_the_set(tmp_path, monkeypatch):
    """A folder "sky" of one's own that trains into runs/sky with the presets of Sky Timelapse."""
    monkeypatch.chdir(tmp_path)
    assert data.run_name("./sky") == "sky-folder"
    assert data.run_name("sky") == "sky"
    assert data.run_name("clips/") == data.run_name("clips") == "clips"

def test_a_checkpoint_that_holds_more_than_tensors_is_told_so(tmp_path):
    """The jargon of torch's loader, which says nothing that a user can do."""
    torch.save(dict(config={}, step=1, model=tmp_path), tmp_path / "x.pt")
    with pytest.raises(data.UserError, match="more than tensors and plain values"):
        data.load_checkpoint(tmp_path / "x.pt")
