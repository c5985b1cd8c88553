"""Samples of question answering: records of an index file or of one's own data, to tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data.collate import pad_tokens
from data.image_reader import ImageReader
from data.vqa_index import VQARecord


class Tokenizer(Protocol):
    """What the tokenizers of all families offer."""

    def build_segment(self, tokens: Sequence[int], max_len: int) -> list[int]:
        """Model input of a text of at most ``max_len`` ids, the special ones at both ends included."""
        ...


@dataclass(frozen=True)
class VQASample:
    """One question with its image."""

    sample_id: int  # row of the index
    question_id: int
    image: Tensor  # (3, S, S) uint8
    tokens: list[int]  # with the special tokens at both ends
    labels: Sequence[int]
    scores: Sequence[float]
    image_error: str = ""  # why the image is a grey stand-in; empty for a good one


class VQADataset:
    """Questions and images of one split."""

    def __init__(
        self,
        records: Sequence[VQARecord],
        images: ImageReader,
        tokenizer: Tokenizer,
        *,
        max_tokens: int = 64,
    ) -> None:
        """Samples of ``records``; questions are cut to ``max_tokens`` with their two special tokens.

        Args:
            records: rows of the index.
            images: reads and transforms their images.
            tokenizer: builds the token segment.
            max_tokens: longest segment, special tokens included.
        """
        self._records, self._images, self._tokenizer, self._max_tokens = records, images, tokenizer, max_tokens

    def __len__(self) -> int:
        """Number of questions."""
        return len(self._records)

    def sample(self, index: int, rng: np.random.Generator) -> VQASample:
        """Read, decode and transform question ``index``.

        Raises:
            DataError: the image cannot be read, and is not to be replaced; names sample, question, file and reason.
        """
        record = self._records[index]
        where = f"sample {index} (question {record.question_id})"
        image, image_error = self._images.read(record.image_path, rng, where)
        return VQASample(
            sample_id=index,
            question_id=record.question_id,
            image=image,
            tokens=self._tokenizer.build_segment(record.tokens, self._max_tokens),
            labels=record.labels,
            scores=record.scores,
            image_error=image_error,
        )


class VQACollate:
    """Joins samples into a batch, text padded to the longest question."""

    def __init__(self, pad_id: int, num_answers: int, *, multiple_of: int = 1) -> None:
        """``multiple_of`` rounds text lengths up, see ``pad_tokens``."""
        self._pad_id, self._num_answers, self._multiple_of = pad_id, num_answers, multiple_of

    def __call__(self, samples: list[VQASample]) -> dict[str, Any]:
        """Batch with ``image`` (B, 3, S, S) uint8, ``question``, ``padding_mask`` (or None), ``targets``, ids."""
        question, padding_mask = pad_tokens(
            [sample.tokens for sample in samples], self._pad_id, multiple_of=self._multiple_of
        )
        targets = torch.zeros(len(samples), self._num_answers)
        for row, sample in enumerate(samples):
            targets[row, list(sample.labels)] = torch.tensor(list(sample.scores), dtype=torch.float32)
        return {
            "image": torch.stack([sample.image for sample in samples]),
            "question": question,
            "padding_mask": padding_mask,
            "targets": targets,
            "question_id": [sample.question_id for sample in samples],
            "sample_id": [sample.sample_id for sample in samples],
            "images_replaced": sum(bool(sample.image_error) for sample in samples),
            "image_errors": [sample.image_error for sample in samples if sample.image_error],
        }
