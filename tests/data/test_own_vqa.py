import json

import pytest

from data.errors import DataError
from data.own_vqa import build_answer_list, own_rows, read_vqa_file
from data.tokenizers.spm import XLMRTokenizer
from data.vqa_answers import AnswerVocabulary
from data.vqa_index import VQARecord, read_vqa_index
from data.vqav2 import build_vqav2_index
from tests.data.vqav2_tree import SPM, write_vqav2

ROW = {"image": "photos/1.jpg", "question": "is the circle red?", "answers": ["Yes"]}


@pytest.fixture(scope="module")
def tokenizer():
    return XLMRTokenizer(SPM)


@pytest.fixture
def vocabulary():
    return AnswerVocabulary(["yes", "no", "red"])


def own_file(tmp_path, *rows, name="own.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_lines_become_records_numbered_from_zero(tmp_path, tokenizer, vocabulary):
    path = own_file(tmp_path, ROW, {**ROW, "image": "2.jpg", "answers": ["red", "red", "RED.", "no"]})
    tokens = tuple(tokenizer.encode(ROW["question"]))
    assert read_vqa_file(path, tokenizer, vocabulary) == [
        VQARecord("photos/1.jpg", tokens, (0,), (1.0,), 0),
        VQARecord("2.jpg", tokens, (2, 1), (1.0, 0.9), 1),
    ]


def test_given_question_ids_are_kept(tmp_path, tokenizer, vocabulary):
    path = own_file(tmp_path, {**ROW, "question_id": 70}, {**ROW, "question_id": 3})
    assert [record.question_id for record in read_vqa_file(path, tokenizer, vocabulary)] == [70, 3]


def test_answers_may_be_left_out(tmp_path, tokenizer):
    path = own_file(tmp_path, {"image": "1.jpg", "question": "is it red?"})
    (record,) = read_vqa_file(path, tokenizer, None)
    assert (record.labels, record.scores) == ((), ())


def test_an_answer_that_stands_in_the_list_needs_no_normalisation(tmp_path, tokenizer):
    (record,) = read_vqa_file(own_file(tmp_path, ROW), tokenizer, AnswerVocabulary(["yes", "Yes"]))
    assert record.labels == (1,)


def test_choices_named_by_letters_stay_apart(tmp_path, tokenizer):
    path = own_file(tmp_path, *({**ROW, "answers": [letter]} for letter in "ABAC"))
    vocabulary = build_answer_list([path])
    assert vocabulary.answers == ("a", "b", "c")
    assert [record.labels for record in read_vqa_file(path, tokenizer, vocabulary)] == [(0,), (1,), (0,), (2,)]


def test_the_answer_list_counts_over_all_files_in_order_of_appearance(tmp_path):
    first = own_file(
        tmp_path, {**ROW, "answers": ["Red.", "blue"]}, {"image": "1.jpg", "question": "why?"}, name="a.jsonl"
    )
    second = own_file(tmp_path, {**ROW, "answers": ["green", "red", "green"]}, name="b.jsonl")
    assert build_answer_list([first, second]).answers == ("red", "blue", "green")
    assert build_answer_list([first, second], min_count=2).answers == ("red", "green")


def test_an_answer_list_of_too_rare_answers_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no question in .*own.jsonl has an answer that is given at least 2 times: "):
        build_answer_list([own_file(tmp_path, ROW)], min_count=2)


def test_an_answer_list_of_no_answers_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no question in .*own.jsonl has answers: training needs lines such as"):
        build_answer_list([own_file(tmp_path, {"image": "1.jpg", "question": "why?"})])


def test_a_misspelt_key_is_named_before_answers_are_counted(tmp_path):
    with pytest.raises(DataError, match=r"own.jsonl:1: unknown key 'answer'; a line is"):
        build_answer_list([own_file(tmp_path, {"image": "1.jpg", "question": "why?", "answer": "yes"})])


def test_an_index_file_has_no_answers_to_list(tmp_path):
    with pytest.raises(DataError, match="own.jsonl:1: an index line has labels, not answers"):
        build_answer_list([own_file(tmp_path, {"image_path": "1.jpg"})])


def test_an_index_file_is_read_as_the_index_reader_does(tmp_path, tokenizer):
    build_vqav2_index(write_vqav2(tmp_path), None, tokenizer, min_answer_count=2)
    vocabulary = AnswerVocabulary.load(tmp_path / "answer2label.txt")
    path = tmp_path / "vqa.train.jsonl"
    assert read_vqa_file(path, tokenizer, vocabulary) == read_vqa_index(path)


def test_questions_without_a_known_answer_are_dropped_when_asked(tmp_path, tokenizer, vocabulary):
    path = own_file(tmp_path, ROW, {**ROW, "answers": ["unicorn"]}, ROW)
    assert [record.labels for record in read_vqa_file(path, tokenizer, vocabulary)] == [(0,), (), (0,)]
    dropped = read_vqa_file(path, tokenizer, vocabulary, drop_unlabelled=True)
    assert [record.question_id for record in dropped] == [0, 2]


def test_a_file_of_which_dropping_leaves_nothing_is_an_error(tmp_path, tokenizer, vocabulary):
    path = own_file(tmp_path, {**ROW, "answers": ["unicorn"]})
    with pytest.raises(DataError, match="none of the 1 questions has an answer of the answer list"):
        read_vqa_file(path, tokenizer, vocabulary, drop_unlabelled=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": "  "}, '"question" must be a text that is not empty'),
        ({"question": "\u200b"}, "has no tokens"),
        ({"question": "\ud83d"}, "surrogate"),
        ({"question": None}, '"question" must be a text'),
        ({"image": "../1.jpg"}, r'"image": .* contains'),
        ({"image": None}, '"image": an image path must be a non-empty string'),
        ({"answers": []}, '"answers" must be a list of texts'),
        ({"answers": "yes"}, '"answers" must be a list of texts'),
        ({"answers": ["yes", " "]}, '"answers" must be a list of texts'),
        ({"answers": ["yes", 2]}, '"answers" must be a list of texts'),
        ({"question_id": 5}, "question_id must stand on every line or on none"),
        ({"anwsers": ["yes"]}, "unknown key 'anwsers'"),
    ],
)
def test_a_bad_own_line_is_named(tmp_path, tokenizer, vocabulary, changes, message):
    path = own_file(tmp_path, ROW, {**ROW, **changes})
    with pytest.raises(DataError, match="own.jsonl:2: .*" + message):
        read_vqa_file(path, tokenizer, vocabulary)


