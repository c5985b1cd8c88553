"""Questions of LLaVA's evaluation: a JSON-lines file, or a chunk of it, to prompts and pixels.

Source: ``llava/eval/model_vqa_loader.py``. Departures: question ids are unique; a prompt that the model would cut is an
error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.collate import pad_tokens
from data.errors import DataError
from data.files import check_relative
from data.image_reader import ImageReader
from data.llava_conversation import GPT, HUMAN, IGNORE_INDEX, Template, build_prompt, encode_conversation
from data.tokenizers.llama import IMAGE_TOKEN, LlamaTokenizer
from data.vizwiz import QuestionId, read_questions

_ANY_LENGTH = 10**6


@dataclass(frozen=True)
class LlavaQuestion:
    """One line of the file; ``place`` is its number in it, from 0."""

    place: int
    question_id: QuestionId
    image: str
    text: str

    @property
    def where(self) -> str:
        """Names the question in messages, its number counted from 1."""
        return f"question {self.place + 1} ({self.question_id!s:.80})"


def read_llava_questions(path: str | Path, num_chunks: int = 1, chunk_index: int = 0) -> list[LlavaQuestion]:
    """Questions of a file, or one of so many parts of equal size, of which the last may be shorter.

    Raises:
        DataError: a line that is not of the form, an id that comes again, an image outside its folder, a text with
            <image>, or no such chunk.
    """
    questions: list[LlavaQuestion] = []
    place_of: dict[QuestionId, int] = {}
    for place, row in enumerate(read_questions(path)):
        question = LlavaQuestion(place, row["question_id"], row["image"], row["text"])
        where = f"{path}: {question.where}"
        first = place_of.setdefault(question.question_id, place)
        if first != place:
            raise DataError(f"{where} has the id of question {first + 1}; answers are told apart by it: rename one")
        check_relative(question.image, where)
        if IMAGE_TOKEN in question.text:
            raise DataError(f"{where} has {IMAGE_TOKEN} in its text, but it is put in front of each: take it out")
        questions.append(question)
    size = -(-len(questions) // num_chunks)
    chunk = questions[chunk_index * size : (chunk_index + 1) * size]
    if not chunk:
        raise DataError(
            f"--chunk-idx {chunk_index}: {len(questions)} questions in --num-chunks {num_chunks} make "
            f"{-(-len(questions) // size)} chunks of at most {size}, counted from 0"
        )
    return chunk


def encode_questions(
    questions: Sequence[LlavaQuestion], tokenizer: LlamaTokenizer, template: Template, *, max_tokens: int
) -> list[list[int]]:
    """Ids of the prompts, open for the answer; -200 marks the image.

    Args:
        questions: to be asked.
        tokenizer: of the model.
        template: one of ``data.llava_conversation.TEMPLATES``.
        max_tokens: most ids that leave room for the image.

    Raises:
        DataError: a prompt is longer, or no text.
    """
    prompts = []
    for question in questions:
        turns = [(HUMAN, f"{IMAGE_TOKEN}\n{question.text}"), (GPT, None)]
        try:
            ids = tokenizer.encode_with_images(build_prompt(turns, template))
        except DataError as error:
            raise DataError(f"{question.where}: {error}") from None
        if len(ids) > max_tokens:
            raise DataError(
                f"{question.where} makes a prompt of {len(ids)} tokens, the model has room for {max_tokens}: shorten it"
            )
        prompts.append(ids)
    return prompts


def answer_ids(text: str, tokenizer: LlamaTokenizer, template: Template) -> list[int]:
    """Ids of an answer with its end, as training learns it."""
    turns = [(HUMAN, f"{IMAGE_TOKEN}\nx"), (GPT, text)]
    encoded = encode_conversation(turns, tokenizer, template, has_image=True, max_length=_ANY_LENGTH)
    return [label for label in encoded.labels if label != IGNORE_INDEX]


@dataclass(frozen=True)
class QuestionSample:
    """ids of the prompt, (3, S, S) uint8 pixels, and why they are a grey stand-in, if they are."""

    place: int
    ids: list[int]
    image: Tensor
    image_error: str = ""


class QuestionDataset:
    """Prompts with their images."""

    def __init__(
        self, questions: Sequence[LlavaQuestion], prompts: Sequence[list[int]], images: ImageReader, pad_id: int
    ) -> None:
        """``prompts`` as ``encode_questions`` makes them of ``questions``; ``pad_id`` fills up those of a batch."""
        self.questions, self._prompts, self._images, self._pad_id = questions, prompts, images, pad_id

    def __len__(self) -> int:
        """Number of questions."""
        return len(self.questions)

    def sample(self, index: int, rng: np.random.Generator) -> QuestionSample:
        """Read the image of question ``index``.

        Raises:
            DataError: it cannot be read; names the question.
        """
        question = self.questions[index]
        image, error = self._images.read(question.image, rng, question.where)
        return QuestionSample(question.place, self._prompts[index], image, error)

    def collate(self, samples: list[QuestionSample]) -> dict[str, Any]:
        """``ids`` (B, T0); ``mask`` (B, T0), True = a token, or None; ``image`` (B, 3, S, S) uint8; ``place``; ...

        ``images_replaced`` and ``image_errors`` tell of images that could not be read.
        """
        ids, padding = pad_tokens([sample.ids for sample in samples], self._pad_id)
        return {
            "ids": ids,
            "mask": None if padding is None else padding == 0,  # a literal <unk> is the padding's id, but a token
            "image": torch.stack([sample.image for sample in samples]),
            "place": [sample.place for sample in samples],
            "images_replaced": sum(bool(sample.image_error) for sample in samples),
            "image_errors": [sample.image_error for sample in samples if sample.image_error],
        }
