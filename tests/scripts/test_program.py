"""scripts/program.py in several processes that fail at once: how many of them say it."""

import sys
from pathlib import Path

import pytest

from data.errors import DataError
from engine import distributed
from engine.errors import RunError
from scripts.program import run
from tests.helpers import run_in_processes

FAILURES = {"input": (DataError, 2, 1), "run time": (RunError, 1, 1), "bug": (KeyError, 1, 2)}


def _fail_each_by_itself(rank: int, folder: str, name: str) -> None:
    kind, code, _ = FAILURES[name]

    def main() -> None:
        distributed.init("cpu")  # the group of this process
        raise kind(f"cannot read {rank}.png: mend it")

    with Path(folder, f"{rank}.txt").open("w") as file:
        terminal, sys.stderr = sys.stderr, file
        try:
            run(main)
        except SystemExit as left:
            assert left.code == code  # noqa: PT017
        finally:
            sys.stderr = terminal


@pytest.mark.parametrize("name", FAILURES)
def test_processes_that_fail_each_by_itself_say_one_line_but_bugs_show_all_tracebacks(tmp_path, name):
    """As with an image that is broken on each of them."""
    run_in_processes(_fail_each_by_itself, 2, str(tmp_path), name)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    lines = [line for text in said for line in text.splitlines() if ": rank " in line]
    assert len(lines) == FAILURES[name][2], said
    assert [text.count("Traceback") for text in said] == ([1, 1] if name == "bug" else [0, 0])
