"""Downloads from a server on this machine, of miniature archives; the real ones are not tested."""
import hashlib
import http.server
import io
import re
import threading
import zipfile

import pytest

import data

SKY = {"sky_timelapse/sky_train/a/a_1/a_frames_1.jpg": b"frame",
       "sky_timelapse/sky_test/b/b_1/b_frames_1.jpg": b"other", "readme.txt": b"not of the set"}
VIDEOS = {"UCF101/v_Bend_g01_c01.avi": b"video" * 1000,
          "UCF101/v_HandStandPushups_g01_c02.avi": b"x"}
LISTS = {"ucfTrainTestlist/classInd.txt": b"1 Bend\n2 HandstandPushups\n",
         "ucfTrainTestlist/trainlist01.txt": b"Bend/v_Bend_g01_c01.avi 1\n"
                                             b"HandstandPushups/v_HandStandPushups_g01_c02.avi 2\n"}

def archive(members):
    """The bytes of a zip file"""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()

class Server:
    """Serves {path: bytes}, with ranges; a connection breaks after `limit` bytes, if there is one."""
    def __init__(self, files):
        self.files, self.limit, self.ranges = files, None, []
        outer = self
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = outer.files[self.path]
                start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
                outer.ranges.append(start)
                self.send_response(206)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                end = None if outer.limit is None else start + outer.limit
                self.wfile.write(content[start:end])
            def log_message(self, *args):
                pass
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, path):
        return f"http://127.0.0.1:{self.http.server_port}{path}"

@pytest.fixture
def server(monkeypatch):
    """Both sets, served from here."""
    server = Server({"/sky.zip": archive(SKY), "/v.zip": archive(VIDEOS), "/l.zip": archive(LISTS)})
    def entry(path):
        return server.url(path), hashlib.sha256(server.files[path]).hexdigest()
    monkeypatch.setattr(data, "DOWNLOADS", {"sky": [(server.url("/sky.zip"), "")],
                                            "ucf101": [entry("/l.zip"), entry("/v.zip")]})
    yield server
    server.http.shutdown()

def test_a_set_comes_to_lie_where_it_is_looked_for(server, tmp_path):
    """Videos unpacked flat, or where no script looks; other files of the archive among the data."""
    data.download("sky", tmp_path)
    data.download("ucf101", tmp_path)
    sources = data.list_sources("ucf101", tmp_path, "train").sources
    assert [s.class_name for s in sources] == ["Bend", "HandstandPushups"]
    assert len(data.list_sources("sky", tmp_path, "test").sources) == 1
    assert not list(tmp_path.rglob("readme.txt"))

def test_an_interrupted_download_goes_on(server, tmp_path):
    """Gigabytes that begin anew; half an archive that is taken for a whole one."""
    server.limit = 3000
    with pytest.raises(data.UserError, match="same command goes on"):
        data.download("ucf101", tmp_path)                          # the lists come first
    server.limit = None
    data.download("ucf101", tmp_path)
    assert server.ranges[-1] == 2999
    assert (tmp_path / "UCF-101/Bend/v_Bend_g01_c01.avi").read_bytes() == b"video" * 1000

def test_another_file_than_published_is_refused(server, tmp_path, monkeypatch):
    """A changed or damaged archive that is unpacked all the same."""
    monkeypatch.setattr(data, "DOWNLOADS", {"sky": [(server.url("/sky.zip"), "0" * 64)]})
    with pytest.raises(data.UserError, match="sha256"):
        data.download("sky", tmp_path)
    assert not list(tmp_path.iterdir())

def test_a_damaged_archive_is_said(server, tmp_path):
    """A stack trace of zipfile; a video with wrong bytes."""
    content = server.files["/sky.zip"]
    server.files["/sky.zip"] = content.replace(b"frame", b"fbame", 2)
    with pytest.raises(data.UserError, match="damaged .*delete it"):
        data.download("sky", tmp_path)

@pytest.mark.parametrize("name", ["../evil/sky_train/a.jpg", "/sky_train/a.jpg"])
def test_nothing_is_unpacked_outside_the_folder(server, tmp_path, name):
    """A member of an archive that overwrites a file somewhere else."""
    server.files["/sky.zip"] = archive({name: b"x"})
    with pytest.raises(data.UserError, match="points outside"):
        data.download("sky", tmp_path / "datasets")
    assert not list(tmp_path.rglob("a.jpg"))

def test_too_little_disk_and_no_server_are_said(server, tmp_path, monkeypatch):
    """A disk that fills up after an hour; a stack trace of urllib."""
    usage = data.shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(data.UserError, match="not enough disk"):
            data.download("sky", tmp_path)
    monkeypatch.setattr(data, "DOWNLOADS", {"sky": [("http://127.0.0.1:9/sky.zip", "")]})
    with pytest.raises(data.UserError, match="cannot fetch"):
        data.download("sky", tmp_path)
    with pytest.raises(data.UserError, match="sky and ucf101|--download is for"):
        data.download("toy", tmp_path)
