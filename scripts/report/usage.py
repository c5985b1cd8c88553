"""Pictures of what a policy chose: heat maps of one epoch, curves over epochs, a page with all of them.

Pure functions from numbers to files. A record is one epoch and one mode (train, val): the share of samples, 0 to 1, for
which each decision was "fine-tune this" or "use this block". The colour scale is fixed, so that epochs compare; darker
is more fine-tuning, with the anchors of the published figures.
"""

import html
import io
import re
from base64 import b64encode
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files import open_atomic, read_json, write_json_atomic
from scripts.report.curves import BLUE, GRAY, ORANGE
from scripts.report.page_style import STYLE

PAGE = "index.html"
MODES = ("train", "val")
# colours of the shares 0, 0.1, … 1
ANCHORS = (
    *((250, 233, 218), (247, 196, 164), (246, 155, 113), (242, 111, 76), (231, 61, 63), (202, 26, 80)),
    *((161, 26, 91), (117, 31, 88), (75, 29, 74), (37, 20, 51), (3, 5, 26)),
)
_PARTS = ("AO", "INT", "OP")
_NAME = re.compile(r"(SpotTune|SpotTune_Block|BlockDrop)_(train|val)_epoch_(\d+)\.json")


@dataclass(frozen=True)
class Usage:
    """Shares of one epoch.

    Attributes:
        strategy: ``SpotTune``, ``SpotTune_Block`` or ``BlockDrop``.
        mode: ``train`` or ``val``.
        epoch: from 0.
        samples: how many decided.
        shares: a row for each layer; one number in it, or those of its heads, attention output, intermediate, output.
        score: accuracy of the epoch in per cent, of a validation.
    """

    strategy: str
    mode: str
    epoch: int
    samples: int
    shares: list[list[float]]
    score: float | None = None

    @property
    def mean_used(self) -> float:
        """Mean number of chosen decisions of a sample."""
        return sum(map(sum, self.shares))

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"{self.strategy}_{self.mode}_epoch_{self.epoch}"

    @property
    def what(self) -> str:
        """What a share is a share of."""
        return "share of samples that use the block" if self.strategy == "BlockDrop" else "share fine-tuned"


def make_usage(strategy: str, mode: str, epoch: int, decisions: list[int], samples: int, num_layers: int) -> Usage:
    """From how many of ``samples`` chose each decision."""
    shares = [round(count / max(samples, 1), 6) for count in decisions]
    width = len(shares) // num_layers
    return Usage(strategy, mode, epoch, samples, [shares[i * width : (i + 1) * width] for i in range(num_layers)])