@pytest.mark.parametrize(
    ("question_id", "message"),
    [(7, r"question_id 7 stands at .*:1 already"), ("8", "must be a whole number, got '8'"), (True, "whole number")],
)
def test_a_bad_question_id_is_named(tmp_path, tokenizer, vocabulary, question_id, message):
    path = own_file(tmp_path, {**ROW, "question_id": 7}, {**ROW, "question_id": question_id})
    with pytest.raises(DataError, match="own.jsonl:2: " + ".*" + message):
        read_vqa_file(path, tokenizer, vocabulary)


def test_a_file_given_twice_is_refused():
    line = ("own.jsonl:1", {**ROW, "question_id": 7})
    with pytest.raises(DataError, match="own.jsonl:1: question_id 7 stands at own.jsonl:1 already; ids are unique"):
        list(own_rows([line, line]))
    assert [row.question_id for _, row in own_rows([("a:1", ROW), ("b:1", ROW)])] == [0, 1]


def test_answers_need_an_answer_list(tmp_path, tokenizer):
    with pytest.raises(DataError, match="own.jsonl:1: the line has answers, but there is no answer list"):
        read_vqa_file(own_file(tmp_path, ROW), tokenizer, None)


def test_lines_of_both_kinds_in_one_file_are_an_error(tmp_path, tokenizer, vocabulary):
    index_line = {"image_path": "1.jpg", "text_segment": [4], "labels": [], "scores": [], "qid": 1}
    with pytest.raises(DataError, match=":2: the key 'image_path' is missing"):
        read_vqa_file(own_file(tmp_path, index_line, ROW), tokenizer, vocabulary)
    with pytest.raises(DataError, match=":2: unknown key 'image_path'"):
        read_vqa_file(own_file(tmp_path, ROW, index_line), tokenizer, vocabulary)
