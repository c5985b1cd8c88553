"""Text with image places to one sequence of vectors: LLaVA's ``prepare_inputs_labels_for_multimodal``.

Letters: B batch, T0 ids with a place an image, T joined rows, I images, P rows an image, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import ModelError

IMAGE_PLACE, IGNORED = -200, -100
_DROPPED = -(2**31)  # stands for a word behind the mask


@dataclass(frozen=True)
class Rows:
    """embeds: (T, D) of each sample; labels: (T,) of each, -100 at images; None where none were given."""

    embeds: list[Tensor]
    labels: list[Tensor] | None


@dataclass(frozen=True)
class Joined:
    """embeds (B, T, D); labels (B, T), -100 at images and padding, or None; mask (B, T), True = a row; lengths."""

    embeds: Tensor
    labels: Tensor | None
    mask: Tensor
    lengths: list[int]


def positions_of(mask: Tensor) -> Tensor:
    """(B, T) masks of rows, padded on the left, to the place of each in its sequence; 0 where nothing is."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def join_rows(
    ids: Tensor,
    images: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    max_length: int | None = None,
) -> Rows:
    """Put the vectors of the images at their places, sample by sample.

    The ids are read back from the device once, and it is waited for at no other place.

    Args:
        ids: (B, T0), ``IMAGE_PLACE`` where an image stands.
        images: (P, D) of each image in reading order over the batch. A sample without a place takes one all the same,
            with no row of it: its stand-in keeps the projector in the graph.
        embed: ids -> vectors.
        mask: (B, T0), True = a token; the others are dropped before anything else.
        labels: (B, T0).
        max_length: rows that are kept of each sample, from its beginning.

    Raises:
        ModelError: another number of images than places and samples without one.
    """
    # numpy: torch's own ``nonzero`` would wait for a device at each call
    host = (ids if mask is None else ids.masked_fill(~mask.bool(), _DROPPED)).cpu().numpy()
    kept, is_image = host != _DROPPED, host == IMAGE_PLACE
    wanted = is_image.sum(1).clip(1).sum()
    if wanted != len(images):
        raise ModelError(
            f"{len(images)} images for {wanted} places: each <image> of a text takes one, and a text without <image> a "
            "stand-in"
        )
    vectors = embed(ids.flatten()[_places(kept & ~is_image, ids.device)])
    own: Sequence[Tensor] = ()
    if labels is not None:
        own = labels.flatten()[_places(kept, ids.device)].split(kept.sum(1).tolist())
    rows, targets, used, first = [], [], 0, 0
    for number, (is_token, is_place) in enumerate(zip(kept, is_image, strict=True)):
        parts, marks = [], []
        places, length = is_place[is_token].nonzero()[0].tolist(), is_token.sum()
        begin = 0
        for place in [*places, length]:
            parts.append(vectors[first : first + place - begin])
            first += place - begin
            if labels is not None:
                marks.append(own[number][begin:place])
            if place < length:
                parts.append(images[used].to(vectors.dtype))
                if labels is not None:
                    marks.append(labels.new_full((len(images[used]),), IGNORED))
                used += 1
            begin = place + 1
        if not places:
            parts.append(images[used][:0].to(vectors.dtype))
            used += 1
        rows.append(torch.cat(parts)[:max_length])
        if labels is not None:
            targets.append(torch.cat(marks)[:max_length])
    return Rows(rows, None if labels is None else targets)


def pad_rows(rows: Rows, padding_side: str = "right") -> Joined:
    """Samples of unequal length as one batch, filled up on one side."""
    lengths = [len(row) for row in rows.embeds]
    longest = max(lengths)
    embeds = torch.stack([_padded(row, longest, 0.0, padding_side) for row in rows.embeds])
    labels = None
    if rows.labels is not None:
        labels = torch.stack([_padded(row, longest, IGNORED, padding_side) for row in rows.labels])
    ones = [torch.ones(length, dtype=torch.bool, device=embeds.device) for length in lengths]
    present = torch.stack([_padded(row, longest, 0, padding_side) for row in ones])
    return Joined(embeds, labels, present, lengths)


def _places(chosen: Any, device: torch.device) -> Tensor:
    """Where a numpy array of truths is true, counted through its rows."""
    return torch.from_numpy(chosen.ravel().nonzero()[0]).to(device, non_blocking=True)


def _padded(row: Tensor, length: int, value: float, side: str) -> Tensor:
    filling = row.new_full((length - len(row), *row.shape[1:]), value)
    return torch.cat([row, filling] if side == "right" else [filling, row])
