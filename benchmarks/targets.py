"""What the benchmarks aim at, and whether a measured row is there."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A number of a row that has a target: how it is read, written, and which side of the target is the good one."""

    read: Callable[[dict[str, Any]], float | None]
    text: str
    at_least: bool = True


def _cost(row: dict[str, Any]) -> float | None:
    return None if row["peer"] is None else row["ours"] / row["peer"]


def _memory(row: dict[str, Any]) -> float | None:
    return None if row["ours_mib"] is None or row["peer_mib"] is None else row["ours_mib"] / row["peer_mib"]


FASTER = Measure(lambda row: row["ratio"], "{:.2f} times as fast")
COST = Measure(_cost, "{:.2f} of its time", at_least=False)
MEMORY = Measure(_memory, "{:.2f} of its memory", at_least=False)
RATE = Measure(lambda row: 1 / row["ours"], "{:,.0f} a second")
UTILISATION = Measure(lambda row: row["utilisation"], "{:.0%} of peak")


@dataclass(frozen=True)
class Target:
    """A bound for one row of one device."""

    what: str  # the row's
    device: str
    measure: Measure
    bound: float

    def is_met(self, row: dict[str, Any]) -> bool:
        """Whether the row reaches the bound; one without the number does not."""
        value = self.measure.read(row)
        return value is not None and (value >= self.bound if self.measure.at_least else value <= self.bound)

    def wanted(self) -> str:
        """The bound in words."""
        return f"{'at least' if self.measure.at_least else 'at most'} {self.measure.text.format(self.bound)}"

    def found(self, row: dict[str, Any]) -> str | None:
        """The row's number in words."""
        value = self.measure.read(row)
        return None if value is None else self.measure.text.format(value)


_LLAVA = "LLaVA's decoder: adapter train step"
TARGETS = (
    Target("beit3_base_patch16_480 vqav2: train step", "cpu", FASTER, 3.5),
    Target("vle_base_384 vqav2: train step", "cpu", FASTER, 1.5),
    Target(_LLAVA, "cpu", FASTER, 1.3),
    Target(_LLAVA, "cpu", MEMORY, 0.8),
    Target("SpotTune: train step, beside Standard", "cpu", COST, 1.6),
    Target("VL-BERT: sample to batch", "cpu", RATE, 10_000),
    Target("beit3_base_patch16_480 vqav2: train step", "cuda", UTILISATION, 0.5),
    Target("beit3_large_patch16_480 vqav2: train step", "cuda", UTILISATION, 0.55),
    Target("vle_base_384 vqav2: train step", "cuda", UTILISATION, 0.4),
    Target(_LLAVA, "cuda", UTILISATION, 0.5),
)
