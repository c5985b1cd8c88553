"""What can be scored without looking at the picture: the bar that a model has to clear.

Pure functions from the records of VQA v2 files to predictions ``{question_id: answer}``; a tie goes to the answer that
was seen first.
"""

from collections import Counter
from collections.abc import Callable, Hashable


def most_frequent_answer(train_annotations: list[dict], eval_annotations: list[dict]) -> dict[int, str]:
    """The most frequent answer of the train annotations, for every question."""
    return _most_frequent(train_annotations, eval_annotations, keys=[lambda record: None])


def most_frequent_per_answer_type(train_annotations: list[dict], eval_annotations: list[dict]) -> dict[int, str]:
    """The most frequent train answer of the same ``answer_type`` (knowing that type tells a little already)."""
    return _most_frequent(train_annotations, eval_annotations, keys=[lambda r: r["answer_type"], lambda r: None])


def question_only_prior(
    train_annotations: list[dict],
    eval_annotations: list[dict],
    question_texts: dict[int, str],
) -> dict[int, str]:
    """The most frequent train answer to exactly this question text: the best guess of somebody with closed eyes.

    A text that train does not have falls back to its ``question_type`` (the first words), then to all questions.

    Args:
        train_annotations: records with ``question_id``, ``question_type`` and ``multiple_choice_answer``.
        eval_annotations: the same; their answers are not read.
        question_texts: question id to text, for both splits.
    """
    by_text = [lambda r: question_texts[r["question_id"]].strip().lower(), lambda r: r["question_type"], lambda r: None]
    return _most_frequent(train_annotations, eval_annotations, keys=by_text)


def _most_frequent(
    train_annotations: list[dict], eval_annotations: list[dict], keys: list[Callable[[dict], Hashable]]
) -> dict[int, str]:
    """Answer with the first key that train knows; the last one is the same for every record."""
    predictions = {}
    tables = [_best_answers(train_annotations, key) for key in keys]
    for record in eval_annotations:
        groups = ((table, key(record)) for table, key in zip(tables, keys, strict=True))
        predictions[record["question_id"]] = next(table[group] for table, group in groups if group in table)
    return predictions


def _best_answers(train_annotations: list[dict], key: Callable[[dict], Hashable]) -> dict[Hashable, str]:
    counts: dict[Hashable, Counter[str]] = {}
    for record in train_annotations:
        counts.setdefault(key(record), Counter())[record["multiple_choice_answer"]] += 1
    return {group: counter.most_common(1)[0][0] for group, counter in counts.items()}
