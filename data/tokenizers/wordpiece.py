"""Text to ids as BERT's uncased tokenizer does: words, then greedy longest pieces of a vocabulary file.

Source: the tokenizer of BERT (Devlin et al. 2019) as VL-BERT uses it.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from data.errors import DataError

KEPT_WHOLE = frozenset(("[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"))
MAX_WORD_CHARACTERS = 100
_WAY_OUT = "give the vocab.txt that comes with the BERT weights"
_SPACES = frozenset("\t\n\r ")
_CJK = (
    *((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)),
    *((0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)),
)


class WordPieceTokenizer:
    """Ids of a BERT vocabulary; 0 is padding."""

    def __init__(self, vocabulary: Sequence[str], source: str = "the vocabulary") -> None:
        """Number the tokens by their place.

        Raises:
            DataError: one of the special tokens is missing, or padding is not the first.
        """
        self.tokens = tuple(vocabulary)
        self._ids = {token: index for index, token in enumerate(self.tokens)}
        missing = sorted(KEPT_WHOLE - self._ids.keys())
        if missing:
            raise DataError(f"{source} has no {missing[0]}: {_WAY_OUT}")
        if self._ids["[PAD]"] != 0:
            raise DataError(f"{source} has [PAD] in line {self._ids['[PAD]'] + 1}, it must be the first: {_WAY_OUT}")
        self.unk_id, self.cls_id = self._ids["[UNK]"], self._ids["[CLS]"]
        self.sep_id, self.mask_id = self._ids["[SEP]"], self._ids["[MASK]"]

    @classmethod
    def load(cls, path: str | Path) -> "WordPieceTokenizer":
        """Read ``vocab.txt``, one token a line.

        Raises:
            DataError: missing, not UTF-8, or not such a vocabulary.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise DataError(f"no vocabulary at {path} ({error.strerror}): {_WAY_OUT}") from None
        except UnicodeDecodeError:
            raise DataError(f"{path} is not UTF-8 text: {_WAY_OUT}") from None
        if lines and not lines[-1]:
            lines.pop()
        return cls([line.strip() for line in lines], source=str(path))

    def __contains__(self, token: str) -> bool:
        """Whether the vocabulary has this token."""
        return token in self._ids

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    def tokenize(self, text: str) -> list[str]:
        """Pieces of a text."""
        return [piece for word in basic_words(text) for piece in self._pieces(word)]

    def to_ids(self, tokens: Sequence[str]) -> list[int]:
        """Ids of tokens of the vocabulary."""
        return [self._ids[token] for token in tokens]

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.to_ids(self.tokenize(text))

    def _pieces(self, word: str) -> list[str]:
        if len(word) > MAX_WORD_CHARACTERS:
            return ["[UNK]"]
        pieces, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in self._ids), None)
            if end is None:
                return ["[UNK]"]
            pieces.append(mark + word[start:end])
            start = end
        return pieces


def swap_sides(tokens: Sequence[str]) -> list[str]:
    """Tokens of a text about an image that is flipped: left and right change places."""
    other = {"left": "right", "right": "left"}
    return [other.get(token, token) for token in tokens]


def basic_words(text: str) -> list[str]:
    """Words and punctuation marks, lower-cased and without accents; special tokens as they are."""
    words = []
    for word in "".join(map(_cleaned, text)).split(" "):
        if word in KEPT_WHOLE:
            words.append(word)
        elif word:
            plain = unicodedata.normalize("NFD", word.lower())
            words += _split_punctuation("".join(c for c in plain if unicodedata.category(c) != "Mn"))
    return words


@lru_cache(maxsize=1 << 14)
def _cleaned(character: str) -> str:
    """What a character becomes: itself, a space, nothing, or itself between spaces."""
    if character in _SPACES:
        return " "
    category = unicodedata.category(character)
    if category == "Zs":
        return " "
    if character in "\0\ufffd" or category.startswith("C"):
        return ""
    if any(low <= ord(character) <= high for low, high in _CJK):
        return f" {character} "
    return character


def _split_punctuation(word: str) -> list[str]:
    parts: list[str] = []
    begins = True
    for character in word:
        if _is_punctuation(character):
            parts.append(character)
            begins = True
        elif begins:
            parts.append(character)
            begins = False
        else:
            parts[-1] += character
    return parts


@lru_cache(maxsize=1 << 14)
def _is_punctuation(character: str) -> bool:
    code = ord(character)
    is_ascii_mark = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return is_ascii_mark or unicodedata.category(character).startswith("P")
