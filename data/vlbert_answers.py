"""VL-BERT's answer list and soft targets.

Source: the VQA data set of VL-BERT. The list is normalised, what people said is not; of two entries that become equal
the first counts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.errors import DataError
from data.vqa_answers import soft_score, strip_punctuation

UNKNOWN = "<unk>"  # the entry of answers that are not in the list; its target is always 0


def normalize_entry(text: str) -> str:
    """An entry of the list: punctuation away, nothing else."""
    return text if text == UNKNOWN else strip_punctuation(text)


class AnswerList:
    """Answers by label."""

    def __init__(self, entries: Sequence[str], source: str = "the answer list") -> None:
        """Normalise and number the entries.

        Raises:
            DataError: no entries, or no ``<unk>``.
        """
        self.entries = tuple(cleaned for entry in entries if (cleaned := entry.strip().lower()))
        self.answers = tuple(map(normalize_entry, self.entries))
        if UNKNOWN not in self.answers:
            raise DataError(f"{source} has no {UNKNOWN}: give VL-BERT's answers_vqa.txt, an answer a line")
        self._label_of: dict[str, int] = {}
        for label, answer in enumerate(self.answers):
            self._label_of.setdefault(answer, label)

    @classmethod
    def load(cls, path: str | Path, num_answers: int | None = None) -> "AnswerList":
        """Read an answer a line.

        Raises:
            DataError: missing, without ``<unk>``, or not as many answers as the config says.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise DataError(f"no answer list at {path} ({error.strerror}): give DATASET.ANSWER_VOCAB_FILE") from None
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text: save it as UTF-8") from None
        found = cls(lines, source=str(path))
        if num_answers is not None and len(found) != num_answers:
            raise DataError(f"{path} has {len(found)} answers, ANSWER_VOCAB_SIZE says {num_answers}: make them equal")
        return found

    def __len__(self) -> int:
        """Number of labels."""
        return len(self.answers)

    def __getitem__(self, label: int) -> str:
        """Answer of a label."""
        return self.answers[label]

    def __contains__(self, answer: str) -> bool:
        """Whether exactly this text has a label."""
        return self.label(answer) is not None

    def label(self, answer: str) -> int | None:
        """Label of exactly this text; None if it is not in the list, and for the unknown one."""
        return None if answer == UNKNOWN else self._label_of.get(answer)

    def soft_labels(self, said: Sequence[str]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Labels of what ten people said, and their scores in (0, 1], in order of first mention."""
        counts = ((self.label(answer), count) for answer, count in Counter(said).items())
        found = {label: soft_score(min(count, 10)) for label, count in counts if label is not None}
        return tuple(found), tuple(found.values())

    def targets(self, said: Sequence[str]) -> Tensor:
        """(answers,) soft scores of what ten people said."""
        scores = torch.zeros(len(self))
        for label, score in zip(*self.soft_labels(said), strict=True):
            scores[label] = score
        return scores

    @classmethod
    def build(cls, answers: Iterable[str], *, min_count: int, most: int | None = None) -> "AnswerList":
        """List of the most frequent answers, ``<unk>`` first.

        Args:
            answers: one a question, such as the most common one of its ten.
            min_count: rarer ones are left out.
            most: length of the list; None for any.

        Raises:
            DataError: no answer is frequent enough.
        """
        counts = Counter(" ".join(normalize_entry(answer.strip().lower()).split()) for answer in answers)
        kept = [answer for answer, count in counts.most_common() if count >= min_count and answer.strip()]
        if not kept:
            raise DataError(f"none of the {len(counts)} different answers occurs {min_count} times: lower the number")
        return cls([UNKNOWN, *kept[: None if most is None else most - 1]], source="the answers of the data")
