"""Activation checkpointing: which layers are computed again in the backward pass, and how one is.

A recomputed layer keeps its inputs alone; what lies between them and its output is made again when the backward pass
reaches it. Gradients are those of the layer that keeps everything, bit for bit.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.errors import ModelError


@dataclass(frozen=True)
class Recompute:
    """A policy for every stack of layers: none of them, all of them, or the first of each K.

    The first and not the last of each K: when the backward pass begins, all that is kept is still there, and what the
    network's last layer makes again would come on top of it.

    Attributes:
        every: K; 1 recomputes each layer, 0 none.
    """

    every: int = 0

    @classmethod
    def parse(cls, text: str) -> "Recompute":
        """``none``, ``full``, or ``every_K`` with K of 2 or more.

        Raises:
            ModelError: anything else.
        """
        if text in ("none", "full"):
            return cls(int(text == "full"))
        found = re.fullmatch(r"every_([1-9][0-9]{0,3})", text)
        if found is None or found[1] == "1":
            raise ModelError(f"{text!r:.40} does not say what to recompute: none, full, or every_K with K of 2 or more")
        return cls(int(found[1]))

    def __str__(self) -> str:
        """What ``parse`` reads."""
        return {0: "none", 1: "full"}.get(self.every, f"every_{self.every}")

    def covers(self, index: int) -> bool:
        """Whether the layer of this number, from 0 on, is recomputed."""
        return self.every > 0 and index % self.every == 0

    def run(self, index: int, layer: Callable[..., Any], *inputs: Any, draws: bool) -> Any:
        """What a layer makes of its inputs, recomputed in the backward pass if the policy covers it.

        Args:
            index: of the layer in its stack.
            layer: must do the same when it is called again with the same inputs and random numbers.
            inputs: tensors and anything else.
            draws: whether the layer draws random numbers (dropout); then the same ones are drawn again.
        """
        if not (self.covers(index) and torch.is_grad_enabled()):
            return layer(*inputs)
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=draws)


NOTHING = Recompute()


def set_recompute(model: nn.Module, policy: Recompute) -> None:
    """Give a policy to every stack of layers in a model: to each module with an attribute ``recompute``."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = policy
