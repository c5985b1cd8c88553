"""Joining samples into batches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_tokens(rows: Sequence[Sequence[int]], pad_id: int, *, multiple_of: int = 1) -> tuple[Tensor, Tensor | None]:
    """Pad token rows on the right to the longest row, not to a maximum.

    Args:
        rows: token ids of each sample.
        pad_id: id that fills up.
        multiple_of: round the common length up to a multiple, so that compiled code meets few lengths.

    Returns:
        (B, T) int64 tokens, and the (B, T) int64 padding mask, 1 where padded; None when nothing is padded, so that
        attention needs no mask and takes its fastest kernel.
    """
    length = -(-max(len(row) for row in rows) // multiple_of) * multiple_of
    tokens = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    padding_mask = torch.ones((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
        padding_mask[index, : len(row)] = 0
    return tokens, padding_mask if bool(padding_mask.any()) else None
