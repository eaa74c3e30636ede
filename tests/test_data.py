"""Sets, decoding, cache, windows: each test names the bug that it would catch."""
import shutil
from pathlib import Path
import imageio.v3 as iio
import numpy as np
import pytest
import torch
import data
from conftest import ROOT, script

def grey_video(folder, values, size=16, name="frame_{}.png"):
    """A frame folder whose frame i is grey with values[i]; PNG, so that the cache holds these very values."""
    folder.mkdir(parents=True)
    for i, value in enumerate(values):
        iio.imwrite(folder / name.format(i), np.full((size, size, 3), value, np.uint8))

# ---- the toy set ----

def test_toy_labels_name_the_motion_and_the_shape():
    """A label off by one, x and y exchanged, a direction reversed."""
    size, frames = 64, 6
    videos, labels = data.toy_videos(48, frames, size, seed=3)
    again, _ = data.toy_videos(48, frames, size, seed=3)
    assert (videos == again).all() and (videos != data.toy_videos(48, frames, size, seed=4)[0]).any()
    assert (np.bincount(labels) == 4).all() and len(data.TOY_CLASSES) == 12
    bright = videos.max(-1) > 185                                          # the ground is darker than 115, the shape's colour 255
    turn = np.exp(2j * np.pi * np.arange(size) / size)                     # the centroid on a torus is a mean of angles
    centre = [np.angle((bright.sum(axis) * turn).sum(-1)) * size / (2 * np.pi) for axis in (2, 3)]   # x, y: (N, T)
    for i, label in enumerate(labels):
        shape, motion = data.TOY_CLASSES[label].split("-")
        x, y = ((np.diff(c[i]) + size / 2) % size - size / 2 for c in centre)
        along = dict(right=x, left=-x, down=y, up=-y)[motion]
        across = y if motion in ("right", "left") else x
        assert (along > 1).all() and (along < 4).all() and (abs(across) < 0.5).all()
        middle = np.roll(bright[i, 0], (size // 2 - round(centre[1][i, 0]), size // 2 - round(centre[0][i, 0])), (0, 1))
        rows, columns = np.flatnonzero(middle.any(1)), np.flatnonzero(middle.any(0))
        box = middle[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        aspect = len(box) / len(box[0])
        assert shape == ("column" if aspect > 1.8 else "bar" if aspect < 1 / 1.8 else "circle"), (shape, aspect)
        assert (0.9 < aspect < 1.1 or shape != "circle") and 0.7 < box.mean() < 0.97, (shape, aspect, box.mean())

# ---- ranges and pictures ----

def test_every_grey_level_survives_float_and_back():
    """Truncation instead of rounding, a factor 127 or 128, [0, 1] where [-1, 1] is meant, exchanged axes."""
    videos = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 7, 3), dtype=np.uint8)
    videos.flat[:256] = np.arange(256)
    x = data.to_float(videos)
    assert x.shape == (2, 3, 3, 5, 7) and x.min() == -1 and x.max() == 1
    assert (data.to_uint8(x) == videos).all()
    assert (data.to_uint8(torch.tensor([-3.0, 0, 3]).expand(1, 1, 1, 1, 3).movedim(-1, 1)) == [0, 128, 255]).all()   # clipped

def test_resize_keeps_the_aspect():
    """A wide frame squeezed into a square: circles become ellipses. And a crop from a corner instead of the centre."""
    y, x = np.mgrid[:120, :200]
    wide = np.where(np.hypot(x - 99.5, y - 59.5) < 40, 255, 0).astype(np.uint8)[..., None].repeat(3, -1)
    for frame in (wide, wide.transpose(1, 0, 2)):
        out = data.resize_crop(frame, 48)[..., 0] > 127
        rows, columns = np.flatnonzero(out.any(1)), np.flatnonzero(out.any(0))
        assert out.shape == (48, 48) and len(rows) == len(columns) and abs(len(rows) - 32) <= 1
        assert rows[0] + rows[-1] == columns[0] + columns[-1] == 47

# ---- decoding and the cache ----

def test_frame_10_comes_after_frame_9(tmp_path):
    """Frames sorted as text: 0, 1, 10, 11, 2 ..."""
    grey_video(tmp_path / "v", range(0, 240, 20), name="clip7_frame_{}.png")
    assert (data.read_video(tmp_path / "v", 16)[:, 0, 0, 0] == np.arange(0, 240, 20)).all()

def test_an_interrupted_preparation_goes_on_to_the_same_cache(tmp_path, clips, monkeypatch):
    """A resumed cache that repeats, loses or misplaces frames; processes that deliver in another order than one does."""
    whole = data.prepare(clips, tmp_path / "a", "train", 16, workers=0)
    stop, decode, calls = 5, data.decode, []
    def interrupted(job):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(job)
        return decode(job)
    with monkeypatch.context() as m:
        m.setattr(data, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(clips, tmp_path / "b", "train", 16, workers=0)
    cache = tmp_path / "b" / "cache"
    journal, frames = next(cache.glob("*.journal")), next(cache.glob("*.u8"))
    assert not list(cache.glob("*.json")) and not list(cache.glob("*.part"))
    saved, total = journal.read_text(), len(data.load_index(whole)["videos"])
    with frames.open("ab") as f:
        f.write(bytes(1000))                                               # the power failed in the middle of a frame
    short = frames.read_bytes()[:999]                                      # a journal that promises more than there is; a damaged one
    for text, content, workers, again in ((saved, frames.read_bytes(), 0, total - stop), (saved, short, 0, total), (saved[:-9], short, 0, total),
                                          (saved, frames.read_bytes(), 2, None)):
        journal.write_text(text)
        frames.write_bytes(content)
        calls.clear()
        with monkeypatch.context() as m:
            if again:
                m.setattr(data, "decode", lambda job: calls.append(job) or decode(job))
            resumed = data.prepare(clips, tmp_path / "b", "train", 16, workers=workers)
        assert again is None or len(calls) == again
        assert resumed.read_bytes() == whole.read_bytes() and not journal.exists()
        assert resumed.with_suffix(".u8").read_bytes() == whole.with_suffix(".u8").read_bytes()
        resumed.unlink()

def test_a_cache_that_does_not_fit_is_made_again(tmp_path, clips):
    """A stale or damaged cache used in silence."""
    folder = shutil.copytree(clips, tmp_path / "clips")
    path = data.prepare(folder, tmp_path, "train", 16)
    before, stamp = path.with_suffix(".u8").read_bytes(), path.stat().st_mtime_ns
    assert data.prepare(folder, tmp_path, "train", 16).stat().st_mtime_ns == stamp             # nothing changed, nothing done
    path.with_suffix(".u8").write_bytes(before[:-1])
    data.prepare(folder, tmp_path, "train", 16)
    assert path.with_suffix(".u8").read_bytes() == before
    path.write_text(path.read_text()[:-9])
    assert data.load_index(data.prepare(folder, tmp_path, "train", 16))
    shutil.copy(folder / "spin" / "02.gif", folder / "wave" / "99.gif")
    assert [v[3] for v in data.load_index(data.prepare(folder, tmp_path, "train", 16))["videos"]][-1] == "wave/99.gif"

def test_preparation_leaves_the_number_of_threads_alone(tmp_path, clips):
    """One thread, meant for the decoding processes, stays for the training that follows: slow, and not the resumed run."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data.prepare(clips, tmp_path, "train", 16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

def test_too_little_disk_is_said_before_writing(tmp_path, clips, monkeypatch):
    """A disk that fills after hours of decoding."""
    monkeypatch.setattr(data.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 100, 0))
    for name in (clips, "toy"):
        with pytest.raises(data.UserError, match="not enough disk .* GB needed, 0.00 GB free"):
            data.prepare(name, tmp_path, "train", 16)
    assert not list(tmp_path.rglob("*.u8"))

@pytest.mark.parametrize("name, frames", [("g23_c01", 240), ("g24_c01", 251)])
def test_genuine_ucf101_files_decode_in_full(name, frames):
    """Frames lost or doubled by the decoder; the counts are ffprobe's."""
    path = ROOT.parent / "shared" / "data" / "ucf101_clips" / "SoccerJuggling" / f"v_SoccerJuggling_{name}.avi"
    if not path.exists():
        pytest.skip(f"no {path.name} here: put it at {path}")
    video = data.read_video(path, 32)
    assert video.shape == (frames, 32, 32, 3) and video.std() > 20

# ---- windows ----

def test_windows_are_consecutive_at_the_stride(tmp_path):
    """A stride that is ignored, a window over the end into the next video, the last window never drawn."""
    for i in range(3):
        grey_video(tmp_path / "v" / f"clip{i}", np.arange(12) + 100 * i)
    videos = data.Videos(tmp_path / "v", tmp_path, "train", 16, frames=4, stride=3)
    assert len(videos) == 2 and videos.classes is None                     # the third is held out
    clips, labels = videos.batch(200, np.random.default_rng(0))
    first = clips[:, :, 0, 0, 0].int()                                     # (N, T)
    assert (first.diff(dim=1) == 3).all() and set(first[:, 0].tolist()) == {0, 1, 2, 100, 101, 102} and (labels == -1).all()
    held = data.Videos(tmp_path / "v", tmp_path, "test", 16, frames=4, stride=3).fixed(6)[0]
    assert set(held[:, 0, 0, 0, 0].tolist()) >= {200, 202} and (held >= 200).all()

def test_flip_mirrors_whole_clips_and_never_a_direction(tmp_path):
    """A flip in height or time, of single frames or of all clips; right becoming left in the toy."""
    folder = tmp_path / "v" / "clip"
    folder.mkdir(parents=True)
    for t in range(4):
        frame = np.arange(16)[None, :] * 4 + np.arange(16)[:, None] + 100 * (t % 2)      # brighter to the right and below
        iio.imwrite(folder / f"{t}.png", frame.astype(np.uint8)[..., None].repeat(3, -1))
    videos = data.Videos(tmp_path / "v", tmp_path, "train", 16, frames=4, flip=True)
    plain, clips = videos.window(0)[0], videos.batch(40, np.random.default_rng(0))[0].numpy()
    mirrored = [(c == plain[:, :, ::-1]).all() for c in clips]
    assert 5 < sum(mirrored) < 35 and all(m or (c == plain).all() for m, c in zip(mirrored, clips))
    assert (videos.fixed(1)[0][0].numpy() == plain).all()
    with pytest.raises(data.UserError, match="--flip would turn right into left"):
        data.Videos("toy", tmp_path, "train", 16, 8, flip=True)

def test_crops_are_squares_from_everywhere(tmp_path):
    """A square that jumps from frame to frame, height and width exchanged, edges that are never reached, evaluation on squares."""
    folder = tmp_path / "v" / "clip"
    folder.mkdir(parents=True)
    for t in range(4):
        iio.imwrite(folder / f"{t}.png", (np.arange(8)[None, :] + 10 * np.arange(8)[:, None] + 100 * (t % 2)).astype(np.uint8)[..., None].repeat(3, -1))
    videos = data.Videos(tmp_path / "v", tmp_path, "train", 8, frames=4, crop=5)
    whole, clips = videos.window(0)[0], videos.batch(200, np.random.default_rng(0))[0].numpy()
    places = [divmod(int(c[0, 0, 0, 0]), 10) for c in clips]                            # (y, x) of the corner
    assert all((c == whole[:, y:y + 5, x:x + 5]).all() for c, (y, x) in zip(clips, places)) and len(set(places)) == 16
    assert videos.fixed(1)[0].shape == (1, 4, 8, 8, 3)
    with pytest.raises(data.UserError, match="--crop 9 is larger"):
        data.Videos(tmp_path / "v", tmp_path, "train", 8, frames=4, crop=9)

# ---- bad input ----

def test_bad_files_are_counted_and_named_and_the_rest_is_used(tmp_path, clips, main):
    """A loader that dies of one bad file, or swallows it."""
    folder = tmp_path / "mixed"
    shutil.copytree(clips, folder)
    for suffix in ("gif", "mp4"):
        good = next(p for p in sorted(clips.rglob(f"*.{suffix}"))).read_bytes()
        (folder / "spin" / f"a_cut.{suffix}").write_bytes(good[:len(good) // 2])
    (folder / "spin" / "a_text.mp4").write_text("not a video at all")
    (folder / "spin" / "notes.txt").write_text("")
    (folder / "nothing").mkdir()
    data.save_grid(folder / "wave" / "short.gif", data.toy_videos(1, 5, 16)[0], zoom=1)
    result = main(data, "--data", folder, "--size", 16, "--frames", 8, "--data_dir", ".")
    assert result.code == 0 and Path("runs/mixed/data.gif").exists(), result.err
    skipped = [line for line in result.out.splitlines() if "skipped" in line and " train" in line]
    line = lambda reason: next(l for l in skipped if reason in l)
    assert "skipped 3 unreadable" in line("unreadable") and all(n in line("unreadable") for n in ("a_cut.gif", "a_cut.mp4", "a_text.mp4"))
    assert "skipped 1 too short" in line("too short") and "wave/short.gif" in line("too short") and "5 of 8" in line("too short")
    assert "skipped 1 empty folder" in line("empty folder") and "nothing" in line("empty folder")
    assert "skipped 1 not a video" in line("not a video") and "notes.txt" in line("not a video")
    assert "train: 11 videos" in result.out and "2 classes" in result.out

@pytest.mark.parametrize("name, words", [("sky", "sky_train/<clip>/.../*.jpg maxin-cn/SkyTimelapse"), ("empty", "folders of JPEG/PNG"),
                                         ("ucf101", "UCF-101/<Class>/*.avi trainlist01.txt https://www.crcv.ucf.edu 6,960,400,115"),
                                         ("bad", "folders of JPEG/PNG"), ("absent", "neither one of toy, sky, ucf101 nor a folder")])
def test_no_usable_video_is_an_error_that_shows_the_tree(tmp_path, main, name, words):
    """A traceback, or training on nothing."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp4").write_text("not a video")
    result = main(data, "--data", name, "--size", 16)
    assert result.code == 1 and result.err.startswith("error: ") and all(w in result.err for w in words.split(" ")), result.err

def test_a_failing_script_prints_one_line_and_exits_with_1(tmp_path):
    """The same, of a real process."""
    (tmp_path / "empty").mkdir()
    result = script("data.py", "--data", "empty", cwd=tmp_path)
    assert result.code == 1 and result.err.startswith("error: no usable video") and len(result.err.splitlines()) == 1

def test_ucf101_split_lists(tmp_path, clips, capsys):
    """The folder HandstandPushups whose files are called HandStandPushups; lists that name absent or outside files; labels from 0."""
    root, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    video = next(clips.rglob("*.mp4"))
    for path in ("Archery/v_Archery_g01_c01", "Archery/v_Archery_g02_c01", "HandstandPushups/v_HandStandPushups_g01_c01", "Typing/v_Typing_g01_c01"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, root / f"{path}.avi")
    shutil.copy(video, tmp_path / "outside.avi")
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 Archery\r\n2 HandStandPushups\r\n3 Typing\r\n")
    (lists / "trainlist01.txt").write_text("Typing/v_Typing_g01_c01.avi 3\nHandstandPushups/v_HandStandPushups_g01_c01.avi 2\nArchery/v_Archery_g02_c01.avi 1\n"
                                           "Archery/v_Archery_g77_c01.avi 1\nArchery/../../outside.avi 1\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c01.avi\n")
    index = data.load_index(data.prepare("ucf101", tmp_path, "train", 16))
    assert index["classes"] == ["Archery", "HandStandPushups", "Typing"]
    assert {Path(s).parts[0]: label for _, _, label, s in index["videos"]} == dict(Typing=2, HandstandPushups=1, Archery=0)
    assert len(index["videos"]) == 3 and "g02" in str(index["videos"])
    out = capsys.readouterr().out
    assert "skipped 2 listed, but not there" in out and "v_Archery_g77_c01.avi" in out and "outside.avi" in out
    (held, n, label, source), = data.load_index(data.prepare("ucf101", tmp_path, "test", 16))["videos"]
    assert (n, label, source) == (12, 0, "Archery/v_Archery_g01_c01.avi")
    (lists / "classInd.txt").write_text("<html>404</html>")
    with pytest.raises(data.UserError, match="classInd.txt is not a list"):
        data.prepare("ucf101", tmp_path, "train", 16)

def test_flags(tmp_path, main, capsys):
    """A flag that is misspelt, of a wrong type, or that loses to a preset."""
    result = main(data, "--sise", 16)
    assert result.code == 1 and "--sise" in result.err and "did you mean --size?" in result.err
    assert "invalid int value: 'big'" in main(data, "--size", "big").err
    assert main(data, "--siz", 16).code == 1                               # no abbreviations
    assert "stride" in main(data, "--stride", 0).err
    cfg = data.parse(data.Config, {"sky": dict(stride=2, size=64)}, ["--data", "sky", "--size", "16"])
    assert (cfg.size, cfg.stride, cfg.frames, cfg.data_dir) == (16, 2, 16, "datasets")          # flag, preset, set, default
    assert "--size 16   (instead of 64)" in capsys.readouterr().out
    assert data.ints("4x8,2") == (4, 8, 2)
