import errno
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.errors import EngineError, RunError
from engine.whole_files import require_writable, write_text, write_weights, write_whole
from engine.write_failures import could_not_write


@pytest.fixture
def umask():
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_a_file_has_the_mode_of_new_files_whatever_wrote_it(tmp_path, umask, mask, mode):
    umask(mask)
    writers = {
        "model.safetensors": lambda at: save_file({"a": torch.ones(2)}, at),
        "model.pth": lambda at: torch.save({"a": torch.ones(2)}, at),
        "latest": lambda at: at.write_text("checkpoint-1\n"),
    }
    for name, write in writers.items():
        write_whole(tmp_path / name, write)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(writers, mode)


def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "run.json", "old")

    def fail(at):
        at.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "run.json", fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_what_a_kill_left_under_the_other_name_is_no_part_of_the_next_file(tmp_path):
    (tmp_path / ".writing-log.txt").write_text("much longer than the text to come")
    write_text(tmp_path / "log.txt", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"log.txt": "new"}


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_weights_are_written_by_the_ending_of_the_name(tmp_path, name):
    long = torch.arange(1000.0)
    write_weights({"piece": long[:2], "same": long[:2], "turned": torch.ones(2, 3).T}, tmp_path / name)
    read = load_file if name.endswith("s") else lambda path: torch.load(path, weights_only=True)
    assert {key: value.tolist() for key, value in read(tmp_path / name).items()} == {
        "piece": [0.0, 1.0],
        "same": [0.0, 1.0],
        "turned": [[1.0, 1.0]] * 3,
    }
    assert (tmp_path / name).stat().st_size < 3000


def test_a_place_that_cannot_be_written_is_refused_before_the_work_and_a_good_one_left_empty(tmp_path):
    require_writable(tmp_path / "new" / "folder" / "model.pth")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"file/model.pth cannot be written \(.+\): choose another place"):
        require_writable(tmp_path / "file" / "model.pth")


Room = namedtuple("Room", "f_bavail f_frsize")
FULL, ROOMY = Room(1, 4096), Room(1 << 30, 4096)


@pytest.mark.parametrize(
    ("error", "room", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ROOMY, "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), ROOMY, "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), FULL, "the disk is full"),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore"),
            ROOMY,
            "PytorchStreamWriter failed writing file data/0: file write failed",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ROOMY, "the disk quota is used up"),
        (PermissionError(errno.EACCES, "Permission denied"), FULL, "Permission denied"),
        (RuntimeError("something else"), FULL, "something else"),
        (RuntimeError(), FULL, "RuntimeError"),
    ],
)
def test_a_full_disk_has_the_same_words_whoever_noticed(tmp_path, monkeypatch, error, room, why):
    asked = []
    monkeypatch.setattr("os.statvfs", lambda folder: asked.append(folder) or room)
    path = tmp_path / "not made" / "model.pth"
    assert could_not_write(path, error) == f"could not write {path} ({why})"
    assert set(asked) <= {tmp_path}


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_bug_is_not_taken_for_a_full_disk(tmp_path, monkeypatch, name):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("torch.save", fail)
    monkeypatch.setattr("engine.whole_files.save_file", fail)
    with pytest.raises(KeyError, match="a bug"):
        write_weights({"a": torch.ones(1)}, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, where one may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_disk_is_refused_before_the_work(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(EngineError, match=r"model.pth cannot be written \(Read-only file system\): choose another"):
        require_writable(small_disk / "model.pth")


def test_a_full_disk_is_refused_before_the_work(small_disk):
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "full").write_bytes(bytes(1 << 21))
    with pytest.raises(EngineError, match=r"model.pth cannot be written \(the disk is full\): choose another place"):
        require_writable(small_disk / "model.pth")


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_on_a_disk_that_is_really_full_both_formats_say_so(small_disk, name):
    with pytest.raises(RunError, match=rf"could not write \S+{name} \(the disk is full\): free some space"):
        write_weights({"a": torch.ones(1 << 20)}, Path(small_disk) / name)
    assert list(small_disk.iterdir()) == []
