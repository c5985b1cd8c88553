"""scripts/ask.py: what is wrong with the picture or the question is said under its flag, before weights are read."""

import json

import pytest
from PIL import Image

from data.errors import DataError
from data.tokenizers.spm import XLMRTokenizer
from scripts import ask
from tests.data.vqav2_tree import SPM
from tests.scripts.vlbert_run import trained_run
from tests.scripts.vqa_run import drawn_data, trained_checkpoint


@pytest.fixture
def no_weights(tmp_path):
    """Arguments with an empty file for weights: whoever reads it fails with another error."""
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "answers.txt").write_text('{"answer": "yes", "label": 0}\n{"answer": "no", "label": 1}\n')
    argv = ["--checkpoint", str(tmp_path / "weights.pth"), "--model", "beit3_base_patch16_480", "--device", "cpu"]
    return [*argv, "--sentencepiece_model", str(SPM), "--answer_list", str(tmp_path / "answers.txt")]


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "the file is empty"),
        (b"hello\n", "it holds text, not an image"),
    ],
)
def test_a_bad_picture_is_named_by_its_flag_without_advice_on_an_index(no_weights, tmp_path, content, reason):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        ask.main([*no_weights, "--image", str(path), "--question", "what?"])
    assert str(error.value) == f"--image {path}: {reason}"


@pytest.mark.parametrize("question", ["", "  ", "\u200b"])
def test_an_empty_question_is_named_by_its_flag(no_weights, picture, question):
    with pytest.raises(DataError, match="^--question .* is empty"):
        ask.main([*no_weights, "--image", picture, "--question", "what?", question])


def test_a_question_that_is_no_text_is_named_by_its_flag(no_weights, picture):
    with pytest.raises(DataError, match="^--question .*surrogate"):
        ask.main([*no_weights, "--image", picture, "--question", "\ud83d"])


def test_a_question_that_is_cut_is_warned_about(capsys):
    tokenizer = XLMRTokenizer(SPM)
    whole = tokenizer.encode("is the circle red?")
    segment = ask.question_tokens("is the circle red?", tokenizer, len(whole) + 1)
    assert segment == [tokenizer.bos_id, *whole[:-1], tokenizer.eos_id]
    assert f"has {len(whole)} tokens, only the first {len(whole) - 1} are read" in capsys.readouterr().err


def test_a_question_that_fits_exactly_is_not_warned_about(capsys):
    tokenizer = XLMRTokenizer(SPM)
    whole = tokenizer.encode("is the circle red?")
    assert ask.question_tokens("is the circle red?", tokenizer, len(whole) + 2)[1:-1] == whole
    assert capsys.readouterr().err == ""


def test_each_question_gets_its_answers(capsys):
    photo = next((drawn_data() / "val2014").iterdir())
    argv = ["--checkpoint", str(trained_checkpoint()), "--image", str(photo), "--device", "cpu", "--json", "--top", "2"]
    capsys.readouterr()
    ask.main([*argv, "--question", "what color is the star?", "is there a star?"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["question"] for line in lines] == ["what color is the star?", "is there a star?"]
    assert all(len(line["top"]) == 2 and line["top"][0][1] >= line["top"][1][1] for line in lines)


@pytest.mark.parametrize("name", ["", "model.pth"])
def test_a_checkpoint_of_vlbert_is_refused_as_such(picture, name):
    checkpoint = trained_run() / "checkpoint-best" / name
    with pytest.raises(DataError) as error:
        ask.main(["--checkpoint", str(checkpoint), "--image", picture, "--question", "what?"])
    assert str(error.value).startswith(f"{checkpoint} is of VL-BERT, which needs regions of a detector")
