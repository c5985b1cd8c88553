"""Losses that several families share, in float32."""

from torch import Tensor
from torch.nn import functional as F


def vqa_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy, summed over answers and averaged over the batch.

    Args:
        logits: (B, num_answers).
        targets: (B, num_answers) soft scores in [0, 1].
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float()) * targets.shape[1]
