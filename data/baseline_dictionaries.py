"""What a course baseline was trained with, in one file beside its weights: how questions and answers become numbers.

``dictionaries.json`` has ``words`` (in the order of their numbers) or ``subwords`` (a sentencepiece model in base64),
``answers`` (text → class), ``reference_behaviour`` and ``image_size``.
"""

import base64
import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from data.baseline_vqa import question_vector
from data.errors import DataError
from data.files import BYTE_ORDER_MARK, read_json
from data.metrics.vizwiz import process_text

DICTIONARIES_FILE = "dictionaries.json"
CLASS_COLUMNS = ["answer", "class_id"]


@dataclass(frozen=True)
class Dictionaries:
    """Questions to vectors, classes to answers.

    Attributes:
        answer_ids: class by normalised answer; where several share one, the first of them is what it answers.
        word_ids: number by word; None where questions are cut into subwords.
        subwords: serialised sentencepiece model; empty where questions are cut into words.
        reference: the original's arithmetic: raw questions are looked up, and answers may be empty.
        image_size: side in pixels to which images are resized.
    """

    answer_ids: Mapping[str, int]
    word_ids: Mapping[str, int] | None
    subwords: bytes = b""
    reference: bool = False
    image_size: int = 224

    @cached_property
    def answers(self) -> list[str]:
        """What each class answers."""
        texts: dict[int, str] = {}
        for text, number in self.answer_ids.items():
            texts.setdefault(number, text)
        return [texts[number] for number in sorted(texts)]

    @property
    def question_size(self) -> int:
        """Entries of a question vector."""
        return self._pieces.GetPieceSize() if self.word_ids is None else len(self.word_ids) + 1

    def question_vector(self, question: str) -> Tensor:
        """(question_size,) float32: 1 at each word or subword of a raw question; unknown ones share an entry."""
        if self.word_ids is not None:
            return question_vector(question, self.word_ids, process_text, reference=self.reference)
        vector = torch.zeros(self.question_size)
        vector[self._pieces.EncodeAsIds(subword_text(question))] = 1.0
        return vector

    def to_json(self) -> bytes:
        """Content of ``dictionaries.json``."""
        words = {} if self.word_ids is None else {"words": list(self.word_ids)}
        subwords = {"subwords": base64.b64encode(self.subwords).decode()} if self.word_ids is None else {}
        settings = {"image_size": self.image_size, "reference_behaviour": self.reference}
        return (json.dumps({**settings, **words, **subwords, "answers": dict(self.answer_ids)}) + "\n").encode()

    @classmethod
    def load(cls, path: str | Path) -> "Dictionaries":
        """Read a ``dictionaries.json``.

        Raises:
            DataError: missing, broken or not of that form.
        """
        values = read_json(path, advice="training writes it beside model.pth")
        way_out = "take the file that training wrote beside the weights"
        if not isinstance(values, dict) or not _is_numbering(values.get("answers")):
            raise DataError(f'{path} has no "answers" (an object, text to class 0, 1, ...): {way_out}')
        size, reference, words = (values.get(key) for key in ("image_size", "reference_behaviour", "words"))
        if type(size) is not int or size < 1 or type(reference) is not bool:
            raise DataError(f'{path}: "image_size" or "reference_behaviour" is missing or wrong: {way_out}')
        if words is None:
            return cls(values["answers"], None, _subwords_of(values, f"{path}: {way_out}"), reference, size)
        if not isinstance(words, list) or not all(type(word) is str for word in words) or len(set(words)) < len(words):
            raise DataError(f'{path}: "words" must be a list of different texts: {way_out}')
        return cls(values["answers"], {word: number for number, word in enumerate(words)}, b"", reference, size)

    @cached_property
    def _pieces(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=self.subwords)


def subword_text(question: str) -> str:
    """A question as it is cut into subwords: normalised, and with no half surrogate pair, which cannot be encoded."""
    return process_text(question).encode("utf-8", "replace").decode()


def read_class_mapping(path: str | Path) -> dict[str, int]:
    """Read which answers are one class.

    Args:
        path: CSV, UTF-8, with the header ``answer,class_id`` and a whole number as class. Answers are normalised; if
            that makes two of them one, the first line counts. Lines whose answer comes out empty are left out.

    Returns:
        Class by normalised answer, numbered anew from 0 in the order of first appearance.

    Raises:
        DataError: no such file, another header, or a line that is not of this form.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(BYTE_ORDER_MARK).decode("utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read --class_mapping {path} ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"--class_mapping {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    rows = csv.reader(lines, strict=True)
    classes: dict[str, int] = {}
    numbers: dict[int, int] = {}
    try:
        header = next(rows, [])
        if header != CLASS_COLUMNS:
            raise DataError(
                f"--class_mapping {path} has the columns {', '.join(header)[:80] or '(none)'}: they must be "
                f"{','.join(CLASS_COLUMNS)}"
            )
        for row in filter(None, rows):
            if len(row) != len(CLASS_COLUMNS) or not (row[1].isascii() and row[1].isdigit() and len(row[1]) < 19):
                raise DataError(f"{path}:{rows.line_num}: a line must be an answer and a whole number, got {row!r:.80}")
            text, number = process_text(row[0]), int(row[1])
            if text and text not in classes:
                classes[text] = numbers.setdefault(number, len(numbers))
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not CSV ({error}): put answers with commas into quotes") from None
    if not classes:
        raise DataError(f"--class_mapping {path} has no answers below its header: add some")
    return classes


def _is_numbering(values: Any) -> bool:
    if not isinstance(values, dict) or not values or not all(type(number) is int for number in values.values()):
        return False
    numbers = set(values.values())
    return numbers == set(range(len(numbers)))


def _subwords_of(values: Mapping[str, Any], where: str) -> bytes:
    try:
        content = base64.b64decode(values["subwords"], validate=True)
        if sentencepiece.SentencePieceProcessor(model_proto=content).GetPieceSize() > 0:
            return content
    except (KeyError, TypeError, ValueError, RuntimeError):
        pass
    raise DataError(f'neither "words" nor a sentencepiece model as "subwords" in {where}')
