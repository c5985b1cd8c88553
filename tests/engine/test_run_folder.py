import shutil

import pytest

from engine.errors import EngineError
from engine.folder_lock import released_at_the_end
from engine.run_folder import prepare_run_folder
from tests.engine.test_checkpoint import save, small_backend
from tests.helpers import run_program


@pytest.fixture(autouse=True)
def _released():
    with released_at_the_end():
        yield


def content_of(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    (tmp_path / ".writing-checkpoint-3").mkdir()
    (tmp_path / ".writing-checkpoint-3" / "model.pth").write_bytes(b"half")
    (tmp_path / ".writing-latest").write_text("checkpoint-3")
    with released_at_the_end():
        assert prepare_run_folder(tmp_path, resume="", auto_resume=True, training=True) is None
    assert list(tmp_path.iterdir()) == []


def test_no_auto_resume_does_not_mix_a_new_run_into_an_old_one(tmp_path):
    save(small_backend(), tmp_path)
    with pytest.raises(EngineError, match="choose another --output_dir"):
        prepare_run_folder(tmp_path, resume="", auto_resume=False, training=True)


def test_resume_latest_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(EngineError, match="no sound checkpoint"):
        prepare_run_folder(tmp_path, resume="latest", auto_resume=True, training=True)


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EngineError, match="cannot be written"):
        prepare_run_folder(tmp_path / "file" / "run", resume="", auto_resume=True, training=True)


def test_no_auto_resume_counts_the_best_checkpoint_too(tmp_path):
    save(small_backend(), tmp_path, "checkpoint-best")
    with pytest.raises(EngineError, match="holds checkpoint-best of another run"):
        prepare_run_folder(tmp_path, resume="", auto_resume=False, training=True)


def test_a_torn_checkpoint_given_by_resume_is_refused(tmp_path):
    folder = save(small_backend(), tmp_path)
    (folder / "training_state.pth").write_bytes(b"half")
    with pytest.raises(
        EngineError, match="cannot resume from .*checkpoint-0: training_state.pth has 4 bytes instead of"
    ):
        prepare_run_folder(tmp_path / "other", resume=str(folder), auto_resume=True, training=True)


@pytest.mark.parametrize("flags", [("", True), ("latest", True), ("", False)])
def test_a_folder_with_damaged_checkpoints_only_is_refused_and_stays_as_it_is(tmp_path, flags):
    first, second = save(small_backend(), tmp_path), save(small_backend(), tmp_path, "checkpoint-best")
    (first / "config.json").write_text("[]")
    (second / "manifest.json").unlink()
    (tmp_path / ".writing-checkpoint-1").mkdir()
    (tmp_path / "config.json").write_text("{}")
    before = content_of(tmp_path)
    with pytest.raises(EngineError) as refused:
        prepare_run_folder(tmp_path, resume=flags[0], auto_resume=flags[1], training=True)
    assert str(refused.value) == (
        f"{tmp_path} holds no sound checkpoint to go on from, only damaged ones or another program's "
        f"({second}: it has no manifest.json; {first}: config.json does not have its recorded checksum): move them "
        "away to start anew, or choose another --output_dir"
    )
    assert content_of(tmp_path) == before


def test_an_older_sound_checkpoint_is_gone_on_from_with_a_warning(tmp_path, capsys):
    older, newer = save(small_backend(), tmp_path), save(small_backend(), tmp_path, "checkpoint-1", 2)
    (newer / "config.json").write_text("[]")
    assert prepare_run_folder(tmp_path, resume="", auto_resume=True, training=True) == older
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: passed over a damaged checkpoint, {newer}: config.json does not have its recorded checksum"
    )


def test_a_checkpoint_that_was_set_aside_counts_as_sound(tmp_path):
    folder = save(small_backend(), tmp_path, "checkpoint-best")
    folder.rename(tmp_path / ".writing-old-checkpoint-best")
    (save(small_backend(), tmp_path) / "model.pth").unlink()
    assert prepare_run_folder(tmp_path, resume="", auto_resume=True, training=True) == folder


PREPARES = """
import sys
from pathlib import Path
from engine.run_folder import prepare_run_folder
prepare_run_folder(Path(sys.argv[1]), resume="", auto_resume=True, training=sys.argv[2] == "train")
"""


def test_a_folder_is_one_training_run_s_until_it_ends_but_an_evaluation_may_use_it(tmp_path):
    def started(what):
        return run_program("-c", PREPARES, str(tmp_path), what).stderr

    with released_at_the_end():
        prepare_run_folder(tmp_path, resume="", auto_resume=True, training=True)
        (tmp_path / ".writing-checkpoint-0").mkdir()  # which the first is about to write
        assert f"writes into {tmp_path}: wait for it" in started("train")
        assert (tmp_path / ".writing-checkpoint-0").is_dir()
        assert started("evaluate") == ""
        shutil.rmtree(tmp_path / ".writing-checkpoint-0")
    assert started("train") == ""
