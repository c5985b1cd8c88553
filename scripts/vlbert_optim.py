"""VL-BERT's parameter groups: everything decays alike; the policy is a part of its own."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from engine.errors import EngineError
from models.vlbert.vqa import POLICY

POLICY_PART = "policy"


def vlbert_parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, policy_weight_decay: float
) -> list[dict[str, Any]]:
    """One group for the network, one for its policy, norms and biases included, as in the original.

    Args:
        named_parameters: of an ``AdaptiveVQA``; frozen ones are left out.
        weight_decay: of the network.
        policy_weight_decay: of the policy.

    Returns:
        Groups with ``name``, ``params``, ``param_names``, ``weight_decay``, ``lr_scale`` and, for the policy, ``part``.

    Raises:
        EngineError: nothing is trainable.
    """
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {"network": [], POLICY_PART: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            parts[POLICY_PART if name.startswith(POLICY) else "network"].append((name, parameter))
    if not parts["network"]:
        raise EngineError("no parameter is trainable: everything is frozen")
    decays = {"network": weight_decay, POLICY_PART: policy_weight_decay}
    return [
        {
            "name": part,
            "part": part if part == POLICY_PART else "",
            "params": [parameter for _, parameter in entries],
            "param_names": [name for name, _ in entries],
            "weight_decay": decays[part],
            "lr_scale": 1.0,
        }
        for part, entries in parts.items()
        if entries
    ]
