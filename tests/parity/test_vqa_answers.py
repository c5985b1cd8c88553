"""Answer normalisation, soft scores and VQA accuracy against recorded values: exact."""

from data.metrics.vqa import question_accuracy, vqa_accuracy
from data.vqa_answers import clean_spaces, normalize_answer, normalize_official, soft_score, strip_punctuation
from tests.parity.fixture_files import load_fixture


def test_soft_scores_equal_the_recorded_table():
    table = load_fixture("beit3_data.pt")["outputs"]["vqa_score_table"]
    assert table
    assert {count: soft_score(count) for count in table} == table


def test_soft_scores_equal_the_recorded_evaluation_ones():
    rows = load_fixture("evaluation_vqa.json")["by_count"]
    assert rows
    for row in rows:
        assert soft_score(row["count"]) == row["soft_score_table"]


def test_normalised_answers_equal_the_recorded_beit3_ones():
    pairs = load_fixture("beit3_data.pt")["outputs"]["normalize_word"]
    assert pairs
    assert [normalize_answer(text) for text, _ in pairs] == [expected for _, expected in pairs]


def test_normalised_answers_equal_the_recorded_evaluation_ones():
    rows = load_fixture("evaluation_vqa.json")["normalisation"]
    assert rows
    for row in rows:
        assert normalize_answer(row["input"]) == row["beit3_normalize_word"], row["input"]


def test_normalised_answers_equal_the_recorded_official_ones():
    for row in load_fixture("evaluation_vqa.json")["normalisation"]:
        assert strip_punctuation(clean_spaces(row["input"])) == row["after_punctuation"], row["input"]
        assert normalize_official(row["input"]) == row["vqa_official"], row["input"]


def test_accuracy_equals_the_recorded_evaluator():
    recorded = load_fixture("evaluation_vqa.json")["accuracy"]
    predictions = {row["question_id"]: row["prediction"] for row in recorded["questions"]}
    accuracy = vqa_accuracy(predictions, recorded["questions"])
    assert {str(qid): score for qid, score in accuracy.per_question.items()} == recorded["per_question"]
    assert {str(qid): round(100 * score, 2) for qid, score in accuracy.per_question.items()} == recorded["eval_qa"]
    assert accuracy.official() == recorded["accuracy"]


def test_score_by_number_of_agreeing_people_equals_the_recorded_table():
    rows = load_fixture("evaluation_vqa.json")["by_count"]
    for row in rows:
        people = ["yes"] * row["count"] + [f"other {i}" for i in range(10 - row["count"])]
        assert question_accuracy("yes", people) == row["official_average"]
