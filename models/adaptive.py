"""Adaptive fine-tuning: which layers, or parts of them, are trained, frozen or left out, fixed or by a learnt policy.

Written against an encoder interface, so that any family's encoder can be driven: a layer is called with tokens and a
mask; SpotTune also wants its four parts (``LayerParts``), each in a trained and a frozen version.

Sources: Guo et al. 2019, "SpotTune"; Wu et al. 2018, "BlockDrop"; the study of adaptive fine-tuning on VL-BERT, whose
published arithmetic is ``reference=True``: there SpotTune never uses the frozen attention output, and SpotTune_Block
feeds the frozen layer with the trained layer's output. The default is corrected.

Letters: B batch, L tokens, D width, H heads, C channels of a head, N layers, A decisions.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.errors import ModelError

TEMPERATURE = 5.0  # of both papers' originals
_NOISE_EPS, _FRACTION_EPS = 1e-20, 1e-9
PARTS = 3  # of a layer beside its heads: attention output, intermediate, output


class LayerParts(Protocol):
    """A layer in the four parts that SpotTune chooses between; each takes ``frozen``: which version to run."""

    def projections(self, tokens: Tensor, *, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> queries, keys and values, each (B, H, L, C)."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What each head gathers, (B, H, L, C); has no weights."""
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
Branch = Callable[..., Tensor]  # takes tensors with the batch first, or None
Run = Callable[..., Tensor]  # how layer ``number`` is called: number, the step of that layer, its inputs


