"""scripts/compare_strategies.sh , tiny: every strategy ends and has a row in the table; a second run keeps it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT

SIZES = {"COMPARE_TRAIN": "12", "COMPARE_VAL": "6", "COMPARE_PRETRAIN": "20", "COMPARE_EPOCHS": "1"}


def compare(folder: Path, *flags: str, **sizes: str) -> subprocess.CompletedProcess:
    environment = {"PLAINVL_VENV": sys.prefix, "COMPARE_DIR": str(folder), "COMPARE_PRETRAIN_EPOCHS": "1"}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "compare_strategies.sh"), *flags],
        env=os.environ | environment | SIZES | sizes,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.slow
def test_every_strategy_is_trained_and_has_its_row(tmp_path):
    done = compare(tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    table = (tmp_path / "strategies.md").read_text()
    assert table.count("\n| ") == 11
    assert "| 4 layers from pretrained |" in table
    assert (tmp_path / "strategies.png").is_file()
    again = compare(tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "strategies.md").read_text() == table
    other = compare(tmp_path, SEED="1")
    assert other.returncode == 2
    assert "give --fresh to start over" in other.stderr


def test_a_wrong_value_is_refused_and_not_remembered(tmp_path):
    done = compare(tmp_path / "new", COMPARE_EPOCHS="0")
    assert done.returncode == 2
    assert done.stderr == "compare_strategies.sh: error: COMPARE_EPOCHS must be a whole number of at least 1, got '0'\n"
    assert not (tmp_path / "new").exists()


def test_an_unknown_argument_is_refused(tmp_path):
    done = compare(tmp_path, "--quick")
    assert done.returncode == 2
    assert "unknown argument --quick" in done.stderr
