"""The XLM-R tokenizer against recorded ids and texts of the reference tokenizer: exact."""

import pytest

from data.tokenizers.spm import SPACING, XLMRTokenizer
from tests.parity.fixture_files import DEFAULT_FOLDER, fixture_path, load_fixture


@pytest.fixture
def beit3(tmp_path):
    recorded = load_fixture("beit3_tokenizer.pt")
    model_file = tmp_path / "recorded.spm"
    model_file.write_bytes(bytes(recorded["inputs"]["spm_bytes"].tolist()))
    return recorded, XLMRTokenizer(model_file)


@pytest.fixture
def evaluation():
    recorded = load_fixture("evaluation_tokenizer.json")
    return recorded, XLMRTokenizer(fixture_path(recorded["spm_file"]))


def test_sizes_and_mask_id_equal_the_recorded_beit3_ones(beit3):
    recorded, tokenizer = beit3
    assert tokenizer.vocab_size == recorded["config"]["vocab_size"]
    assert tokenizer.mask_id == recorded["config"]["mask_token_id"]


def test_sizes_and_special_ids_equal_the_recorded_evaluation_ones(evaluation):
    recorded, tokenizer = evaluation
    special = recorded["special"]
    assert tokenizer.vocab_size == recorded["vocab_size"]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id) == (special["bos"], special["pad"], special["eos"])
    assert (tokenizer.unk_id, tokenizer.mask_id) == (special["unk"], special["mask"])


def test_encoded_ids_equal_the_recorded_beit3_ones(beit3):
    recorded, tokenizer = beit3
    assert recorded["outputs"]["encode"]
    for row in recorded["outputs"]["encode"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]


def test_encoded_ids_equal_the_recorded_evaluation_ones(evaluation):
    recorded, tokenizer = evaluation
    assert recorded["rows"]
    for row in recorded["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]


def test_decoded_captions_equal_the_recorded_beit3_ones(beit3):
    recorded, tokenizer = beit3
    assert recorded["outputs"]["decode"]
    for row in recorded["outputs"]["decode"]:
        assert tokenizer.decode(row["ids"]) == row["text"]


def test_decoded_captions_equal_the_recorded_evaluation_ones(evaluation):
    recorded, tokenizer = evaluation
    assert recorded["decode"]
    for row in recorded["decode"]:
        assert tokenizer.decode(row["ids"]) == row["text"]
        assert tokenizer.decode(row["ids"], clean_up=False) == row["text_without_cleanup"]
    for row in recorded["rows"]:
        assert tokenizer.decode(row["with_special"]) == row["decoded_skip_special"], row["text"]


def test_spacing_equals_the_recorded_clean_up(beit3):
    recorded, _ = beit3
    assert recorded["outputs"]["clean_up"]
    for spaced, expected in recorded["outputs"]["clean_up"]:
        for before, after in SPACING:
            spaced = spaced.replace(before, after)
        assert spaced == expected


def check_segment(tokenizer, tokens, row, expected):
    """The segment is the recorded row up to its padding, which the collate function adds."""
    assert tokenizer.build_segment(tokens, row["max_len"]) == expected[: row["num_tokens"]]
    assert expected[row["num_tokens"] :] == [tokenizer.pad_id] * (row["max_len"] - row["num_tokens"])
    assert row["padding_mask"] == [0] * row["num_tokens"] + [1] * (row["max_len"] - row["num_tokens"])


def test_segments_equal_the_recorded_evaluation_ones(evaluation):
    recorded, tokenizer = evaluation
    assert recorded["segments"]
    for row in recorded["segments"]:
        check_segment(tokenizer, row["ids"], row, row["language_tokens"])


def test_segments_equal_the_recorded_data_ones():
    # any tokenizer does: the rows hold ids, and begin, padding and end have the same in all of them
    tokenizer = XLMRTokenizer(DEFAULT_FOLDER / "evaluation_tokenizer.spm")
    rows = load_fixture("beit3_data.pt")["outputs"]["text_segments"]
    assert rows
    for row in rows:
        check_segment(tokenizer, row["tokens"], row, row["ids"])
