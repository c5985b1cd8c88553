import pytest

from data.errors import DataError
from data.vqa_answers import (
    CONTRACTIONS,
    AnswerVocabulary,
    normalize_answer,
    normalize_official,
    soft_score,
    soft_targets,
)


def test_one_number_with_a_comma_deletes_every_mark():
    assert normalize_answer("black/white") == "black white"
    assert normalize_answer("black/white 1,000") == "blackwhite 1000"


def test_a_mark_beside_a_space_is_deleted_everywhere():
    assert normalize_answer("t-shirt") == "t shirt"
    assert normalize_answer("t-shirt - red") == "tshirt red"


def test_only_the_official_treatment_strips_first():
    assert normalize_answer("red/blue/ ") == "redblue"
    assert normalize_official("red/blue/ ") == "red blue"
    assert normalize_official("\nyes\tno ") == "yes no"


def test_full_stops_stay_before_digits_and_after_the_thirty_second():
    assert normalize_answer("2.5.") == "2.5"
    assert normalize_answer("." * 40 + "x") == "." * 8 + "x"


def test_contractions_match_whole_words_only():
    assert normalize_answer("dont") == "don't"
    assert normalize_answer("donts") == "donts"
    assert normalize_answer("somebody'd've couldn'tve") == "somebody'd've couldn't've"


def test_the_contraction_table_has_every_entry_that_can_change_a_word():
    # 120 official entries without four with a capital I and two that map to themselves (let's, she's)
    assert len(CONTRACTIONS) == 114
    assert all(word != changed for word, changed in CONTRACTIONS.items())


@pytest.mark.parametrize("word", ["its", "im", "ive", "shed", "wed", "well", "ill", "lets", "whatd"])
def test_words_that_are_no_contractions_stay(word):
    assert normalize_answer(word) == word


def test_soft_score_of_ten_people_is_the_table():
    assert [soft_score(count) for count in range(11)] == [0.0, 0.3, 0.6, 0.9] + [1.0] * 7


@pytest.mark.parametrize(
    ("count", "people", "score"),
    [
        (1, 1, 1.0),
        (1, 2, 1.0),
        (1, 3, 0.9),
        (1, 4, 0.9),
        (1, 5, 0.6),
        (2, 5, 1.0),
        (1, 8, 0.3),
        (1, 30, 0.3),
        (0, 3, 0.0),
    ],
)
def test_soft_score_of_other_numbers_is_scaled_to_ten(count, people, score):
    assert soft_score(count, people) == score


def test_soft_score_refuses_more_agreement_than_people():
    for count, people in ((11, 10), (-1, 10), (1, 0)):
        with pytest.raises(DataError, match="count"):
            soft_score(count, people)


def test_vocabulary_keeps_frequent_normalised_answers_in_order_of_appearance():
    answers = ["Red.", "rare", "dog"] + ["dog", "a dog", "red"] * 4
    vocabulary = AnswerVocabulary.from_annotations(answers, min_count=5)
    assert vocabulary.answers == ("red", "dog")
    assert vocabulary[1] == "dog"
    assert vocabulary.label("red") == 0
    assert vocabulary.label("rare") is None
    assert "Red." not in vocabulary
    assert len(vocabulary) == 2


def test_a_vocabulary_without_frequent_answers_is_an_error():
    with pytest.raises(DataError, match="none of the 2 different answers occurs 9 times: lower --min_answer_count"):
        AnswerVocabulary.from_annotations(["yes", "no"])


def test_saved_vocabulary_loads_equal_and_has_the_reference_form(tmp_path):
    vocabulary = AnswerVocabulary(["can't", "yes", "café", ""])
    vocabulary.save(tmp_path / "answer2label.txt")
    assert AnswerVocabulary.load(tmp_path / "answer2label.txt").answers == vocabulary.answers
    first = (tmp_path / "answer2label.txt").read_text().splitlines()[:3]
    assert first == [
        '{"answer": "can\'t", "label": 0}',
        '{"answer": "yes", "label": 1}',
        '{"answer": "caf\\u00e9", "label": 2}',
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"answer": "yes", "label": 0}\n{"answer": "no", "label": 2}\n', ":2: label 2 where 1 is due"),
        ('{"answer": "yes", "label": 0}\n{"answer": "yes", "label": 1}\n', ":2: the answer 'yes' has label 0 already"),
        ('{"answer": "yes", "label": "0"}\n', ":1: a line must be"),
        ('{"answer": "yes", "label": false}\n', ":1: a line must be"),
        ('{"answer": 3, "label": 0}\n', ":1: a line must be"),
        ('{"label": 0}\n', ":1: a line must be"),
        ("", "is empty: scripts/make_index.py writes"),
    ],
)
def test_a_bad_answer_file_is_named_with_its_line(tmp_path, lines, message):
    (tmp_path / "answer2label.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        AnswerVocabulary.load(tmp_path / "answer2label.txt")


def test_an_answer_list_with_repeats_or_nothing_is_refused():
    with pytest.raises(DataError, match="'yes' stands twice"):
        AnswerVocabulary(["yes", "no", "yes"])
    with pytest.raises(DataError, match="no answers"):
        AnswerVocabulary([])


def test_targets_count_raw_answers_in_order_of_appearance():
    vocabulary = AnswerVocabulary(["yes", "no", "2"])
    answers = ["no", "yes", "Yes", "yes", "two", "yes", "yes", "no", "maybe", "maybe"]
    assert soft_targets(answers, vocabulary) == ([1, 0], [0.6, 1.0])
    assert soft_targets(["maybe"] * 10, vocabulary) == ([], [])
