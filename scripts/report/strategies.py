"""Runs with several fine-tuning strategies side by side: a Markdown table and a plot, from what the runs logged."""

import io
import statistics
from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.files import read_json, read_jsonl
from scripts.report.curves import BLUE, GRAY, ORANGE
from scripts.report.usage import read_usages


@dataclass(frozen=True)
class StrategyRun:
    """One row.

    Attributes:
        name: of the strategy.
        train: soft accuracy of the last epoch's training batches in per cent, dropout and drawn decisions included.
        val: best soft accuracy of a validation in per cent.
        trained: parameters of the network that train.
        frozen: those that do not.
        policy: parameters of the policy network.
        used: mean number of chosen decisions of a validation sample, and the number of decisions; None without policy.
        seconds_per_step: median over the logging intervals.
        peak_mib: of the process on the CPU, of the device on CUDA.
    """

    name: str
    train: float
    val: float
    trained: int
    frozen: int
    policy: int
    used: tuple[float, int] | None
    seconds_per_step: float
    peak_mib: float


def read_run(folder: Path) -> StrategyRun:
    """Row of a folder that holds ``name.txt`` and, somewhere below, one run.

    Raises:
        DataError: the run has not ended an epoch.
    """
    found = list(folder.rglob("run.json"))
    if len(found) != 1:
        raise DataError(f"{folder} must hold one run, it holds {len(found)}: run scripts/compare_strategies.sh again")
    run = found[0].parent
    facts = read_json(run / "run.json")
    epochs = read_jsonl(run / "log.txt", advice="the run has not ended an epoch")
    intervals = read_jsonl(run / "metrics.jsonl", advice="the run has not logged a step")
    usages = [usage for usage in read_usages(run / "visualizations") if usage.mode == "val"]
    last = max(usages, key=lambda usage: usage.epoch, default=None)
    return StrategyRun(
        name=(folder / "name.txt").read_text(encoding="utf-8").strip(),
        train=100 * epochs[-1]["train_acc"],
        val=max(row["val_score"] for row in epochs),
        trained=facts["parameters_trained"],
        frozen=facts["parameters_frozen"],
        policy=facts.get("parameters_policy", 0),
        used=None if last is None else (last.mean_used, sum(map(len, last.shares))),
        seconds_per_step=facts["samples_per_step"] / statistics.median(row["samples_per_s"] for row in intervals),
        peak_mib=max(row["peak_mib"] for row in intervals),
    )


def strategies_table(rows: list[StrategyRun], heading: str) -> str:
    """Markdown; thousands of parameters where there are less than a million."""
    lines = [
        f"# {heading}",
        "",
        "| strategy | train accuracy | val accuracy | gap | trained | frozen | policy | chosen per sample | "
        "time per step | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        used = "–" if row.used is None else f"{row.used[0]:.1f} of {row.used[1]}"
        cells = [
            *(row.name, f"{row.train:.2f}", f"{row.val:.2f}", f"{row.train - row.val:.2f}"),
            *(_count(row.trained), _count(row.frozen), _count(row.policy), used),
            *(f"{1000 * row.seconds_per_step:.0f} ms", f"{row.peak_mib:.0f} MiB"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Train accuracy is the mean over the batches of the last epoch, with dropout and drawn decisions; val accuracy "
        "the best of all epochs, without either. Chosen: layers used (BlockDrop), layers or parts fine-tuned (others).",
    ]
    return "\n".join(lines) + "\n"


def _count(number: int) -> str:
    if number == 0:
        return "–"
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def draw_strategies(rows: list[StrategyRun], heading: str) -> bytes:
    """PNG: training and validation accuracy of each strategy, and the time of a step beside them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRAY}
    with pyplot.rc_context({**style, "legend.frameon": False}):
        size = (10, 1.4 + 0.38 * len(rows))
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=size, dpi=120, layout="constrained", sharey=True, width_ratios=(3, 1)
        )
        try:
            places = range(len(rows))
            left.hlines(places, [row.val for row in rows], [row.train for row in rows], color="#d1d5db", lw=3, zorder=1)
            left.scatter([row.train for row in rows], places, color=BLUE, s=36, label="training batches", zorder=2)
            left.scatter([row.val for row in rows], places, color=ORANGE, s=36, label="validation", zorder=3)
            left.set_yticks(places, [row.name for row in rows])
            left.invert_yaxis()
            left.set_xlabel("soft accuracy (%)")
            left.grid(axis="x", color="#e5e7eb")
            left.legend(loc="lower left", ncols=2, bbox_to_anchor=(0, 1), fontsize=8)
            right.barh(places, [1000 * row.seconds_per_step for row in rows], color=GRAY, height=0.55)
            right.set_xlabel("time per step (ms)")
            right.tick_params(axis="y", length=0)
            for panel in (left, right):
                panel.set_axisbelow(True)
            figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
            picture = io.BytesIO()
            figure.savefig(picture, format="png", metadata={"Software": None})
        finally:
            pyplot.close(figure)
    return picture.getvalue()
