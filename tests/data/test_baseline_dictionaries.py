"""The file beside a course baseline's weights, and the CSV of answer classes."""

import json

import pytest
import torch

from data.baseline_dictionaries import Dictionaries, read_class_mapping
from data.errors import DataError
from scripts.train_sentencepiece import train_model

WORDS = Dictionaries({"cup": 0, "mug": 0, "": 1}, {"what": 0, "is": 1, "this": 2}, image_size=32)


@pytest.fixture(scope="module")
def subwords():
    return Dictionaries({"cup": 0}, None, train_model(["what is this", "what colour is this"], 40), image_size=32)


def test_a_file_gives_back_what_was_written(tmp_path, subwords):
    for number, written in enumerate((WORDS, Dictionaries({"é": 0}, {"": 0}, reference=True), subwords)):
        path = tmp_path / f"{number}.json"
        path.write_bytes(written.to_json())
        assert Dictionaries.load(path) == written
        assert Dictionaries.load(path).to_json() == written.to_json()


def test_a_class_answers_with_its_first_text():
    assert WORDS.answers == ["cup", ""]


def test_questions_are_looked_up_normalised_and_in_the_original_as_typed():
    assert WORDS.question_vector("What is THIS thing?").tolist() == [1, 1, 1, 1]
    assert WORDS.question_vector("What is this").tolist() == [1, 1, 1, 0]
    reference = Dictionaries(WORDS.answer_ids, WORDS.word_ids, reference=True)
    assert reference.question_vector("What is this").tolist() == [0, 1, 1, 1]


def test_subwords_are_marked_whatever_the_case_and_an_empty_question_has_none(subwords):
    vector = subwords.question_vector("What is this?")
    assert vector.shape == (subwords.question_size,)
    assert set(vector.tolist()) == {0.0, 1.0}
    assert torch.equal(vector, subwords.question_vector("what IS this"))
    assert not torch.equal(vector, subwords.question_vector("what colour is this"))
    assert subwords.question_vector("?").sum() == 0
    assert subwords.question_vector("\ud800").sum() == 0  # half a surrogate pair cannot be encoded: "?" stands in


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": {}}, 'no "answers"'),
        ({"answers": {"a": 0, "b": 2}}, 'no "answers"'),
        ({"answers": {"a": True}}, 'no "answers"'),
        ({"image_size": 0}, '"image_size" or "reference_behaviour"'),
        ({"reference_behaviour": 1}, '"image_size" or "reference_behaviour"'),
        ({"words": ["a", "a"]}, "different texts"),
        ({"words": None}, "neither"),
        ({"words": None, "subwords": "!"}, "neither"),
        ({"words": None, "subwords": "AAAA"}, "neither"),
        ({"words": None, "subwords": 3}, "neither"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, change, message):
    path = tmp_path / "dictionaries.json"
    path.write_text(json.dumps(json.loads(WORDS.to_json()) | change))
    with pytest.raises(DataError, match=message):
        Dictionaries.load(path)


def test_classes_are_numbered_by_first_appearance_and_normalised(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text('answer,class_id\n"Cup, red",7\nthe mug,3\nMug,9\nred cup,7\n.,4\n\n', encoding="utf-8-sig")
    assert read_class_mapping(path) == {"cup red": 0, "mug": 1, "red cup": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"has the columns \(none\): they must be answer,class_id"),
        (b"text,label\ncup,1\n", "has the columns text, label: they must be answer,class_id"),
        (b"answer,class_id\n", "no answers below"),
        (b"answer,class_id\n?,1\n", "no answers below"),
        (b"answer,class_id\ncup,one\n", "csv:2: a line must be"),
        (b"answer,class_id\ncup,1\nred cup, big,2\n", "csv:3: a line must be"),
        (b'answer,class_id\n"cup"s,1\n', "csv:2: not CSV"),
        (b"answer,class_id\n\xff,1\n", "not UTF-8"),
    ],
)
def test_another_csv_is_refused_by_name_and_line(tmp_path, content, message):
    path = tmp_path / "classes.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_class_mapping(path)
