"""Pictures of what a policy chose: numbers, colours, pages; the table of strategies; Weights & Biases."""

import io
import json
import sys
from types import ModuleType

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from data.errors import DataError
from engine.errors import EngineError
from scripts import compare_strategies
from scripts.report.curves import BLUE, ORANGE
from scripts.report.strategies import StrategyRun, draw_strategies, read_run
from scripts.report.usage import ANCHORS, draw_heatmap, make_usage, read_usages, write_usage, write_usage_page
from scripts.wandb_log import WandbLog
from tests.scripts.vlbert_run import program as train
from tests.scripts.vlbert_run import run_dir, train_flags, trained_run


def colours_of(png: bytes) -> set[tuple[int, int, int]]:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    return set(map(tuple, pixels.tolist()))


def close(found: set[tuple[int, int, int]], wanted: tuple[int, int, int]) -> bool:
    return any(max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) <= 2 for colour in found)


def test_shares_are_counts_over_samples_layer_by_layer():
    usage = make_usage("SpotTune", "train", 3, [8, 4, 0, 2, 6, 8, 8, 8], 8, 2)
    assert usage.shares == [[1.0, 0.5, 0.0, 0.25], [0.75, 1.0, 1.0, 1.0]]
    assert usage.mean_used == pytest.approx(5.5)
    assert usage.stem == "SpotTune_train_epoch_3"


@pytest.mark.parametrize("strategy", ["SpotTune", "BlockDrop"])
def test_the_colour_of_a_share_is_the_published_one_whatever_else_is_in_the_picture(strategy):
    """The scale is fixed: two pictures of narrow ranges show different colours."""
    width = 5 if strategy == "SpotTune" else 1
    for tenth in (0, 3, 10):
        usage = make_usage(strategy, "val", 0, [tenth] * 4 * width, 10, 4)
        cells = Image.open(io.BytesIO(draw_heatmap(usage))).convert("RGB").resize((40, 40), Image.Resampling.NEAREST)
        assert close(colours_of(draw_heatmap(usage)), ANCHORS[tenth])
        most = max(cells.getcolors(), key=lambda entry: entry[0] if entry[1] != (255, 255, 255) else 0)[1]
        assert close({most}, ANCHORS[tenth])


def test_darker_is_more():
    luminance = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in ANCHORS]
    assert luminance == sorted(luminance, reverse=True)


def test_the_page_shows_every_epoch_and_is_the_same_after_a_resume(tmp_path):
    for epoch in range(3):
        for mode in ("train", "val"):
            write_usage(tmp_path, make_usage("BlockDrop", mode, epoch, [4, 2, 0], 4, 3))
    write_usage_page(tmp_path, title="a <title>")
    page = (tmp_path / "index.html").read_text()
    assert page.count("<figcaption>") == 6
    assert "a &lt;title&gt;" in page
    assert "epoch 2, val: 1.5 of 3 per sample, 4 samples" in page
    write_usage_page(tmp_path, title="a <title>")
    assert (tmp_path / "index.html").read_text() == page
    assert [usage.epoch for usage in read_usages(tmp_path)] == [0, 1, 2] * 2


def test_what_an_earlier_run_of_another_kind_left_is_passed_over(tmp_path):
    write_usage(tmp_path, make_usage("BlockDrop", "val", 5, [4, 2, 0], 4, 3))  # of a later epoch
    write_usage(tmp_path, make_usage("BlockDrop", "val", 0, [4, 2], 4, 2))  # of fewer layers
    write_usage(tmp_path, make_usage("SpotTune_Block", "val", 1, [4, 2, 0], 4, 3))
    newest = make_usage("BlockDrop", "val", 2, [4, 2, 0], 4, 3)
    write_usage(tmp_path, newest)
    write_usage_page(tmp_path, newest=newest)
    assert (tmp_path / "index.html").read_text().count("<figcaption>") == 1


