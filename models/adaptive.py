"""Adaptive fine-tuning: which layers, or parts of them, are trained, frozen or left out, fixed or by a learnt policy.

Written against an encoder interface, so that any family's encoder can be driven: a layer is called with tokens and a
mask; SpotTune also wants its four parts (``LayerParts``), each in a trained and a frozen version.

Sources: Guo et al. 2019, "SpotTune"; Wu et al. 2018, "BlockDrop"; the study of adaptive fine-tuning on VL-BERT, whose
published arithmetic is ``reference=True``: there SpotTune never uses the frozen attention output, and SpotTune_Block
feeds the frozen layer with the trained layer's output. The default is corrected.

Letters: B batch, L tokens, D width, H heads, C channels of a head, N layers, A decisions.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from models.errors import ModelError

TEMPERATURE = 5.0  # of both papers' originals
_NOISE_EPS, _FRACTION_EPS = 1e-20, 1e-9
PARTS = 3  # of a layer beside its heads: attention output, intermediate, output


class LayerParts(Protocol):
    """A layer in the four parts that SpotTune chooses between; each takes ``frozen``: which version to run."""

    def contexts(self, tokens: Tensor, mask: Tensor | None, *, frozen: bool) -> Tensor:
        """(B, L, D) -> (B, H, L, C): what each head gathers."""
        ...

    def attention_output(self, context: Tensor, tokens: Tensor, *, frozen: bool) -> Tensor:
        """(B, H, L, C) and the layer's input -> (B, L, D), residual and norm included."""
        ...

    def widen(self, tokens: Tensor, *, frozen: bool) -> Tensor:
        """(B, L, D) -> (B, L, F), activation included."""
        ...

    def narrow(self, wide: Tensor, tokens: Tensor, *, frozen: bool) -> Tensor:
        """(B, L, F) and what was widened -> (B, L, D), residual and norm included."""
        ...


Layer = Callable[[Tensor, Tensor | None], Tensor]


# ---- how the layers run ----


