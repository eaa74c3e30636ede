"""Sets, decoding, the cache, splits, windows, flags. Each test names the bug that it catches."""
import multiprocessing
import os
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import data
from conftest import ROOT, script

def write_frames(folder, values, size=16, name="frame_{}.png"):
    """A video as a folder of grey frames, frame i of value values[i]. PNG keeps these values, and
    so does the cache, if its size is the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        iio.imwrite(folder / name.format(i), np.full((size, size, 3), value, np.uint8))

def write_pattern(folder, size, rows, columns):
    """A video of 4 frames whose pixel (y, x) is rows * y + columns * x, 100 more in odd frames."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:size, :size]
    for t in range(4):
        frame = rows * y + columns * x + 100 * (t % 2)
        iio.imwrite(folder / f"{t}.png", frame.astype(np.uint8)[..., None].repeat(3, -1))

def grey_values(video):
    """The value of each frame of a data.Video or an array (T, H, W, 3)."""
    frames = video.open() if isinstance(video, data.Video) else video
    return frames[:, 0, 0, 0].tolist()

# --------------------------------------------------------------------------------------------------
# the toy set

def centroid(bright, axis):
    """Position of the bright pixels (N, T, H, W) along an axis, on a torus: a mean of angles."""
    size = bright.shape[-1]
    other = 5 - axis
    circle = np.exp(2j * np.pi * np.arange(size) / size)
    return np.angle((bright.sum(other) * circle).sum(-1)) * size / (2 * np.pi)       # (N, T)

def bounding_box(bright, x, y):
    """The part of one frame (H, W) that holds the shape, moved from (x, y) to the middle."""
    size = len(bright)
    bright = np.roll(bright, (size // 2 - round(y), size // 2 - round(x)), (0, 1))
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    return bright[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]

def test_toy_labels_name_the_motion_and_the_shape():
    """A label off by one, x and y exchanged, a direction reversed."""
    size = 64
    videos, labels = data.toy_videos(48, 6, size, seed=3)
    assert len(data.TOY_CLASSES) == 12
    assert (np.bincount(labels) == 4).all()
    bright = videos.max(-1) > 185                        # the ground is below 115, the shape 255
    x, y = centroid(bright, 3), centroid(bright, 2)
    for i, label in enumerate(labels):
        shape, motion = data.TOY_CLASSES[label].split("-")
        dx, dy = ((np.diff(c[i]) + size / 2) % size - size / 2 for c in (x, y))
        along = dict(right=dx, left=-dx, down=dy, up=-dy)[motion]
        across = dy if motion in ("right", "left") else dx
        assert along.min() > 1
        assert along.max() < 4
        assert abs(across).max() < 0.5
        box = bounding_box(bright[i, 0], x[i, 0], y[i, 0])
        height, width = box.shape
        limits = dict(column=(1.8, 9), circle=(0.9, 1.1), bar=(1 / 9, 1 / 1.8))[shape]
        assert limits[0] < height / width < limits[1]
        assert 0.7 < box.mean() < 0.97                               # the corners are empty

def test_the_toy_is_the_same_for_the_same_seed():
    """A draw that does not come from the seed: two machines train on different sets."""
    videos, _ = data.toy_videos(12, seed=3)
    again, _ = data.toy_videos(12, seed=3)
    other, _ = data.toy_videos(12, seed=4)
    assert (videos == again).all()
    assert (videos != other).any()

# --------------------------------------------------------------------------------------------------
# value ranges and pictures

def test_every_grey_level_survives_float_and_back():
    """Truncation instead of rounding, a factor 127 or 128, [0, 1] for [-1, 1], exchanged axes."""
    videos = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7, 3), dtype=np.uint8)
    videos.flat[:256] = np.arange(256)
    x = data.to_float(videos)
    assert x.shape == (2, 3, 3, 5, 7)
    assert x.min() == -1
    assert x.max() == 1
    assert (data.to_uint8(x) == videos).all()
    colour = torch.tensor([-3.0, 0, 3]).view(1, 3, 1, 1, 1)
    assert data.to_uint8(colour).flatten().tolist() == [0, 128, 255]             # clipped

