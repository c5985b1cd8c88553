"""Evaluation over several processes: every sample once, sums and counts travel, means are made at the end."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from engine import distributed, stop
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
    check: Callable[[], None] = stop.raise_if_asked,
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Run ``forward(model, batch)`` without gradients over this process's share; yields (batch, outputs).

    All processes call the model equally often, since a forward pass may hold a collective (weights that are spread over
    the processes are gathered in it): one that has fewer batches repeats its last one, or the first of another process
    if it has none, and drops what comes out. So every process has to read the results to their end. The model is in
    evaluation mode meanwhile and gets its mode back.

    Args:
        model: the unwrapped model.
        batches: this process's batches, on the CPU.
        forward: what to compute; called inside autocast and inference mode.
        device: where the model is.
        autocast: makes the autocast context.
        total: number of this process's batches; several processes need it unless ``batches`` has a length.
        description: label of the progress bar of the main process.
        check: called before each forward pass, so equally often on every process; may raise to end the evaluation.
    """
    was_training = model.training
    model.eval()

    def outputs_of(batch: dict[str, Any]) -> Any:
        check()
        with torch.inference_mode(), autocast():
            return forward(model, batch)

    show = distributed.is_main() and sys.stderr.isatty()
    try:
        batches, batch, rounds = _in_lock_step(batches, total)
        count = 0
        for batch in tqdm(batches, total=total, desc=description, disable=not show, leave=False):
            batch, count = to_device(batch, device), count + 1
            yield batch, outputs_of(batch)
        if count < rounds:
            batch = to_device(batch, device)
            for _ in range(count, rounds):
                outputs_of(batch)
    finally:
        model.train(was_training)


def _in_lock_step(
    batches: Iterable[dict[str, Any]], total: int | None
) -> tuple[Iterable[dict[str, Any]], dict[str, Any] | None, int]:
    """Agree once on the number of forward passes: the batches, one to repeat where there are none, that number."""
    if distributed.world_size() == 1:
        return batches, None, 0
    counts = distributed.gather_objects(len(batches) if total is None else total)
    borrowed = None
    if max(counts) > 0 == min(counts):
        lender = counts.index(max(counts))
        if distributed.rank() == lender:
            rest = iter(batches)
            borrowed = next(rest)
            batches = chain([borrowed], rest)
        box = [borrowed]
        dist.broadcast_object_list(box, src=lender)
        borrowed = box[0]
    return batches, borrowed, max(counts)


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
