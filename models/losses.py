"""Losses that several families share, in float32."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # label of what is not to be learnt


def vqa_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy, summed over answers and averaged over the batch.

    Args:
        logits: (B, num_answers).
        targets: (B, num_answers) soft scores in [0, 1].
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float()) * targets.shape[1]


def chunked_cross_entropy(
    hidden: Tensor, head: Callable[[Tensor], Tensor], labels: Tensor, *, chunk: int = 1024
) -> Tensor:
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
