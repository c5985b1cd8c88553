"""BEiT-3's samples of captioning: a caption of which some tokens are masked, or an image to caption."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.caption_index import CaptionRecord
from data.caption_masking import mask_caption
from data.collate import pad_tokens
from data.image_reader import ImageReader
from data.tokenizers.spm import XLMRTokenizer


@dataclass(frozen=True)
class CaptionSample:
    """One caption with its image; the three lists are as long as the caption with its special tokens."""

    sample_id: int  # row of the index
    image_id: int
    image: Tensor  # (3, S, S) uint8
    tokens: list[int]  # clean
    masked_tokens: list[int]
    masked_positions: list[int]  # 1 where the loss counts
    image_error: str = ""  # why the image is a grey stand-in; empty for a good one


@dataclass(frozen=True)
class ImageSample:
    """One image to caption."""

    sample_id: int
    image_id: int
    image: Tensor  # (3, S, S) uint8
    image_error: str = ""


class BEiT3CaptionDataset:
    """Captions to train on, with their images."""

    def __init__(
        self,
        records: Sequence[CaptionRecord],
        images: ImageReader,
        tokenizer: XLMRTokenizer,
        *,
        mask_prob: float,
        max_tokens: int,
    ) -> None:
        """Samples of ``records``.

        Args:
            records: rows of a training index; all have a text.
            images: reads and transforms their images.
            tokenizer: builds the token segment.
            mask_prob: share of the tokens to hide.
            max_tokens: longest segment, special tokens included; longer captions are cut.
        """
        self._records, self._images, self._tokenizer = records, images, tokenizer
        self._mask_prob, self._max_tokens = mask_prob, max_tokens

    def __len__(self) -> int:
        """Number of captions."""
        return len(self._records)

    def sample(self, index: int, rng: np.random.Generator) -> CaptionSample:
        """Read the image and draw which tokens of the caption are hidden; every draw comes from ``rng``.

        Raises:
            DataError: the image cannot be read, and is not to be replaced; names sample, image id, file and reason.
        """
        record = self._records[index]
        image, image_error = self._images.read(record.image_path, rng, f"sample {index} (image {record.image_id})")
        tokens = self._tokenizer.build_segment(record.tokens, self._max_tokens)
        draws = random.Random(int(rng.integers(2**63)))  # the masking rule is written for Python's generator
        masked_tokens, masked_positions = mask_caption(
            tokens, self._mask_prob, self._tokenizer.mask_id, self._tokenizer.vocab_size, draws
        )
        return CaptionSample(index, record.image_id, image, tokens, masked_tokens, masked_positions, image_error)


class CaptionImageDataset:
    """Images to caption."""

    def __init__(self, records: Sequence[CaptionRecord], images: ImageReader) -> None:
        """``records`` as ``BEiT3CaptionDataset``; their text, if any, is not read."""
        self._records, self._images = records, images

    def __len__(self) -> int:
        """Number of images."""
        return len(self._records)

    def sample(self, index: int, rng: np.random.Generator) -> ImageSample:
        """Read and transform image ``index``.

        Raises:
            DataError: as ``BEiT3CaptionDataset.sample``.
        """
        record = self._records[index]
        image, image_error = self._images.read(record.image_path, rng, f"sample {index} (image {record.image_id})")
        return ImageSample(index, record.image_id, image, image_error)


class CaptionCollate:
    """Joins training samples, text padded to the longest caption."""

    def __init__(self, pad_id: int, *, multiple_of: int = 1) -> None:
        """``multiple_of`` rounds text lengths up, see ``pad_tokens``."""
        self._pad_id, self._multiple_of = pad_id, multiple_of

    def __call__(self, samples: list[CaptionSample]) -> dict[str, Any]:
        """Batch: ``image`` (B, 3, S, S) uint8, ``masked_tokens``, ``masked_positions`` (bool) and ``padding_mask`` (or
        None), all (B, T), and ``targets`` (M,): the clean tokens at the M masked positions, row by row.
        """
        masked_tokens, padding_mask = self._pad([sample.masked_tokens for sample in samples])
        tokens, _ = self._pad([sample.tokens for sample in samples])
        positions = pad_tokens([sample.masked_positions for sample in samples], 0, multiple_of=self._multiple_of)[0]
        masked_positions = positions.bool()
        return {
            **_image_batch(samples),
            "masked_tokens": masked_tokens,
            "masked_positions": masked_positions,
            "padding_mask": padding_mask,
            "targets": tokens[masked_positions],
        }

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        return pad_tokens(rows, self._pad_id, multiple_of=self._multiple_of)


def collate_images(samples: list[ImageSample]) -> dict[str, Any]:
    """Batch of images to caption: ``image`` (B, 3, S, S) uint8 and ids."""
    return _image_batch(samples)


def _image_batch(samples: Sequence[CaptionSample | ImageSample]) -> dict[str, Any]:
    return {
        "image": torch.stack([sample.image for sample in samples]),
        "image_id": [sample.image_id for sample in samples],
        "sample_id": [sample.sample_id for sample in samples],
        "images_replaced": sum(bool(sample.image_error) for sample in samples),
        "image_errors": [sample.image_error for sample in samples if sample.image_error],
    }
