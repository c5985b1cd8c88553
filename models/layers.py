"""Small pieces that several families share: attention, BERT's add and norm, stochastic depth, start values.

Letters: B batch, H heads, Q queries, K keys, C channels of a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.linear import Linear
from models.onednn_attention import is_worthwhile, onednn_attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention; every family's attention ends here.

    Without a mask the flash kernels can be chosen, so callers pass None where nothing is hidden.

    Args:
        q: (B, H, Q, C). With Q = 0 the (empty) queries come back, which keeps their projection in the autograd graph.
        k: (B, H, K, C).
        v: (B, H, K, C).
        mask: boolean, True = may look, or numbers that are added to the scores; broadcastable to (B, H, Q, K).
        is_causal: query i looks at keys 0..i.
        dropout: probability with which an attention weight is dropped.
        scale: factor of the products; C^-0.5 if None.

    Returns:
        (B, H, Q, C).

    Raises:
        ValueError: if both ``mask`` and ``is_causal`` are given (kernels disagree on what that means).
    """
    if mask is not None and is_causal:
        raise ValueError("attention takes a mask or is_causal, not both: put the causal part into the mask")
    if q.shape[-2] == 0:
        return q
    if dropout == 0 and not is_causal and is_worthwhile(q, k, mask):
        return onednn_attention(q, k, v, mask, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, scale=scale)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H C) -> (B, H, L, C)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, L, C) -> (B, L, H C)."""
    return x.transpose(1, 2).flatten(2)


class AddAndNorm(nn.Module):
    """The end of a post-norm block, under BERT's key names: project, drop out, add the residual, normalise."""

    def __init__(self, inner: int, width: int, *, eps: float, dropout: float) -> None:
        """With random weights; ``inner`` is the width of what comes in."""
        super().__init__()
        self.dense = Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """(..., inner), (..., width) -> (..., width)."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


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
    """x + branch, or x + scale * branch with the (B, 1, 1) factors of ``drop_path_scales``; x keeps its type."""
    # with 16-bit weights x has 16 bits and the float32 factors must not widen it
    return x + branch if scale is None else x + (branch * scale).to(x.dtype)


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
