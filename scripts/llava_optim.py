"""LLaVA's parameter groups and schedules: the projector may have a rate of its own; biases and norms do not decay."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from engine.errors import EngineError
from engine.optim import groups_by_part
from engine.schedule import Schedule, warmup_decay

PROJECTOR = "mm_projector"


def llava_schedule(kind: str, lr: float, *, warmup_ratio: float, total_steps: int) -> Schedule:
    """The rate over the steps, as transformers' trainer has it: the first step of a warm-up has rate 0.

    Args:
        kind: ``cosine``, ``linear`` (both fall to 0), ``constant_with_warmup`` or ``constant``.
        lr: peak rate.
        warmup_ratio: share of the steps in which the rate rises, rounded up.
        total_steps: of the whole run.

    Raises:
        EngineError: an unknown kind.
    """
    if kind == "constant":
        return lambda step: lr
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if kind == "constant_with_warmup":
        return lambda step: lr * min(1.0, step / max(1, warmup_steps)) if warmup_steps else lr
    if kind not in ("cosine", "linear"):
        raise EngineError(f"--lr_scheduler_type {kind!r}: give cosine, linear, constant or constant_with_warmup")
    power = None if kind == "cosine" else 1.0
    return warmup_decay(lr, 0.0, warmup_steps=warmup_steps, total_steps=total_steps, power=power)


def llava_parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, projector_lr: float | None, weight_decay: float
) -> list[dict[str, Any]]:
    """The original's four groups in its order; empty ones are left out.

    Args:
        named_parameters: of a ``LlavaForCausalLM``; frozen ones are left out.
        lr: peak rate of all but the projector.
        projector_lr: of the projector; None: the same.
        weight_decay: of the groups that decay.

    Returns:
        Groups with ``name``, ``params``, ``param_names``, ``weight_decay`` and ``lr_scale``.

    Raises:
        EngineError: nothing is trainable, or a projector's rate beside a rate of 0.
    """
    if projector_lr is not None and lr <= 0:
        raise EngineError("--mm_projector_lr needs a --learning_rate above 0")
    return groups_by_part(
        named_parameters,
        {"rest": 1.0, "projector": 1.0 if projector_lr is None else projector_lr / lr},
        part=lambda name: "projector" if PROJECTOR in name and projector_lr is not None else "rest",
        decays=lambda name: not ("bias" in name or "norm" in name),
        weight_decay=weight_decay,
    )
