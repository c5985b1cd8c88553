"""What benchmarks report: rows and curves, in one form for all of them."""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.files import write_json_atomic

NOT_INSTALLED = "peer not installed"


@dataclass
class Row:
    """One thing measured, beside its peer.

    Attributes:
        section: of the table, a key of ``results_page.SECTIONS``.
        what: names the row; the same on every machine.
        setting: sizes, precision.
        ours: seconds.
        peer_name: package or recipe; empty where there is none to compare with.
        peer: seconds; None if it is not installed.
        check: what was found when the outputs were compared.
        ours_mib: peak memory, where it was measured.
        peer_mib: the same.
        utilisation: useful FLOPs a second over the device's, where both are known.
    """

    section: str
    what: str
    setting: str
    ours: float
    peer_name: str = ""
    peer: float | None = None
    check: str = ""
    ours_mib: float | None = None
    peer_mib: float | None = None
    utilisation: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a file, with the ratio."""
        ratio = None if self.peer is None else self.peer / self.ours  # how many times faster ours is
        state = NOT_INSTALLED if self.peer_name and self.peer is None else "measured"
        return {**asdict(self), "ratio": ratio, "state": state}


@dataclass
class Curve:
    """Seconds over a size; ``peer`` is None where there is none.

    Attributes:
        what: names the curve.
        setting: everything else.
        axis: what x counts.
        x: sizes.
        ours: seconds at each.
        peer_name: as in ``Row``.
        peer: seconds at each.
        check: as in ``Row``.
    """

    what: str
    setting: str
    axis: str
    x: list[float]
    ours: list[float]
    peer_name: str = ""
    peer: list[float] | None = None
    check: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For a file, with the exponents."""
        found = {"ours_exponent": exponent(self.x, self.ours)}
        if self.peer is not None:
            found["peer_exponent"] = exponent(self.x, self.peer)
        state = NOT_INSTALLED if self.peer_name and self.peer is None else "measured"
        return {**asdict(self), **found, "state": state}


@dataclass
class Result:
    """All that a benchmark found; ``details`` is kept in its own file only."""

    rows: list[Row] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    details: Any = None


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Slope of y over x in logarithms by least squares: 1 where twice as much takes twice as long; None for one x."""
    if len(set(x)) < 2:
        return None
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float:
    """Of the last minute."""
    return os.getloadavg()[0]


def write_result(path: Path | None, result: Result, setting: dict[str, Any]) -> Result:
    """Write one benchmark's file (``--json``) if a path is given; returns the result."""
    if path is not None:
        import torch

        content = {
            "torch": torch.__version__,
            "setting": {key: value for key, value in setting.items() if not isinstance(value, Path)},
            "rows": [row.as_dict() for row in result.rows],
            "curves": [curve.as_dict() for curve in result.curves],
            "details": result.details,
        }
        write_json_atomic(path, content, indent=2)
    return result
