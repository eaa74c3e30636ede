"""Inputs that users have. Each test names the mistake that would be made in silence."""
import shutil
import struct
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import data
from conftest import write_frames, write_video

def gif(path, seed=0, length=12):
    """A GIF of noise"""
    video = np.random.default_rng(seed).integers(0, 255, (length, 16, 16, 3), dtype=np.uint8)
    write_video(path, video)

def open_set(root, tmp_path, split="train", frames=8):
    return data.Videos(str(root), tmp_path / "datasets", split, 16, frames)

def names(videos):
    return [video.name for video in videos.videos]

def read_video(path, size):
    return np.stack([*data.read_frames(path, size)])

def test_frames_come_in_natural_order(tmp_path):
    """Sorted as text, 10 before 9; files that a Mac hides among the frames."""
    stems = ["clip7_9", "clip7_10", "clip7_11", "clip7_100"]
    for value in (3, 1, 0, 2):                                        # not in the order of writing
        write_frames(tmp_path / "v", [value], name=f"{stems[value]}.png")
    (tmp_path / "v" / f"._{stems[0]}.png").write_bytes(b"of a Mac")
    assert read_video(tmp_path / "v", 16)[:, 0, 0, 0].tolist() == [0, 1, 2, 3]

@pytest.mark.parametrize("one, two", [
    ("v_Archery_g01_c01_{}.png", "v_Archery_g01_c02_{}.png"), ("img_{}.png", "x_{}.png"),
    ("00-00-00-{}.png", "00-00-01-{}.png")])
def test_several_sequences_in_a_folder_are_refused(tmp_path, capsys, one, two):
    """Two videos, or colour and optical flow, mixed into one."""
    for name in one, two:
        write_frames(tmp_path / "set" / "mixed", range(20), name)
    for i in range(3):
        gif(tmp_path / "set" / f"{i}.gif", i)
    videos = open_set(tmp_path / "set", tmp_path)
    assert "mixed" not in names(videos)
    out = capsys.readouterr().out
    assert "skipped 1 unreadable: [" in out
    assert "mixed (" in out
    assert "in one number only: number them 0001.png" in out

def test_pictures_beside_videos_are_no_video(tmp_path, capsys):
    """A cover that becomes a clip and turns the classes off; classes as text: 1, 10, 2."""
    for i in range(6):
        gif(tmp_path / "set" / ("10", "1", "2")[i % 3] / f"{i}.gif", i)
    write_frames(tmp_path / "set", [9], "cover.png")
    write_frames(tmp_path / "set" / "2", [9], "thumb.png")
    assert open_set(tmp_path / "set", tmp_path).classes == ["1", "2", "10"]
    assert "skipped 2 not a video" in capsys.readouterr().out

@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_folders_of_splits(tmp_path, test):
    """A validation set that is trained on, because its folder is not called test; the rule that one
    folder makes no class, applied to each split alone; a class that only the test split has."""
    for name in ("train/cat/0", "train/dog/1", f"{test}/dog/2", f"{test}/emu/3"):
        gif(tmp_path / "set" / f"{name}.gif")
    train, held_out = (open_set(tmp_path / "set", tmp_path, split) for split in ("train", "test"))
    assert names(train) == ["cat/0.gif", "dog/1.gif"]
    assert names(held_out) == ["dog/2.gif", "emu/3.gif"]
    assert train.classes == held_out.classes == ["cat", "dog"]
    assert (train.labels, held_out.labels) == ([0, 1], [1, -1])

