"""scripts/written_files.py: which files a program takes for its own."""

from pathlib import Path

import pytest

from data.errors import DataError
from scripts.written_files import RECORD, refuse_others, written
from tests.helpers import run_in_processes


def _write_many(rank: int, folder: str) -> None:
    for number in range(200):
        path = Path(folder, f"{rank}-{number}")
        with written(path):
            path.write_text(f"of {rank}")


def test_programs_that_write_into_one_folder_lose_none_of_each_others_records(tmp_path):
    run_in_processes(_write_many, 2, str(tmp_path))
    paths = [path for path in tmp_path.iterdir() if path.name != RECORD]
    assert len(paths) == 400
    refuse_others(*paths, overwrite=False)
    paths[7].write_text("of somebody else")
    with pytest.raises(
        DataError, match=f"{paths[7].name} is there and was not written by this program, or was changed"
    ):
        refuse_others(*paths, overwrite=False)
    refuse_others(*paths, overwrite=True)


def test_a_record_that_was_cut_off_says_nothing_and_harms_no_other(tmp_path):
    first, second, absent = (tmp_path / name for name in ("first", "second", "absent"))
    with written(first):
        first.touch()
    record = tmp_path / RECORD
    record.write_bytes(record.read_bytes() + b'["a list"]\n{"cut')
    with written(second, None):
        second.touch()
    refuse_others(first, second, absent, None, overwrite=False)
    record.write_bytes(b"\xff")
    with pytest.raises(DataError, match="first is there"):
        refuse_others(second.with_name("absent"), first, overwrite=False)


def test_after_a_write_that_failed_only_what_is_there_is_known(tmp_path):
    whole, absent = tmp_path / "whole", tmp_path / "absent"

    def write_the_first():
        with written(whole, absent):
            whole.write_text("all of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_the_first()
    refuse_others(whole, absent, overwrite=False)
    absent.write_text("of somebody else")
    with pytest.raises(DataError, match="absent is there and was not written by this program"):
        refuse_others(absent, overwrite=False)


def test_a_full_disk_is_said_with_the_name_of_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr("scripts.written_files.os.write", lambda handle, line: len(line) - 1)
    with pytest.raises(OSError, match="No space left on device") as failed, written(tmp_path / "file"):
        pass
    assert failed.value.filename == str(tmp_path / RECORD)
