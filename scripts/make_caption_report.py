"""Report of a captioning run: scores beside one caption for all images, a page of captions, training curves."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from data.errors import DataError
from data.files import read_jsonl, resolve_inside
from data.official_files import find_annotation
from scripts.arguments import OneLineParser
from scripts.program import run
from scripts.report.folder import add_page_flags, check_output, read_log, write_report


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="output folder of the run (log.txt, metrics.jsonl)")
    parser.add_argument("--data_path", type=Path, required=True, help="folder with the images and the annotations")
    parser.add_argument("--task", choices=["coco_captioning", "nocaps"], default="coco_captioning", help="the data set")
    parser.add_argument("--split", choices=["val", "test"], default="val", help="what was captioned (default: val)")
    parser.add_argument(
        "--predictions", type=Path, help="captions_<task>_<split>.jsonl of the evaluation (default: the one in --run)"
    )
    parser.add_argument("--before", type=Path, help="the same file of the untrained model, for comparison")
    parser.add_argument(
        "--annotations", type=Path, help="reference captions (default: the official file of --data_path)"
    )
    parser.add_argument("--output", type=Path, help="folder for the report (default: --run)")
    add_page_flags(parser, title="Captions", shown="images")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read, score, print the table, write report.html, curves.png and summary.json."""
    args = build_parser().parse_args(argv)
    output = args.output or args.run
    log = read_log(args.run)
    check_output(output, overwrite=args.overwrite)
    file = args.predictions or args.run / f"captions_{args.task}_{args.split}.jsonl"
    rows = read_captions(file)

    from data.caption_references import read_caption_references
    from data.coco_captions import ANNOTATION_PLACES, COCO_FILE, NOCAPS_FILES
    from data.metrics.captions import score_captions
    from scripts.report.caption_page import render_page
    from scripts.report.caption_priors import best_constant_caption
    from scripts.report.curves import draw_curves

    coco_file = find_annotation(COCO_FILE, args.data_path, None, ANNOTATION_PLACES)
    default = coco_file
    if args.task == "nocaps" and not args.annotations:
        default = find_annotation(NOCAPS_FILES[args.split], args.data_path, None, ANNOTATION_PLACES)
    references = read_caption_references(args.annotations or default, args.split)
    missing = [index for index in rows if index not in references.captions]
    if missing:
        raise DataError(f"{file} captions image {missing[0]}, which has no reference captions: check --split")
    references = references.only(list(rows))
    captions = {index: row["caption"] for index, row in rows.items()}
    columns = {"Model": captions}
    if args.before:
        before = read_captions(args.before)
        if before.keys() != rows.keys():
            raise DataError(f"{args.before} has not the images of {file}: caption the same split")
        columns["Before training"] = {index: before[index]["caption"] for index in rows}
    train = [text for texts in read_caption_references(coco_file, "train").captions.values() for text in texts]
    constant = best_constant_caption(train, references.captions)
    columns["One caption for all"] = dict.fromkeys(rows, constant)
    scores = {name: score_captions(references.captions, found, with_java="no") for name, found in columns.items()}
    table = [
        {"name": metric, "group": "", "count": len(rows), "scores": [one.corpus[metric] for one in scores.values()]}
        for metric in scores["Model"].corpus
    ]
    print(format_table(list(columns), table))
    print(f'the caption for all: "{constant}"')

    cider = scores["Model"].per_image["CIDEr"]
    cards = [
        {
            "image": str(resolve_inside(args.data_path, row["image"])),
            "caption": row["caption"],
            "references": list(references.captions[index]),
            "cider": cider[index],
            "domain": references.domains.get(index, ""),
        }
        for index, row in rows.items()
    ]
    # the curve is of val; which data set a run of NoCaps was validated on, its log does not say
    where = {("coco_captioning", "val"): "", ("nocaps", args.split): f" of NoCaps {args.split}"}
    level = "one caption for all" + where.get((args.task, args.split), f" of {args.split}")
    curves = draw_curves(
        log,
        score_key="val_CIDEr",
        score_name="CIDEr on val",
        axis="CIDEr, times 100",
        panel_title="CIDEr",
        levels={level: scores["One caption for all"].corpus["CIDEr"]},
    )
    page = render_page(
        cards,
        title=args.title,
        subtitle=f"{args.split} split, {len(rows):,} images, captions from {file.name}; worst first. "
        f"One caption for all: “{constant}”",
        columns=list(columns),
        table=table,
        curves_png=curves,
        max_cards=args.max_cards,
        seed=args.seed,
    )
    summary = {"split": args.split, "columns": list(columns), "rows": table, "caption_for_all": constant}
    write_report(output, page, curves, summary)


def read_captions(path: Path) -> dict[int, dict]:
    """Rows of ``captions_<task>_<split>.jsonl`` by image id.

    Raises:
        DataError: the file is missing, a line has other keys, or an image stands twice.
    """
    rows: dict[int, dict] = {}
    for number, row in enumerate(read_jsonl(path, advice="give the captions_*.jsonl of an evaluation"), start=1):
        good = type(row.get("image_id")) is int and all(type(row.get(key)) is str for key in ("image", "caption"))
        if not good or row["image_id"] in rows:
            what = "stands twice" if good else 'needs "image", "image_id" and "caption"'
            raise DataError(f"{path}, record {number} {what}: {row!r:.80}; give the captions_*.jsonl of an evaluation")
        rows[row["image_id"]] = row
    return rows


def format_table(columns: list[str], table: list[dict]) -> str:
    """The table as text, times 100."""
    wide = max(len(name) for name in columns)
    lines = [f"{'times 100':<10}" + "  ".join(f"{name:>{wide}}" for name in columns)]
    lines += [f"{row['name']:<10}" + "  ".join(f"{100 * score:>{wide}.1f}" for score in row["scores"]) for row in table]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
