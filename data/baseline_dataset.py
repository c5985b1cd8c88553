"""Samples of the course baseline: an image of one size, a question vector and, where there is one, a target.

Images are resized as in the original (Pillow's bilinear, aspect ratio not kept). Bytes travel to the device.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from data.baseline_dictionaries import Dictionaries
from data.image_reader import ImageReader
from data.transforms import TrainTransform
from data.vizwiz import VizWizRow

NO_TARGET = -100
MIN_CROP_SCALE = 0.7
JITTER = 0.2


class BaselineTransform:
    """Resize; with ``augment`` a mild crop before and a change of brightness, contrast and colour after it.

    Nothing is mirrored: that would turn texts and make questions with "left" and "right" wrong.
    """

    def __init__(self, size: int, *, augment: bool = False) -> None:
        """Set the side in pixels."""
        scale = MIN_CROP_SCALE if augment else 1.0
        self._resize = TrainTransform(size, "bilinear", min_crop_scale=scale, hflip=False, exact=True)
        self._augment = augment

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Tensor:
        """(H, W, 3) uint8 → (3, S, S) uint8; all draws come from ``rng``."""
        resized = self._resize(image, rng)
        if not self._augment:
            return resized
        picture = Image.fromarray(resized.permute(1, 2, 0).contiguous().numpy())
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            picture = change(picture).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


class BaselineDataset:
    """Questions and images of one split."""

    def __init__(
        self,
        rows: Sequence[VizWizRow],
        images: ImageReader,
        dictionaries: Dictionaries,
        targets: Sequence[int] | None = None,
    ) -> None:
        """Samples of ``rows``; ``targets`` are classes, absent where answers are only to be predicted."""
        self._rows, self._images, self._dictionaries, self._targets = rows, images, dictionaries, targets

    def __len__(self) -> int:
        """Number of questions."""
        return len(self._rows)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Read and transform question ``index``.

        Raises:
            DataError: the image cannot be read, and is not to be replaced; names sample, file and reason.
        """
        row = self._rows[index]
        image, image_error = self._images.read(row.image, rng, f"sample {index} (question {row.id})")
        return {
            "image": image,
            "question": self._dictionaries.question_vector(row.question),
            "target": NO_TARGET if self._targets is None else self._targets[index],
            "sample_id": index,
            "image_error": image_error,
        }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch with ``image`` (B, 3, S, S) uint8, ``question`` (B, Q), ``target`` (B,), ids and replaced images."""
    errors = [sample["image_error"] for sample in samples if sample["image_error"]]
    return {
        "image": torch.stack([sample["image"] for sample in samples]),
        "question": torch.stack([sample["question"] for sample in samples]),
        "target": torch.tensor([sample["target"] for sample in samples]),
        "sample_id": [sample["sample_id"] for sample in samples],
        "images_replaced": len(errors),
        "image_errors": errors,
    }
