"""VLE's parameter groups: backbone, head and fusion, each with and without weight decay."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from engine.optim import groups_by_part

# parts of a name that say no decay; the head's own layer norm is not among them, and decays as in the original
_NO_DECAY = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
_PARTS = (("backbone", ""), ("head", "vqa_classifier"), ("fusion", "cross_modal"))  # the last that matches wins


def vle_parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    lr_mult_head: float,
    lr_mult_cross_modal: float,
) -> list[dict[str, Any]]:
    """The original's six groups in its order, chosen by name; empty ones are left out.

    ``fusion`` are the fusion layers and both poolers, not the projections and the token types.

    Args:
        named_parameters: of a ``VLEForVQA``; frozen ones are left out.
        weight_decay: of the groups that decay.
        lr_mult_head: factor of the head's rate.
        lr_mult_cross_modal: factor of the fusion layers' rate.

    Returns:
        Groups with ``name``, ``params``, ``param_names``, ``weight_decay`` and ``lr_scale``.

    Raises:
        EngineError: nothing is trainable.
    """
    return groups_by_part(
        named_parameters,
        {"backbone": 1.0, "head": float(lr_mult_head), "fusion": float(lr_mult_cross_modal)},
        part=lambda name: [part for part, mark in _PARTS if mark in name][-1],
        decays=lambda name: not any(mark in name for mark in _NO_DECAY),
        weight_decay=weight_decay,
    )
