"""Answers of VQA: one text normalisation in two treatments, the soft score by count, and the list of known answers.

Source: the normalisation of the official VQA evaluator, of which BEiT-3 and VLE use steps 2 to 8 to build their labels.
Kept from it: one "1,000" anywhere deletes every punctuation mark, and at most 32 full stops are deleted.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from data.errors import DataError
from data.files import iterate_jsonl, write_jsonl_atomic

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
MAX_FULL_STOPS = 32  # the original passes a flag (re.UNICODE, 32) where the count belongs
NUMBERS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
NUMBERS["none"] = "0"
ARTICLES = frozenset(("a", "an", "the"))
SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)  # by the number of people, of ten, who gave the answer; 1.0 from four on


def answer_type(answer: str) -> str:
    """``yes/no``, ``number`` or ``other``, as the annotations of VQA and VizWiz have it, of a normalised answer."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if answer.isdigit() else "other"


def _contractions() -> dict[str, str]:
    """The official table; its four entries with a capital I are left out, since they never meet lower-cased words."""
    table: dict[str, str] = {}
    for (
        stem
    ) in "ai are ca could did does do had has have is might must need ought sha should was were wo would".split():
        table[f"{stem}nt"] = f"{stem}n't"
    for stem in "could had might should would".split():
        table[f"{stem}nt've"] = table[f"{stem}n'tve"] = f"{stem}n't've"
    for stem in "he it she somebody someone something there they we who you".split():
        table[f"{stem}d've"] = table[f"{stem}'dve"] = f"{stem}'d've"
    endings = {
        "ve": "could might must not should would they we what where who you",
        "d": "he how it someone something there they where who you",
        "ll": "how it somebody someone something they what who why you",
        "s": "he how somebody someone that there what when where who why",
        "re": "there they what why you",
    }
    for ending, stems in endings.items():
        for stem in stems.split():
            table[stem + ending] = f"{stem}'{ending}"
    table.update({"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "somebody'd": "somebodyd", "yall": "y'all"})
    table.update(dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at"))
    table.update(dict.fromkeys(("yall'll", "y'allll"), "y'all'll"))
    table.update(dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've"))
    return table


CONTRACTIONS = _contractions()


def strip_punctuation(text: str) -> str:
    """Delete or blank the 21 marks, then delete full stops that no digit follows.

    A mark is deleted where the text has it beside a space, or has digit-comma-digit anywhere; else it becomes a space.
    """
    result = text
    delete_all = DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in PUNCTUATION:
        if mark in text:
            delete = delete_all or f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if delete else " ")
    return FULL_STOP.sub("", result, count=MAX_FULL_STOPS)


def normalize_words(text: str) -> str:
    """Lower-case, numbers to digits, articles dropped, apostrophes put into contractions, single spaces."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """Answer text as BEiT-3 and VLE write it into their label list."""
    return normalize_words(strip_punctuation(text))


@lru_cache(maxsize=1 << 16)
def normalize_official(text: str) -> str:
    """Answer text as the official evaluator compares it: ``clean_spaces``, then the same steps."""
    return normalize_words(strip_punctuation(clean_spaces(text)))


def clean_spaces(text: str) -> str:
    """Line breaks and tabs as spaces, ends stripped (the evaluator's first step)."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def soft_score(count: int, num_answers: int = 10) -> float:
    """Score in [0, 1] of an answer that ``count`` of ``num_answers`` people gave.

    For ten people it is the table 0, 0.3, 0.6, 0.9, 1. For another number the count is scaled to ten and rounded to the
    nearest whole, halves up, but an answer that somebody gave counts at least once: 1 of 1 and 1 of 2 score 1.0,
    1 of 3 and 1 of 4 score 0.9, 1 of 5 scores 0.6, 1 of 30 scores 0.3.

    Raises:
        DataError: if ``count`` is not between 0 and ``num_answers``.
    """
    if not 0 <= count <= num_answers:
        raise DataError(
            f"the count of an answer must be between 0 and the number of answers {num_answers}, got {count}"
        )
    if count and num_answers != 10:
        count = max(1, (20 * count + num_answers) // (2 * num_answers))
    return SOFT_SCORES[min(count, 4)]


class AnswerVocabulary:
    """The answers that a classifier knows; the label of an answer is its place in the list."""

    def __init__(self, answers: Sequence[str], source: str = "the answer list") -> None:
        """Number the answers.

        Args:
            answers: distinct strings in label order.
            source: where they come from, for messages.

        Raises:
            DataError: if there is no answer, or one stands twice.
        """
        self.answers = tuple(answers)
        self._label_of = {answer: label for label, answer in enumerate(self.answers)}
        if not self.answers:
            raise DataError(f"{source} has no answers")
        if len(self._label_of) < len(self.answers):
            label = next(i for i, answer in enumerate(self.answers) if self._label_of[answer] != i)
            raise DataError(f"{source}: the answer {self.answers[label]!r} stands twice; every answer has one label")

    def __len__(self) -> int:
        """Number of labels."""
        return len(self.answers)

    def __getitem__(self, label: int) -> str:
        """Answer of a label."""
        return self.answers[label]

    def __contains__(self, answer: str) -> bool:
        """Whether exactly this text has a label."""
        return answer in self._label_of

    def label(self, answer: str) -> int | None:
        """Label of exactly this text, None if it is not in the list."""
        return self._label_of.get(answer)

    @classmethod
    def from_annotations(cls, multiple_choice_answers: Iterable[str], min_count: int = 9) -> "AnswerVocabulary":
        """Answers that occur at least ``min_count`` times after normalisation, in order of first appearance.

        On all of VQA v2 (train, then val annotations) this gives the 3129 labels of the published weights.

        Raises:
            DataError: if no answer occurs that often.
        """
        counts = Counter(map(normalize_answer, multiple_choice_answers))  # keeps the order of first appearance
        kept = [answer for answer, count in counts.items() if count >= min_count]
        if not kept:
            raise DataError(
                f"none of the {len(counts)} different answers occurs {min_count} times: lower --min_answer_count"
            )
        return cls(kept)

    @classmethod
    def load(cls, path: str | Path) -> "AnswerVocabulary":
        """Read ``answer2label.txt``: one {"answer": str, "label": int} a line, labels 0, 1, 2, ... in order.

        Raises:
            DataError: missing file, wrong keys or types, labels out of order, an answer twice; the line is named.
        """
        answers: dict[str, int] = {}
        advice = "scripts/make_index.py writes answer2label.txt beside the index files"
        for number, row in iterate_jsonl(path, advice=advice):
            answer, label = row.get("answer"), row.get("label")
            if type(answer) is not str or type(label) is not int:
                raise DataError(
                    f'{path}:{number}: a line must be {{"answer": text, "label": number}}, got {row!r:.120}'
                )
            if label != len(answers):
                raise DataError(f"{path}:{number}: label {label} where {len(answers)} is due; labels run 0, 1, 2, ...")
            if answer in answers:
                first = answers[answer]
                raise DataError(f"{path}:{number}: the answer {answer!r} has label {first} already; each stands once")
            answers[answer] = label
        return cls(list(answers), source=str(path))

    def save(self, path: str | Path) -> None:
        """Write ``answer2label.txt``, whole or not at all."""
        write_jsonl_atomic(path, self.rows())

    def rows(self) -> Iterable[dict[str, str | int]]:
        """The lines of ``answer2label.txt`` as objects."""
        return ({"answer": answer, "label": label} for label, answer in enumerate(self.answers))


def soft_targets(raw_answers: Sequence[str], vocabulary: AnswerVocabulary) -> tuple[list[int], list[float]]:
    """Labels and scores of one question, as BEiT-3 and VLE build them.

    The answers are counted as they stand, not normalised (so "Yes" meets no label), in order of first appearance.

    Args:
        raw_answers: what each person said; ten in VQA v2, and scored as if ten for any other number.
        vocabulary: known answers.

    Returns:
        Distinct labels and, parallel to them, scores in (0, 1]; both empty if no answer is known.
    """
    labels: list[int] = []
    scores: list[float] = []
    for answer, count in Counter(raw_answers).items():
        label = vocabulary.label(answer)
        if label is not None:
            labels.append(label)
            scores.append(soft_score(min(count, 10)))
    return labels, scores
