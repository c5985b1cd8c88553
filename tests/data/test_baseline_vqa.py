"""The course baseline's data: words, answers and targets."""

import pytest
import torch

from data.baseline_vqa import (
    build_answer_ids,
    build_word_ids,
    choose_targets,
    encode_answers,
    frequent_answer_ids,
    mode_targets,
    question_vector,
)
from data.errors import DataError


def lower_without_marks(text: str) -> str:
    return text.lower().strip("?. ")


def test_words_are_numbered_by_first_appearance():
    word_ids = build_word_ids(["What is this?", "is it", "What now"], lower_without_marks)
    assert word_ids == {"what": 0, "is": 1, "this": 2, "it": 3, "now": 4}


def test_a_normalised_question_has_all_its_words_and_the_originals_has_not():
    word_ids = build_word_ids(["What is this?"], lower_without_marks)
    assert question_vector("What is this?", word_ids, lower_without_marks).tolist() == [1, 1, 1, 0]
    assert question_vector("What is this?", word_ids, lower_without_marks, reference=True).tolist() == [0, 1, 0, 1]


def test_unknown_words_share_the_last_entry():
    word_ids = build_word_ids(["is it"], lower_without_marks)
    assert question_vector("Is that new?", word_ids, lower_without_marks).tolist() == [1, 0, 1]


def test_an_empty_question_is_one_word_like_in_the_original():
    word_ids = build_word_ids(["what", "?"], lower_without_marks)
    assert word_ids == {"what": 0, "": 1}
    assert question_vector("?", word_ids, lower_without_marks).tolist() == [0, 1, 0]


def test_the_most_frequent_answer_wins_and_the_first_of_equals():
    answers = [["blue", "Red.", "red", "blue"], ["blue", "red", "Red"], ["dark red"]]
    answer_ids = build_answer_ids(answers, lower_without_marks)
    assert answer_ids == {"blue": 0, "red": 1, "dark red": 2}
    encoded = encode_answers(answers, answer_ids, lower_without_marks)
    assert encoded == [[0, 1, 1, 0], [0, 1, 1], [2]]
    targets = mode_targets(encoded)
    assert targets.dtype == torch.long
    assert targets.tolist() == [0, 1, 2]


def test_equal_counts_are_settled_by_appearance_and_not_by_number():
    assert mode_targets([[7, 3, 3, 7]]).tolist() == [7]


def test_a_question_without_answers_is_named():
    for refused in (lambda: encode_answers([["a"], []], {"a": 0}, str), lambda: mode_targets([[0], []])):
        with pytest.raises(DataError, match="question 1 .* has no answers"):
            refused()


def test_an_answer_outside_the_dictionary_is_named():
    with pytest.raises(DataError, match="answer 'Green' of question 1 .* not in the answer dictionary"):
        encode_answers([["blue"], ["Green"]], {"blue": 0}, lower_without_marks)


def test_an_empty_answer_gives_way_to_the_next_and_unanswerable_stands_in_where_all_are_empty():
    answers = [["?", "?", "red", "blue", "blue"], ["?", "."], ["?"]]
    answer_ids = build_answer_ids([*answers, ["unanswerable"]], lower_without_marks)
    names = list(answer_ids)
    assert [names[target] for target in choose_targets(answers, answer_ids, lower_without_marks)] == [
        *("blue", "unanswerable", "unanswerable")
    ]
    # the original learns the empty one
    assert names[mode_targets(encode_answers(answers, answer_ids, lower_without_marks))[0]] == ""


def test_answers_of_one_class_are_counted_together_and_unknown_ones_teach_nothing():
    answers = [["cat", "dog", "dog", "kitten"], ["fish"], ["?"]]
    assert choose_targets(answers, {"cat": 0, "kitten": 0, "dog": 1}, lower_without_marks) == [0, None, None]


def test_rare_and_empty_answers_are_left_out_of_a_reduced_dictionary():
    answers = [["Red", "?", "?"], ["blue", "red."], ["green"]]
    assert frequent_answer_ids(answers, lower_without_marks, 2) == {"red": 0}
    assert frequent_answer_ids(answers, lower_without_marks, 1) == {"red": 0, "blue": 1, "green": 2}
    with pytest.raises(DataError, match="no answer was given 3 times or more"):
        frequent_answer_ids(answers, lower_without_marks, 3)
