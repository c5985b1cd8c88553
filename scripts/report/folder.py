"""What the programs that make a report have in common: flags of the page, the run's log, and the folder's files."""

import argparse
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import open_atomic, write_json_atomic
from scripts.arguments import count, positive_int
from scripts.report.curves import RunLog, read_run_log
from scripts.written_files import is_ours, refuse_others, written

PAGE, CURVES, SUMMARY = "report.html", "curves.png", "summary.json"


def add_page_flags(parser: argparse.ArgumentParser, *, title: str, shown: str) -> None:
    """Heading and number of cards, and whether files of others are replaced.

    ``shown`` is what a card shows, in the plural.
    """
    parser.add_argument("--title", default=title, help="heading of the page")
    parser.add_argument("--max_cards", type=positive_int, default=200, help=f"{shown} on the page (default: 200)")
    parser.add_argument("--seed", type=count, default=0, help=f"which {shown} are shown (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="also replace files that these programs did not write")


def check_output(folder: Path, *, overwrite: bool, has_curves: bool = True) -> None:
    """See that the report can go into a folder; called before any work is done.

    Args:
        folder: of the report.
        overwrite: replace files that no program of ours wrote.
        has_curves: whether it will have a picture of curves.

    Raises:
        DataError: it is a file, or holds such files.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output {folder}: a file, not a folder; give another --output")
    names = (PAGE, CURVES, SUMMARY) if has_curves else (PAGE, SUMMARY)
    refuse_others(*(folder / name for name in names), overwrite=overwrite)


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
    """``report.html``, ``curves.png`` if there is one, ``summary.json``; says so. An older report's curves go."""
    curves = folder / CURVES
    is_stale = curves_png is None and is_ours(curves)
    with written(folder / PAGE, curves if curves_png or is_stale else None, folder / SUMMARY):
        if is_stale:
            curves.unlink()
        with open_atomic(folder / PAGE) as handle:
            handle.write(page)
        if curves_png:
            with open_atomic(curves, binary=True) as handle:
                handle.write(curves_png)
        write_json_atomic(folder / SUMMARY, summary, indent=1)
    print(f"wrote {PAGE}, {f'{CURVES} and ' if curves_png else ''}{SUMMARY} to {folder}")
