"""Softmax attention over many float32 tokens on a CPU of few cores: head by head, with oneDNN's products.

For AMD's processors (see ``models.linear``): torch's own kernel multiplies small blocks with MKL, which has half of
oneDNN's speed there, and splits the heads among the threads; a whole head at a time is faster while threads are few.
Measured with 915 tokens and 24 heads on an EPYC with AVX-512, one thread: forward 50 ms instead of 63, with backward
146 instead of 263. On a Xeon torch's own is the faster one: with backward 80 ms instead of 141, two threads.

Letters: B batch, H heads, Q queries, K keys, C channels of a head.
"""

import math
from typing import Any

import torch
from torch import Tensor

from models.linear import fits_onednn, onednn_product

# Pairs of query and key of a head: below, calling overhead outweighs the gain; above, a head's pairs leave the caches.
_MIN_PAIRS, _MAX_PAIRS = 90_000, 4_000_000
_MAX_THREADS = 4  # measured with 1 and 2; where there are many, torch's split over the heads is the better one


def is_worthwhile(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether ``onednn_attention`` takes these and is the faster way."""
    return (
        fits_onednn(q, k)
        and _MIN_PAIRS <= q.shape[-2] * k.shape[-2] <= _MAX_PAIRS
        and torch.get_num_threads() <= _MAX_THREADS
        and (mask is None or not mask.requires_grad)
    )


def onednn_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """``models.layers.attention`` without dropout; (B, H, Q, C)."""
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return _attention(q, k, v, mask, scale or q.shape[-1] ** -0.5)[0]


# an operator of its own, so that torch.compile leaves it alone
@torch.library.custom_op("plainvl::onednn_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """What is gathered, and (B, H, Q) logarithms of the sums of the weights, for the backward pass."""
    out, log_sums = _like(q), q.new_empty(q.shape[:3])
    for place, (q_head, k_head, v_head) in _heads(q, k, v):
        weights = _scores(q_head, k_head, None if mask is None else mask[place], scale)
        largest = weights.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(q.dtype).min)  # -inf: everything is hidden
        sums = weights.sub_(largest).exp_().sum(dim=1, keepdim=True)
        torch.div(onednn_product(weights, v_head.t()), sums.clamp(min=torch.finfo(q.dtype).tiny), out=out[place])
        log_sums[place] = torch.where(sums > 0, largest + sums.log(), math.inf).squeeze(1)
    return out, log_sums


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return _like(q), q.new_empty(q.shape[:3])


@torch.library.custom_op("plainvl::onednn_attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; the weights are computed once more, not kept."""
    grad_q, grad_k, grad_v = _like(q), _like(k), _like(v)
    shares = (grad * out).sum(dim=-1, keepdim=True)
    for place, (q_head, k_head, v_head, grad_head) in _heads(q, k, v, grad):
        weights = _scores(q_head, k_head, None if mask is None else mask[place], scale)
        weights.sub_(log_sums[place][:, None]).exp_()
        grad_v[place] = onednn_product(grad_head.t(), weights.t()).t()
        weights.mul_(onednn_product(grad_head, v_head).sub_(shares[place])).mul_(scale)
        grad_q[place] = onednn_product(weights, k_head.t())
        grad_k[place] = onednn_product(q_head.t(), weights.t()).t()
    return grad_q, grad_k, grad_v


@_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, log_sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q, k, v, mask, out, log_sums = ctx.saved_tensors
    return *_attention_backward(grad, q, k, v, mask, ctx.scale, out, log_sums), None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _heads(*tensors: Tensor) -> Any:
    """Place of each head, and its dense (tokens, C) matrices."""
    for sample in range(tensors[0].shape[0]):
        for head in range(tensors[0].shape[1]):
            yield (sample, head), [tensor[sample, head].contiguous() for tensor in tensors]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(Q, C), (K, C) -> (Q, K)."""
    scores = onednn_product(q * scale, k)
    if mask is None:
        return scores
    return scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)


def _like(x: Tensor) -> Tensor:
    """(B, H, N, C) whose heads lie side by side, so that joining them copies nothing."""
    batch, heads, tokens, channels = x.shape
    return x.new_empty(batch, tokens, heads, channels).transpose(1, 2)
