"""Training samples of LLaVA: a JSON list of conversations with images, to ids, labels and pixels.

Source: the supervised data set of LLaVA. Departures: a sample whose answers leave no label is an error that names it,
an image in the text without an image file, or the reverse, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.files import check_relative, read_json
from data.image_reader import ImageReader
from data.llava_conversation import Encoded, Template, Turn, collate, encode_conversation
from data.llava_features import FeatureReader
from data.llava_sampler import modality_length
from data.tokenizers.llama import IMAGE_TOKEN, LlamaTokenizer
from data.vizwiz import ANSWERS_KEY

SCHEMA = (
    '[{"id": "a1", "image": "a1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, '
    '{"from": "gpt", "value": "a cup"}]}]'
)


@dataclass(frozen=True)
class Conversation:
    """One sample.

    Attributes:
        name: its id.
        turns: of human and gpt.
        image: its path, or None for text alone.
        answers: of which each epoch takes one in place of the last turn's; empty: the last turn's.
    """

    name: str
    turns: tuple[Turn, ...]
    image: str | None
    answers: tuple[str, ...] = ()

    def variants(self) -> list[tuple[Turn, ...]]:
        """The turns with each of the answers."""
        who = self.turns[-1][0]
        return [(*self.turns[:-1], (who, answer)) for answer in self.answers] or [self.turns]


def read_conversations(path: str | Path) -> list[Conversation]:
    """A JSON list of samples; keys that are not known are left alone, as in the original.

    Raises:
        DataError: a wrong key or type; an image without its place in the text, or a place without an image.
    """
    content = read_json(path, advice=f"write a list of samples, such as {SCHEMA}")
    if not isinstance(content, list) or not content:
        raise DataError(f"{path} must hold a list of samples, such as {SCHEMA}")
    samples = []
    for number, row in enumerate(content):
        where = f"{path}: sample {number} (counted from 0)"
        turns = row.get("conversations") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f'{where} needs "conversations", a list of {{"from": …, "value": …}}')
        if not turns:
            raise DataError(f'{where} has no turn in its "conversations": give a question and an answer, or remove it')
        pairs = tuple((turn.get("from"), turn.get("value")) for turn in turns)
        if not all(isinstance(text, str) for _, text in pairs):
            raise DataError(f"{where} has a turn whose value is no text: mend the sample")
        image = row.get("image")
        if image is not None:
            check_relative(image, where)
        places = sum(IMAGE_TOKEN in text for _, text in pairs)
        if (image is None) != (places == 0):
            what = f"has an image but no {IMAGE_TOKEN} in its text" if image else f"has {IMAGE_TOKEN} but no image"
            raise DataError(f"{where} {what}: mend the sample")
        if places > 1:
            raise DataError(f"{where} has {IMAGE_TOKEN} in {places} turns and one image: keep it in one turn")
        answers = row.get(ANSWERS_KEY, [])
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f'{where}: "{ANSWERS_KEY}" must be a list of texts, got {answers!r:.80}')
        samples.append(Conversation(str(row.get("id", number)), pairs, image, tuple(answers)))
    return samples


@dataclass(frozen=True)
class LlavaSample:
    """ids and labels, and (3, S, S) uint8 pixels, black for text alone; or features in their place."""

    sample_id: int
    encoded: Encoded
    image: Tensor
    image_error: str = ""


class LlavaDataset:
    """Conversations of one file."""

    def __init__(
        self,
        samples: Sequence[Conversation],
        images: ImageReader,
        tokenizer: LlamaTokenizer,
        template: Template,
        *,
        image_size: int,
        max_length: int = 2048,
    ) -> None:
        """Encode as they are asked for.

        Args:
            samples: of the file.
            images: reads and transforms their images.
            tokenizer: of the base model.
            template: one of ``data.llava_conversation.TEMPLATES``.
            image_size: side in pixels.
            max_length: most tokens of a sample.
        """
        self._samples, self._tokenizer, self._template = samples, tokenizer, template
        self._images: ImageReader | FeatureReader = images
        self._blank = torch.zeros(3, image_size, image_size, dtype=torch.uint8)
        self._max_length, self._image_key = max_length, "image"

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._samples)

    def lengths(self) -> list[int]:
        """``modality_length`` of every sample, as the length-grouped order wants them."""
        return [modality_length((text for _, text in s.turns), has_image=s.image is not None) for s in self._samples]

    def use_features(self, features: FeatureReader) -> None:
        """Give the features of the images in place of pixels from now on, and read no image."""
        self._images, self._blank, self._image_key = features, features.blank(), "features"

    def sample(self, index: int, rng: np.random.Generator) -> LlavaSample:
        """Encode sample ``index`` and read its image.

        Raises:
            DataError: turns that do not fit, no label left, or an image that cannot be read; names the sample.
        """
        sample = self._samples[index]
        where = f"sample {index} ({sample.name})"
        variants = sample.variants()
        encoded = encode_conversation(
            variants[int(rng.integers(len(variants)))] if len(variants) > 1 else variants[0],
            self._tokenizer,
            self._template,
            has_image=sample.image is not None,
            max_length=self._max_length,
            where=where,
        )
        image, error = self._blank, ""
        if sample.image is not None:
            image, error = self._images.read(sample.image, rng, where)
        return LlavaSample(index, encoded, image, error)

    def collate(self, samples: list[LlavaSample]) -> dict[str, Any]:
        """Join samples, cut to the maximal length.

        Returns:
            ``ids``, ``labels``, ``mask`` (B, T); ``image`` (B, 3, S, S) uint8 or ``features`` (B, P, C); ``sample_id``;
            what was replaced.
        """
        encoded = [sample.encoded for sample in samples]
        batch: dict[str, Any] = collate(encoded, self._tokenizer.pad_id, self._max_length)
        batch[self._image_key] = torch.stack([sample.image for sample in samples])
        batch["sample_id"] = [sample.sample_id for sample in samples]
        batch["images_replaced"] = sum(bool(sample.image_error) for sample in samples)
        batch["image_errors"] = [sample.image_error for sample in samples if sample.image_error]
        return batch
