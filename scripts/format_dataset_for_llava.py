"""Turn VizWiz's files, or those of the course competition, into LLaVA's training and question files.

python scripts/format_dataset_for_llava.py                                    # ./data, as the competition's pipeline
python scripts/format_dataset_for_llava.py --hold_out 0.05 --vizwiz_prompt        # keeps labelled questions for scoring
python scripts/format_dataset_for_llava.py --train_file my/train.jsonl --val_file my/val.jsonl   # questions of your own

Reads train.json and valid.json (or val.json, test.json) of --data_path; writes train_for_llava.json,
valid_for_llava.jsonl (of val.json too), test_for_llava.jsonl; with --hold_out also heldout_for_llava.jsonl and
heldout_annotations.json (of questions of your own heldout_annotations.jsonl, in their own form).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
from typing import Any

from data.errors import DataError
from data.files import open_atomic, write_json_atomic, write_jsonl_atomic
from data.vizwiz import (
    ANSWER_CHOICES,
    SUFFIX,
    ConversionOptions,
    VizWizRow,
    own_line,
    question_lines,
    read_own_rows,
    read_rows,
    split_rows,
    training_file,
)
from scripts.arguments import OneLineParser, count, number
from scripts.program import run
from scripts.written_files import refuse_others, written

TRAIN_FILE = "train_for_llava.json"
HELD_OUT_QUESTIONS, HELD_OUT_ROWS = "heldout_for_llava.jsonl", "heldout_annotations.json"
HELD_OUT_OWN_ROWS = "heldout_annotations.jsonl"
# what is asked -> where the questions go; the course says valid, VizWiz val
_QUESTIONS = {"valid": "valid_for_llava.jsonl", "val": "valid_for_llava.jsonl", "test": "test_for_llava.jsonl"}


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program; without any it does what the competition's pipeline does."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--data_path", type=Path, default=Path("data"), help="folder of the JSON files (%(default)s)")
    p.add_argument(
        "--train_file",
        type=Path,
        nargs="+",
        help="training .jsonl of your own: image, question, answers; then --data_path is not read",
    )
    p.add_argument("--val_file", type=Path, help="questions of your own to answer; with answers also for --annotations")
    p.add_argument("--output_path", type=Path, help="folder to write (default: --data_path)")
    p.add_argument("--keep_raw_questions", action="store_true", help="leave questions as they were asked")
    p.add_argument("--vizwiz_prompt", action="store_true", help="put LLaVA's prompt for VizWiz behind every question")
    p.add_argument(
        "--answer_choice",
        choices=ANSWER_CHOICES,
        default="mode",
        help="learn the most frequent answer, the first of the highest accuracy, another one in each epoch (sample), "
        "or a sample of each person's (all) (%(default)s)",
    )
    p.add_argument("--drop_unsure", action="store_true", help="leave out answers of people who were not confident")
    p.add_argument(
        "--hold_out",
        type=number(float, low=0, high=1),
        default=0.0,
        metavar="FRACTION",
        help="share of the training rows that is kept for scoring instead (none)",
    )
    p.add_argument("--seed", type=count, default=0, help="of the hold-out (%(default)s)")
    p.add_argument("--overwrite", action="store_true", help="also replace files that this program did not write")
    return p


def main(argv: list[str] | None = None) -> None:
    """Read and convert everything, then write: bad input leaves older files as they are."""
    args = build_parser().parse_args(argv)
    output = args.output_path or args.data_path
    options = ConversionOptions(
        keep_questions_raw=args.keep_raw_questions,
        suffix=SUFFIX if args.vizwiz_prompt else "",
        answer_choice=args.answer_choice,
        drop_unsure_answers=args.drop_unsure,
    )
    are_own = args.train_file is not None or args.val_file is not None
    if are_own:
        rows, asked = _read_own(args)
    else:
        rows, asked = read_rows(args.data_path / "train.json"), _read_questions(args.data_path)
    train, held_out = split_rows(rows, args.hold_out, args.seed)
    converted = training_file(train, options)
    unlabelled = [row.image for row in held_out if not row.answers]
    if unlabelled:
        raise DataError(f"image {unlabelled[0]} has no answers to score against: convert the training split")

    annotations = HELD_OUT_OWN_ROWS if are_own else HELD_OUT_ROWS
    names = [*([TRAIN_FILE] if rows else []), *asked, *([HELD_OUT_QUESTIONS, annotations] if held_out else [])]
    paths = [output / name for name in names]
    refuse_others(*paths, overwrite=args.overwrite)
    try:
        with written(*paths):
            if rows:
                with open_atomic(output / TRAIN_FILE) as handle:
                    json.dump(converted.entries, handle, indent=4)  # without a line end, as the original's
            for name, lines in asked.items():
                write_jsonl_atomic(output / name, question_lines(lines, options))
            if held_out:
                write_jsonl_atomic(output / HELD_OUT_QUESTIONS, question_lines(held_out, options))
                if are_own:
                    write_jsonl_atomic(output / annotations, map(own_line, held_out))
                else:
                    write_json_atomic(output / annotations, [annotation_of(row) for row in held_out])
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise DataError(f"--output_path {output} cannot be written ({error.strerror}): give another folder") from None

    total = len(converted.entries)
    if rows:
        print(f"wrote {total} samples to {output / TRAIN_FILE}")
    for name, lines in asked.items():
        print(f"wrote {len(lines)} questions to {output / name}")
    if not rows:
        return
    if held_out:
        print(f"held out {len(held_out)} of {len(rows)} rows in {HELD_OUT_QUESTIONS} and {annotations}")
    elif (output / HELD_OUT_QUESTIONS).exists():
        print(f"note: {output / HELD_OUT_QUESTIONS} is of an earlier run; this run trains on its questions, too")
    for what, amount in (
        ("unanswerable", converted.num_unanswerable),
        ("unique answers", converted.num_distinct_answers),
        ("empty answers replaced", converted.num_replaced),
    ):
        print(f"{what}: {amount} of {total} ({100 * amount / total:.1f} %)")


def annotation_of(row: VizWizRow) -> dict[str, Any]:
    """The row as VizWiz publishes it, which ``data.vizwiz.read_rows`` reads again."""
    answers = [
        {"answer": answer.text} | ({} if answer.confidence is None else {"answer_confidence": answer.confidence})
        for answer in row.answers
    ]
    values: dict[str, Any] = {"image": row.image, "question": row.question, "answers": answers}
    if row.answer_type is not None:
        values["answer_type"] = row.answer_type
    if row.is_answerable is not None:
        values["answerable"] = int(row.is_answerable)
    return values


def _read_own(args: argparse.Namespace) -> tuple[list[VizWizRow], dict[str, list[VizWizRow]]]:
    """Questions of one's own to learn from, which are those with answers, and those to answer."""
    if args.train_file is None and args.hold_out:
        raise DataError("--hold_out keeps a part of --train_file: give both, or leave --hold_out out")
    every = read_own_rows(args.train_file or ())
    rows = [row for row in every if row.answers]
    if every and not rows:
        raise DataError(
            f"none of the {len(every)} questions of --train_file {args.train_file[0]} has answers: give some"
        )
    if len(rows) < len(every):
        print(f"left out {len(every) - len(rows)} of {len(every)} training questions, which have no answers")
    return rows, {} if args.val_file is None else {_QUESTIONS["valid"]: read_own_rows([args.val_file])}


def _read_questions(folder: Path) -> dict[str, list[VizWizRow]]:
    """Rows by the file that their questions go to."""
    found = [name for name in _QUESTIONS if (folder / f"{name}.json").exists()]
    if not found:
        raise DataError(f"{folder} has none of valid.json, val.json and test.json: put the questions to answer there")
    if {"valid", "val"} <= set(found):
        raise DataError(f"{folder} has valid.json and val.json, which would be one output: move one of them away")
    return {_QUESTIONS[name]: read_rows(folder / f"{name}.json") for name in found}


if __name__ == "__main__":
    run(main)
