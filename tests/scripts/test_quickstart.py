"""The quick start as users run it, at reduced size: it learns to look, and a second run keeps what is done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

CAPTION_SIZES = {"QUICKSTART_TRAIN": "700", "QUICKSTART_VAL": "30", "QUICKSTART_TEST": "60", "QUICKSTART_EPOCHS": "4"}
SIZES = {"QUICKSTART_TRAIN": "800", "QUICKSTART_VAL": "100", "QUICKSTART_TEST": "100", "QUICKSTART_EPOCHS": "12"}


def quickstart(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "quickstart.sh"), *flags],
        env=os.environ | {"PLAINVL_VENV": sys.prefix, "QUICKSTART_DIR": str(folder)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    done = quickstart(folder, **SIZES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_model_looks_at_the_pictures(first_run):
    folder, _ = first_run
    summary = json.loads((folder / "report" / "summary.json").read_text())
    overall = dict(zip(summary["columns"], summary["rows"][0]["scores"], strict=True))
    assert summary["rows"][0]["count"] == 600
    assert overall["Model"] > overall["Question only"] + 0.2, overall
    assert overall["Model"] > overall["Shuffled images"] + 0.2, overall


def test_it_prints_accuracy_times_and_where_everything_is(first_run):
    folder, done = first_run
    for text in ("Shuffled images", "Question only", "yes/no", "number", "other"):
        assert text in done.stdout
    for stage in ("environment", "draw scenes", "build index", "fine-tune", "predict", "report", "total"):
        assert any(line.startswith(stage) and line.endswith(" s") for line in done.stdout.splitlines()), stage
    places = [line.split()[-1] for line in done.stdout.splitlines()[-4:]]
    assert all(Path(place).exists() for place in places), places
    assert (folder / "report" / "report.html").stat().st_size > 100_000


def test_it_trains_through_torchrun_and_predicts_through_the_launcher(first_run):
    _, done = first_run
    assert "+ torchrun --standalone --nproc_per_node=" in done.stdout
    assert "bash scripts/prediction.sh --eval_split test" in done.stdout


def test_a_second_run_changes_nothing_and_says_so(first_run):
    folder, _ = first_run
    before = snapshot(folder)
    again = quickstart(folder, **SIZES)
    assert again.returncode == 0
    assert again.stdout.count("done before, kept") == 7
    assert "Question only" in again.stdout
    after = snapshot(folder)
    changed = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    assert changed == []


def test_a_run_with_other_settings_is_refused(first_run):
    folder, _ = first_run
    done = quickstart(folder, **SIZES | {"QUICKSTART_TRAIN": "501"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds a run with 800 train" in done.stderr
    assert "--fresh" in done.stderr


@pytest.mark.parametrize(
    ("words", "variable", "value", "rule"),
    [
        ([], "QUICKSTART_TRAIN", "39", "a whole number of at least 40 (fewer fill no batch)"),
        (["captioning"], "QUICKSTART_TEST", "1", "a whole number of at least 2 (pictures change places)"),
        ([], "QUICKSTART_VAL", "0", "a whole number of at least 1"),
        ([], "QUICKSTART_EPOCHS", "all", "a whole number of at least 1"),
        ([], "SEED", "first", "a whole number of at least 0"),
        ([], "NPROC_PER_NODE", "0", "a number of processes"),
    ],
)
def test_a_wrong_value_is_refused_and_not_remembered(tmp_path, words, variable, value, rule):
    done = quickstart(tmp_path / "new", *words, **{variable: value})
    assert (done.returncode, done.stderr) == (2, f"quickstart.sh: error: {variable} must be {rule}, got '{value}'\n")
    assert not (tmp_path / "new").exists()


def test_an_unknown_argument_is_refused(tmp_path):
    done = quickstart(tmp_path / "new", "--fast")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown argument --fast" in done.stderr


def test_captions_of_drawn_scenes_are_learnt_and_shown(tmp_path):
    folder = tmp_path / "captions"
    done = quickstart(folder, "captioning", **CAPTION_SIZES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((folder / "report" / "summary.json").read_text())
    cider = {row["name"]: row for row in summary["rows"]}["CIDEr"]
    assert cider["count"] == 60
    found = dict(zip(summary["columns"], cider["scores"], strict=True))
    assert found["Model"] > 2 * found["One caption for all"] > 2 * found["Before training"], found
    assert "bash scripts/predict_captions.sh --eval_split test" in done.stdout
    assert (folder / "report" / "report.html").stat().st_size > 50_000
    places = [line.split()[-1] for line in done.stdout.splitlines()[-4:]]
    assert all(Path(place).exists() for place in places), places
    again = quickstart(folder, "captioning", **CAPTION_SIZES)
    assert again.returncode == 0
    assert again.stdout.count("done before, kept") == 7
    other = quickstart(folder, **CAPTION_SIZES)
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "holds a run with captions, 700 train" in other.stderr
