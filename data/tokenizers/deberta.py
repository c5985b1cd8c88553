"""Text to ids as DeBERTa-v2 and -v3 do: the ids are those of the sentencepiece model, specials included.

Layout of the file: 0 [PAD], 1 [CLS], 2 [SEP], 3 [UNK], then pieces; [MASK] is no piece and gets the id after the last.
The ids equal those of the slow reference tokenizer (DebertaV2Tokenizer), literal specials inside a text included.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from data.errors import DataError
from data.files import read_json
from data.tokenizers.spm import SentencePieceModel, SentencePieceTokenizer, encode_around_literals

MODEL_FILE = "spm.model"
CONFIG_FILE = "tokenizer_config.json"
_WAY_OUT = "give the folder of a VLE model, whose spm.model comes with the published weights"
_SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
_NOT_OFFERED = ("do_lower_case", "split_by_punct")


class DebertaTokenizer(SentencePieceTokenizer):
    """Ids of VLE's text tower: 0 padding, 1 begin, 2 end, 3 unknown, mask = number of pieces."""

    pad_id = 0
    bos_id = 1
    eos_id = 2
    unk_id = 3

    def __init__(self, model_file: str | Path) -> None:
        """Read the model file, and ``tokenizer_config.json`` beside it where there is one.

        Raises:
            DataError: if it is missing, broken, numbers its specials differently, or the config asks for what is not
                implemented.
        """
        super().__init__(SentencePieceModel(model_file, way_out=_WAY_OUT))
        processor = self.model.processor
        found = tuple(processor.IdToPiece(index) for index in range(min(len(_SPECIALS), self.model.num_pieces)))
        if found != _SPECIALS:
            raise DataError(f"{model_file} begins with {found}, DeBERTa's layout needs {_SPECIALS}: {_WAY_OUT}")
        config = Path(model_file).with_name(CONFIG_FILE)
        settings = read_json(config) if config.is_file() else {}
        for key in _NOT_OFFERED:
            if isinstance(settings, dict) and settings.get(key):
                raise DataError(f"{config}: {key} {settings[key]!r:.40} is not implemented here, only false")
        self.mask_id = self.model.num_pieces
        self._literals = dict(zip(_SPECIALS, range(4), strict=True)) | {"[MASK]": self.mask_id}
        self._literal = re.compile("(" + "|".join(map(re.escape, self._literals)) + ")")

    @property
    def vocab_size(self) -> int:
        """Number of pieces and the mask; the published models have more rows, which nothing uses."""
        return self.model.num_pieces + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text without begin and end; empty for white space.

        A literal special ("[MASK]" and so on) becomes its id and eats the white space around it.

        Raises:
            DataError: if the text cannot be written as UTF-8.
        """
        if "[" not in text:
            return self.model.encode(text)
        return encode_around_literals(text, self._literal, self._literals, self.model.encode)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces of ids, as the model file spells them."""
        return ["[MASK]" if index == self.mask_id else self.model.processor.IdToPiece(index) for index in ids]

    def pair(self, first: Sequence[int], second: Sequence[int]) -> tuple[list[int], list[int]]:
        """[CLS] first [SEP] second [SEP] and the token types, 0 for the first part and its ends."""
        ids = [self.bos_id, *first, self.eos_id, *second, self.eos_id]
        return ids, [0] * (len(first) + 2) + [1] * (len(second) + 1)


def tokenizer_files(tokenizer: DebertaTokenizer) -> dict[str, bytes]:
    """The small files that the reference wants beside ``spm.model``, by name."""
    names = dict(zip(("pad_token", "cls_token", "sep_token", "unk_token"), _SPECIALS, strict=True))
    names |= {"bos_token": "[CLS]", "eos_token": "[SEP]", "mask_token": "[MASK]"}
    settings = dict.fromkeys(_NOT_OFFERED, False) | names | {"tokenizer_class": "DebertaV2Tokenizer"}
    contents = {
        CONFIG_FILE: settings,
        "special_tokens_map.json": names,
        "added_tokens.json": {"[MASK]": tokenizer.mask_id},
    }
    return {name: (json.dumps(value, indent=2, sort_keys=True) + "\n").encode() for name, value in contents.items()}
