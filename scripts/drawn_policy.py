"""Decisions with values in a model whose other tensors have none, for predictions of VL-BERT's memory."""

from typing import Any

import torch
from torch import Tensor, nn

from engine.without_values import SHAPES_ONLY


class _Drawn(torch.autograd.Function):
    """Scores of decisions with values, drawn at random, in the place of scores without."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        return torch.randn(scores.shape, device=scores.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with SHAPES_ONLY:
            return torch.empty(gradient.shape, device=gradient.device)


class DrawnPolicy(nn.Module):
    """A policy whose decisions have values, since the layers look at them on the host."""

    def __init__(self, policy: nn.Module) -> None:
        """Stand in the place of ``policy``."""
        super().__init__()
        self.policy = policy

    def forward(self, *inputs: Any, **more: Any) -> Tensor:
        """Run it for its memory, and draw other scores."""
        return _Drawn.apply(self.policy(*inputs, **more))
