"""Text to ids as Llama's sentencepiece tokenizer does, with the places of images (LLaVA, Vicuna).

The ids are those of the model file: 0 <unk>, also padding, 1 <s>, 2 </s>, then bytes and pieces. They equal those of
the slow reference tokenizer (transformers 4.37 LlamaTokenizer), and with images those of ``tokenizer_image_token`` in
LLaVA's ``mm_utils.py``. Differences: text of ids is not stripped at its ends; <image> is known here, not beside it.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from data.errors import DataError
from data.files import read_json
from data.tokenizers.spm import WORD_START, SentencePieceModel

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"
ADDED_FILE = "added_tokens.json"
IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = -200  # no id of a table: the model puts the features of an image there
_WAY_OUT = "give the folder of a LLaVA or Vicuna model, whose tokenizer.model comes with the published weights"
_SPECIALS = ("<unk>", "<s>", "</s>")
# normalizer_spec { add_dummy_prefix: false } as protobuf: behind a serialized model it overrides the model's own value
_NO_PREFIX = b"\x1a\x02\x18\x00"


def num_bytes(text: str) -> int:
    """Bytes of a text in sentencepiece's spelling, where a space is the word-start mark; the unit of ``locate``."""
    return len(text.replace(" ", WORD_START).encode("utf-8"))


