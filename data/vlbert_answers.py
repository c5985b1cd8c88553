"""VL-BERT's answer list and soft targets.

Source: the VQA data set of VL-BERT. The list is normalised, what people said is not; of two entries that become equal
the first counts.
"""

from collections import Counter
from collections.abc import Sequence
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
        cleaned = [entry.strip().lower() for entry in entries]
        self.answers = tuple(normalize_entry(entry) for entry in cleaned if entry)
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
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"no answer list at {path} ({error.strerror}): give DATASET.ANSWER_VOCAB_FILE") from None
        found = cls(lines, source=str(path))
        if num_answers is not None and len(found) != num_answers:
            raise DataError(f"{path} has {len(found)} answers, ANSWER_VOCAB_SIZE says {num_answers}: make them equal")
        return found

    def __len__(self) -> int:
        """Number of labels."""
        return len(self.answers)

    def targets(self, said: Sequence[str]) -> Tensor:
        """(answers,) soft scores of what ten people said."""
        scores = torch.zeros(len(self))
        for answer, count in Counter(said).items():
            label = self._label_of.get(answer)
            if label is not None and answer != UNKNOWN:
                scores[label] = soft_score(min(count, 10))
        return scores
