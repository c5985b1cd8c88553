import random

import pytest

from data.caption_masking import mask_caption
from data.errors import DataError

BOS, EOS, MASK, VOCAB = 0, 2, 99, 100
CAPTION = [BOS, 10, 11, 12, 13, 14, 15, 16, EOS]


class Script:
    """Generator that hands out what it is given, and keeps what it was asked."""

    def __init__(self, *draws):
        self.draws, self.asked = list(draws), []

    def randint(self, a, b):
        self.asked.append((a, b))
        return self.draws.pop(0)

    def random(self):
        self.asked.append("random")
        return self.draws.pop(0)


def test_draws_come_in_the_order_position_then_fate_then_id():
    script = Script(3, 0.95, 42, 1, 0.1)
    tokens, positions = mask_caption([BOS, 10, 11, 12, EOS], 0.4, MASK, VOCAB, script)
    assert script.asked == [(1, 4), "random", (3, 99), (1, 4), "random"]
    assert tokens == [BOS, MASK, 11, 42, EOS]
    assert positions == [0, 1, 0, 1, 0]


def test_a_position_that_is_taken_costs_one_draw_only():
    script = Script(1, 0.1, 1, 2, 0.1)
    assert mask_caption([BOS, 10, 11, 12, EOS], 0.4, MASK, VOCAB, script)[1] == [0, 1, 1, 0, 0]
    assert script.asked == [(1, 4), "random", (1, 4), (1, 4), "random"]


@pytest.mark.parametrize(
    ("draw", "token"), [(0.0, MASK), (0.799, MASK), (0.8, 10), (0.899, 10), (0.9, 55), (0.999, 55)]
)
def test_eight_of_ten_are_hidden_one_stays_and_one_is_replaced(draw, token):
    script = Script(1, draw, 55)
    assert mask_caption([BOS, 10, EOS], 0.3, MASK, VOCAB, script) == ([BOS, token, EOS], [0, 1, 0])


@pytest.mark.parametrize(("prob", "count"), [(0.0, 1), (0.05, 1), (0.5, 5), (0.7, 6), (1.0, 8)])
def test_the_share_is_rounded_at_least_one_and_never_all(prob, count):
    for seed in range(20):
        _, positions = mask_caption(CAPTION, prob, MASK, VOCAB, random.Random(seed))
        assert sum(positions) == count
        assert positions[0] == 0


def test_the_end_token_may_be_masked():
    assert mask_caption([BOS, 10, EOS], 0.3, MASK, VOCAB, Script(2, 0.1)) == ([BOS, 10, MASK], [0, 0, 1])


def test_the_caption_handed_in_stays_as_it_was():
    caption = list(CAPTION)
    mask_caption(caption, 0.9, MASK, VOCAB, random.Random(0))
    assert caption == CAPTION


@pytest.mark.parametrize("tokens", [[], [BOS]])
def test_a_caption_without_room_for_a_mask_is_an_error(tokens):
    with pytest.raises(DataError, match="needs its begin and end token"):
        mask_caption(tokens, 0.5, MASK, VOCAB, random.Random(0))


@pytest.mark.parametrize("prob", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_an_error(prob):
    with pytest.raises(DataError, match=r"--captioning_mask_prob must be in \[0, 1\]"):
        mask_caption(CAPTION, prob, MASK, VOCAB, random.Random(0))