def run_layers(layers: Iterable[Layer], tokens: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Plain: one layer after the other; the (B, L, D) outputs of all of them."""
    outputs = []
    for layer in layers:
        tokens = layer(tokens, mask)
        outputs.append(tokens)
    return outputs


def run_block_drop(layers: Sequence[Layer], tokens: Tensor, mask: Tensor | None, policy: Tensor) -> list[Tensor]:
    """Keep or leave out each layer for each sample: x' = p layer(x) + (1 - p) x.

    Without gradients and with decisions of 0 and 1 a layer runs on the samples that keep it alone: the same outputs.

    Args:
        layers: N of them.
        tokens: (B, L, D).
        mask: whatever the layers take, batch first.
        policy: (B, N), 1 = keep.
    """
    _check_decisions(policy, len(layers))
    skip = not torch.is_grad_enabled() and bool(((policy == 0) | (policy == 1)).all())
    outputs = []
    for layer, keep in zip(layers, policy.unbind(1), strict=True):
        if not skip:
            tokens = _mix(keep, layer(tokens, mask), tokens)
        elif bool(keep.all()):
            tokens = layer(tokens, mask)
        elif bool(keep.any()):
            rows = keep.nonzero().squeeze(1)
            changed = layer(tokens[rows], None if mask is None else mask[rows])
            tokens = tokens.index_copy(0, rows, changed.to(tokens.dtype))
        outputs.append(tokens)
    return outputs


def run_spottune_block(
    layers: Sequence[Layer],
    frozen_layers: Sequence[Layer],
    tokens: Tensor,
    mask: Tensor | None,
    policy: Tensor,
    *,
    reference: bool = False,
) -> list[Tensor]:
    """Choose between each layer and its frozen copy for each sample; policy (B, N), 1 = the trained one.

    Without gradients and with decisions of 0 and 1 each sample goes through one of the two alone.
    """
    _check_decisions(policy, len(layers))
    skip = not (reference or torch.is_grad_enabled()) and bool(((policy == 0) | (policy == 1)).all())
    outputs = []
    for layer, frozen, tuned in zip(layers, frozen_layers, policy.unbind(1), strict=True):
        if skip:
            changed = torch.empty_like(tokens)
            for chosen, rows in ((layer, tuned.nonzero().squeeze(1)), (frozen, (tuned == 0).nonzero().squeeze(1))):
                if len(rows):
                    part = chosen(tokens[rows], None if mask is None else mask[rows])
                    changed[rows] = part.to(changed.dtype)
            tokens = changed
        else:
            ours = layer(tokens, mask)
            tokens = _mix(tuned, ours, frozen(ours if reference else tokens, mask))
        outputs.append(tokens)
    return outputs


def run_spottune(
    layers: Sequence[LayerParts], tokens: Tensor, mask: Tensor | None, policy: Tensor, *, reference: bool = False
) -> list[Tensor]:
    """Choose between trained and frozen version of each head and part for each sample.

    Args:
        layers: N of them.
        tokens: (B, L, D).
        mask: whatever the layers take.
        policy: (B, N (H + 3)), 1 = trained; of each layer in turn its heads, attention output, intermediate, output.
        reference: as published: the attention output is always the trained one, and its decision has no gradient.
    """
    per_layer = policy.shape[1] // max(len(layers), 1)
    _check_decisions(policy, len(layers) * per_layer)
    outputs = []
    for layer, decisions in zip(layers, policy.split(per_layer, dim=1), strict=True):
        heads, (attended, wide, narrow) = decisions[:, :-PARTS], decisions[:, -PARTS:].unbind(1)
        ours = layer.contexts(tokens, mask, frozen=False)
        if heads.shape[1] != ours.shape[1]:
            wanted = len(layers) * (ours.shape[1] + PARTS)
            raise ModelError(f"a policy of {policy.shape[1]} decisions, the encoder takes {wanted}")
        gate = heads[:, :, None, None]
        context = gate * ours + (1 - gate) * layer.contexts(tokens, mask, frozen=True)
        ours = layer.attention_output(context, tokens, frozen=False)
        if reference:  # the published code mixes the trained output with itself
            tokens = _mix(attended, ours, ours)
        else:
            tokens = _mix(attended, ours, layer.attention_output(context, tokens, frozen=True))
        widened = _mix(wide, layer.widen(tokens, frozen=False), layer.widen(tokens, frozen=True))
        tokens = _mix(narrow, layer.narrow(widened, tokens, frozen=False), layer.narrow(widened, tokens, frozen=True))
        outputs.append(tokens)
    return outputs


def _mix(gate: Tensor, one: Tensor, other: Tensor) -> Tensor:
    gate = gate[:, None, None]
    return gate * one + (1 - gate) * other


def _check_decisions(policy: Tensor, wanted: int) -> None:
    if policy.ndim != 2 or policy.shape[1] != wanted:
        raise ModelError(f"a policy of shape {tuple(policy.shape)}, the encoder takes (batch, {wanted}) decisions")


# ---- which layers train ----


def frozen_layers(strategy: str, num_layers: int, listed: Sequence[int] = ()) -> set[int]:
    """Numbers of the layers that a plain strategy freezes.

    Args:
        strategy: ``standard``, ``pretrained_frozen``, ``last_<k>`` (only the last k train) or ``specific_k``.
        num_layers: N.
        listed: layers that ``specific_k`` freezes, from 0.

    Raises:
        ModelError: unknown strategy, or a layer that is not there.
    """
    if strategy == "standard":
        return set()
    if strategy == "pretrained_frozen":
        return set(range(num_layers))
    if strategy.startswith("last_") and strategy.removeprefix("last_").isdigit():
        trained = int(strategy.removeprefix("last_"))
        if not 0 < trained <= num_layers:
            raise ModelError(
                f"strategy {strategy}: the encoder has {num_layers} layers, train 1 to {num_layers} of them"
            )
        return set(range(num_layers - trained))
    if strategy == "specific_k":
        wrong = [index for index in listed if not 0 <= index < num_layers]
        if wrong or not listed:
            said = f"got {list(listed)}" if not wrong else f"there is no layer {wrong[0]}"
            raise ModelError(f"strategy specific_k freezes the listed layers, from 0 to {num_layers - 1}: {said}")
        return set(listed)
    raise ModelError(
        f"unknown strategy {strategy!r}: choose standard, pretrained_frozen, last_<k>, specific_k, SpotTune, "
        "SpotTune_Block or BlockDrop"
    )


def num_decisions(strategy: str, num_layers: int, num_heads: int) -> int:
    """A: decisions for a sample; 0 for strategies without a policy."""
    return {"SpotTune": num_layers * (num_heads + PARTS), "SpotTune_Block": num_layers, "BlockDrop": num_layers}.get(
        strategy, 0
    )


# ---- policies ----


def sample_policy(logits: Tensor, uniform: Tensor | None = None, *, temperature: float = TEMPERATURE) -> Tensor:
    """Decisions drawn by Gumbel softmax, hard forward, with the gradient of the soft ones (straight-through).

    Args:
        logits: (B, 2 A), two for each decision.
        uniform: (B, A, 2) draws from [0, 1); drawn here if None.
        temperature: of the softmax.

    Returns:
        (B, A) of 0 and 1, up to rounding; 1 is the second logit's choice.
    """
    pairs = logits.float().unflatten(1, (-1, 2))
    if uniform is None:
        uniform = torch.rand_like(pairs)
    noise = -torch.log(-torch.log(uniform + _NOISE_EPS) + _NOISE_EPS)
    soft = ((pairs + noise) / temperature).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return (hard - soft.detach() + soft)[..., 1]


def decide(logits: Tensor) -> Tensor:
    """The most probable decisions, without noise: (B, 2 A) logits -> (B, A) of 0 and 1."""
    return logits.unflatten(1, (-1, 2)).argmax(dim=-1).to(torch.float32)


def constrain_k_loss(policy: Tensor, num_blocks: float, scale: float = 1.0) -> Tensor:
    """How far the batch's mean number of chosen decisions is from ``num_blocks``, squared."""
    return scale * (policy.mean(dim=0).sum() - num_blocks) ** 2


def deterministic_policy_loss(policy: Tensor, scale: float = 1.0) -> Tensor:
    """Entropy-like sum over decisions of -m ln m, m the batch's mean; 0 where all samples decide alike."""
    means = policy.mean(dim=0) + _FRACTION_EPS
    return -scale * (means * means.log()).sum()


def set_trainable(modules: Iterable[nn.Module], trainable: bool) -> None:
    """Freeze or release all parameters of some modules."""
    for module in modules:
        for parameter in module.parameters():
            parameter.requires_grad_(trainable)