class LlamaTokenizer:
    """Ids of Llama; can be pickled, so that loader workers may hold it.

    Attributes:
        legacy: True marks a word start in front of every text between literal specials ("</s>"), False only in front
            of the whole text. It must be what the base model was trained with: Vicuna and LLaVA 1.5 use False.
    """

    unk_id = 0
    pad_id = 0  # LLaVA sets the padding token to <unk>
    bos_id = 1
    eos_id = 2

    def __init__(
        self, model_file: str | Path, *, legacy: bool = True, added_tokens: dict[str, int] | None = None
    ) -> None:
        """Read a sentencepiece file; ``load`` also reads the settings beside it.

        Args:
            model_file: its path.
            legacy: which of the two rules for word starts.
            added_tokens: literal texts beyond the pieces, and their ids.

        Raises:
            DataError: if it is missing, broken, or numbers its specials differently.
        """
        self.legacy = legacy
        self._model = SentencePieceModel(model_file, way_out=_WAY_OUT)
        self._processor = self._model.processor
        num_known = min(len(_SPECIALS), self._model.num_pieces)
        found = tuple(self._processor.IdToPiece(index) for index in range(num_known))
        if found != _SPECIALS:
            raise DataError(f"{model_file} begins with {found}, Llama's layout needs {_SPECIALS}: {_WAY_OUT}")
        if not legacy:
            self._processor.LoadFromSerializedProto(self._processor.serialized_model_proto() + _NO_PREFIX)
        self._literals = {**(added_tokens or {}), **{text: index for index, text in enumerate(_SPECIALS)}}
        longest_first = sorted(self._literals, key=lambda text: (-len(text), text))
        self._literal = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._mark_id = self._processor.PieceToId(WORD_START) or None  # 0 says that it is no piece
        self._guard_length = len(self._model.encode(_SPECIALS[0]))
        self._prefix_bytes = num_bytes(" ") if self._processor.EncodeAsPieces("x")[0].startswith(WORD_START) else 0

    @classmethod
    def load(cls, folder_or_model_file: str | Path, legacy: bool | None = None) -> "LlamaTokenizer":
        """Read ``tokenizer.model`` and, where they lie beside it, ``tokenizer_config.json`` and ``added_tokens.json``.

        Args:
            folder_or_model_file: the folder of a model, or the sentencepiece file itself.
            legacy: None takes the value of the config; without one it is True, as in the reference.

        Raises:
            DataError: if a file is missing or broken, or the model numbers its specials differently.
        """
        path = Path(folder_or_model_file)
        if path.is_dir():
            path = path / MODEL_FILE
        if legacy is None:
            legacy = _read_legacy(path.with_name(CONFIG_FILE))
        return cls(path, legacy=legacy, added_tokens=_read_added_tokens(path.with_name(ADDED_FILE)))

    @property
    def vocab_size(self) -> int:
        """Number of pieces and added tokens."""
        return max(self._model.num_pieces, 1 + max(self._literals.values()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides on ids: the sentencepiece model, the rule for word starts, added tokens."""
        rules = repr((self.legacy, sorted(self._literals.items())))
        return hashlib.sha256(self._processor.serialized_model_proto() + rules.encode()).hexdigest()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of a text, a literal "</s>" and so on as its id; <image> is plain text here.

        Args:
            text: any; spaces at its ends count.
            bos: begin with <s>.

        Raises:
            DataError: if the text cannot be written as UTF-8.
        """
        ids = [index for index, _ in self._tokens(text)]
        return [self.bos_id, *ids] if bos else ids

    def encode_with_images(self, prompt: str) -> list[int]:
        """Ids of a prompt after one <s>, -200 for each <image>.

        Each text between images is encoded by itself: the one after an image begins like a new text, with a word-start
        mark, even where it begins with a new line.

        Raises:
            DataError: if the prompt cannot be written as UTF-8.
        """
        first, *others = (self.encode(chunk, bos=False) for chunk in prompt.split(IMAGE_TOKEN))
        ids = [self.bos_id, *first]
        for chunk in others:
            ids += [IMAGE_TOKEN_ID, *chunk]
        return ids

    def locate(self, text: str, *, images: bool = False) -> tuple[list[int], list[int]]:
        """Ids of a text, as ``encode_with_images`` or ``encode`` give them, and where each begins in the text.

        Args:
            text: any.
            images: read <image> as an image.

        Returns:
            Ids after <s>, and as many places: -1 for <s>, else the number of bytes (``num_bytes``) before the token.
            A mark that the tokenizer put in front of a text has no bytes of its own.

        Raises:
            DataError: if the text cannot be written as UTF-8, or the model does not take texts as they are.
        """
        ids, places, place = [self.bos_id], [-1], 0
        for index, chunk in enumerate(text.split(IMAGE_TOKEN) if images else [text]):
            if index > 0:
                ids.append(IMAGE_TOKEN_ID)
                places.append(place)
                place += num_bytes(IMAGE_TOKEN)
            tokens = self._tokens(chunk)
            end = place + num_bytes(chunk)
            for token, size in tokens:
                ids.append(token)
                places.append(place)
                place += size
            if place != end:
                raise DataError(
                    f"the sentencepiece model rewrites {chunk!r:.80}, so answers cannot be found in it: {_WAY_OUT}"
                )
        return ids, places

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, spaces at its ends kept; <s>, </s>, <unk>, images and added tokens are left out.

        Args:
            ids: whole numbers of any kind, a 1-D tensor too. Broken UTF-8 among bytes becomes U+FFFD.
        """
        numbers = map(int, ids)
        kept = [index for index in numbers if len(_SPECIALS) <= index < self._model.num_pieces]
        pieces = [self._processor.IdToPiece(index) for index in kept]
        if not pieces:
            return ""
        # the reference takes off one mark here, and the model itself a second one in legacy mode
        pieces[0] = pieces[0].removeprefix(WORD_START)
        return self._processor.DecodePieces(pieces)

    def _tokens(self, text: str) -> list[tuple[int, int]]:
        """(id, bytes of the text that it stands for) of a text without images."""
        if not text:
            return []
        if not self.legacy:
            text = WORD_START + text.replace(WORD_START, " ")
        tokens: list[tuple[int, int]] = []
        for index, part in enumerate(self._literal.split(text)):  # plain, literal, plain, ..., plain
            if index % 2 == 1:
                tokens.append((self._literals[part], num_bytes(part)))
            elif part:
                tokens.extend(self._plain_tokens(part))
        if self.legacy:
            return tokens
        first, size = tokens[0]
        if first == self._mark_id and len(tokens) > 1 and tokens[1][0] < len(_SPECIALS):
            return tokens[1:]  # no lone mark before a special
        return [(first, size - num_bytes(WORD_START)), *tokens[1:]]

    def _plain_tokens(self, part: str) -> list[tuple[int, int]]:
        # as the reference does: <unk> in front keeps sentencepiece off the first space, its tokens are dropped again
        guarded = not self.legacy and part.startswith((WORD_START, " "))
        source = _SPECIALS[0] + part if guarded else part
        ids = self._model.encode(source)
        pieces = self._processor.EncodeAsPieces(source)  # spells unknown pieces as in the text, unlike IdToPiece
        sizes = [
            1 if self._processor.IsByte(index) else num_bytes(piece) for index, piece in zip(ids, pieces, strict=True)
        ]
        if guarded:
            ids, sizes = ids[self._guard_length :], sizes[self._guard_length :]
        elif self.legacy and sizes:
            sizes[0] -= self._prefix_bytes
        return list(zip(ids, sizes, strict=True))


def _read_legacy(path: Path) -> bool:
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise DataError(f"{path}: must be an object: copy the file of the base model")
    legacy = settings.get("legacy")
    if legacy is None:
        return True
    if not isinstance(legacy, bool):
        raise DataError(f"{path}: legacy must be true or false, got {legacy!r:.40}: copy the file of the base model")
    return legacy


def _read_added_tokens(path: Path) -> dict[str, int]:
    added = read_json(path) if path.is_file() else {}
    if not isinstance(added, dict) or not all(
        text and type(index) is int and index >= 0 for text, index in added.items()
    ):
        raise DataError(f"{path}: must map texts to ids: copy the file of the base model")
    return added
