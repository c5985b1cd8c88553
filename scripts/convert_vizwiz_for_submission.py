"""Turn an answers file of scripts/model_vqa_loader.py into the list that VizWiz takes.

python scripts/convert_vizwiz_for_submission.py --annotation-file data/valid_for_llava.jsonl \\
    --result-file eval/MODEL.jsonl --result-upload-file eval/MODEL.json

Answers are normalised by EvalAI's rules, as in the original, or by --normalize.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from data.errors import DataError
from data.vizwiz import NORMALIZATIONS, read_questions, read_results, upload_entries, write_upload
from scripts.arguments import OneLineParser
from scripts.program import run
from scripts.written_files import refuse_others, written


def build_parser() -> argparse.ArgumentParser:
    """The original's flags, and ours."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument(
        "--annotation-file", "--annotation_file", type=Path, required=True, help="the questions (JSON lines)"
    )
    p.add_argument("--result-file", "--result_file", type=Path, required=True, help="the answers (JSON lines)")
    p.add_argument("--result-upload-file", "--result_upload_file", type=Path, required=True, help="JSON file to write")
    p.add_argument(
        "--normalize", choices=tuple(NORMALIZATIONS), default="evalai", help="what is done to an answer (%(default)s)"
    )
    p.add_argument("--overwrite", action="store_true", help="also replace a file that these programs did not write")
    return p


def main(argv: list[str] | None = None) -> None:
    """Read both files, then write."""
    args = build_parser().parse_args(argv)
    output = args.result_upload_file
    for source in (args.annotation_file, args.result_file):
        if output.resolve() == source.resolve():
            raise DataError(f"--result-upload-file {output} is an input itself: give another file")
    questions = read_questions(args.annotation_file)
    results, num_broken = read_results(args.result_file)
    entries = upload_entries(questions, results, NORMALIZATIONS[args.normalize])
    refuse_others(output, overwrite=args.overwrite)
    try:
        with written(output):
            write_upload(output, entries)
    except (FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise DataError(f"--result-upload-file {output} cannot be written ({error.strerror}): give another") from None
    if num_broken:
        print(f"passed over {num_broken} broken lines of {args.result_file}")
    print(f"wrote {len(entries)} answers to {output}")


if __name__ == "__main__":
    run(main)
