"""What the course baseline sees of questions and answers: dictionaries, question vectors, targets.

Source: the data set in ``main.py`` of the VizWiz course competition. A question is a 0/1 vector over the training
words, a target the most frequent answer. The normalisation comes in as ``process_text`` (the competition's own).

Deliberate differences: the original builds its dictionary from normalised questions but looks raw ones up, so ``this?``
and ``What`` are unknown words to it; here both are normalised, and ``reference=True`` brings the defect back. It may
learn an answer that is empty once normalised; ``choose_targets`` does not, ``mode_targets`` is the original's.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from data.errors import DataError
from data.vizwiz import UNANSWERABLE

TextFunction = Callable[[str], str]


def build_word_ids(questions: Iterable[str], process_text: TextFunction) -> dict[str, int]:
    """Number the words of the normalised questions in the order of their first appearance.

    Words lie between single spaces, as in the original; so a question that is empty once normalised gives the word "".

    Args:
        questions: raw, of the training split.
        process_text: the normalisation.
    """
    return _number(word for question in questions for word in process_text(question).split(" "))


def build_answer_ids(answers: Iterable[Iterable[str]], process_text: TextFunction) -> dict[str, int]:
    """Number the normalised answers, each a whole string, in the order of their first appearance.

    Args:
        answers: per question, what the people said, raw; of the training split.
        process_text: the normalisation.
    """
    return _number(process_text(answer) for of_question in answers for answer in of_question)


def frequent_answer_ids(answers: Iterable[Iterable[str]], process_text: TextFunction, min_count: int) -> dict[str, int]:
    """Number the normalised answers that people gave ``min_count`` times or more, in the order of first appearance.

    Args:
        answers: per question, what the people said, raw; of the training split.
        process_text: the normalisation; an answer that it leaves empty is left out.
        min_count: over all questions and people.

    Raises:
        DataError: there is none.
    """
    counts = Counter(process_text(answer) for of_question in answers for answer in of_question)
    frequent = _number(text for text, count in counts.items() if text and count >= min_count)
    if not frequent:
        raise DataError(f"no answer was given {min_count} times or more: lower --min_answer_count")
    return frequent


def question_vector(
    question: str, word_ids: Mapping[str, int], process_text: TextFunction, *, reference: bool = False
) -> Tensor:
    """Mark the words of a question.

    Args:
        question: raw.
        word_ids: of the training questions, whichever split the question is from.
        process_text: the normalisation that ``word_ids`` was built with.
        reference: look the words up as they were typed, like the original.

    Returns:
        (len(word_ids) + 1,) float32: 1 at each known word; the last entry is 1 if any word is unknown.
    """
    vector = torch.zeros(len(word_ids) + 1)
    for word in (question if reference else process_text(question)).split(" "):
        vector[word_ids.get(word, len(word_ids))] = 1.0
    return vector


def encode_answers(
    answers: Iterable[Sequence[str]], answer_ids: Mapping[str, int], process_text: TextFunction
) -> list[list[int]]:
    """Ids of all answers of all questions.

    Args:
        answers: per question, what the people said, raw.
        answer_ids: of the training answers.
        process_text: the normalisation that ``answer_ids`` was built with.

    Raises:
        DataError: a question without answers, or an answer that is not in the dictionary.
    """
    return [
        [_answer_id(answer, row, answer_ids, process_text) for answer in _nonempty(of_question, row)]
        for row, of_question in enumerate(answers)
    ]


def mode_targets(encoded: Iterable[Sequence[int]]) -> Tensor:
    """The most frequent answer of each question; of equally frequent ones the one that was given first.

    Args:
        encoded: per question the ids of its answers, in the order of the file.

    Returns:
        (questions,) int64.

    Raises:
        DataError: a question without answers.
    """
    # Counter keeps the order of first appearance and most_common is stable: the first seen wins
    modes = [Counter(_nonempty(ids, row)).most_common(1)[0][0] for row, ids in enumerate(encoded)]
    return torch.tensor(modes, dtype=torch.long)


def choose_targets(
    answers: Iterable[Sequence[str]], answer_ids: Mapping[str, int], process_text: TextFunction
) -> list[int | None]:
    """The most frequent answer that can be learnt of each question; of equally frequent ones the one given first.

    Answers that are empty once normalised give way to the others; where all are, ``unanswerable`` stands in.

    Args:
        answers: per question, what the people said, raw.
        answer_ids: number by normalised answer; several answers may share one.
        process_text: the normalisation that ``answer_ids`` was built with.

    Returns:
        Per question a number, or None where none of its answers has one.
    """
    targets: list[int | None] = []
    for of_question in answers:
        texts = list(filter(None, map(process_text, of_question))) or [UNANSWERABLE]
        known = [answer_ids[text] for text in texts if text in answer_ids]
        targets.append(Counter(known).most_common(1)[0][0] if known else None)
    return targets


def _number(items: Iterable[str]) -> dict[str, int]:
    return {item: number for number, item in enumerate(dict.fromkeys(items))}


def _nonempty(of_question: Sequence, row: int) -> Sequence:
    if not of_question:
        raise DataError(f"question {row} (counted from 0) has no answers and so no target: leave it out or answer it")
    return of_question


def _answer_id(answer: str, row: int, answer_ids: Mapping[str, int], process_text: TextFunction) -> int:
    found = answer_ids.get(process_text(answer))
    if found is None:
        raise DataError(
            f"answer {answer!r} of question {row} (counted from 0) is not in the answer dictionary: "
            f"build the dictionary with this question or leave the question out"
        )
    return found
