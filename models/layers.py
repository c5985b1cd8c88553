"""Small pieces that several families share: linear layer, attention, stochastic depth, truncated-normal start values.

Letters: B batch, H heads, Q queries, K keys, C channels of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Below this many multiplications the overhead of an operator of our own (0.1 ms) outweighs the gain.
_MIN_PRODUCTS_FOR_ONEDNN = 15_000_000
# torch multiplies float32 matrices on x86 with MKL, which on AMD processors has half of the speed of oneDNN (measured
# on an EPYC with AVX-512: 95 against 180 GFLOP/s a core). oneDNN's linear op is in every x86 build of torch, but has no
# public name.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


class Linear(nn.Linear):
    """``nn.Linear`` that computes large float32 products on the CPU with oneDNN, forward and backward; else exactly it.

    The same numbers but for rounding: the largest relative error of a product is 1e-6 where MKL's is 4e-7.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if _use_onednn(x, self.weight):
            return _onednn_linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN_LINEAR is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _MIN_PRODUCTS_FOR_ONEDNN
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


# an operator of its own, because torch.compile knows oneDNN's only with constant weights
@torch.library.custom_op("plainvl::onednn_linear", mutates_args=())
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X weight^T + bias; ``weight`` must be dense or the transpose of a dense matrix, else oneDNN is 1000 x slower."""
    return _ONEDNN_LINEAR(x, weight, bias, "none", [], "").contiguous()


@_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _onednn_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    rows, grad_rows = x.flatten(0, -2).contiguous(), grad.flatten(0, -2)
    grad_x = _onednn_linear(grad, weight.t().contiguous(), None) if needs_x else None
    grad_weight = _onednn_linear(grad_rows.t(), rows.t(), None) if needs_weight else None
    return grad_x, grad_weight, grad_rows.sum(0) if needs_bias else None


_onednn_linear.register_autograd(_onednn_linear_backward, setup_context=_save_for_backward)


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Softmax attention, scaled by C^-0.5; every family's attention ends here.

    Without a mask the flash kernels can be chosen, so callers pass None where nothing is hidden.

    Args:
        q: (B, H, Q, C). With Q = 0 the (empty) queries come back, which keeps their projection in the autograd graph.
        k: (B, H, K, C).
        v: (B, H, K, C).
        mask: boolean, True = may look, broadcastable to (B, H, Q, K).
        is_causal: query i looks at keys 0..i.

    Returns:
        (B, H, Q, C).

    Raises:
        ValueError: if both ``mask`` and ``is_causal`` are given (kernels disagree on what that means).
    """
    if mask is not None and is_causal:
        raise ValueError("attention takes a mask or is_causal, not both: put the causal part into the mask")
    if q.shape[-2] == 0:
        return q
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def drop_path_scales(rate: float, num_layers: int, num_branches: int, batch_size: int, device: torch.device) -> Tensor:
    """Draw stochastic depth for a whole network at once: what each residual branch of each sample is multiplied by.

    The rate grows linearly from 0 in the first layer to ``rate`` in the last. A sample's branch is kept with
    probability 1 - p and then divided by 1 - p, else it is zero. The draws are an input of the layers, not made
    inside: compiled layers then share one graph whatever their rate, and recomputed ones (activation checkpointing)
    see the same draw.

    Returns:
        (num_layers, num_branches, batch_size, 1, 1), float32.
    """
    keep = 1 - torch.linspace(0, rate, num_layers, device=device).view(-1, 1, 1, 1, 1)
    draws = torch.rand(num_layers, num_branches, batch_size, 1, 1, device=device)
    return (draws < keep) / keep


def add_residual(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    """x + branch, or x + scale * branch with the (B, 1, 1) factors of ``drop_path_scales``."""
    return x + branch if scale is None else x + branch * scale


@torch.no_grad()
def init_linear_truncated_(linear: nn.Linear, *, std: float = 0.02, bound: float = 0.02) -> None:
    """Weights from a normal distribution cut off at +-``bound``, bias zero, in place.

    Drawn by inverting the distribution function: ``torch.nn.init.trunc_normal_`` takes 1.8 s (measured, torch 2.15)
    for a matrix of the base model where this takes 0.04 s.
    """
    limit = math.erf(bound / (std * math.sqrt(2)))
    linear.weight.uniform_(-limit, limit).erfinv_().mul_(std * math.sqrt(2)).clamp_(-bound, bound)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
