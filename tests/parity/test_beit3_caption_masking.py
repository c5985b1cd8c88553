"""Caption masking against the recording (beit3_data.pt, ``caption_masking``): equal under the same seed."""

import random

import pytest

from data.caption_masking import mask_caption
from tests.parity.fixture_files import load_fixture


def seeded_module(seed):
    random.seed(seed)
    return random


@pytest.mark.parametrize("generator", [seeded_module, random.Random])
def test_masked_captions_equal_the_recorded_ones(generator):
    recorded = load_fixture("beit3_data.pt")
    mask_id, vocab_size = (recorded["config"][key] for key in ("mask_token_id", "vocab_size"))
    rows = recorded["outputs"]["caption_masking"]
    assert rows
    for row in rows:
        real, padding = row["tokens"][: row["num_tokens"]], row["tokens"][row["num_tokens"] :]
        tokens, positions = mask_caption(real, row["mask_prob"], mask_id, vocab_size, generator(row["python_seed"]))
        assert tokens + padding == row["masked_tokens"], row["python_seed"]
        assert positions + [0] * len(padding) == row["masked_pos"], row["python_seed"]
