"""Turn VizWiz's upload list into submission.npy of the course competition: its answers, in order.

python scripts/format_result_for_submission.py --result-upload-file eval/MODEL.json --submission-file submission.npy
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from data.errors import DataError
from data.vizwiz import read_upload, write_submission
from scripts.arguments import OneLineParser
from scripts.program import run
from scripts.written_files import refuse_others, written


def build_parser() -> argparse.ArgumentParser:
    """The original's two flags."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument(
        "--result-upload-file", "--result_upload_file", type=Path, required=True, help="the list of answers (JSON)"
    )
    p.add_argument("--submission-file", "--submission_file", type=Path, required=True, help="array to write")
    p.add_argument("--overwrite", action="store_true", help="also replace a file that these programs did not write")
    return p


def main(argv: list[str] | None = None) -> None:
    """Read, then write."""
    args = build_parser().parse_args(argv)
    output = args.submission_file
    if output.resolve() == args.result_upload_file.resolve():
        raise DataError(f"--submission-file {output} is the input itself: give another file")
    answers = read_upload(args.result_upload_file)
    refuse_others(output, overwrite=args.overwrite)
    try:
        with written(output):
            write_submission(output, answers)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise DataError(f"--submission-file {output} cannot be written ({error.strerror}): give another") from None
    print(f"wrote {len(answers)} answers to {output}")


if __name__ == "__main__":
    run(main)
