"""Prepare VQA v2 for VLE: answer vocabulary, and rows of each split, one an image with its questions.

python scripts/write_vqa.py                          # data/vqav2 -> data/vqav2/vqav2_arrow
python scripts/write_vqa.py --data_path /data/vqav2 --output_path /data/vqav2/rows
python scripts/write_vqa.py --format arrow           # with the images inside, as the original reads them (pyarrow)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from typing import Any

from data.errors import DataError
from scripts.arguments import OneLineParser, count, positive_int
from scripts.program import run

DATA_PATH, ROWS_FOLDER = "data/vqav2", "vqav2_arrow"  # the original's places
FORMATS = ("jsonl", "arrow")


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data_path", default=DATA_PATH, help="folder of image folders and official files (%(default)s)")
    p.add_argument("--annotation_path", help="folder of the official JSON files, where they are not in --data_path")
    p.add_argument("--output_path", help=f"folder for the rows (default: {ROWS_FOLDER} in --data_path)")
    p.add_argument(
        "--format", default="jsonl", choices=FORMATS, help="jsonl: paths of images; arrow: their bytes (%(default)s)"
    )
    p.add_argument("--seed", type=count, default=42, help="of the choice of the rest_val images (%(default)s)")
    p.add_argument(
        "--num_rest_val_images", type=positive_int, default=1000, help="images of the validation split (%(default)s)"
    )
    p.add_argument(
        "--min_answer_count", type=positive_int, default=9, help="occurrences that give an answer a label (%(default)s)"
    )
    return p


def main(argv: list[str] | None = None) -> None:
    """Read, write, and print what was found, written and left out."""
    args = build_parser().parse_args(argv)
    if not Path(args.data_path).is_dir():
        raise DataError(f"no folder {args.data_path}: give --data_path (layout: docs/datasets.md)")

    from data.vle_rows import build_vle_rows

    output_path = Path(args.output_path or Path(args.data_path) / ROWS_FOLDER)
    print(f"vqav2: reading the annotations below {args.annotation_path or args.data_path}", flush=True)
    summary = build_vle_rows(
        args.data_path,
        args.annotation_path,
        output_path,
        kind=args.format,
        seed=args.seed,
        min_answer_count=args.min_answer_count,
        num_rest_val_images=args.num_rest_val_images,
        progress=_progress,
    )
    for what, where in summary.found:
        print(f"  found   {what}: {where}")
    for name, rows in summary.num_lines.items():
        print(f"  written {output_path / name}: {rows} images, {summary.num_questions[name]} questions")
    for note in summary.notes:
        print(f"  skipped {note}")
    print(f"  {summary.num_answers} answers (the published VQA weights have 3129), seed of rest_val {args.seed}")


def _progress(images: list, description: str) -> Any:
    from tqdm import tqdm

    return tqdm(images, desc=description, unit="image", mininterval=1.0, disable=None)  # None: only on a terminal


if __name__ == "__main__":
    run(main)
