"""What the programs that make a report have in common: flags of the page, the run's log, and the folder's files."""

import argparse
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import open_atomic, write_json_atomic
from scripts.arguments import count, positive_int
from scripts.report.curves import RunLog, read_run_log


def add_page_flags(parser: argparse.ArgumentParser, *, title: str, shown: str) -> None:
    """Heading and number of cards; ``shown`` is what a card shows, in the plural."""
    parser.add_argument("--title", default=title, help="heading of the page")
    parser.add_argument("--max_cards", type=positive_int, default=200, help=f"{shown} on the page (default: 200)")
    parser.add_argument("--seed", type=count, default=0, help=f"which {shown} are shown (default: 0)")


def check_output(folder: Path) -> None:
    """Raise DataError unless ``folder`` can be one; called before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output {folder}: a file, not a folder; give another --output")


def read_log(run: Path) -> RunLog:
    """The log of the run in a folder.

    Raises:
        DataError: no such folder, or no usable log in it.
    """
    if not run.is_dir():
        what = "a file, not a folder" if run.exists() else "no such folder"
        raise DataError(f"--run {run}: {what}; give the --output_dir of a training run")
    return read_run_log(run)


def write_report(folder: Path, page: str, curves_png: bytes | None, summary: dict[str, Any]) -> None:
    """``report.html``, ``curves.png`` if there is one, ``summary.json``; says so."""
    with open_atomic(folder / "report.html") as handle:
        handle.write(page)
    if curves_png:
        with open_atomic(folder / "curves.png", binary=True) as handle:
            handle.write(curves_png)
    write_json_atomic(folder / "summary.json", summary, indent=1)
    print(f"wrote report.html, {'curves.png and ' if curves_png else ''}summary.json to {folder}")