def run_once(number: int, step: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Plainly; ``models.recompute`` has another way. Decisions are inputs: a step that runs again decides alike."""
    return step(*inputs)


# ---- how the layers run ----


def run_layers(layers: Iterable[Layer], tokens: Tensor, mask: Tensor | None, *, run: Run = run_once) -> list[Tensor]:
    """Plain: one layer after the other; the (B, L, D) outputs of all of them."""
    outputs = []
    for number, layer in enumerate(layers):
        tokens = run(number, layer, tokens, mask)
        outputs.append(tokens)
    return outputs


def run_block_drop(
    layers: Sequence[Layer], tokens: Tensor, mask: Tensor | None, policy: Tensor, *, run: Run = run_once
) -> list[Tensor]:
    """Keep or leave out each layer for each sample: x' = p layer(x) + (1 - p) x.

    With decisions of 0 and 1 a layer runs on the samples that keep it alone. In training the others go through it too,
    since the decision's gradient compares both outcomes, but nothing of it is kept or propagated back.

    Args:
        layers: N of them.
        tokens: (B, L, D).
        mask: whatever the layers take, batch first.
        policy: (B, N), 1 = keep.
        run: see ``Run``.
    """
    return run_spottune_block(layers, [_unchanged] * len(layers), tokens, mask, policy, run=run)


def _unchanged(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens


def run_spottune_block(
    layers: Sequence[Layer],
    frozen_layers: Sequence[Layer],
    tokens: Tensor,
    mask: Tensor | None,
    policy: Tensor,
    *,
    reference: bool = False,
    run: Run = run_once,
) -> list[Tensor]:
    """Choose between each layer and its frozen copy for each sample; policy (B, N), 1 = the trained one.

    With decisions of 0 and 1 each sample goes through one of the two; in training also through the other one, as in
    ``run_block_drop``.
    """
    _check_decisions(policy, len(layers))
    rows = None if reference else _rows_of(policy)
    outputs = []
    for number, (layer, frozen, tuned) in enumerate(zip(layers, frozen_layers, policy.unbind(1), strict=True)):
        chosen = None if rows is None else rows[number]
        step = partial(_tuned_or_frozen, reference=reference)
        tokens = run(number, step, tuned, chosen, layer, frozen, tokens, mask)
        outputs.append(tokens)
    return outputs


def _tuned_or_frozen(
    tuned: Tensor,
    rows: tuple[Tensor, Tensor] | None,
    layer: Layer,
    frozen: Layer,
    tokens: Tensor,
    mask: Tensor | None,
    *,
    reference: bool,
) -> Tensor:
    if rows is None:
        ours = layer(tokens, mask)
        return _mix(tuned, ours, frozen(ours if reference else tokens, mask))
    return _choose(tuned, rows, layer, frozen, tokens, mask)


def run_spottune(
    layers: Sequence[LayerParts],
    tokens: Tensor,
    mask: Tensor | None,
    policy: Tensor,
    *,
    reference: bool = False,
    run: Run = run_once,
) -> list[Tensor]:
    """Choose between trained and frozen version of each head and part for each sample.

    With decisions of 0 and 1 each sample goes through one version; in training also through the other one, as in
    ``run_block_drop``.

    Args:
        layers: N of them.
        tokens: (B, L, D).
        mask: whatever the layers take.
        policy: (B, N (H + 3)), 1 = trained; of each layer in turn its heads, attention output, intermediate, output.
        reference: as published: the attention output is always the trained one, and its decision has no gradient.
        run: see ``Run``.
    """
    per_layer = policy.shape[1] // max(len(layers), 1)
    _check_decisions(policy, len(layers) * per_layer)
    rows = _rows_of(policy)
    step = partial(_tune_parts, num_layers=len(layers), reference=reference)
    outputs = []
    for number, (layer, decisions) in enumerate(zip(layers, policy.split(per_layer, dim=1), strict=True)):
        first = (number + 1) * per_layer - PARTS
        chosen = None if rows is None else rows[first : first + PARTS]
        tokens = run(number, step, decisions, chosen, layer, tokens, mask)
        outputs.append(tokens)
    return outputs


def _tune_parts(
    decisions: Tensor,
    rows: list[tuple[Tensor, Tensor]] | None,
    layer: LayerParts,
    tokens: Tensor,
    mask: Tensor | None,
    *,
    num_layers: int,
    reference: bool,
) -> Tensor:
    """A layer's heads and parts, as its (B, H + 3) decisions say; ``rows`` of the parts, None where some are soft."""
    heads, parts = decisions[:, :-PARTS], decisions[:, -PARTS:].unbind(1)
    context = _contexts(layer, tokens, mask, heads, num_layers, hard=rows is not None)

    def part(place: int, branch: Branch, *inputs: Tensor) -> Tensor:
        ours, theirs = partial(branch, frozen=False), partial(branch, frozen=True)
        if rows is None:
            return _mix(parts[place], ours(*inputs), theirs(*inputs))
        return _choose(parts[place], rows[place], ours, theirs, *inputs)

    if reference:  # the published code mixes the trained output with itself
        ours = layer.attention_output(context, tokens, frozen=False)
        tokens = _mix(parts[0], ours, ours)
    else:
        tokens = part(0, layer.attention_output, context, tokens)
    return part(2, layer.narrow, part(1, layer.widen, tokens), tokens)


def _contexts(
    layer: LayerParts, tokens: Tensor, mask: Tensor | None, heads: Tensor, num_layers: int, *, hard: bool
) -> Tensor:
    """What the heads gather, each in its trained or its frozen version: (B, H, L, C)."""
    ours, theirs = (layer.projections(tokens, frozen=frozen) for frozen in (False, True))
    if heads.shape[1] != ours[0].shape[1]:
        wanted = num_layers * (ours[0].shape[1] + PARTS)
        found = num_layers * (heads.shape[1] + PARTS)
        raise ModelError(f"a policy of {found} decisions, the encoder takes {wanted}")
    gate = heads[:, :, None, None]
    if not hard:
        gate = gate.to(ours[0].dtype)
        return gate * layer.attend(*ours, mask) + (1 - gate) * layer.attend(*theirs, mask)
    tuned = gate.detach() == 1
    chosen = layer.attend(*(torch.where(tuned, a, b) for a, b in zip(ours, theirs, strict=True)), mask)
    if not gate.requires_grad:
        return chosen
    with torch.no_grad():
        other = layer.attend(*(torch.where(tuned, b, a) for a, b in zip(ours, theirs, strict=True)), mask)
        lead = chosen - other
    return _Decided.apply(gate, chosen, lead)


class _Decided(torch.autograd.Function):
    """gate * one + (1 - gate) * other for a gate of 0 and 1, of which only the chosen one is propagated back.

    The gradient of the other one would be 0; the gate's is that of the product with one - other, which is ``lead``,
    the chosen one less the one that was not, with the sign of the decision.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, chosen: Tensor, lead: Tensor) -> Tensor:
        ctx.save_for_backward(gate, lead)
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, lead = ctx.saved_tensors
        product = (gradient * lead).to(gate.dtype)
        return product.sum_to_size(gate.shape) * (2 * gate - 1), gradient, None


def _choose(gate: Tensor, rows: tuple[Tensor, Tensor], one: Branch, other: Branch, *inputs: Tensor | None) -> Tensor:
    """``one`` for the samples in ``rows[0]``, ``other`` for those in ``rows[1]``; gate (B,) says the same, as floats.

    In training each also runs on the other's samples, without a trace in the graph, for the gradient of the gate.
    """
    ones, others = rows
    training = torch.is_grad_enabled()
    if not training and len(others) == 0:
        return one(*inputs)
    if not training and len(ones) == 0:
        return other(*inputs)
    parted = [(None, None) if value is None else _Parted.apply(value, ones, others) for value in inputs]
    mine, yours = zip(*parted, strict=True)
    if not training:
        return _joined(one(*mine), other(*yours), ones, others)
    # with no sample of its own a branch still gets gradients, of 0: all processes must have the same ones
    ours = one(*mine) if len(ones) else one(*(None if value is None else value[:1] for value in inputs))[:0]
    theirs = other(*yours) if len(others) else None
    with torch.no_grad():
        ours_less_other = ours - other(*mine) if len(ones) else ours.detach()
        one_less_theirs = None if theirs is None else one(*yours) - theirs
    if theirs is None:
        theirs, one_less_theirs = ours[:0].detach(), ours_less_other[:0]
    return _Chosen.apply(gate, ours, theirs, ours_less_other, one_less_theirs, ones, others)


class _Parted(torch.autograd.Function):
    """(B, ...) -> two groups of samples; the backward of plain indexing would fill and add zeros."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ones: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ones, others)
        return value.index_select(0, ones), value.index_select(0, others)

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor) -> tuple[Tensor, None, None]:
        return _joined(one, other, *ctx.saved_tensors), None, None


