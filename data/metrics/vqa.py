"""Official VQA accuracy: the share of people who agree, averaged over the ways to leave one person out.

Source: the VQA evaluator in its form since 2021, which compares unanimous questions as raw text. The person left out is
told by place, not by comparing records, so annotations without answer_id score the same.
"""

import operator
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from data.vqa_answers import clean_spaces, normalize_official

MIN_ANSWERS = 4  # three others must be able to agree, else no answer can reach 1


@dataclass(frozen=True)
class Mean:
    """A mean kept as sum and count, so that groups can be joined and rounding happens once."""

    total: float
    count: int

    @property
    def value(self) -> float:
        """Fraction in [0, 1]; 0 of nothing is 0."""
        return self.total / self.count if self.count else 0.0

    @property
    def percent(self) -> float:
        """As the official tool prints it: times 100, two decimals."""
        return round(100 * self.total / self.count, 2) if self.count else 0.0


@dataclass(frozen=True)
class VQAAccuracy:
    """Scores of a prediction file; fractions, except in ``official``.

    Attributes:
        per_question: score by question id, in annotation order.
        overall_mean: over all questions.
        question_type_means: over the questions of each ``question_type``; empty if the annotations have none.
        answer_type_means: the same for ``answer_type``.
    """

    per_question: dict[int, float]
    overall_mean: Mean
    question_type_means: dict[str, Mean]
    answer_type_means: dict[str, Mean]

    @property
    def overall(self) -> float:
        """Mean over all questions, a fraction."""
        return self.overall_mean.value

    def official(self) -> dict[str, Any]:
        """Numbers and key names of the official tool: times 100, two decimals."""
        return {
            "overall": self.overall_mean.percent,
            "perQuestionType": {name: mean.percent for name, mean in self.question_type_means.items()},
            "perAnswerType": {name: mean.percent for name, mean in self.answer_type_means.items()},
        }


def ten_choose_nine(prediction: Hashable, answers: Sequence[Hashable]) -> float:
    """Mean over the ways to leave one person out of min(1, people of the rest who agree / 3).

    Args:
        prediction: text or id, already normalised.
        answers: of ten people, or as many as there are.

    Returns:
        Score in [0, 1]; for ten people 0, 0.3, 0.6, 0.9 and 1 by the number who agree.
    """
    matches = sum(answer == prediction for answer in answers)
    return sum(min(1.0, (matches - (answer == prediction)) / 3) for answer in answers) / len(answers)


def question_accuracy(prediction: str, answers: Sequence[str], always_normalize: bool = False) -> float:
    """Score in [0, 1] of one answer against those of several people.

    Args:
        prediction: the model's answer.
        answers: what each person said, usually ten.
        always_normalize: normalise both sides always. The official rule (default) does so only where the people
            disagree: ten times "two" against "2", or "Yes" against "yes", scores 0.
    """
    answers = [clean_spaces(answer) for answer in answers]
    prediction = clean_spaces(prediction)
    if always_normalize or len(set(answers)) > 1:
        answers = [normalize_official(answer) for answer in answers]
        prediction = normalize_official(prediction)
    return ten_choose_nine(prediction, answers)


