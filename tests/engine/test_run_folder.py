import pytest

from engine.errors import EngineError
from engine.run_folder import prepare_run_folder
from tests.engine.test_checkpoint import save, small_backend


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    (tmp_path / ".writing-checkpoint-3").mkdir()
    (tmp_path / ".writing-checkpoint-3" / "model.pth").write_bytes(b"half")
    (tmp_path / ".writing-latest").write_text("checkpoint-3")
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
