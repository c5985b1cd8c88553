"""Samples of VL-BERT: records, regions and perhaps images, to tensors and batches.

Source: the VQA data set and the collator of VL-BERT. As there, a mirrored sample has its boxes mirrored, and left and
right exchanged in question and answers, while features that were computed before stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.vlbert_images import pad_boxes, pad_images, transform
from data.vlbert_vqa import RegionPlaces, VLBertRecord

LoadImage = Callable[[VLBertRecord], np.ndarray]


@dataclass(frozen=True)
class VLBertSample:
    """One question with its regions, the whole image first."""

    sample_id: int  # place in the split
    question_id: int
    image: Tensor | None  # (3, height, width) float32; None with precomputed features
    boxes: Tensor  # (K, 4)
    features: tuple[np.ndarray, ...]  # (1, 2048) of the whole image, (K - 1, 2048) of the others; empty with an image
    info: Tensor  # width, height after the resize, and both ratios
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    scores: tuple[float, ...]


class VLBertDataset:
    """Questions of one split."""

    def __init__(
        self,
        records: Sequence[VLBertRecord],
        regions: RegionPlaces,
        *,
        flip_prob: float = 0.0,
        scales: tuple[int, int] = (600, 1000),
        load_image: LoadImage | None = None,
    ) -> None:
        """Samples of ``records``.

        Args:
            records: questions.
            regions: of their images.
            flip_prob: share of samples that are mirrored.
            scales: shorter side of the resized image, and limit of the longer one; boxes are resized alike.
            load_image: record → (H, W, 3) uint8 RGB, for models that look at the image; None: features are precomputed.
        """
        self._records, self._regions, self._load_image = records, regions, load_image
        self._flip_prob, self._scales = flip_prob, scales

    def __len__(self) -> int:
        """Number of questions."""
        return len(self._records)

    def sample(self, index: int, rng: np.random.Generator) -> VLBertSample:
        """Read question ``index``.

        Raises:
            DataError: its regions or its image cannot be read; names sample, question and reason.
        """
        record = self._records[index]
        flip = bool(rng.random() < self._flip_prob)
        try:
            found = self._regions.sources[record.place].regions(record.image_id)
            image = None if self._load_image is None else self._load_image(record)
            size = self._regions.size(record, found.size)
            sized = transform(found.boxes, size, image, flip=flip, scales=self._scales)
        except DataError as error:
            raise DataError(f"sample {index} (question {record.question_id}): {error}") from None
        features = () if image is not None else (found.whole[None], found.features)
        tokens, labels, scores = record.tokens, record.labels, record.scores
        if flip and record.flipped is not None:
            tokens, labels, scores = record.flipped
        return VLBertSample(
            index, record.question_id, sized.image, sized.boxes, features, sized.info, tokens, labels, scores
        )


class VLBertCollate:
    """Joins samples into a batch, everything padded to its longest."""

    def __init__(self, num_answers: int) -> None:
        """``num_answers`` is the width of the targets."""
        self._num_answers = num_answers

    def __call__(self, samples: list[VLBertSample]) -> dict[str, Any]:
        """Batch of ``boxes`` (B, K, 4 or 2052), ``sizes`` (B, 4), ``question`` (B, Q), ``targets`` (B, answers), ids.

        ``image`` (B, 3, height, width) is there for models that look at it.
        """
        question = np.zeros((len(samples), max(len(sample.tokens) for sample in samples)), np.int64)
        targets = np.zeros((len(samples), self._num_answers), np.float32)
        for place, sample in enumerate(samples):
            question[place, : len(sample.tokens)] = sample.tokens
            targets[place, list(sample.labels)] = sample.scores
        features = [sample.features for sample in samples] if samples[0].image is None else ()
        batch = {
            "boxes": pad_boxes([sample.boxes for sample in samples], features),
            "sizes": torch.stack([sample.info for sample in samples]),
            "question": torch.from_numpy(question),
            "targets": torch.from_numpy(targets),
            "question_id": [sample.question_id for sample in samples],
            "sample_id": [sample.sample_id for sample in samples],
            "images_replaced": 0.0,
        }
        if samples[0].image is not None:
            batch["image"] = pad_images([sample.image for sample in samples])
        return batch