def vqa_accuracy(
    predictions: Mapping[int, str], annotations: Iterable[Mapping[str, Any]], *, always_normalize: bool = False
) -> VQAAccuracy:
    """Official accuracy of predictions.

    Args:
        predictions: answer by question id.
        annotations: objects of the official file: ``question_id``, ``answers`` ([{"answer": text}] or plain texts),
            and, for the means by type, ``question_type`` and ``answer_type``.
        always_normalize: see ``question_accuracy``.

    Raises:
        DataError: predictions do not cover exactly the annotated questions, an answer is no string, an annotation is
            incomplete or stands twice.
    """
    annotations = list(annotations)
    by_id = {_question_id(annotation, place): annotation for place, annotation in enumerate(annotations)}
    if len(by_id) < len(annotations) or not by_id:
        raise DataError(f"{len(annotations)} annotations with {len(by_id)} different question ids; ids must be unique")
    _check_cover(predictions, by_id)

    per_question: dict[int, float] = {}
    by_question_type: dict[str, list[float]] = {}
    by_answer_type: dict[str, list[float]] = {}
    for qid, annotation in by_id.items():
        score = question_accuracy(_text(predictions[qid], qid), _human_answers(annotation, qid), always_normalize)
        per_question[qid] = score
        for groups, key in ((by_question_type, "question_type"), (by_answer_type, "answer_type")):
            if annotation.get(key) is not None:
                groups.setdefault(annotation[key], []).append(score)
    return VQAAccuracy(
        per_question,
        _mean(per_question.values()),
        {name: _mean(scores) for name, scores in by_question_type.items()},
        {name: _mean(scores) for name, scores in by_answer_type.items()},
    )


def submission_entries(
    predictions: Mapping[Any, str] | Iterable[tuple[Any, str]], expected_ids: Iterable[int] | None = None
) -> list[dict[str, int | str]]:
    """Entries of a result file, sorted by question id: [{"question_id": 1, "answer": "yes"}, ...].

    Args:
        predictions: answers by question id, or pairs; ids may be numpy or torch whole numbers, the result has ints.
        expected_ids: if given, the ids must be exactly these (servers refuse anything else).

    Raises:
        DataError: an id is no whole number or stands twice, an answer is no string, ids are missing or too many.
    """
    pairs = predictions.items() if isinstance(predictions, Mapping) else predictions
    answers: dict[int, str] = {}
    for raw_id, answer in pairs:
        try:
            if isinstance(raw_id, bool):
                raise TypeError
            qid = operator.index(raw_id)
        except TypeError:
            raise DataError(f"a question id must be a whole number, got {raw_id!r:.80}") from None
        if qid in answers:
            raise DataError(f"question {qid} is answered twice; servers refuse repeated ids")
        answers[qid] = _text(answer, qid)
    if expected_ids is not None:
        _check_cover(answers, dict.fromkeys(expected_ids))
    return [{"question_id": qid, "answer": answers[qid]} for qid in sorted(answers)]


def _check_cover(predictions: Mapping[int, Any], wanted: Mapping[int, Any]) -> None:
    missing = [qid for qid in wanted if qid not in predictions]
    extra = [qid for qid in predictions if qid not in wanted]
    if missing or extra:
        raise DataError(
            f"predictions must cover exactly the {len(wanted)} questions: {len(missing)} missing {_first(missing)}, "
            f"{len(extra)} not asked {_first(extra)}; are they of the same split?"
        )


def _first(ids: list[int]) -> str:
    return f"(first {', '.join(map(repr, ids[:3]))})" if ids else ""


def _question_id(annotation: Mapping[str, Any], place: int) -> int:
    qid = annotation.get("question_id") if isinstance(annotation, Mapping) else None
    if type(qid) is not int:
        raise DataError(f'annotation {place}: "question_id" must be a whole number, got {annotation!r:.120}')
    return qid


def _human_answers(annotation: Mapping[str, Any], qid: int) -> list[str]:
    answers = annotation.get("answers")
    if isinstance(answers, list):
        answers = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    if not isinstance(answers, list) or not all(type(answer) is str for answer in answers):
        raise DataError(f'question {qid}: "answers" must be a list of answers, got {annotation.get("answers")!r:.120}')
    if len(answers) < MIN_ANSWERS:
        raise DataError(
            f"question {qid} has {len(answers)} answers; official accuracy compares at least {MIN_ANSWERS} people "
            "(ten in VQA v2), use the soft score for data with fewer"
        )
    return answers


def _text(answer: Any, qid: int) -> str:
    if type(answer) is not str:
        raise DataError(f"question {qid}: an answer must be a string, got {answer!r:.80}")
    return answer


def _mean(scores: Iterable[float]) -> Mean:
    scores = list(scores)
    return Mean(sum(scores), len(scores))