def test_adding_a_video_moves_no_other_between_the_splits():
    """A split by position, or by a hash that differs from process to process: videos trained on
    are then used to measure. Or an empty test split: the hashes of a, b and c choose none."""
    videos = [f"{i:03d}.mp4" for i in range(500)]
    train, test = data.hold_out(videos, "train"), data.hold_out(videos, "test")
    assert sorted(train + test) == videos
    assert 30 < len(test) < 70
    assert test[:5] == ["013.mp4", "042.mp4", "045.mp4", "046.mp4", "073.mp4"]
    for some in (videos[1:], videos[:14], videos[::2], videos[13::29]):
        assert data.hold_out(some, "test") == [name for name in some if name in test]
        assert data.hold_out(some, "train") == [name for name in some if name not in test]
    assert len(data.hold_out(["a", "b", "c"], "test")) == 1
    assert data.hold_out(["a"], "train") == data.hold_out(["a"], "test") == ["a"]

def test_our_own_outputs_are_not_data(tmp_path, main):
    """Previews and caches inside the data folder, trained on in the next run."""
    for i in range(12):
        gif(tmp_path / f"{i:02d}.gif", i)
    write_frames(tmp_path / "runs" / "0001", range(8))
    flags = ["--data", ".", "--data_dir", ".", "--size", 16, "--frames", 8]
    for _ in range(2):
        result = main(data, *flags)
        counts = [int(line.split()[1]) for line in result.out.splitlines() if "videos," in line]
        assert len(counts) == 2
        assert sum(counts) == 12

