"""Evaluation over several processes: every sample once, sums and counts travel, means are made at the end."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import distributed
from engine.errors import EngineError


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on ``device``; other entries unchanged."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value for key, value in batch.items()
    }


def forward_batches(
    model: nn.Module,
    batches: Iterable[dict[str, Any]],
    forward: Callable[[nn.Module, dict[str, Any]], Any],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    total: int | None = None,
    description: str = "evaluating",
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Run ``forward(model, batch)`` without gradients over this process's share; yields (batch, outputs).

    The model is put into evaluation mode meanwhile and back into its mode at the end.

    Args:
        model: the unwrapped model.
        batches: this process's batches, on the CPU.
        forward: what to compute; called inside autocast and inference mode.
        device: where the model is.
        autocast: makes the autocast context.
        total: number of batches, for the progress bar of the main process.
        description: label of the progress bar.
    """
    was_training = model.training
    model.eval()
    show = distributed.is_main() and sys.stderr.isatty()
    try:
        for batch in tqdm(batches, total=total, desc=description, disable=not show, leave=False):
            batch = to_device(batch, device)
            with torch.inference_mode(), autocast():
                outputs = forward(model, batch)
            yield batch, outputs
    finally:
        model.train(was_training)


def gather_by_id(local: dict[int, Any], *, expected: int | None = None) -> dict[int, Any]:
    """Merge the per-process results ``id -> value`` on every process, sorted by id.

    Args:
        local: results of this process.
        expected: number of ids that there must be in all.

    Raises:
        EngineError: an id came from two processes, or the number is not the expected one.
    """
    merged: dict[int, Any] = {}
    for part in distributed.gather_objects(local):
        repeated = merged.keys() & part.keys()
        if repeated:
            raise EngineError(f"{len(repeated)} ids were evaluated twice, such as {min(repeated)}: ids must be unique")
        merged.update(part)
    if expected is not None and len(merged) != expected:
        raise EngineError(f"{len(merged)} ids were evaluated instead of {expected}: ids must be unique")
    return dict(sorted(merged.items()))


def sum_over_processes(sums: dict[str, float]) -> dict[str, float]:
    """Add up float sums and counts over the processes (in float64)."""
    keys = sorted(sums)
    total = distributed.all_reduce_(torch.tensor([float(sums[key]) for key in keys], dtype=torch.float64))
    return dict(zip(keys, total.tolist(), strict=True))
