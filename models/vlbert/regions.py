"""Image regions to vectors: where a region is, as sines and cosines, beside what it shows.

Source: ``coordinate_embeddings`` and the down-sampling of VL-BERT's FastRCNN module.

Letters: B batch, K regions.
"""

import torch
from torch import Tensor, nn

from models.linear import Linear

FEATURE_SIZE = 2048
_WAVES = 256  # sines, and as many cosines, of each of four numbers
_BASE, _SCALE = 1000.0, 100.0
DROPOUT = 0.1  # fixed in the original


def coordinate_embedding(boxes: Tensor, sizes: Tensor, num_waves: int = _WAVES) -> Tensor:
    """Centre and size of boxes, relative to their image, as waves.

    Args:
        boxes: (..., 4), x1 y1 x2 y2.
        sizes: (..., 2), width and height of the image, in the same unit.
        num_waves: sines a number; as many cosines follow them.

    Returns:
        (..., 4, 2 * num_waves).
    """
    left, top, right, bottom = boxes.unbind(-1)
    width, height = sizes.unbind(-1)
    numbers = (
        (left + right) / (2 * width),
        (top + bottom) / (2 * height),
        (right - left) / width,
        (bottom - top) / height,
    )
    numbers = torch.stack(numbers, dim=-1) * _SCALE
    waves = _BASE ** (torch.arange(num_waves, dtype=numbers.dtype, device=boxes.device) / num_waves)
    angles = numbers[..., None] / waves
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PrecomputedRegions(nn.Module):
    """Region vectors from features that a detector has computed before."""

    def __init__(self, width: int) -> None:
        """``width`` of the vectors."""
        super().__init__()
        self.obj_downsample = nn.Sequential(nn.Dropout(DROPOUT), Linear(2 * FEATURE_SIZE, width), nn.ReLU())

    def forward(self, boxes: Tensor, features: Tensor, sizes: Tensor, mask: Tensor) -> Tensor:
        """(B, K, 4) boxes, (B, K, 2048) features, (B, 2) image sizes, (B, K) mask -> (B, K, width), 0 at padding."""
        where = coordinate_embedding(boxes, sizes[:, None].expand(-1, boxes.shape[1], -1)).flatten(-2)
        vectors = self.obj_downsample(torch.cat([where.to(features.dtype), features], dim=-1))
        return vectors * mask[..., None].to(vectors.dtype)