def test_resize_keeps_the_aspect():
    """A wide frame squeezed into a square; a crop from a corner instead of the centre."""
    y, x = np.mgrid[:120, :200]
    disc = np.where(np.hypot(x - 99.5, y - 59.5) < 40, 255, 0).astype(np.uint8)
    disc = disc[..., None].repeat(3, -1)
    for frame in (disc, disc.transpose(1, 0, 2)):
        small = data.resize_crop(frame, 48)[..., 0] > 127
        rows, columns = np.flatnonzero(small.any(1)), np.flatnonzero(small.any(0))
        assert small.shape == (48, 48)
        assert len(rows) == len(columns)
        assert abs(len(rows) - 32) <= 1
        assert rows[0] + rows[-1] == 47
        assert columns[0] + columns[-1] == 47

def test_a_grid_shows_each_video_in_its_place(tmp_path):
    """Rows and columns exchanged, a video in the place of another, frames out of order."""
    values = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 10                 # (N, T)
    videos = np.broadcast_to(values[:, :, None, None, None], (6, 4, 8, 8, 3))
    data.save_grid(tmp_path / "grid.gif", videos, columns=3, zoom=1)
    grid = iio.imread(tmp_path / "grid.gif", plugin="pillow", mode="RGB")
    assert grid.shape == (4, 2 * 9 - 1, 3 * 9 - 1, 3)                 # with white lines between
    for i in range(6):
        row, column = divmod(i, 3)
        assert grey_values(grid[:, 9 * row + 4:, 9 * column + 4:]) == values[i].tolist()

# --------------------------------------------------------------------------------------------------
# decoding

@pytest.mark.parametrize("names", [
    ["frame_9", "frame_10", "frame_11", "frame_100"],
    ["IMG_9", "img_10", "IMG_11", "img_100"],
    ["00-00-00-875", "00-00-01-000", "00-00-01-375", "00-00-02-000"],
    ["clip7_1", "clip7_2", "clip7_10", "clip7_100"]])
def test_frames_come_in_natural_order(tmp_path, names):
    """Sorted as text, 10 before 9; sorted by the last number, 02-000 before 01-375."""
    for value in (3, 1, 0, 2):                                        # not in the order of writing
        write_frames(tmp_path / "v", [value], name=f"{names[value]}.png")
    (tmp_path / "v" / f"._{names[0]}.png").write_bytes(b"of a Mac")   # hidden: no frame
    (tmp_path / "v" / ".DS_Store").write_bytes(b"of a Mac")
    assert grey_values(data.read_video(tmp_path / "v", 16)) == [0, 1, 2, 3]

@pytest.mark.parametrize("name, frames", [("g23_c01", 240), ("g24_c01", 251)])
def test_genuine_ucf101_files_decode_in_full(name, frames):
    """Frames lost or doubled by the decoder. The counts are ffprobe's."""
    folder = ROOT.parent / "shared" / "data" / "ucf101_clips" / "SoccerJuggling"
    path = folder / f"v_SoccerJuggling_{name}.avi"
    if not path.exists():
        pytest.skip(f"no {path.name} here: put it at {path}")
    video = data.read_video(path, 32)
    assert video.shape == (frames, 32, 32, 3)
    assert video.std() > 20

# --------------------------------------------------------------------------------------------------
# the cache

@pytest.fixture
def decoded(monkeypatch):
    """A list of the names of the videos that prepare() decodes."""
    names, decode = [], data.decode
    def decode_and_record(source, *more):
        names.append(source.name)
        return decode(source, *more)
    monkeypatch.setattr(data, "decode", decode_and_record)
    return names

def prepare(folder):
    """Prepare folder/v, with the cache in folder -> {name: values of its frames}"""
    videos, _, _ = data.prepare(folder / "v", folder, "train", 16)
    return {video.name: grey_values(video) for video in videos}

def cache_files(folder):
    """The files of the cache by the name of their video."""
    videos, _, _ = data.prepare(folder / "v", folder, "train", 16)
    return {video.name: video.path for video in videos}

