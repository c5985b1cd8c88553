"""Learned position tables at another image resolution: BEiT-3 and VLE fine-tune at a larger one than they pre-train."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import ModelError


def resize_pos_embed(table: Tensor, grid: int, num_prefix: int) -> Tensor:
    """Resample a learned position table to another square patch grid.

    The rows before the patches stay as they are; the rest is interpolated bicubically in float32, corners not
    aligned, no antialiasing.

    Args:
        table: (num_prefix + g * g, D) rows of the checkpoint.
        grid: wanted patches per side, that is image side / patch side.
        num_prefix: rows before the first patch (class token, and in BEiT-3 the two that its position ids skip).

    Returns:
        (num_prefix + grid * grid, D) in the dtype of ``table``; ``table`` itself if the grid is already right.

    Raises:
        ModelError: if the number of patch rows is not a square.
    """
    num_patches = table.shape[0] - num_prefix
    old_grid = math.isqrt(max(num_patches, 0))
    if old_grid == 0 or old_grid * old_grid != num_patches:
        raise ModelError(
            f"a position table of {table.shape[0]} rows has {num_patches} patch rows after its first {num_prefix}, "
            f"which is not a square number: only tables of square images can be resized"
        )
    if old_grid == grid:
        return table
    prefix, patches = table[:num_prefix], table[num_prefix:]
    patches = patches.float().reshape(1, old_grid, old_grid, -1).permute(0, 3, 1, 2)  # (1, D, g, g)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(table.dtype)
    return torch.cat([prefix, patches])
