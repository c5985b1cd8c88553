"""Whether the weights that a run trains are all finite: looked at once before they are written."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engine import distributed


def first_nonfinite(entries: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with a value that is not finite on any process; all processes call it together.

    Args:
        entries: the same names in the same order on every process; a tensor may be this process's part, or empty.
    """
    names: list[str] = []
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, (name, value) in enumerate(entries):
        names.append(name)
        if value.numel() and value.is_floating_point():
            by_device.setdefault(value.device, []).append((place, value.detach()))
    bad = []
    for held in by_device.values():
        # the largest magnitude: unlike a sum of squares it is finite for every finite value
        largest = torch._foreach_norm([value for _, value in held], math.inf)
        finite = torch.stack([value.float() for value in largest]).isfinite().tolist()  # the one wait for the device
        bad += [place for (place, _), is_finite in zip(held, finite, strict=True) if not is_finite]
    found = [place for place in distributed.gather_objects(min(bad, default=None)) if place is not None]
    return names[min(found)] if found else None
