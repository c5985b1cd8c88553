"""What a family contributes to ``bench_step.py``: how to build each side, and how much work a forward pass is."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NUM_ANSWERS = 3129


@dataclass
class Side:
    """One of the two that are compared; ``forward`` gives logits, ``loss`` takes them."""

    model: nn.Module
    forward: Callable[[], Tensor]
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer | None = None


@dataclass
class Workload:
    """Both sides, and the FLOPs of one forward pass over the whole batch; ``build_peer`` is None without a peer."""

    build_ours: Callable[[], Side]
    build_peer: Callable[[], Side] | None
    forward_flops: float


@dataclass
class TextBatch:
    """(B, T) ids; (B, T) padding or None; (B, T) positions to predict, for captioning; both padded to one length."""

    tokens: Tensor
    padding_mask: Tensor | None
    masked: Tensor

    def lengths(self) -> list[int]:
        """Tokens of each row without padding."""
        if self.padding_mask is None:
            return [self.tokens.shape[1]] * len(self.tokens)
        return (~self.padding_mask).sum(1).tolist()


def draw_text(
    args: argparse.Namespace, batch_size: int, pad_to: int | None, *, vocabulary: int, masked_fraction: float = 0.0
) -> TextBatch:
    """Random words between two specials; the same words for every ``pad_to`` (None: the longest of the batch)."""
    generator = torch.Generator().manual_seed(1)
    shortest = args.question_tokens // 2 if args.ragged else args.question_tokens
    lengths = 2 + torch.randint(shortest, args.question_tokens + 1, (batch_size,), generator=generator)
    width = pad_to or int(lengths.max())
    words = torch.randint(4, vocabulary, (batch_size, args.question_tokens + 2), generator=generator)
    masked = torch.rand(batch_size, args.question_tokens + 2, generator=generator) < masked_fraction
    tokens, positions = (
        torch.ones(batch_size, width, dtype=torch.long),
        torch.zeros(batch_size, width, dtype=torch.bool),
    )
    for row, length in enumerate(lengths.tolist()):
        tokens[row, :length] = words[row, :length]
        positions[row, 1:length] = masked[row, 1:length]
        tokens[row, 0] = 0
        positions[row, 1] = True
    padding_mask = torch.arange(width) >= lengths[:, None]
    device = args.device
    return TextBatch(tokens.to(device), padding_mask.to(device) if padding_mask.any() else None, positions.to(device))
