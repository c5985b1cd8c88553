"""DeBERTa's ids against recorded ones: equal."""

from typing import Any

import pytest

from data.tokenizers.deberta import DebertaTokenizer
from tests.parity.fixture_files import fixture_path, load_fixture


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return load_fixture("vle_tokenizer.pt")


@pytest.fixture(scope="module")
def tokenizer() -> DebertaTokenizer:
    return DebertaTokenizer(fixture_path("vle_tiny_for_vqa") / "spm.model")


def whole(tokenizer: DebertaTokenizer, text: str, max_len: int = 10**9) -> list[int]:
    ids = tokenizer.encode(text)
    return tokenizer.build_segment(ids, max_len) if ids else [tokenizer.bos_id, tokenizer.eos_id]


def test_sizes_and_special_ids(recording, tokenizer):
    config = recording["config"]
    assert (tokenizer.model.num_pieces, tokenizer.vocab_size) == (config["pieces"], config["len"])
    ids = {"pad": tokenizer.pad_id, "cls": tokenizer.bos_id, "sep": tokenizer.eos_id, "unk": tokenizer.unk_id}
    assert ids | {"mask": tokenizer.mask_id} == {
        name: config["special_ids"][f"{name}_token"] for name in (*ids, "mask")
    }


def test_every_recorded_text_has_the_same_pieces_and_ids(recording, tokenizer):
    for example in recording["examples"]:
        assert tokenizer.pieces(tokenizer.encode(example["text"])) == example["tokens"], example["text"]
        assert whole(tokenizer, example["text"]) == example["input_ids"], example["text"]


def test_truncated_texts_keep_both_ends(recording, tokenizer):
    for example in recording["truncated"]:
        ids = whole(tokenizer, example["text"], example["max_length"])
        padded = ids + [tokenizer.pad_id] * (len(example["input_ids"]) - len(ids))
        assert padded == example["input_ids"], example["text"]


def test_pairs(recording, tokenizer):
    for example in recording["pairs"]:
        ids, types = tokenizer.pair(tokenizer.encode(example["a"]), tokenizer.encode(example["b"]))
        assert (ids, types) == (example["input_ids"], example["token_type_ids"])