def test_only_what_changed_is_decoded_again(tmp_path, decoded):
    """Videos rendered anew under the same names and not noticed, by their time or by their size; a
    set decoded from the beginning because one video was added."""
    for i, name in enumerate("abc"):
        write_frames(tmp_path / "v" / name, [i, i + 1, i + 2])
    assert prepare(tmp_path) == {"a": [0, 1, 2], "b": [1, 2, 3], "c": [2, 3, 4]}
    assert sorted(decoded) == ["a", "b", "c"]
    assert {path.suffix for path in (tmp_path / "cache").rglob("*.npy*")} == {".npy"}

    decoded.clear()
    write_frames(tmp_path / "v" / "d", [5, 6])
    times = {path: path.stat().st_mtime for path in tmp_path.rglob("*.png")}
    write_frames(tmp_path / "v" / "b", [3, 2, 1])                     # other times, equal sizes
    for path in (tmp_path / "v" / "b").iterdir():
        os.utime(path, (times[path] + 10, times[path] + 10))
    larger = tmp_path / "v" / "c" / "frame_1.png"                     # equal times, another size
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    noise[0, 0] = 99
    iio.imwrite(larger, noise)
    os.utime(larger, (times[larger], times[larger]))
    assert prepare(tmp_path) == {"a": [0, 1, 2], "b": [3, 2, 1], "c": [2, 99, 4], "d": [5, 6]}
    assert sorted(decoded) == ["b", "c", "d"]

