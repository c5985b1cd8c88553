"""Text to ids on a sentencepiece model, with the id layout of XLM-R (BEiT-3's tokenizer).

``SentencePieceModel`` holds the model file and knows piece ids only; a tokenizer class adds the id layout of one family
on top of it. XLM-R layout: 0 <s>, 1 <pad>, 2 </s>, 3 <unk>, piece i >= 3 becomes i + 1, <mask> comes last.
The ids equal those of the slow reference tokenizer (XLMRobertaTokenizer), literal specials inside a text included.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import sentencepiece

from data.errors import DataError

WAY_OUT = "give --sentencepiece_model PATH; beit3.spm comes with the published weights"
WORD_START = "\u2581"
# the reference tidies English spacing after decoding, by these replacements in this order
SPACING = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'")) + tuple(
    (f" {ending}", ending) for ending in ("n't", "'m", "'s", "'ve", "'re")
)


class SentencePieceModel:
    """A sentencepiece model file as piece ids; can be pickled, so that loader workers may hold it."""

    def __init__(self, model_file: str | Path, *, way_out: str = WAY_OUT) -> None:
        """Read the file.

        Args:
            model_file: its path.
            way_out: what a user can do about a wrong one, for messages.

        Raises:
            DataError: if it is missing, unreadable or not a sentencepiece model.
        """
        try:
            content = Path(model_file).read_bytes()
        except OSError as error:
            raise DataError(f"no sentencepiece model at {model_file} ({error.strerror}): {way_out}") from None
        self.processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(content) and self.processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError):
            loaded = False
        if not loaded or self.processor.GetPieceSize() == 0:
            size = f"{len(content)} bytes"
            raise DataError(f"{model_file} is not a whole sentencepiece model ({size}): fetch it again, or {way_out}")

    @property
    def num_pieces(self) -> int:
        """Pieces in the file, its own unknown, begin and end included."""
        return self.processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Piece ids of a text, 0 where the model knows nothing.

        Raises:
            DataError: if the text has lone surrogates, which cannot be written as UTF-8.
        """
        if not text.isascii():  # sentencepiece reports what it cannot convert differently from version to version
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(
                    f"{text!r:.80} holds half a surrogate pair (a broken \\ud... escape): mend it"
                ) from None
        return self.processor.EncodeAsIds(text)

    def decode(self, pieces: list[int]) -> str:
        """Text of piece ids: pieces joined, word-start marks as spaces, ends stripped."""
        return "".join(map(self.processor.IdToPiece, pieces)).replace(WORD_START, " ").strip()


def encode_around_literals(
    text: str, literal: re.Pattern[str], ids: Mapping[str, int], encode_plain: Callable[[str], list[int]]
) -> list[int]:
    """Ids of a text in which special tokens may stand literally ("<mask>").

    Each becomes its id and eats the white space around it; what is between is encoded by itself.

    Args:
        text: any.
        literal: matches a literal; with one group around all of it.
        ids: literal to id.
        encode_plain: for the parts between, which may be empty.
    """
    parts = literal.split(text)  # plain, literal, plain, ..., plain
    found: list[int] = []
    for index, part in enumerate(parts):
        if index % 2 == 1:
            found.append(ids[part])
            continue
        part = part.lstrip() if index > 0 else part
        part = part.rstrip() if index < len(parts) - 1 else part
        found.extend(encode_plain(part))
    return found


class SentencePieceTokenizer(ABC):
    """What the families' tokenizers share: a model file, texts of data files, segments with a token at both ends.

    Attributes:
        bos_id: id before a text.
        eos_id: id behind it.
    """

    bos_id: int
    eos_id: int

    def __init__(self, model: SentencePieceModel) -> None:
        """Hold the model file."""
        self.model = model

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the sentencepiece model: tells whether token ids in a file are this tokenizer's."""
        return hashlib.sha256(self.model.processor.serialized_model_proto()).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text without begin and end."""

    def encode_filled(self, text: str, kind: str, where: str) -> list[int]:
        """``encode`` for a text of a data file, which must not come out empty.

        Raises:
            DataError: as ``encode``, or no tokens; names the place and the ``kind`` of text (question, caption).
        """
        try:
            tokens = self.encode(text)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if not tokens:
            raise DataError(f"{where}: the {kind} {text!r:.80} has no tokens; mend or remove it")
        return tokens

    def build_segment(self, tokens: Sequence[int], max_len: int) -> list[int]:
        """Model input of a text: begin, at most ``max_len`` - 2 of its ids, end; not padded.

        Raises:
            DataError: if there are no tokens, or no room for one.
        """
        if len(tokens) == 0:
            raise DataError("the text has no tokens: an empty question or caption cannot be encoded")
        if max_len < 3:
            raise DataError(f"the maximal text length must be at least 3 (begin, one token, end), got {max_len}")
        return [self.bos_id, *tokens[: max_len - 2], self.eos_id]


class XLMRTokenizer(SentencePieceTokenizer):
    """Ids of BEiT-3: 0 begin, 1 padding, 2 end, 3 unknown, piece + 1 for the others, mask = number of pieces + 1."""

    bos_id = 0
    pad_id = 1
    eos_id = 2
    unk_id = 3
    _offset = 1  # piece ids start with unk, <s>, </s> where the layout has <s>, <pad>, </s>, <unk>

    def __init__(self, model_file: str | Path) -> None:
        """Read the model file.

        Raises:
            DataError: if it is missing, broken, or numbers its own specials differently.
        """
        super().__init__(SentencePieceModel(model_file))
        specials = self.model.processor.unk_id(), self.model.processor.bos_id(), self.model.processor.eos_id()
        if specials != (0, 1, 2):
            raise DataError(
                f"{model_file} numbers <unk>, <s>, </s> as {specials}, the XLM-R layout needs (0, 1, 2): {WAY_OUT}"
            )
        self.mask_id = self.model.num_pieces + 1
        self._literals = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": self.mask_id}
        self._literal = re.compile("(" + "|".join(map(re.escape, self._literals)) + ")")

    @property
    def vocab_size(self) -> int:
        """Number of pieces + 2; the published models have eight more, unused, rows."""
        return self.model.num_pieces + 2

    def encode(self, text: str) -> list[int]:
        """Ids of a text without begin and end; empty for white space.

        A literal special ("<mask>" and so on) becomes its id and eats the white space around it.

        Raises:
            DataError: if the text cannot be written as UTF-8.
        """
        if "<" not in text:
            return self._encode_plain(text)
        return encode_around_literals(text, self._literal, self._literals, self._encode_plain)

    def decode(self, ids: Iterable[int], clean_up: bool = True) -> str:
        """Text of ids; specials and ids that have no text are left out.

        Args:
            ids: whole numbers of any kind, a 1-D tensor too.
            clean_up: remove the space before punctuation and English endings, as the reference does for captions.
        """
        numbers = map(int, ids)
        text = self.model.decode([i - self._offset for i in numbers if self.unk_id < i < self.mask_id])
        if clean_up:
            for spaced, tight in SPACING:
                text = text.replace(spaced, tight)
        return text

    def _encode_plain(self, text: str) -> list[int]:
        return [piece + self._offset if piece else self.unk_id for piece in self.model.encode(text)]