@pytest.mark.parametrize(("strategy", "width"), [("SpotTune", 5), ("BlockDrop", 1)])
def test_the_page_explains_its_epochs_and_the_parts_it_names(tmp_path, strategy, width):
    write_usage(tmp_path, make_usage(strategy, "val", 0, [4] * 2 * width, 4, 2))
    write_usage_page(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "Epochs count from 0, as in the files' names." in " ".join(page.split())
    assert ("AH: attention heads, AO: attention output, INT: intermediate, OP: output" in page) == (width > 1)


def test_nothing_is_drawn_without_numbers(tmp_path):
    write_usage_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the table of strategies ----


def test_a_table_and_a_plot_of_runs(tmp_path, capsys):
    for number, strategy in enumerate(("standard", "BlockDrop")):
        folder = tmp_path / "runs" / f"0{number}"
        folder.mkdir(parents=True)
        (folder / "name.txt").write_text(f"{strategy} run\n")
        (folder / "inner").symlink_to(trained_run(strategy))
    rows = []
    for folder in sorted((tmp_path / "runs").iterdir()):
        inner = (folder / "inner").resolve()
        (folder / "inner").unlink()
        for name in ("run.json", "log.txt", "metrics.jsonl", "visualizations"):
            if (inner / name).exists():
                (folder / name).symlink_to(inner / name)
        rows.append(read_run(folder))
    assert [row.used is None for row in rows] == [True, False]
    assert rows[1].policy > 0
    compare_strategies.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")])
    table = (tmp_path / "out" / "strategies.md").read_text()
    assert table.startswith("# drawn data: shows that the methods work, no evidence on VQAv2\n")
    assert table.count("\n| ") == 3
    assert f"| {rows[0].train:.2f} | {rows[0].val:.2f} | {rows[0].train - rows[0].val:.2f} |" in table
    assert Image.open(tmp_path / "out" / "strategies.png").size[0] > 600
    assert "wrote" in capsys.readouterr().out


def test_training_and_validation_have_the_colours_of_the_curves(monkeypatch):
    drawn, scatter = {}, Axes.scatter

    def keep(panel, *places, color, label, **style):
        drawn[label] = color
        return scatter(panel, *places, color=color, label=label, **style)

    monkeypatch.setattr(Axes, "scatter", keep)
    draw_strategies([StrategyRun("standard", 60.0, 50.0, 1, 0, 0, None, 0.1, 100.0)], "heading")
    assert drawn == {"training batches": BLUE, "validation": ORANGE}


def test_runs_that_are_not_there_are_named(tmp_path):
    with pytest.raises(DataError, match="no runs in"):
        compare_strategies.main(["--runs", str(tmp_path), "--output", str(tmp_path)])
    (tmp_path / "name.txt").write_text("x")
    with pytest.raises(DataError, match="must hold one run, it holds 0"):
        read_run(tmp_path)


# ---- Weights & Biases ----


class FakeRun:
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.finished = False

    def log(self, values: dict, step: int | None = None) -> None:
        self.rows.append({**values, "at": step})

    def finish(self) -> None:
        self.finished = True


def test_the_same_numbers_and_pictures_go_to_wandb(tmp_path, monkeypatch):
    fake, started = FakeRun(), {}
    module = ModuleType("wandb")
    module.init = lambda **settings: started.update(settings) or fake
    module.Image = lambda path: ("picture", path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    train(*train_flags(tmp_path, "--wandb", "--log_every", "1", "--set=VERSION=mine", strategy="BlockDrop"))
    assert (started["project"], started["name"]) == ("adaptive-finetuning", "mine")
    assert started["config"]["FINETUNE_STRATEGY"] == "BlockDrop"
    losses = [row["Training Loss"] for row in fake.rows if "Training Loss" in row]
    logged = [json.loads(line) for line in (run_dir(tmp_path, "BlockDrop") / "metrics.jsonl").read_text().splitlines()]
    assert losses == [row["loss"] for row in logged]
    assert [row["at"] for row in fake.rows if "Training Loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {key for row in fake.rows for key in row if "Fraction" in key} == {
        "BlockDrop Finetuning Fraction: train",
        "BlockDrop Finetuning Fraction: val",
    }
    assert [row["Val SoftAcc"] for row in fake.rows if "Val SoftAcc" in row]
    assert fake.finished


def test_wandb_that_is_not_installed_or_refuses_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EngineError, match="pip install wandb"):
        WandbLog(tmp_path, name="x", settings={})
    module = ModuleType("wandb")

    def refuse(**_: object) -> None:
        raise OSError("no key")

    module.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(EngineError, match=r"refuses to start \(no key\): leave --wandb out"):
        WandbLog(tmp_path, name="x", settings={})
