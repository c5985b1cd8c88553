"""Learning-rate schedules: pure functions from the optimizer step to the base rate of that step."""

import math
from collections.abc import Callable

from engine.errors import EngineError

Schedule = Callable[[int], float]


def warmup_cosine(base: float, floor: float, *, warmup_steps: int, total_steps: int) -> Schedule:
    """Linear warm-up from 0 to ``base``, then half a cosine down towards ``floor`` (BEiT-3 ``utils.cosine_scheduler``).

    The warm-up points are evenly spaced with both ends included, so the very first step has rate 0 and the peak
    occurs twice: as the last warm-up point and as the first of the cosine. Steps past the end keep the last value.

    Args:
        base: peak rate.
        floor: rate that the cosine approaches.
        warmup_steps: number of warm-up steps (0 for none).
        total_steps: number of steps of the whole run, warm-up included.

    Returns:
        Function from step (0-based) to rate.

    Raises:
        EngineError: if there are no steps.
    """
    if total_steps < 1:
        raise EngineError(f"a schedule needs at least one step, got {total_steps}")
    warmup_steps = min(max(warmup_steps, 0), total_steps)
    cosine_steps = total_steps - warmup_steps

    def rate(step: int) -> float:
        step = min(max(step, 0), total_steps - 1)
        if step < warmup_steps:
            if warmup_steps == 1:
                return 0.0
            return base if step == warmup_steps - 1 else step * (base / (warmup_steps - 1))
        return floor + 0.5 * (base - floor) * (1 + math.cos(math.pi * (step - warmup_steps) / cosine_steps))

    return rate
