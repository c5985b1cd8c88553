"""scripts/demo_llava.sh at a tiny size: every stage runs, what it promises is there, a second run keeps all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

SIZES = {"DEMO_TRAIN": "24", "DEMO_VALID": "6", "DEMO_PRETRAIN": "24", "DEMO_EPOCHS": "1", "DEMO_PRETRAIN_EPOCHS": "1"}
STAGES = 8


def demo(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "demo_llava.sh"), *flags],
        env=os.environ | {"PLAINVL_VENV": sys.prefix, "DEMO_DIR": str(folder)} | SIZES | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_stage_runs_once(tmp_path):
    done = demo(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    places = [Path(line.split()[-1]) for line in done.stdout.splitlines()[-4:]]
    assert all(place.exists() for place in places), places
    rows = json.loads((tmp_path / "report/summary.json").read_text())["rows"]
    assert rows[0]["count"] == int(SIZES["DEMO_VALID"])
    assert json.loads((tmp_path / "tiny-llava-lora/adapter_config.json").read_text())["r"] == 16

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = demo(tmp_path)
    assert (again.returncode, again.stdout.count("done before, kept")) == (0, STAGES)
    changed = {path.name for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert changed == set()
    table = "accuracy in %"
    assert again.stdout.split(table)[-1].split("\n\n== ")[0] == done.stdout.split(table)[-1].split("\n\n== ")[0]

    other = demo(tmp_path, DEMO_TRAIN="25")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    assert "holds a run with 24, 6 and 24 images" in other.stderr
    assert "--fresh" in other.stderr


@pytest.mark.parametrize(
    ("variable", "value", "rule"),
    [
        ("DEMO_TRAIN", "15", "a whole number of at least 16 (one batch)"),
        ("DEMO_PRETRAIN", "0", "a whole number of at least 16 (one batch)"),
        ("DEMO_VALID", "few", "a whole number of at least 1"),
        ("DEMO_EPOCHS", "1.5", "a whole number of at least 1"),
        ("SEED", "-1", "a whole number of at least 0"),
        ("NPROC_PER_NODE", "17", "at most 16, the batch size over all processes"),
    ],
)
def test_a_wrong_value_is_refused_and_not_remembered(tmp_path, variable, value, rule):
    done = demo(tmp_path / "new", **{variable: value})
    assert (done.returncode, done.stderr) == (2, f"demo_llava.sh: error: {variable} must be {rule}, got '{value}'\n")
    assert not (tmp_path / "new").exists()


def test_an_unknown_argument_is_refused(tmp_path):
    done = demo(tmp_path / "new", "--fast")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown argument --fast" in done.stderr
