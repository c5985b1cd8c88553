"""scripts/download_images.py against a server on this machine that answers well, badly and not at all."""

import http.server
import io
import json
import threading

import pytest
from PIL import Image

from data import image_fetching
from data.errors import DataError
from engine.errors import RunError
from scripts import download_images


def picture(width=6, height=4):
    content = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(content, "JPEG")
    return content.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Answers by path; ``requests`` lists what was asked for, ``failures`` how often a path still fails."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.failures, self.lock = [], {}, threading.Lock()

    def url(self, path):
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.lstrip("/")
        with self.server.lock:
            self.server.requests.append(name)
            fails = self.server.failures.get(name, 0) > 0
            self.server.failures[name] = self.server.failures.get(name, 0) - 1
        if name.startswith("absent"):
            self.send_error(404)
        elif name.startswith("to_"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname" if "file" in name else "ftp://localhost/a.jpg")
            self.end_headers()
        elif name.startswith("moved"):
            self.send_response(302)
            self.send_header("Location", "/ok.jpg")
            self.end_headers()
        elif fails and name.startswith("busy"):
            self.send_error(503)
        else:
            content = b"<html>sorry</html>" if name.startswith("page") else picture()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-20] if fails and name.startswith("cut") else content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(image_fetching.time, "sleep", lambda seconds: None)


@pytest.fixture
def flags(tmp_path, server):
    """Writes the annotation file for these names; returns the flags."""

    def write(*names, **changes):
        images = [{"id": n, "file_name": name, "coco_url": server.url(name), **changes} for n, name in enumerate(names)]
        path = tmp_path / "nocaps.json"
        path.write_text(json.dumps({"images": images}))
        return ["--annotations", str(path), "--output", str(tmp_path / "val")]

    return write


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_images_are_fetched_once_and_a_second_call_asks_for_nothing(flags, server, tmp_path, capsys):
    argv = flags("a.jpg", "b.jpg", width=6, height=4)
    download_images.main(argv)
    assert left(tmp_path / "val") == ["a.jpg", "b.jpg"]
    assert (tmp_path / "val" / "a.jpg").read_bytes() == picture()
    download_images.main(argv)
    assert sorted(server.requests) == ["a.jpg", "b.jpg"]
    assert capsys.readouterr().out.splitlines() == [
        f"2 images fetched, 0 were there, 0 failed; in {tmp_path / 'val'}",
        f"0 images fetched, 2 were there, 0 failed; in {tmp_path / 'val'}",
    ]


def test_a_torn_file_of_an_earlier_call_is_fetched_again(flags, tmp_path):
    argv = flags("a.jpg")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.jpg").write_bytes(picture()[:-200])
    download_images.main(argv)
    assert (tmp_path / "val" / "a.jpg").read_bytes() == picture()


def test_a_server_that_is_busy_or_cuts_off_is_asked_again(flags, server, tmp_path):
    server.failures = {"busy.jpg": 2, "cut.jpg": 2}
    download_images.main(flags("busy.jpg", "cut.jpg"))
    assert left(tmp_path / "val") == ["busy.jpg", "cut.jpg"]
    assert server.requests.count("busy.jpg") == server.requests.count("cut.jpg") == 3


def test_redirections_on_the_web_are_followed(flags, tmp_path):
    download_images.main(flags("moved.jpg"))
    assert (tmp_path / "val" / "moved.jpg").read_bytes() == picture()


def test_what_cannot_be_had_is_listed_and_the_rest_is_kept(flags, server, tmp_path):
    server.failures = {"cut.jpg": 99}
    names = ["absent.jpg", "ok.jpg", "page.jpg", "to_file.jpg", "to_ftp.jpg", "cut.jpg"]
    with pytest.raises(
        RunError, match=r"^5 of 6 images could not be fetched, the first absent.jpg: HTTP 404 Not Found"
    ):
        download_images.main([*flags(*names), "--tries", "2"])
    folder = tmp_path / "val"
    assert left(folder) == ["download_failures.jsonl", "ok.jpg"]
    rows = [json.loads(line) for line in (folder / "download_failures.jsonl").read_text().splitlines()]
    reasons = {row["file_name"]: row["reason"] for row in rows}
    assert list(reasons) == [name for name in names if name != "ok.jpg"]
    assert "not an image" in reasons["page.jpg"]
    assert "Redirection to url 'file:///etc/hostname' is not allowed" in reasons["to_file.jpg"]
    assert reasons["to_ftp.jpg"] == "redirected to 'ftp://localhost/a.jpg', which is refused"
    assert reasons["cut.jpg"].startswith("cut off after")
    assert server.requests.count("absent.jpg") == 1
    assert server.requests.count("cut.jpg") == 2
    server.failures.clear()
    download_images.main(flags("ok.jpg", "cut.jpg"))
    assert left(folder) == ["cut.jpg", "ok.jpg"]


def test_an_image_of_another_size_than_the_file_says_is_not_kept(flags, tmp_path):
    with pytest.raises(RunError, match="it has 6 x 4 pixels, the annotation file says 60 x 40"):
        download_images.main(flags("a.jpg", width=60, height=40))
    assert left(tmp_path / "val") == ["download_failures.jsonl"]


def test_an_image_that_is_too_large_is_not_read_to_its_end(flags, monkeypatch):
    monkeypatch.setattr(image_fetching, "MAX_BYTES", 100)
    with pytest.raises(RunError, match="larger than 100 bytes"):
        download_images.main(flags("a.jpg"))


def test_a_disk_that_is_full_ends_with_one_line(flags, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match=r"could not write .*a.jpg \(the disk is full\): free some space"):
        download_images.main(flags("a.jpg"))


def test_only_as_many_as_wanted_are_fetched(flags, tmp_path):
    download_images.main([*flags("a.jpg", "b.jpg", "c.jpg"), "--limit", "2"])
    assert left(tmp_path / "val") == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_name": "../a.jpg"}, r"images\[0\]: file_name"),
        ({"file_name": "/etc/a.jpg"}, r"images\[0\]: file_name"),
        ({"coco_url": "file:///etc/passwd"}, "must begin with http:// or https://"),
        ({"coco_url": "ftp://host/a.jpg"}, "must begin with http:// or https://"),
        ({"coco_url": None}, r"images\[0\] has no address: needs one of coco_url"),
    ],
)
def test_names_that_lead_away_and_addresses_off_the_web_are_refused_before_anything_is_fetched(
    flags, server, tmp_path, changes, message
):
    with pytest.raises(DataError, match=message):
        download_images.main(flags("a.jpg", **changes))
    assert server.requests == []
    assert not (tmp_path / "val").exists()


def test_a_name_that_stands_twice_is_refused(flags):
    with pytest.raises(DataError, match=r"images\[1\]: the name a.jpg stands twice"):
        download_images.main(flags("a.jpg", "a.jpg"))
