"""BEiT-3's samples: records of an index file or of one's own data, to image and token tensors."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.collate import pad_tokens
from data.errors import DataError
from data.files import resolve_inside
from data.images import load_image
from data.tokenizers.spm import XLMRTokenizer
from data.vqa_index import VQARecord

NUM_SHOWN = 5  # missing images named in the message
ImageTransform = Callable[[Any, np.random.Generator], Tensor]


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


class BEiT3VQADataset:
    """Questions and images of one split."""

    def __init__(
        self,
        records: Sequence[VQARecord],
        image_root: Path,
        transform: ImageTransform,
        tokenizer: XLMRTokenizer,
        *,
        image_size: int,
        max_tokens: int = 64,
        replace_broken_images: bool = False,
    ) -> None:
        """Samples of ``records``; questions are cut to ``max_tokens`` with their two special tokens.

        Args:
            records: rows of the index.
            image_root: folder that the records' image paths are relative to, and must not leave.
            transform: image → (3, S, S) uint8.
            tokenizer: builds the token segment.
            image_size: S in pixels, for the grey stand-in of a broken image.
            max_tokens: longest segment, special tokens included.
            replace_broken_images: put a grey image where one cannot be read, instead of stopping.
        """
        self._records, self._root, self._transform, self._tokenizer = records, image_root, transform, tokenizer
        self._image_size, self._max_tokens = image_size, max_tokens
        self._replace_broken_images = replace_broken_images

    def __len__(self) -> int:
        """Number of questions."""
        return len(self._records)

    def sample(self, index: int, rng: np.random.Generator) -> VQASample:
        """Read, decode and transform question ``index``.

        Raises:
            DataError: the image cannot be read, and is not to be replaced; names sample, question, file and reason.
        """
        record = self._records[index]
        image_error = ""
        try:
            image = self._transform(load_image(resolve_inside(self._root, record.image_path)), rng)
        except DataError as error:
            image_error = f"sample {index} (question {record.question_id}): {error}"
            if not self._replace_broken_images:
                raise DataError(image_error) from None
            image = torch.full((3, self._image_size, self._image_size), 128, dtype=torch.uint8)
        return VQASample(
            sample_id=index,
            question_id=record.question_id,
            image=image,
            tokens=self._tokenizer.build_segment(record.tokens, self._max_tokens),
            labels=record.labels,
            scores=record.scores,
            image_error=image_error,
        )


def check_images_exist(relative: Iterable[str], root: Path) -> None:
    """Refuse a data set with missing images before any work starts.

    Each folder is listed once: asking for every file alone takes minutes on a network share.

    Args:
        relative: image paths of the records.
        root: folder that they are relative to.

    Raises:
        DataError: with the number of missing images and the first few.
    """
    by_folder: dict[str, set[str]] = {}
    for path in relative:
        by_folder.setdefault(os.path.dirname(path), set()).add(path)
    missing = []
    for folder, paths in by_folder.items():
        present = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        # a file system may spell a name differently in its list, in case or in accents
        missing += [path for path in paths if os.path.basename(path) not in present and not (root / path).is_file()]
    if missing:
        total = sum(map(len, by_folder.values()))
        raise DataError(
            f"{len(missing)} of {total} images are not in {root}, the first: {', '.join(sorted(missing)[:NUM_SHOWN])}; "
            "check --data_path, or give --skip_broken_images to put a grey image in their place"
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
