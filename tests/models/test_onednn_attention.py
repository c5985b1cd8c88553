"""Attention by heads with oneDNN against torch's own: values, gradients, masks, where it is taken."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from models import onednn_attention as module
from models.layers import attention, join_heads, split_heads
from models.linear import has_onednn
from models.onednn_attention import is_worthwhile, onednn_attention

pytestmark = pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN")
BATCH, HEADS, QUERIES, KEYS, CHANNELS = 2, 3, 37, 50, 16
LIMIT = 2e-6  # of the largest entry; measured 5e-7, torch's own 4e-7


def drawn(queries: int = QUERIES, keys: int = KEYS) -> list[Tensor]:
    """Queries, keys and values as layers have them: heads side by side."""
    torch.manual_seed(0)
    lengths = (queries, keys, keys)
    return [split_heads(torch.randn(BATCH, n, HEADS * CHANNELS), HEADS).requires_grad_() for n in lengths]


def masks() -> dict[str, Tensor | None]:
    hidden_keys = torch.ones(BATCH, 1, 1, KEYS, dtype=torch.bool)
    hidden_keys[0, ..., 40:] = False
    return {
        "none": None,
        "keys": hidden_keys,
        "pairs": torch.rand(1, HEADS, QUERIES, KEYS) < 0.7,
        "numbers": torch.randn(BATCH, 1, QUERIES, KEYS),
        "minus infinity": torch.where(hidden_keys, 0.0, -math.inf),
    }


def results(run, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    out = run(*inputs)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kind", masks())
def test_values_and_gradients_are_those_of_double_precision(kind: str, scale: float | None):
    inputs, mask = drawn(), masks()[kind]
    weights = torch.randn(BATCH, HEADS, QUERIES, CHANNELS)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    expected = results(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=wide, scale=scale),
        [x.detach().double().requires_grad_() for x in inputs],
        weights.double(),
    )
    ours = results(lambda q, k, v: onednn_attention(q, k, v, mask, scale), inputs, weights)
    for found, wanted in zip(ours, expected, strict=True):
        assert (found - wanted).abs().max() <= LIMIT * wanted.abs().max()


def test_queries_that_see_nothing_gather_nothing_and_move_nothing():
    inputs = drawn()
    mask = torch.ones(BATCH, 1, QUERIES, KEYS, dtype=torch.bool)
    mask[0, :, 5] = False
    weights = torch.randn(BATCH, HEADS, QUERIES, CHANNELS)
    ours = results(lambda q, k, v: onednn_attention(q, k, v, mask), inputs, weights)
    assert not ours[0][0, :, 5].any()
    assert not ours[1][0, :, 5].any()
    assert all(bool(x.isfinite().all()) for x in ours)
    rest = [n for n in range(QUERIES) if n != 5]
    alone = results(
        lambda q, k, v: F.scaled_dot_product_attention(q[:1, :, rest], k[:1], v[:1]), inputs, weights[:1, :, rest]
    )
    for found, wanted in zip(ours[2:], alone[2:], strict=True):
        assert_close(found[0], wanted[0], rtol=0, atol=LIMIT * float(wanted.abs().max()))


def test_the_heads_lie_so_that_joining_them_copies_nothing():
    out = onednn_attention(*drawn())
    assert join_heads(out).data_ptr() == out.data_ptr()


def test_attention_takes_this_way_for_many_tokens_only(monkeypatch):
    taken = []
    monkeypatch.setattr("models.layers.onednn_attention", lambda *inputs: taken.append(1) or onednn_attention(*inputs))
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("models.linear._PREFERS_ONEDNN", True)
    few, many = drawn(), drawn(300, 300)
    hidden = torch.ones(1, 1, 1, 300, dtype=torch.bool)
    assert_close(attention(*many, mask=hidden), F.scaled_dot_product_attention(*many))
    assert_close(attention(*many, scale=0.2), F.scaled_dot_product_attention(*many, scale=0.2))
    assert len(taken) == 2
    attention(*few)
    attention(*many, is_causal=True)
    attention(*many, dropout=0.5)
    attention(*(x.double() for x in many))
    attention(*many, mask=torch.zeros(1, 1, 300, 300, requires_grad=True))  # a bias that learns
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_worthwhile(many[0], many[1], None)
    assert len(taken) == 2
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 64)
    attention(*many)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("models.linear._PREFERS_ONEDNN", False)
    attention(*many)
    assert len(taken) == 2


def test_it_compiles():
    torch._dynamo.reset()
    inputs, weights = drawn(), torch.randn(BATCH, HEADS, QUERIES, CHANNELS)
    compiled = torch.compile(onednn_attention, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(
        results(compiled, inputs, weights), results(onednn_attention, inputs, weights), strict=True
    ):
        assert_close(found, wanted)
