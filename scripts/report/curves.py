"""Loss and accuracy of a run as one picture, from the two files that training writes.

``log.txt`` has one JSON object per epoch, ``metrics.jsonl`` one per logging interval. After a resume an epoch or a step
may stand there twice: the last one counts. Keys that are missing or unknown are left out of the picture.
"""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError

LOG = "log.txt"  # a line for each epoch
BLUE, ORANGE, GRAY = "#2f6690", "#c8553d", "#6b7280"


@dataclass(frozen=True)
class RunLog:
    """Lines of ``log.txt`` by epoch and of ``metrics.jsonl`` by step, both in order."""

    epochs: list[dict]
    intervals: list[dict]

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Epochs finished (from 1) and the values of one key of ``log.txt``, where it is there and finite."""
        rows = [(row["epoch"] + 1, row[key]) for row in self.epochs if _is_finite(row.get(key))]
        return [epoch for epoch, _ in rows], [float(value) for _, value in rows]


def read_run_log(run: Path) -> RunLog:
    """Read ``log.txt`` and, if it is there, ``metrics.jsonl`` of a run's output folder.

    Raises:
        DataError: no ``log.txt``, or a line in the middle of a file that is not a JSON object with its epoch or step.
    """
    log, metrics = run / LOG, run / "metrics.jsonl"
    if not log.is_file():
        raise DataError(f"no {LOG} in {run}: give the --output_dir of a training run that finished an epoch")
    return RunLog(_read_lines(log, "epoch"), _read_lines(metrics, "step") if metrics.is_file() else [])


def _read_lines(path: Path, key: str) -> list[dict]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: dict[int, dict] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break  # no line end: the run was killed while it wrote this line
            raise DataError(f"{path}:{number} is not JSON ({error}): delete the line") from None
        if not isinstance(row, dict) or not isinstance(row.get(key), int):
            raise DataError(f'{path}:{number} has no whole number "{key}": delete the line')
        rows[row[key]] = row
    return [rows[place] for place in sorted(rows)]


def draw_curves(
    log: RunLog,
    *,
    score_key: str | None = "val_score",
    score_name: str = "VQA accuracy on val",
    is_percent: bool = False,
    axis: str = "accuracy (%)",
    panel_title: str = "Accuracy",
    levels: dict[str, float | None] | None = None,
    title: str = "",
) -> bytes:
    """Two panels side by side, loss and a score over epochs, or the loss alone, as PNG bytes.

    Args:
        log: what ``read_run_log`` gave.
        score_key: the key of ``log.txt`` in the right panel. ``val_score`` is a fraction, or per cent if any of its
            values is above 1 (BEiT-3's original log has per cent); others are fractions, which may be above 1 (CIDEr).
            None: no right panel.
        score_name: how the legend calls it.
        is_percent: the score is no fraction, however small its values.
        axis: label of the right axis.
        panel_title: of the right panel.
        levels: name → fraction that needs no picture or the like, drawn as a line each, at most two; None: not known.
        title: above both panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRAY}
    with pyplot.rc_context({**style, "axes.grid": True, "grid.color": "#e5e7eb", "legend.frameon": False}):
        figure, panels = pyplot.subplots(
            1, 1 if score_key is None else 2, figsize=(10, 3.8), dpi=120, layout="constrained", squeeze=False
        )
        try:
            _draw_loss(panels[0, 0], log)
            for right in panels[0, 1:]:
                _draw_score(right, log, score_key, score_name, levels or {}, is_percent=is_percent)
                right.set_ylabel(axis)
                right.set_title(panel_title, loc="left", fontsize=10, color=GRAY)
            for panel in panels[0]:
                panel.set_xlabel("epoch")
                panel.set_xlim(0, max([1, *(row["epoch"] + 1 for row in log.epochs)]) * 1.02)
                panel.xaxis.get_major_locator().set_params(integer=True)
            if title:
                figure.suptitle(title, x=0.01, ha="left", fontsize=11)
            picture = io.BytesIO()
            figure.savefig(picture, format="png", metadata={"Software": None})  # the same bytes whatever the version
        finally:
            pyplot.close(figure)
    return picture.getvalue()


def _draw_loss(panel, log: RunLog) -> None:
    points = [(row["step"], row["loss"]) for row in log.intervals if _is_finite(row.get("loss"))]
    if len(points) > 1 and log.epochs:  # one point makes no line
        panel.plot(
            _epochs_of(points, log), [y for _, y in points], color=BLUE, alpha=0.35, lw=1, label="per logging interval"
        )
    epochs, losses = log.series("train_loss")
    middles = [epoch - 0.5 for epoch in epochs]  # a mean stands for its whole epoch
    panel.plot(middles, losses, color=BLUE, marker="o", ms=3.5, lw=1.8, label="mean of the epoch")
    panel.set_ylabel("training loss")
    panel.set_title("Loss", loc="left", fontsize=10, color=GRAY)
    values = losses + [y for _, y in points]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        panel.set_yscale("log")
    panel.legend()


def _epochs_of(points: list[tuple[int, float]], log: RunLog) -> list[float]:
    """Place of each logging interval on the epoch axis.

    The files do not say how many steps an epoch has. The last step of every finished epoch tells it, to within one
    logging interval; the largest is taken, because an epoch that ``--max_steps`` cut short tells too little.
    """
    ends: dict[int, int] = {}
    for row in log.intervals:
        epoch = row["epoch"] if isinstance(row.get("epoch"), int) else log.epochs[-1]["epoch"]
        ends[epoch] = max(ends.get(epoch, 0), row["step"])
    steps_per_epoch = max(
        [ends[row["epoch"]] / (row["epoch"] + 1) for row in log.epochs if row["epoch"] in ends] or [0]
    )
    return [step / (steps_per_epoch or max(step for step, _ in points) or 1) for step, _ in points]


def _draw_score(panel, log: RunLog, key: str, name: str, levels: dict[str, float | None], *, is_percent: bool) -> None:
    epochs, scores = log.series(key)
    scale = 1 if is_percent or key == "val_score" and any(score > 1 for score in scores) else 100
    percent = [scale * score for score in scores]
    heights = [100 * value for value in levels.values() if value is not None]
    if percent:
        panel.plot(epochs, percent, color=ORANGE, marker="o", ms=3.5, lw=1.8, label=name)
        best = max(range(len(percent)), key=percent.__getitem__)
        panel.annotate(
            f"best {percent[best]:.1f}",
            (epochs[best], percent[best]),
            (0, 5),  # above: the whole curve lies below its best point
            textcoords="offset points",
            ha="right" if 2 * epochs[best] > epochs[-1] else "left",  # towards the middle, inside the axes
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # a level may pass behind the words
        )
    for (level, value), dash in zip(levels.items(), ("--", ":"), strict=False):
        if value is not None:
            panel.axhline(100 * value, color=GRAY, ls=dash, lw=1.4, label=f"{level} ({100 * value:.1f})")
    panel.set_ylim(0, max([100.0, *(1.1 * height for height in [*percent, *heights])]))
    if panel.get_legend_handles_labels()[0]:
        panel.legend()


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
