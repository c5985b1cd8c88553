"""Table and plot of finished VL-BERT runs with several strategies (scripts/compare_strategies.sh makes the runs).

python scripts/compare_strategies.py --runs quickstart/strategies/runs --output quickstart/strategies
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from data.errors import DataError
from scripts.arguments import OneLineParser
from scripts.program import run

HEADING = "drawn data: shows that the methods work, no evidence on VQAv2"


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of folders, each with a run and its name.txt")
    parser.add_argument("--output", type=Path, required=True, help="folder for strategies.md and strategies.png")
    parser.add_argument("--heading", default=HEADING, help="first line of the table (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read the logs of every run, write both files."""
    args = build_parser().parse_args(argv)

    from data.files import open_atomic
    from scripts.report.strategies import draw_strategies, read_run, strategies_table

    folders = sorted(path.parent for path in args.runs.glob("*/name.txt")) if args.runs.is_dir() else []
    if not folders:
        raise DataError(f"no runs in {args.runs}: scripts/compare_strategies.sh makes them")
    rows = [read_run(folder) for folder in folders]
    table = strategies_table(rows, args.heading)
    with open_atomic(args.output / "strategies.md") as file:
        file.write(table)
    with open_atomic(args.output / "strategies.png", binary=True) as file:
        file.write(draw_strategies(rows, args.heading))
    print(table)
    print(f"wrote {args.output / 'strategies.md'} and {args.output / 'strategies.png'}")


if __name__ == "__main__":
    run(main)
