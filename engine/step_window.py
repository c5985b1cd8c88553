"""What the steps of one logging interval gave, kept on the device until it ends; running means of an epoch."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine import distributed
from engine.backend import StepInfo


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, read from the device."""

    index: int
    sample_ids: list[int]  # of this process
    lr: float  # base rate
    failed: bool
    values: dict[str, float]  # means over micro-batches and processes


class StepWindow:
    """Device-side values of one logging interval; nothing here waits for the device until ``read``."""

    def __init__(self) -> None:
        """Begin the first interval."""
        self._micro_batches = 0
        self._totals: dict[str, Tensor | float] = {}
        self._ids: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Begin the next interval."""
        self._started = time.perf_counter()
        self._steps: list[tuple[int, list[int], float, StepInfo, dict[str, Tensor | float]]] = []
        self.data_wait_s = 0.0

    def elapsed_s(self) -> float:
        """From the interval's begin until ``read`` had its values."""
        return self._ended - self._started

    def add(self, losses: dict[str, Any], sample_ids: Any) -> None:
        """Take what ``loss_fn`` gave for one micro-batch."""
        self._micro_batches += 1
        for key, value in losses.items():
            value = value.detach().float() if isinstance(value, Tensor) else float(value)
            self._totals[key] = self._totals.get(key, 0.0) + value
        if sample_ids is not None:
            self._ids.extend(int(index) for index in sample_ids)

    def close_step(self, step: int, lr: float, info: StepInfo) -> None:
        """Turn the micro-batches since the last call into one step."""
        means = {key: total / self._micro_batches for key, total in self._totals.items()}
        self._steps.append((step, self._ids, lr, info, means))
        self._micro_batches, self._totals, self._ids = 0, {}, []

    def read(self) -> list[StepRecord]:
        """The steps of the interval; values that ``loss_fn`` gave are means over the processes."""
        infos = [info for _, _, _, info, _ in self._steps]
        failed = torch.stack([info.failed for info in infos]).tolist()
        norms = torch.stack([info.grad_norm.float() for info in infos]).tolist()
        loss_scales = _to_floats([info.loss_scale for info in infos])
        keys = list(self._steps[0][-1])
        scalars = {key: _to_floats([means[key] for *_, means in self._steps]) for key in keys}
        self._ended = time.perf_counter()
        shares = distributed.gather_objects(scalars)  # added in rank order: the same sums in any interval
        scalars = {
            key: [sum(values) / len(shares) for values in zip(*(share[key] for share in shares), strict=True)]
            for key in keys
        }
        return [
            StepRecord(
                step,
                ids,
                lr,
                failed[place],
                {key: scalars[key][place] for key in keys}
                | {"grad_norm": norms[place], "loss_scale": loss_scales[place]},
            )
            for place, (step, ids, lr, _, _) in enumerate(self._steps)
        ]


def _to_floats(values: list[Tensor | float]) -> list[float]:
    return torch.stack(values).tolist() if isinstance(values[0], Tensor) else values


def add_finite(means: dict[str, list[float]], values: dict[str, float]) -> None:
    """Take the finite values into the running (mean, number of values)."""
    for key, value in values.items():
        mean = means.setdefault(key, [0.0, 0])
        if math.isfinite(value):
            mean[1] += 1
            mean[0] += (value - mean[0]) / mean[1]


def means_of(means: dict[str, list[float]]) -> dict[str, float]:
    """Mean of each key; NaN where no step had a finite value."""
    return {key: mean if number else math.nan for key, (mean, number) in means.items()}
