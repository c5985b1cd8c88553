"""Learning-rate schedules: pure functions from the optimizer step to the base rate of that step."""

import math
from collections.abc import Callable, Sequence

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


def warmup_decay(
    base: float, end: float, *, warmup_steps: int, total_steps: int, power: float | None = 1.0
) -> Schedule:
    """Linear warm-up from 0 to ``base``, then a polynomial down to ``end``, or half a cosine down to 0.

    As in transformers' ``get_polynomial_decay_schedule_with_warmup`` and ``get_cosine_schedule_with_warmup``: the very
    first step of a warm-up has rate 0, and the peak occurs once, right after it.

    Args:
        base: peak rate.
        end: rate at and after the last step; the cosine takes no notice of it.
        warmup_steps: number of warm-up steps (0 for none).
        total_steps: number of steps of the whole run, warm-up included.
        power: of the polynomial; None for the cosine.

    Returns:
        Function from step (0-based) to rate.

    Raises:
        EngineError: no steps, a rate that would rise, or a power that is not above 0.
    """
    if total_steps < 1:
        raise EngineError(f"a schedule needs at least one step, got {total_steps}")
    if end > base:
        raise EngineError(f"the schedule falls from {base:g} to {end:g}: the end must not be above the peak")
    if power is not None and power <= 0:
        raise EngineError(f"the power of the schedule must be above 0, got {power:g}")
    warmup_steps = max(warmup_steps, 0)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return base * (step / max(1, warmup_steps))
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if power is None:
            return base * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return end if step > total_steps else (base - end) * (1 - min(progress, 1.0)) ** power + end

    return rate


def triangle(base: float, *, warmup_steps: int, total_steps: int) -> Schedule:
    """Linear up to ``base`` at step ``warmup_steps``, then linear down to 0 at the last step (VL-BERT's ``triangle``).

    As in the original the schedule moves before the optimizer: the very first step has rate base / warmup_steps.

    Args:
        base: peak rate.
        warmup_steps: steps of the rise (0 for none).
        total_steps: of the whole run.
    """
    falling = max(1, total_steps - warmup_steps)

    def rate(step: int) -> float:
        step += 1
        if step < warmup_steps:
            return base * (step / warmup_steps)
        return base * max(0.0, (total_steps - step) / falling)

    return rate


def multi_step(
    base: float,
    milestones: Sequence[int],
    factor: float,
    *,
    warmup_steps: int = 0,
    warmup_factor: float = 0.0,
    constant_warmup: bool = False,
) -> Schedule:
    """A rate that is multiplied at each milestone, after a warm-up (VL-BERT's ``step``).

    Args:
        base: rate before the first milestone.
        milestones: steps at which the rate changes.
        factor: what it is multiplied with.
        warmup_steps: steps of the warm-up (0 for none).
        warmup_factor: share of the rate in the first step of the warm-up, which rises linearly.
        constant_warmup: it stays at ``warmup_factor`` instead.
    """

    def rate(step: int) -> float:
        share = 1.0
        if step < warmup_steps:
            done = 0.0 if constant_warmup else step / warmup_steps
            share = warmup_factor * (1 - done) + done
        return base * share * factor ** sum(milestone <= step for milestone in milestones)

    return rate
