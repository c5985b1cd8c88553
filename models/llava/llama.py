"""The Llama decoder with its original key names: RMS norms, rotary positions, grouped keys, cache; its loss.

Source: Touvron et al. 2023; arithmetic and key names of transformers' LlamaForCausalLM.

Letters: B batch, T new tokens, K tokens that are looked at, D width, H heads, G heads of keys, C channels of a head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.errors import ModelError
from models.layers import attention, join_heads, split_heads
from models.linear import Linear
from models.llava.config import LlamaConfig
from models.recompute import NOTHING

IGNORED = -100  # label of what is not to be learnt


class RMSNorm(nn.Module):
    """Divides by the root of the mean square, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        """With weight one."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.weight * _Normed.apply(x, self._eps)


class _Normed(torch.autograd.Function):
    """x over its root mean square; of float32 copies only the root is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse)
        return (wide * inverse).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, inverse = ctx.saved_tensors
        normed, grad = x.float() * inverse, grad.float()
        along = (grad * normed).mean(-1, keepdim=True)
        return ((grad - normed * along) * inverse).to(x.dtype), None


class Cache:
    """Keys and values of all layers for the tokens so far, in room that is taken once."""

    def __init__(self, config: LlamaConfig, batch_size: int, room: int, like: Tensor) -> None:
        """Room for ``room`` tokens of ``batch_size`` rows, with the type and device of ``like``."""
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, room, config.head_size)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, G, T, C) to one layer; all keys and values of it, (B, G, K, C). ``advance`` after the last."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[3]:
            raise ModelError(f"{end} tokens for a cache with room for {self.keys.shape[3]}")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """All layers have been extended."""
        self.length += tokens

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows in this order, as a beam search wants."""
        end = self.length
        self.keys[:, :, :, :end] = self.keys[:, rows, :, :end]
        self.values[:, :, :, :end] = self.values[:, rows, :, :end]


@dataclass(frozen=True)
class Decoded:
    """tokens (B, T, D) after the last norm; layers: (B, T, D) before the first layer and after each, if asked for."""

    tokens: Tensor
    layers: list[Tensor] | None


class LlamaModel(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, config: LlamaConfig) -> None:
        """Build it with random weights."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute = NOTHING

    def decode(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        cache: Cache | None = None,
        keep_layers: bool = False,
    ) -> Decoded:
        """Run embedded tokens through the layers.

        Args:
            tokens: (B, T, D).
            mask: (B, K), True = a token, False = padding; None: nothing is padded. Padding at the end needs no mask as
                long as nobody reads what comes out for it: no token looks ahead.
            positions: (B, T) of the new tokens; 0, 1, … from the cache's length on if None.
            lengths: of samples that lie one behind the other in a single row, B = 1; none sees another, and each begins
                at position 0.
            cache: of the tokens before; gets the new ones too.
            keep_layers: give the tokens after each layer as well.
        """
        past = 0 if cache is None else cache.length
        if lengths is not None:
            if cache is not None or mask is not None or (tokens.shape[0], sum(lengths)) != (1, tokens.shape[1]):
                raise ModelError("samples one behind the other fill one row, without mask and cache")
            positions = torch.cat([torch.arange(length, device=tokens.device) for length in lengths])[None]
        elif positions is None:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
        rotation = rotary(positions, self.config, tokens.dtype)
        may_look = None if mask is None else _may_look(mask, tokens.shape[1])
        layers = [tokens] if keep_layers else None
        recompute = self.recompute if cache is None else NOTHING  # a cache must be extended once
        for number, layer in enumerate(self.layers):
            inputs = (tokens, rotation, may_look, lengths, cache, number)
            tokens = recompute.run(number, layer, *inputs, draws=self.training)  # adapters have dropout
            if layers is not None:
                layers.append(tokens)
        if cache is not None:
            cache.advance(positions.shape[1])
        tokens = self.norm(tokens)
        if layers is not None:
            layers[-1] = tokens
        return Decoded(tokens, layers)


