"""Scores of VizWiz: answers against those of ten people by three text rules, and answerability.

Sources: ``process_text`` and the criterion of the course competition's ``main.py``; LLaVA's ``m4c_evaluator.py``
(EvalAI's answer processor, TextVQA accuracy); the public evaluator of VizWiz. What a text becomes has odd sides
("phone" is "ph1") that labels and submissions share, so they are kept.

Deliberate difference: sums are divided by the number of people, where the course divides by 10 whatever it is.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import DataError
from data.metrics.vqa import MIN_ANSWERS, Mean, ten_choose_nine
from data.vqa_answers import clean_spaces, normalize_official, normalize_words, strip_punctuation

_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_LONE_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_MARK = re.compile(r"[^\w\s':]")
_CONTRACTIONS = {f"{stem}nt": f"{stem}n't" for stem in "do is are wo ca would could".split()}
_CONTRACTIONS_OF_FORK = _CONTRACTIONS | {"its": "it's", "youre": "you're"}


def process_text(text: str, *, llava_fork: bool = False) -> str:
    """Normalise a question or an answer as the course competition does; numbers and contractions also within words.

    Args:
        text: anything; the result can be empty.
        llava_fork: two more contractions, as in the competition's LLaVA pipeline.
    """
    text = text.lower()
    for digits, word in enumerate(_NUMBERS):
        text = text.replace(word, str(digits))
    text = _ARTICLE.sub("", _LONE_FULL_STOP.sub("", text))
    for plain, contraction in (_CONTRACTIONS_OF_FORK if llava_fork else _CONTRACTIONS).items():
        text = text.replace(plain, contraction)
    return " ".join(_MARK.sub(" ", text).split())


def normalize_evalai(text: str) -> str:
    """Normalise an answer as LLaVA does before an upload to VizWiz; the result can be empty."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    # stripped twice: the ends count for marks beside a space
    return normalize_words(strip_punctuation(clean_spaces(text.strip())))


def _as_it_is(text: str) -> str:
    return text


TextRule = Callable[[str], str]
# name of the rule: what is done to the prediction, what to the people's answers
TEXT_RULES: dict[str, tuple[TextRule, TextRule]] = {
    "course": (process_text, process_text),
    "textvqa": (normalize_evalai, normalize_evalai),
    # with straight apostrophes; the public evaluator writes curly ones into contractions, which nobody types
    "vizwiz": (normalize_official, _as_it_is),
}


@dataclass(frozen=True)
class VizWizAccuracy:
    """Scores of predictions, fractions.

    Attributes:
        per_image: score by image name.
        overall: over all images.
        per_answer_type: over the images of each answer type; empty if none is given.
    """

    per_image: dict[str, float]
    overall: Mean
    per_answer_type: dict[str, Mean]


def vizwiz_accuracy(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    answer_types: Mapping[str, str] | None = None,
    *,
    rule: str = "course",
) -> VizWizAccuracy:
    """Accuracy of answers by image name.

    Args:
        predictions: the model's answer.
        answers: what the people said, raw.
        answer_types: such as ``yes/no``; images that are not in it are in no group.
        rule: a key of ``TEXT_RULES``.

    Raises:
        DataError: an unknown rule, too few people, or predictions that do not cover exactly the images.
    """
    if rule not in TEXT_RULES:
        raise DataError(f"the text rule must be one of {', '.join(TEXT_RULES)}, got {rule!r:.40}")
    missing, foreign = answers.keys() - predictions.keys(), predictions.keys() - answers.keys()
    if missing or foreign or not answers:
        first = f" (first {min(missing or foreign)})" if missing or foreign else ""
        raise DataError(
            f"predictions must cover exactly the {len(answers)} images with answers: {len(missing)} missing, "
            f"{len(foreign)} not asked{first}; are they of the same split?"
        )
    treat_prediction, treat_answer = TEXT_RULES[rule]
    per_image: dict[str, float] = {}
    groups: dict[str, list[float]] = {}
    for image, of_people in answers.items():
        if len(of_people) < MIN_ANSWERS:
            raise DataError(
                f"image {image} has {len(of_people)} answers; the accuracy compares at least {MIN_ANSWERS} people "
                "(ten in VizWiz): leave the image out"
            )
        score = ten_choose_nine(treat_prediction(predictions[image]), [treat_answer(answer) for answer in of_people])
        per_image[image] = score
        if answer_types and image in answer_types:
            groups.setdefault(answer_types[image], []).append(score)
    means = {name: Mean(sum(scores), len(scores)) for name, scores in groups.items()}
    return VizWizAccuracy(per_image, Mean(sum(per_image.values()), len(per_image)), means)


def average_precision(is_positive: np.ndarray, scores: np.ndarray) -> float:
    """Area under the steps of precision over recall, each threshold taken with all that have its score.

    Args:
        is_positive: (N,) bool, at least one True.
        scores: (N,), higher for what is more likely positive.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last place of each distinct score
    true_positives = np.cumsum(is_positive[order])[ends]
    recall_gains = np.diff(true_positives, prepend=0) / true_positives[-1]
    return float(np.sum(recall_gains * (true_positives / (ends + 1))))


def answerability_scores(is_answerable: Sequence[bool], predicted: Sequence[float]) -> dict[str, float]:
    """Scores of VizWiz task 2, in which ``unanswerable`` is what is looked for.

    Args:
        is_answerable: per question, the truth.
        predicted: per question, in [0, 1], how sure it is that the question can be answered.

    Returns:
        Fractions ``average_precision`` and ``f1``, the latter for those below 0.5 being called unanswerable.

    Raises:
        DataError: lengths differ, a number is not in [0, 1], or no question is unanswerable.
    """
    positive, answerable = ~np.array(is_answerable, dtype=bool), np.array(predicted, dtype=np.float64)
    if positive.shape != answerable.shape:
        raise DataError(f"{len(predicted)} answerability predictions for {len(is_answerable)} questions: give each one")
    wrong = np.flatnonzero(~((answerable >= 0) & (answerable <= 1)))  # finds NaN too
    if len(wrong):
        raise DataError(f"answerability prediction {wrong[0]} must be in [0, 1], got {answerable[wrong[0]]:g}")
    if not positive.any():
        raise DataError("no question is unanswerable, so there is no average precision: score more questions")
    scores = 1 - answerable
    found = scores > 0.5
    f1 = 2 * np.sum(found & positive) / (np.sum(found) + np.sum(positive))
    return {"average_precision": average_precision(positive, scores), "f1": float(f1)}