@pytest.mark.parametrize("damage", ["truncated", "empty", "no array"])
def test_a_damaged_cache_file_is_decoded_again(tmp_path, decoded, damage):
    """A file that is not what it should be, used in silence or ending in a stack trace."""
    for name in "ab":
        write_frames(tmp_path / "v" / name, [1, 2, 3])
    path = cache_files(tmp_path)["b"]
    whole = path.read_bytes()
    decoded.clear()
    if damage == "truncated":
        path.write_bytes(whole[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"\x93NUMPY junk")
    assert prepare(tmp_path) == {"a": [1, 2, 3], "b": [1, 2, 3]}
    assert decoded == ["b"]
    assert path.read_bytes() == whole

def test_an_interrupted_preparation_goes_on(tmp_path, decoded, monkeypatch):
    """Half a video that is taken for a whole one; videos that are decoded again, or never."""
    for i in range(12):
        write_frames(tmp_path / "v" / f"{i:02d}", range(i, i + 5))
    read_frames = data.read_frames
    def read_two_frames_of_number_6(path, *more):
        for i, frame in enumerate(read_frames(path, *more)):
            if path.name == "06" and i == 2:
                raise KeyboardInterrupt
            yield frame
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_frames", read_two_frames_of_number_6)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path)
    done = list((tmp_path / "cache").rglob("*.npy"))
    assert 6 <= len(done) < 12
    assert not list((tmp_path / "cache").rglob("*.tmp"))

    decoded.clear()
    killed = done[0].with_name(f"{done[0].name}.1.tmp")               # as SIGKILL would leave it
    killed.write_bytes(done[0].read_bytes()[:500])
    assert prepare(tmp_path) == {f"{i:02d}": [*range(i, i + 5)] for i in range(12)}
    assert len(decoded) == 12 - len(done)
    assert "06" in decoded

def prepare_together(barrier, folder, data_dirs):
    """Prepare a folder once for each of data_dirs, each time at the same moment as the others."""
    for data_dir in data_dirs:
        barrier.wait(100)
        data.prepare(folder, data_dir, "train", 16)

def test_two_processes_prepare_one_set_at_once(tmp_path):
    """Two that write to the same file: a wrong cache that is accepted, or a stack trace."""
    folder = tmp_path / "v"
    for i in range(30):
        write_frames(folder / f"{i:02d}", range(i, i + 6))
    data_dirs = [tmp_path / f"try{attempt}" for attempt in range(3)]
    spawn = multiprocessing.get_context("spawn")          # a fork would inherit locks of threads
    arguments = (spawn.Barrier(2), folder, data_dirs)
    processes = [spawn.Process(target=prepare_together, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    for data_dir in data_dirs:
        videos, _, _ = data.prepare(folder, data_dir, "train", 16)
        assert [grey_values(v) for v in videos] == [[*range(i, i + 6)] for i in range(30)]
        assert len([*data_dir.rglob("*.npy*")]) == 30

def test_folders_of_one_name_do_not_share_a_cache(tmp_path):
    """Two sets called "v" in different places: the second one gets the first one's videos."""
    for place, values in (("here", [1, 2]), ("there", [2, 1])):       # of the same sizes
        write_frames(tmp_path / place / "v" / "a", values)
        for path in (tmp_path / place / "v" / "a").iterdir():
            os.utime(path, (1, 1))                                    # and times
        videos, _, _ = data.prepare(tmp_path / place / "v", tmp_path, "train", 16)
        assert grey_values(videos[0]) == values

def test_too_little_disk_is_said_before_writing(tmp_path, clips, monkeypatch):
    """A disk that fills after hours of decoding."""
    full = shutil._ntuple_diskusage(total=100, used=100, free=0)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: full)
    for name in (clips, "toy"):
        with pytest.raises(data.UserError, match="not enough disk .* GB needed, 0.00 GB free"):
            data.prepare(name, tmp_path, "train", 16)
    assert not list(tmp_path.rglob("*.npy*"))

# --------------------------------------------------------------------------------------------------
# the held-out split of a folder without splits

def split_names(names):
    """-> the names of the training and the test split"""
    videos = [data.Video(name, "", 16, None) for name in names]
    train, test = (data.hold_out(videos, split) for split in ("train", "test"))
    return [v.name for v in train], [v.name for v in test]

def test_adding_a_video_moves_no_other_between_the_splits():
    """A split by position, or by a hash that differs from process to process: videos trained on
    are then used to measure."""
    names = [f"{i:03d}.mp4" for i in range(500)]
    train, test = split_names(names)
    assert sorted(train + test) == names
    assert 30 < len(test) < 70
    assert test[:5] == ["013.mp4", "042.mp4", "045.mp4", "046.mp4", "073.mp4"]
    for some in (names[1:], names[:14], names[::2], names[13::29]):
        some_train, some_test = split_names(some)
        assert some_test == [name for name in some if name in test]
        assert some_train == [name for name in some if name not in test]

@pytest.mark.parametrize("names", [["a", "b", "c"], ["d", "j"], ["d", "j", "p", "s", "u"]])
def test_no_split_of_a_small_folder_is_empty(names):
    """The hashes of a, b, c choose none for the test split, and those of the others all."""
    train, test = split_names(names)
    assert train
    assert test
    assert sorted(train + test) == names
    assert split_names(["a"]) == (["a"], ["a"])                       # documented: it is both

@pytest.mark.parametrize("wrong", ["too short", "unreadable"])
def test_unusable_videos_do_not_empty_the_held_out_split(tmp_path, wrong):
    """Held out first and looked at afterwards: no video is left for the test split."""
    names = ["a", "b", "c", "e"]
    _, (held_out,) = split_names(names)
    for name in names:
        write_frames(tmp_path / "v" / name, range(8))
    if wrong == "too short":
        for path in [*(tmp_path / "v" / held_out).iterdir()][2:]:
            path.unlink()
    else:
        (tmp_path / "v" / held_out / "frame_3.png").write_text("not an image")
    train = data.Videos(tmp_path / "v", tmp_path, "train", 16, 8)
    test = data.Videos(tmp_path / "v", tmp_path, "test", 16, 8)
    names.remove(held_out)
    assert ([v.name for v in train.videos], [v.name for v in test.videos]) == split_names(names)
    assert len(test) == 1

# --------------------------------------------------------------------------------------------------
# windows

def test_windows_are_consecutive_at_the_stride(tmp_path):
    """A stride that is ignored, a window over the end of a video, a last window never drawn."""
    for i in range(3):
        write_frames(tmp_path / "v" / "train" / f"clip{i}", np.arange(12) + 80 * i)
    write_frames(tmp_path / "v" / "test" / "clip", np.arange(12) + 240)
    videos = data.Videos(tmp_path / "v", tmp_path, "train", 16, frames=4, stride=3)
    assert len(videos) == 3
    assert videos.classes is None
    clips, labels = videos.batch(200, np.random.default_rng(0))
    values = clips[:, :, 0, 0, 0].int()                                          # (N, T)
    assert (values.diff(dim=1) == 3).all()
    assert set(values[:, 0].tolist()) == {0, 1, 2, 80, 81, 82, 160, 161, 162}
    assert (labels == -1).all()
    test = data.Videos(tmp_path / "v", tmp_path, "test", 16, frames=4, stride=3)
    fixed, _ = test.fixed(6)
    assert set(fixed[:, 0, 0, 0, 0].tolist()) == {240, 241, 242}

def test_flip_mirrors_whole_clips_and_never_a_direction(tmp_path):
    """A flip in height or time, of single frames or of all clips; right and left in the toy."""
    write_pattern(tmp_path / "v" / "clip", 16, rows=1, columns=4)
    videos = data.Videos(tmp_path / "v", tmp_path, "train", 16, frames=4, flip=True)
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

def test_a_share_of_a_batch_is_read_alone(tmp_path):
    """Several processes that read all clips each; a share whose windows, squares or mirrors are not
    those of the whole batch."""
    write_pattern(tmp_path / "v" / "clip", 16, rows=5, columns=4)
    videos = data.Videos(tmp_path / "v", tmp_path, "train", 16, frames=4, flip=True, crop=7)
    whole, labels = videos.batch(8, np.random.default_rng(0))
    read = []
    window = videos.window
    videos.window = lambda *args: read.append(args) or window(*args)
    share, all_labels = videos.batch(8, np.random.default_rng(0), slice(2, 5))
    assert (share == whole[2:5]).all()
    assert (all_labels == labels).all()
    assert len(read) == 3

def test_crops_are_squares_from_everywhere(tmp_path):
    """A square that moves from frame to frame, height and width exchanged, edges that are never
    reached, evaluation on squares."""
    write_pattern(tmp_path / "v" / "clip", 8, rows=10, columns=1)
    videos = data.Videos(tmp_path / "v", tmp_path, "train", 8, frames=4, crop=5)
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
    with pytest.raises(data.UserError, match="--crop 9 is larger"):
        data.Videos(tmp_path / "v", tmp_path, "train", 8, frames=4, crop=9)

# --------------------------------------------------------------------------------------------------
# bad input

def test_bad_files_are_counted_and_named_and_the_rest_is_used(tmp_path, clips, main):
    """A loader that ends at one bad file, or is silent about it."""
    folder = tmp_path / "mixed"
    shutil.copytree(clips, folder)
    for name in ("00.mp4", "02.gif"):
        content = (folder / "spin" / name).read_bytes()
        (folder / "spin" / f"cut_{name}").write_bytes(content[:len(content) // 2])
    (folder / "spin" / "text.mp4").write_text("not a video at all")
    (folder / "spin" / "notes.txt").write_text("")
    (folder / "nothing").mkdir()
    short, _ = data.toy_videos(1, 5, 16)
    data.save_grid(folder / "wave" / "short.gif", short, zoom=1)
    flags = ["--data", folder, "--size", 16, "--frames", 8, "--data_dir", "."]
    result = main(data, *flags)
    assert result.code == 0, result.err
    assert Path("runs/mixed/data.gif").exists()
    lines = [line for line in result.out.splitlines() if " train: " in line]
    for remark, names in {
            "skipped 2 unreadable": ["spin/cut_00.mp4", "spin/text.mp4"],
            "1 used up to its first damaged frame": [
                "spin/cut_02.gif (5 frames, then image file is truncated"],
            "skipped 2 too short": ["spin/cut_02.gif", "wave/short.gif (5 of 8 frames)"],
            "skipped 1 empty folder": ["nothing"],
            "skipped 1 not a video": ["spin/notes.txt"]}.items():
        line, = [line for line in lines if remark in line]
        assert all(name in line for name in names), line
    assert "train: 10 videos, 120 frames" in result.out
    assert "test: 2 videos, 24 frames" in result.out
    assert "2 classes" in result.out

@pytest.mark.parametrize("name, words", [
    ("sky", ["sky_train/<clip>/.../*.jpg", "--data sky --download"]),
    ("ucf101", ["UCF-101/<Class>/*.avi", "trainlist01.txt", "--data ucf101 --download"]),
    ("empty", ["folders of JPEG/PNG"]),
    ("bad", ["folders of JPEG/PNG"]),
    ("absent", ["neither one of toy, sky, ucf101 nor a folder"])])
def test_no_usable_video_is_an_error_that_shows_the_tree(tmp_path, main, name, words):
    """A stack trace, or training on nothing."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("not a video")
    result = main(data, "--data", name, "--size", 16)
    assert result.code == 1
    assert result.err.startswith("error: ")
    assert all(word in result.err for word in words), result.err

def test_a_failing_script_prints_one_line_and_exits_with_1(tmp_path):
    """The same of a real process."""
    (tmp_path / "empty").mkdir()
    result = script("data.py", "--data", "empty", cwd=tmp_path)
    assert result.code == 1
    assert result.err.startswith("error: no usable video")
    assert len(result.err.splitlines()) == 1

def write_ucf101(folder, video):
    """UCF-101 in small; its test list has no labels, and one class is spelt in two ways."""
    root, lists = folder / "UCF-101", folder / "ucfTrainTestlist"
    for name in ("Archery/v_Archery_g01_c01", "Archery/v_Archery_g02_c01",
                 "HandstandPushups/v_HandStandPushups_g01_c01", "Typing/v_Typing_g01_c01"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, root / f"{name}.avi")
    shutil.copy(video, folder / "outside.avi")
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\r\n2 HandStandPushups\r\n3 Typing\r\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    (lists / "trainlist01.txt").write_text(
        "Typing/v_Typing_g01_c01.avi 3\n"
        "HandstandPushups/v_HandStandPushups_g01_c01.avi 2\n"
        "Archery/v_Archery_g02_c01.avi 1\n"
        "Archery/v_Archery_g77_c01.avi 1\n"
        "Archery/../../outside.avi 1\n")

def test_ucf101_split_lists(tmp_path, clips, capsys):
    """A class that is not found because of a capital letter; lists that name absent files or files
    outside the set; labels that do not count from 0."""
    write_ucf101(tmp_path, clips / "spin" / "00.mp4")
    videos = data.Videos("ucf101", tmp_path, "train", 16, frames=8)
    assert videos.classes == ["Archery", "HandStandPushups", "Typing"]
    assert [(v.name, v.label) for v in videos.videos] == [
        ("Typing/v_Typing_g01_c01.avi", 2),
        ("HandstandPushups/v_HandStandPushups_g01_c01.avi", 1),
        ("Archery/v_Archery_g02_c01.avi", 0)]
    skipped, = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert "skipped 2 listed, but not there" in skipped
    assert "v_Archery_g77_c01.avi" in skipped
    assert "outside.avi" in skipped
    test, = data.Videos("ucf101", tmp_path, "test", 16, frames=8).videos
    assert (test.name, test.label, test.frames) == ("Archery/v_Archery_g01_c01.avi", 0, 12)
    (tmp_path / "ucfTrainTestlist" / "classInd.txt").write_text("<html>404 not found</html>")
    with pytest.raises(data.UserError, match="classInd.txt must hold lines of a number"):
        data.prepare("ucf101", tmp_path, "train", 16)

# --------------------------------------------------------------------------------------------------
# flags

@pytest.mark.parametrize("flags, words", [
    ("--sise 16", "--sise 16 (did you mean --size?)"), ("--siz 16", "--siz 16"),
    ("--size big", "invalid int value: 'big'"), ("--stride 0", "--stride: 0 is too small")])
def test_wrong_flags_end_in_one_line(main, flags, words):
    """A flag that is misspelt or abbreviated, of a wrong type, or out of range."""
    result = main(data, *flags.split())
    assert result.code == 1
    assert words in result.err

def test_a_flag_comes_before_the_preset_and_that_before_the_set(capsys):
    """A flag that loses to a preset, or a preset to what is true of the set."""
    presets = {"sky": dict(stride=2, size=64)}
    cfg = data.parse_flags(data.Config, presets, ["--data", "sky", "--size", "16"])
    assert cfg == data.Config(data="sky", data_dir="datasets", size=16, frames=16, stride=2)
    assert "--size 16   (instead of 64)" in capsys.readouterr().out
    assert data.ints("4x8,2") == (4, 8, 2)