class _Chosen(torch.autograd.Function):
    """Outputs of two groups of samples in the order of the batch, and what each decision would have changed."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        ours: Tensor,
        theirs: Tensor,
        ours_less_other: Tensor,
        one_less_theirs: Tensor,
        ones: Tensor,
        others: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(ours_less_other, one_less_theirs, ones, others)
        ctx.gate_dtype = gate.dtype
        return _joined(ours, theirs, ones, others)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ours_less_other, one_less_theirs, ones, others = ctx.saved_tensors
        of_ones, of_others = gradient.index_select(0, ones), gradient.index_select(0, others)
        of_gate = None
        if ctx.needs_input_grad[0]:
            products = [_dots(of_ones, ours_less_other), _dots(of_others, one_less_theirs)]
            of_gate = _joined(*products, ones, others).to(ctx.gate_dtype)
        return of_gate, of_ones, of_others, None, None, None, None


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot product of each sample, (B, ...) twice -> (B,)."""
    if a.dtype != torch.float32:
        return (a * b).flatten(1).sum(1, dtype=torch.float32)
    # not torch.bmm, which MKL does at a twentieth of the speed on Intel's processors
    return torch.linalg.vecdot(a.flatten(1), b.to(a.dtype).flatten(1))


def _joined(one: Tensor, other: Tensor, ones: Tensor, others: Tensor) -> Tensor:
    """Two groups of samples in the order of the batch."""
    whole = one.new_empty(len(ones) + len(others), *one.shape[1:])
    return whole.index_copy_(0, ones, one).index_copy_(0, others, other.to(one.dtype))


def _rows_of(policy: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """For each decision the samples with 1 and those with 0; None if any is in between. Waits for the device once."""
    values = policy.detach().cpu()
    if not bool(((values == 0) | (values == 1)).all()):
        return None
    rows = []
    for column in values.unbind(1):
        parts = column.nonzero().squeeze(1), (column == 0).nonzero().squeeze(1)
        rows.append(tuple(part.to(policy.device, non_blocking=True) for part in parts))
    return rows


def _mix(gate: Tensor, one: Tensor, other: Tensor) -> Tensor:
    gate = gate[:, None, None].to(one.dtype)
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
        (B, A) of 0 and 1; 1 is the second logit's choice.
    """
    pairs = logits.float().unflatten(1, (-1, 2))
    if uniform is None:
        uniform = torch.rand_like(pairs)
    noise = -torch.log(-torch.log(uniform + _NOISE_EPS) + _NOISE_EPS)
    soft = ((pairs + noise) / temperature).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return (hard + (soft - soft.detach()))[..., 1]  # the bracket is exactly 0


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
