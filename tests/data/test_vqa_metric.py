import json

import numpy as np
import pytest
import torch

from data.errors import DataError
from data.metrics.vqa import Mean, question_accuracy, submission_entries, vqa_accuracy


def question(qid, answers, question_type="is the", answer_type="yes/no"):
    answers = [{"answer": answer} for answer in answers]
    return {"question_id": qid, "answers": answers, "question_type": question_type, "answer_type": answer_type}


def test_score_by_agreeing_people():
    scores = [question_accuracy("yes", ["yes"] * k + ["no"] * (10 - k)) for k in range(10)]
    assert scores == pytest.approx([0, 0.3, 0.6, 0.9] + [1] * 6, abs=1e-12)


def test_unanimous_people_are_compared_as_raw_text():
    assert question_accuracy("2", ["two"] * 10) == 0.0
    assert question_accuracy("yes", ["Yes"] * 10) == 0.0
    assert question_accuracy("Yes ", ["Yes\n"] * 10) == 1.0


def test_disagreeing_people_are_compared_after_normalisation():
    assert question_accuracy("2", ["two"] * 9 + ["three"]) == 1.0
    assert question_accuracy("The  dog!", ["dog"] * 9 + ["cat"]) == 1.0


def test_normalising_always_changes_unanimous_questions_only():
    assert question_accuracy("2", ["two"] * 10, always_normalize=True) == 1.0
    answers = ["two"] * 3 + ["three"] * 7
    assert question_accuracy("2", answers, always_normalize=True) == question_accuracy("2", answers)


def test_equal_records_without_answer_ids_are_left_out_one_at_a_time():
    # leaving out every equal record at once would give 0.8, not 1
    result = vqa_accuracy({1: "yes"}, [question(1, ["yes"] * 8 + ["no"] * 2)])
    assert result.overall == 1.0


def test_types_are_means_over_questions():
    yes, no = ["yes"] * 10, ["no"] * 10
    annotations = [question(1, yes), question(2, no), question(3, yes, "how many", "number"), question(4, yes)]
    result = vqa_accuracy(dict.fromkeys((1, 2, 3, 4), "yes"), annotations)
    assert result.overall == 0.75
    assert result.question_type_means == {"is the": Mean(2.0, 3), "how many": Mean(1.0, 1)}
    assert result.answer_type_means == {"yes/no": Mean(2.0, 3), "number": Mean(1.0, 1)}
    assert result.per_question == {1: 1.0, 2: 0.0, 3: 1.0, 4: 1.0}


def test_official_numbers_are_percentages_with_two_decimals():
    annotations = [question(1, ["yes"] * 10), question(2, ["no"] * 10), question(3, ["yes"] * 2 + ["no"] * 8)]
    result = vqa_accuracy(dict.fromkeys((1, 2, 3), "yes"), annotations)
    assert result.official() == {
        "overall": 53.33,
        "perQuestionType": {"is the": 53.33},
        "perAnswerType": {"yes/no": 53.33},
    }
    assert result.per_question == {1: 1.0, 2: 0.0, 3: pytest.approx(0.6)}


def test_plain_answers_without_types_are_scored():
    result = vqa_accuracy({1: "yes"}, [{"question_id": 1, "answers": ["yes"] * 10}])
    assert (result.overall, result.question_type_means, result.answer_type_means) == (1.0, {}, {})


def test_predictions_must_cover_the_questions():
    annotations = [question(qid, ["yes"] * 10) for qid in (1, 2, 3)]
    with pytest.raises(DataError, match=r"the 3 questions: 2 missing \(first 2, 3\), 1 not asked \(first 9\)"):
        vqa_accuracy({1: "yes", 9: "no"}, annotations)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"answers": ["yes"] * 10}, '"question_id" must be a whole number'),
        ({"question_id": 1}, 'question 1: "answers" must be a list'),
        ({"question_id": 1, "answers": [3] * 10}, 'question 1: "answers" must be a list'),
        ({"question_id": 1, "answers": ["yes"]}, "question 1 has 1 answers; official accuracy compares at least 4"),
    ],
)
def test_a_bad_annotation_is_named(annotation, message):
    with pytest.raises(DataError, match=message):
        vqa_accuracy({1: "yes"}, [annotation])


def test_annotations_that_repeat_or_are_none_are_refused():
    with pytest.raises(DataError, match="2 annotations with 1 different"):
        vqa_accuracy({1: "yes"}, [question(1, ["yes"] * 10)] * 2)
    with pytest.raises(DataError, match="0 annotations"):
        vqa_accuracy({}, [])


def test_an_answer_that_is_no_string_is_refused():
    with pytest.raises(DataError, match="question 1: an answer must be a string, got 3"):
        vqa_accuracy({1: 3}, [question(1, ["yes"] * 10)])


def test_submission_is_sorted_and_has_plain_numbers():
    entries = submission_entries([(np.int64(3), "no"), (torch.tensor(1), "yes"), (2, "2")])
    assert json.dumps(entries) == (
        '[{"question_id": 1, "answer": "yes"}, {"question_id": 2, "answer": "2"}, {"question_id": 3, "answer": "no"}]'
    )
    assert submission_entries({5: "yes"}, expected_ids=[5]) == [{"question_id": 5, "answer": "yes"}]


@pytest.mark.parametrize("qid", [1.0, "1", True, None])
def test_submission_ids_must_be_whole_numbers(qid):
    with pytest.raises(DataError, match="must be a whole number"):
        submission_entries([(qid, "yes")])


def test_a_submission_with_repeated_missing_or_wrong_answers_is_refused():
    with pytest.raises(DataError, match="question 1 is answered twice"):
        submission_entries([(1, "yes"), (np.int32(1), "yes")])
    with pytest.raises(DataError, match="1 missing .first 2."):
        submission_entries({1: "yes"}, expected_ids=[1, 2])
    with pytest.raises(DataError, match="must be a string"):
        submission_entries({1: None})