def write_usage(folder: Path, usage: Usage) -> None:
    """Numbers and heat map of one epoch, ``<strategy>_<mode>_epoch_<n>.json`` and ``.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(
        folder / f"{usage.stem}.json", {**asdict(usage), "mean_used": round(usage.mean_used, 4)}, indent=1
    )
    with open_atomic(folder / f"{usage.stem}.png", binary=True) as handle:
        handle.write(draw_heatmap(usage))


def write_usage_page(folder: Path, *, newest: Usage | None = None, title: str = "") -> None:
    """``index.html``: curves over all epochs that have numbers in the folder, and their heat maps.

    Args:
        folder: what ``write_usage`` wrote into.
        newest: the record of the epoch that has just ended; what an earlier run of another kind left is passed over.
        title: of the page.
    """
    found = sorted(read_usages(folder), key=lambda usage: (usage.epoch, MODES.index(usage.mode)))
    if newest is not None:
        found = [usage for usage in found if usage.epoch <= newest.epoch and _same_kind(usage, newest)]
    if not found:
        return
    title = title or f"{found[0].strategy}: what the policy chose"
    curves = _image(draw_usage_curves(found), "Curves over epochs")
    maps = "".join(
        f"<figure>{_image((folder / f'{usage.stem}.png').read_bytes(), usage.stem)}<figcaption>{_caption(usage)}"
        "</figcaption></figure>"
        for usage in reversed(found)
        if (folder / f"{usage.stem}.png").is_file()
    )
    parts = _PARTS_LINE if len(found[0].shares[0]) > 1 else ""
    with open_atomic(folder / PAGE) as file:
        file.write(_PAGE.format(title=html.escape(title), style=STYLE, parts=parts, curves=curves, maps=maps))


def _same_kind(one: Usage, other: Usage) -> bool:
    layout = [list(map(len, usage.shares)) for usage in (one, other)]
    return one.strategy == other.strategy and layout[0] == layout[1]


def read_usages(folder: Path) -> list[Usage]:
    """All records of a folder."""
    usages = []
    for path in sorted(folder.glob("*.json")):
        if _NAME.fullmatch(path.name):
            content: dict[str, Any] = read_json(path)
            content.pop("mean_used", None)
            usages.append(Usage(**content))
    return usages


def _caption(usage: Usage) -> str:
    total = sum(map(len, usage.shares))
    return f"epoch {usage.epoch}, {usage.mode}: {usage.mean_used:.1f} of {total} per sample, {usage.samples:,} samples"


def draw_heatmap(usage: Usage) -> bytes:
    """PNG: layers downwards and components across, or, with one decision a layer, the blocks in a row."""
    pyplot, colors = _pyplot()
    by_part = len(usage.shares[0]) > 1
    grid = usage.shares if by_part else [[row[0] for row in usage.shares]]
    layers = [f"BL_{i + 1}" for i in range(len(usage.shares))]
    across = layers
    if by_part:
        across = [f"AH_{i + 1}" for i in range(len(grid[0]) - len(_PARTS))] + list(_PARTS)
    width, height = 1.6 + 0.42 * len(grid[0]), 1.7 + 0.36 * len(grid)
    figure, panel = pyplot.subplots(figsize=(max(width, 5.2), height), dpi=120, layout="constrained")
    try:
        shown = panel.imshow(grid, cmap=colors, vmin=0, vmax=1, aspect="auto")
        panel.set_xticks(range(len(across)), across, fontsize=7, rotation=45 if by_part else 0)
        panel.set_yticks(range(len(grid)), layers if by_part else [""], fontsize=7)
        if not by_part:
            for place, share in enumerate(grid[0]):
                panel.text(place, 0, f"{share:.2f}", ha="center", va="center", fontsize=7, color=_readable(share))
        for side in panel.spines.values():
            side.set_visible(False)
        panel.tick_params(length=0)
        panel.set_title(f"{usage.strategy}, {usage.mode}, epoch {usage.epoch}", loc="left", fontsize=10)
        bar = figure.colorbar(shown, ax=panel, ticks=[0, 0.5, 1], fraction=0.06, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, length=0)
        if by_part:
            bar.set_label(usage.what, fontsize=8)
        else:
            panel.set_xlabel(usage.what, fontsize=8)
        return _png(figure)
    finally:
        pyplot.close(figure)


def draw_usage_curves(usages: list[Usage]) -> bytes:
    """PNG: mean number of choices by mode and the accuracy over epochs, and the share of each layer over epochs."""
    pyplot, colors = _pyplot()
    scores = {usage.epoch: usage.score for usage in usages if usage.score is not None}
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GRAY}
    with pyplot.rc_context({**style, "legend.frameon": False}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), dpi=120, layout="constrained")
        try:
            for mode, color in zip(MODES, (BLUE, ORANGE), strict=True):
                chosen = [usage for usage in usages if usage.mode == mode]
                if chosen:
                    points = [u.epoch for u in chosen], [u.mean_used for u in chosen]
                    left.plot(*points, color=color, marker="o", ms=3.5, label=mode)
            total = sum(map(len, usages[0].shares))
            left.set_ylim(0, total)
            left.set_ylabel(f"choices per sample, of {total}")
            left.set_xlabel("epoch")
            left.set_title("Mean number of choices", loc="left", fontsize=10, color=GRAY)
            left.xaxis.get_major_locator().set_params(integer=True)
            below = {"loc": "upper left", "bbox_to_anchor": (0, -0.16), "ncols": 3}
            if scores:
                beside = left.twinx()
                epochs = sorted(scores)
                beside.plot(epochs, [scores[e] for e in epochs], color=GRAY, ls="--", lw=1.2, label="accuracy on val")
                beside.set_ylim(0, 100)
                beside.set_ylabel("accuracy on val (%)", color=GRAY)
                handles = [*left.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
                left.legend(handles=handles, **below)
            else:
                left.legend(**below)
            mode = "val" if any(usage.mode == "val" for usage in usages) else "train"
            chosen = [usage for usage in usages if usage.mode == mode]
            grid = [
                [sum(usage.shares[layer]) / len(usage.shares[layer]) for usage in chosen]
                for layer in range(len(chosen[0].shares))
            ]
            shown = right.imshow(grid, cmap=colors, vmin=0, vmax=1, aspect="auto")
            right.set_yticks(range(len(grid)), [f"BL_{i + 1}" for i in range(len(grid))], fontsize=7)
            right.set_xticks(range(len(chosen)), [str(usage.epoch) for usage in chosen], fontsize=7)
            right.set_xlabel("epoch")
            right.set_title(f"Share of each layer, {mode}", loc="left", fontsize=10, color=GRAY)
            figure.colorbar(shown, ax=right, ticks=[0, 0.5, 1], fraction=0.06, pad=0.02).outline.set_visible(False)
            return _png(figure)
        finally:
            pyplot.close(figure)


def _readable(share: float) -> str:
    """Light figures on the dark half of the scale."""
    return "white" if share > 0.35 else "black"


def _pyplot() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    anchors = [tuple(value / 255 for value in color) for color in ANCHORS]
    return pyplot, LinearSegmentedColormap.from_list("usage", anchors)


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})  # the same bytes whatever the version
    return picture.getvalue()


def _image(content: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{b64encode(content).decode()}">'


_PARTS_LINE = "<br>AH: attention heads, AO: attention output, INT: intermediate, OP: output."

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}
main {{ padding-top: 44px; }}
.curves img {{ filter: none; }}
.maps {{ margin: 28px 0 60px; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }}
.maps figure {{ margin: 0; background: #fff; border-radius: 8px; padding: .5rem; }}
.maps img {{ width: 100%; height: auto; }}
.maps figcaption {{ color: #4b5563; font-size: .85rem; }}
</style></head><body><main><h1>{title}</h1>
<p class="subtitle">Darker is more fine-tuning (of a block that may be left out: more use). The colour scale is the same
in all pictures; decisions in training are drawn, in validation they are the most probable ones. Epochs count
from 0, as in the files' names.{parts}</p>
<figure class="curves" tabindex="0">{curves}</figure>
<div class="maps">{maps}</div></main></body></html>
"""
