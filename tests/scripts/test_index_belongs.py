"""An index belongs to one answer list and one tokenizer, a checkpoint to one model: a mix is refused, never scored."""

import shutil

import pytest

from data.errors import DataError
from scripts import make_index, train_sentencepiece
from tests.scripts.vqa_run import LARGER, drawn_data, eval_flags, failure, program, train_flags, trained_checkpoint


@pytest.fixture
def data(tmp_path):
    """A copy of the drawn data that a test may change."""
    return shutil.copytree(drawn_data(), tmp_path / "data")


def rebuild(data, *more):
    make_index.main(["vqav2", "--data_path", str(data), "--num_rest_val_images", "12", *more])


def test_labels_of_another_answer_list_are_not_scored(tmp_path, capsys, data):
    rebuild(data, "--min_answer_count", "30")
    argv = eval_flags(trained_checkpoint(), tmp_path / "out", "--eval_split", "val", data=data)
    code, line = failure(capsys, argv)
    assert code == 2
    assert "another answer list" in line
    assert not (tmp_path / "out" / "submit_vqav2_val.json").exists()


def test_questions_without_labels_are_answered_whatever_list_the_index_has(tmp_path, data):
    rebuild(data, "--min_answer_count", "30")
    program(*eval_flags(trained_checkpoint(), tmp_path / "out", "--eval_split", "test", data=data))
    assert (tmp_path / "out" / "submit_vqav2_test.json").exists()


@pytest.fixture
def data_of_another_tokenizer(data):
    """Index made with a smaller sentencepiece model, after which the first one is put back."""
    first = (data / "beit3.spm").read_bytes()
    (data / "beit3.spm").unlink()
    questions = sorted(map(str, (data / "vqa").glob("*_questions.json")))
    train_sentencepiece.main(["--input", *questions, "--output", str(data / "beit3.spm"), "--vocab_size", "45"])
    rebuild(data, "--min_answer_count", "5")
    (data / "beit3.spm").write_bytes(first)
    return data


def test_an_index_of_another_tokenizer_is_refused_by_training_and_evaluation(
    tmp_path, capsys, data_of_another_tokenizer
):
    for argv in (
        train_flags(tmp_path / "run", "--max_steps", "1", data=data_of_another_tokenizer),
        eval_flags(trained_checkpoint(), tmp_path / "out", "--eval_split", "test", data=data_of_another_tokenizer),
    ):
        code, line = failure(capsys, argv)
        assert code == 2
        assert "another sentencepiece model" in line


def test_checking_an_index_tells_that_it_is_of_another_tokenizer(data_of_another_tokenizer):
    with pytest.raises(DataError, match="another sentencepiece model"):
        make_index.main(["--data_path", str(data_of_another_tokenizer), "--check"])


def test_an_index_without_a_note_on_its_tokenizer_is_taken_as_the_originals_are(tmp_path, data):
    (data / "vqa.tokenizer.json").unlink()
    program(*train_flags(tmp_path / "run", "--max_steps", "1", data=data))


def test_checking_before_the_first_build_names_the_command_to_run(data):
    for path in [*data.glob("vqa.*"), data / "answer2label.txt"]:
        path.unlink()
    with pytest.raises(DataError, match="no index in .* yet: run python scripts/make_index.py"):
        make_index.main(["--data_path", str(data), "--check"])


def test_the_folder_of_a_run_given_as_weights_is_answered_with_its_checkpoint(tmp_path, capsys):
    program(*train_flags(tmp_path / "run", "--max_steps", "1"))
    code, line = failure(capsys, eval_flags(tmp_path / "run", tmp_path / "out"))
    assert code == 2
    assert f"is the folder of a run: give {tmp_path / 'run' / 'checkpoint-best'}" in line


def test_a_resume_with_another_model_names_both(tmp_path, capsys):
    program(*train_flags(tmp_path / "run", "--max_steps", "1"))
    code, line = failure(capsys, train_flags(tmp_path / "run", "--model", LARGER))
    assert code == 2
    assert f"this run is of {LARGER}; give --model" in line
