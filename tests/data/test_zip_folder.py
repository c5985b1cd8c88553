"""Zip archives: read by name, never unpacked, each process with its own place in the file."""

import multiprocessing
import zipfile
from pathlib import Path

import pytest

from data import zip_folder
from data.errors import DataError
from data.zip_folder import ZipFolder
from tests.helpers import sent_to_a_process


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "boxes.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for number in range(40):
            file.writestr(f"boxes/{number}.json", str(number) * 3000)
        file.writestr("other/7.json", "elsewhere")
        file.writestr("../escape.json", "outside")
        file.writestr("/absolute.json", "outside")
    return path


def test_files_of_the_folder_are_read_by_name(archive):
    folder = ZipFolder(archive)
    assert sorted(folder.names()) == sorted(f"{number}.json" for number in range(40))
    assert folder.read("7.json") == b"7" * 3000
    assert sent_to_a_process(folder).read("8.json") == b"8" * 3000


@pytest.mark.parametrize("name", ["../escape.json", "/absolute.json", "../other/7.json", "nowhere.json"])
def test_what_is_not_in_the_folder_does_not_exist(archive, name, tmp_path):
    with pytest.raises(DataError, match="has no"):
        ZipFolder(archive).read(name)
    assert [path.name for path in tmp_path.iterdir()] == ["boxes.zip"]


def _read_all(folder: ZipFolder, connection) -> None:
    connection.send([folder.read(f"{number}.json") == (str(number) * 3000).encode() for number in range(40)] * 5)


def test_forked_processes_do_not_disturb_each_other(archive):
    folder = ZipFolder(archive)
    context = multiprocessing.get_context("fork")
    ends = []
    for _ in range(3):
        here, there = context.Pipe()
        context.Process(target=_read_all, args=(folder, there), daemon=True).start()
        ends.append(here)
    assert all(all(end.recv()) for end in ends)


def test_a_symbolic_link_in_the_archive_is_only_a_file_with_a_path_in_it(tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text("secret")
    path = tmp_path / "boxes.zip"
    link = zipfile.ZipInfo("boxes/1.json")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(link, str(secret))
    assert ZipFolder(path).read("1.json") == str(secret).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no archive at"),
        (b"", "is no sound zip archive"),
        (b"PK\x03\x04 but then nothing", "is no sound zip archive"),
    ],
)
def test_broken_archives_are_named(tmp_path, content, message):
    path = tmp_path / "boxes.zip"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        ZipFolder(path)


def test_a_damaged_member_is_named(archive):
    content = bytearray(archive.read_bytes())
    place = content.index(b"boxes/7.json") + len("boxes/7.json")
    content[place : place + 8] = b"\xff" * 8
    archive.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"boxes.zip: 7.json cannot be read"):
        ZipFolder(archive).read("7.json")


def test_an_archive_without_its_folder_and_a_file_that_is_too_large_are_refused(tmp_path, archive, monkeypatch):
    flat = tmp_path / "flat.zip"
    with zipfile.ZipFile(flat, "w") as file:
        file.writestr("7.json", "x")
    with pytest.raises(DataError, match="has no files in a folder flat/"):
        ZipFolder(flat)
    monkeypatch.setattr(zip_folder, "MAX_FILE_BYTES", 100)
    with pytest.raises(DataError, match="has 3000 bytes, more than a file here may have"):
        ZipFolder(archive).read("7.json")


def test_paths_of_the_archive_are_kept(archive):
    assert ZipFolder(str(archive)).path == Path(archive)