def rotary(positions: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, (B, 1, T, C) each, computed in float32."""
    half = torch.arange(0, config.head_size, 2, dtype=torch.float32, device=positions.device) / config.head_size
    angles = (positions.float() / config.rope_factor)[..., None] / config.rope_theta**half
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines


def _may_look(mask: Tensor, new: int) -> Tensor:
    """(B, K) -> (B, 1, T, K): new token t may look at tokens up to itself that are no padding, and at itself."""
    total = mask.shape[1]
    rows = torch.arange(total - new, total, device=mask.device)[:, None]
    columns = torch.arange(total, device=mask.device)
    return (((columns <= rows) & mask[:, None].bool()) | (columns == rows))[:, None]


class _Layer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        rotation: tuple[Tensor, Tensor],
        may_look: Tensor | None,
        lengths: Sequence[int] | None = None,
        cache: Cache | None = None,
        number: int = 0,
    ) -> Tensor:
        tokens = tokens + self.self_attn(self.input_layernorm(tokens), rotation, may_look, lengths, cache, number)
        return tokens + self.mlp(self.post_attention_layernorm(tokens))


class _Attention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        width, keys = config.hidden_size, config.num_key_value_heads * config.head_size
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, keys, bias=False)
        self.v_proj = Linear(width, keys, bias=False)
        self.o_proj = Linear(width, width, bias=False)

    def forward(
        self,
        tokens: Tensor,
        rotation: tuple[Tensor, Tensor],
        may_look: Tensor | None,
        lengths: Sequence[int] | None,
        cache: Cache | None,
        number: int,
    ) -> Tensor:
        q = _rotate(split_heads(self.q_proj(tokens), self._heads), rotation)
        k = _rotate(split_heads(self.k_proj(tokens), self._key_heads), rotation)
        v = split_heads(self.v_proj(tokens), self._key_heads)
        if cache is not None:
            k, v = cache.extend(number, k, v)
        if self._heads != self._key_heads:
            k, v = (x.repeat_interleave(self._heads // self._key_heads, dim=1) for x in (k, v))
        if lengths is not None:
            parts = zip(*(x.split(list(lengths), dim=2) for x in (q, k, v)), strict=True)
            out = torch.cat([attention(*part, is_causal=True) for part in parts], dim=2)
        elif may_look is not None:
            out = attention(q, k, v, mask=may_look)
        elif q.shape[2] == k.shape[2]:
            out = attention(q, k, v, is_causal=True)
        elif q.shape[2] == 1:
            out = attention(q, k, v)
        else:
            ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            out = attention(q, k, v, mask=ahead.tril(k.shape[2] - q.shape[2]))
        return self.o_proj(join_heads(out))


class _MLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))


class _Gated(torch.autograd.Function):
    """silu(gate) * up; silu is made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def next_word_loss(hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, *, chunk: int = 1024) -> Tensor:
    """Cross entropy of the next word, mean over the labelled places, without the logits of all of them at once.

    Only labelled rows meet the vocabulary, ``chunk`` at a time; their float32 logits are made again in the backward
    pass. Value and gradients are those of the loss over all logits.

    Args:
        hidden: (..., D), already shifted: row t foretells label t.
        head: (n, D) -> (n, vocabulary) logits.
        labels: (...), ``IGNORED`` where nothing is to be learnt.
        chunk: rows whose logits exist at the same time.

    Returns:
        A scalar; NaN if no place is labelled.
    """
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    wanted = (labels != IGNORED).nonzero().squeeze(1)  # waits for the device, once
    rows, targets = hidden.index_select(0, wanted), labels.index_select(0, wanted)

    def part(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), targets, reduction="sum")

    pairs = zip(rows.split(chunk), targets.split(chunk), strict=True)
    if torch.is_grad_enabled() and len(rows) > chunk:
        sums = [checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
    else:
        sums = [part(*pair) for pair in pairs]
    return torch.stack(sums).sum() / len(targets) if len(targets) else part(rows, targets) / 0
