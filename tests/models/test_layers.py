"""Shared layers: each against its definition."""

import pytest
import torch
from torch.testing import assert_close

from models.layers import add_residual, attention, drop_path_scales, init_linear_truncated_

CPU = torch.device("cpu")


def random_heads(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_attention_is_the_softmax_of_scaled_products():
    q, k, v = (random_heads(2, 3, n, 8) for n in (5, 7, 7))
    expected = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    assert_close(attention(q, k, v), expected, atol=1e-6, rtol=1e-5)


def test_true_in_the_mask_means_may_look():
    q, k, v = (random_heads(1, 2, n, 4) for n in (3, 6, 6))
    mask = torch.tensor([True, True, False, True, False, False])
    assert_close(attention(q, k, v, mask=mask.expand(1, 1, 3, 6)), attention(q, k[:, :, mask], v[:, :, mask]))


def test_causal_attention_equals_a_lower_triangular_mask():
    q, k, v = (random_heads(1, 2, 6, 4) + n for n in range(3))
    lower = torch.ones(6, 6, dtype=torch.bool).tril()
    assert_close(attention(q, k, v, is_causal=True), attention(q, k, v, mask=lower))


def test_a_mask_and_the_causal_flag_together_are_refused():
    x = random_heads(1, 1, 2, 4)
    with pytest.raises(ValueError, match="not both"):
        attention(x, x, x, mask=torch.ones(2, 2, dtype=torch.bool), is_causal=True)


def test_attention_without_queries_is_empty_and_gives_them_zero_gradient():
    weight = torch.ones(4, requires_grad=True)
    x = random_heads(2, 2, 3, 4)
    out = attention(x[:, :, :0] * weight, x, x)
    assert out.shape == (2, 2, 0, 4)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4))


def test_drop_path_keeps_the_expected_value_and_grows_with_depth():
    torch.manual_seed(0)
    scales = drop_path_scales(0.4, 5, 2, 20000, CPU)
    assert_close(scales.mean(dim=(1, 2, 3, 4)), torch.ones(5), atol=0.02, rtol=0)
    dropped = (scales == 0).float().mean(dim=(1, 2, 3, 4))
    assert_close(dropped, torch.linspace(0, 0.4, 5), atol=0.01, rtol=0)


def test_drop_path_draws_every_branch_and_sample_anew():
    torch.manual_seed(0)
    scales = drop_path_scales(0.5, 2, 2, 64, CPU)[-1]
    assert not torch.equal(scales[0], scales[1])
    assert 0 < (scales[0] == 0).sum() < 64


def test_a_dropped_branch_leaves_the_residual_as_it_is():
    x, branch = random_heads(2, 3, 4), random_heads(2, 3, 4) + 1
    out = add_residual(x, branch, torch.tensor([0.0, 2.0]).view(2, 1, 1))
    assert torch.equal(out[0], x[0])
    assert_close(out[1], x[1] + 2 * branch[1])


def test_truncated_start_values_stay_in_bounds_with_the_right_deviation():
    torch.manual_seed(0)
    linear = torch.nn.Linear(400, 500)
    init_linear_truncated_(linear)
    assert linear.weight.abs().max() <= 0.02
    # a normal distribution cut at one sigma has 0.5396 of its deviation: 0.0108
    assert_close(linear.weight.std().item(), 0.0108, atol=1e-4, rtol=0)
    assert not linear.bias.any()