@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_turned_video_is_shown_upright(tmp_path, turn):
    """Videos of phones, which lie on their side. The matrix is that of the container's header."""
    upright = np.zeros((4, 64, 32, 3), np.uint8)
    upright[:, :32, :, 0] = 220                                  # red above, blue below
    upright[:, 32:, :, 2] = 220
    write_video(tmp_path / "v.mp4", np.rot90(upright, turn // 90, (1, 2)))
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[turn]
    place = content.index(b"tkhd") + 44
    content[place:place + 20] = struct.pack(">5i", a << 16, b << 16, 0, c << 16, d << 16)
    (tmp_path / "v.mp4").write_bytes(content)
    first = read_video(tmp_path / "v.mp4", 32)[0]
    assert first[4, 16].argmax() == 0
    assert first[-4, 16].argmax() == 2

def test_a_turned_picture_is_shown_upright(tmp_path):
    """Frames of a phone, which lie on their side: EXIF says clockwise."""
    from PIL import Image
    ramp = np.linspace(0, 255, 16)[None].repeat(16, 0)
    image = Image.fromarray(ramp.astype(np.uint8))
    exif = image.getexif()
    exif[0x112] = 6
    image.save(tmp_path / "exif.jpg", exif=exif, quality=98)
    found = read_video(tmp_path / "exif.jpg", 16)[0, :, :, 0].astype(int)
    assert abs(found - np.rot90(ramp, -1)).max() < 6

def test_bad_files_are_counted_and_named_and_the_rest_is_used(tmp_path, clips, main):
    """A loader that ends at one bad file, or is silent about it."""
    folder = tmp_path / "mixed"
    shutil.copytree(clips, folder)
    content = (folder / "spin" / "00.mp4").read_bytes()
    (folder / "spin" / "cut.mp4").write_bytes(content[:len(content) // 2])
    (folder / "spin" / "notes.txt").write_text("")
    write_frames(folder / "spin" / "damaged", range(12))
    (folder / "spin" / "damaged" / "frame_7.png").write_bytes(b"")
    gif(folder / "wave" / "short.gif", length=5)
    result = main(data, "--data", folder, "--size", 16, "--frames", 8, "--data_dir", ".")
    skipped = "\n".join(line for line in result.out.splitlines() if "skipped" in line)
    for name in ("spin/cut.mp4", "spin/notes.txt", "spin/damaged", "frame_7.png", "wave/short.gif"):
        assert name in skipped, name
    counts = [line.split() for line in result.out.splitlines() if "videos," in line]
    assert sum(int(words[1]) for words in counts) == 12               # the good ones
    assert sum(int(words[3]) for words in counts) == 12 * 12          # frames
    assert "2 classes" in result.out
    assert Path("runs/mixed/data-train.gif").exists()

@pytest.mark.parametrize("name", ["sky", "ucf101", "empty", "absent"])
def test_no_usable_video_is_one_line(tmp_path, main, name):
    """A stack trace, or training on nothing."""
    (tmp_path / "empty").mkdir()
    result = main(data, "--data", name, "--size", 16, code=1)
    assert "no usable video for --data" in result.err
    assert name in result.err

def test_an_array_of_videos(tmp_path):
    """A video of another index than its name; floats from 0 to 1 taken for black videos."""
    array = np.random.default_rng(0).integers(0, 256, (20, 12, 16, 16, 3), dtype=np.uint8)
    path = tmp_path / "clips.npy"
    np.save(path, array)
    train, test = (open_set(path, tmp_path, split) for split in ("train", "test"))
    assert len(train) + len(test) == 20
    assert not set(names(train)) & set(names(test))
    for videos in (train, test):
        for i, name in enumerate(names(videos)):
            assert (videos.window(i, 3) == array[int(name), 3:11]).all()
    for wrong in (array / 255, array[..., 0], array[:, :, :8, :8]):
        np.save(path, wrong)
        with pytest.raises(data.UserError, match="must hold uint8 .N, T, 16, 16, 3.*--size"):
            open_set(path, tmp_path)

def test_ucf101_split_lists(tmp_path, clips, capsys):
    """A class that is not found because of a capital letter; lists that name absent files; labels
    that do not count from 0; lines that end as in Windows; videos in another folder than listed."""
    root, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    root.mkdir()
    for name in ("Archery_g01", "Archery_g02", "HandStandPushups_g01", "Typing_g01"):
        shutil.copy(clips / "spin" / "00.mp4", root / f"v_{name}_c01.avi")
    lists.mkdir()
    (lists / "classInd.txt").write_bytes(b"1 Archery\r\n2 HandstandPushups\r\n3 Typing\r\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")     # without labels
    (lists / "trainlist01.txt").write_bytes(
        b"Typing/v_Typing_g01_c01.avi 3\r\n"
        b"HandstandPushups/v_HandStandPushups_g01_c01.avi 2\r\n"
        b"Archery/v_Archery_g02_c01.avi 1\r\n"
        b"Archery/v_Archery_g77_c01.avi 1\r\n")
    videos = data.Videos("ucf101", tmp_path, "train", 16, frames=8)
    assert videos.classes == ["Archery", "HandstandPushups", "Typing"]
    assert [Path(name).name for name in names(videos)] == [
        "v_Typing_g01_c01.avi", "v_HandStandPushups_g01_c01.avi", "v_Archery_g02_c01.avi"]
    assert videos.labels == [2, 1, 0]
    out = capsys.readouterr().out
    assert "skipped 1 unreadable: [" in out
    assert "Archery/v_Archery_g77_c01.avi" in out
    test = data.Videos("ucf101", tmp_path, "test", 16, frames=8)
    assert names(test) == ["Archery/v_Archery_g01_c01.avi"]
    assert test.labels == [0]

def test_a_set_is_found_where_its_archive_unpacks(tmp_path):
    """unzip -d datasets/... puts a folder into a folder."""
    write_frames(tmp_path / "sky_timelapse" / "sky_timelapse" / "sky_test" / "b" / "b_1", range(8))
    assert names(data.Videos("sky", tmp_path, "test", 16, frames=8)) == ["b/b_1"]
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Bend\n")
    (lists / "trainlist01.txt").write_text("Bend/v_Bend_g01_c01.avi 1\n")
    (tmp_path / "UCF-101" / "UCF101").mkdir(parents=True)
    (tmp_path / "UCF-101" / "UCF101" / "v_Bend_g01_c01.avi").write_bytes(b"")
    sources, classes = data.find_set("ucf101", tmp_path, "train")
    assert classes == ["Bend"]
    assert [path.parent.name for path in sources.values()] == ["UCF101"]
