"""Score a file of captions against what people wrote: BLEU, ROUGE-L, CIDEr; METEOR and SPICE where Java has them.

python scripts/score_captions.py --predictions submit_coco_captioning_val.json --annotations dataset_coco.json
python scripts/score_captions.py --predictions submit_nocaps_val.json --annotations nocaps_val_4500_captions.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
from typing import Any

from scripts.arguments import OneLineParser
from scripts.beit3_args import CAPTION_METRICS
from scripts.program import run


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--predictions", required=True, help='prediction file: [{"image_id": 391895, "caption": "a man"}, ...]'
    )
    parser.add_argument(
        "--annotations",
        required=True,
        help="captions of people: a COCO caption file (also NoCaps), Karpathy's dataset_coco.json, or a .jsonl file",
    )
    parser.add_argument("--split", choices=["val", "test"], help="split of dataset_coco.json (default: every image)")
    parser.add_argument(
        "--caption_metrics",
        "--metrics",
        default="auto",
        choices=list(CAPTION_METRICS),
        help="basic: BLEU, ROUGE-L, CIDEr; auto: also METEOR and SPICE where they are installed; all: required",
    )
    parser.add_argument(
        "--partial", action="store_true", help="score the images that both files have; else they must have the same"
    )
    parser.add_argument("--output", help="also write the scores into this JSON file")
    parser.add_argument("--per_image", action="store_true", help="with the scores of every image in --output")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read both files, compare, print."""
    args = build_parser().parse_args(argv)

    from data.caption_references import read_caption_references
    from data.errors import DataError
    from data.files import write_json_atomic
    from data.metrics.captions import check_java, format_scores, score_by_domain, score_captions

    if args.per_image and not args.output:
        raise DataError("--per_image needs --output FILE")
    with_java = CAPTION_METRICS[args.caption_metrics]
    check_java(with_java)
    captions = read_predictions(args.predictions)
    references = read_caption_references(args.annotations, args.split)
    if args.partial:
        common = [index for index in captions if index in references.captions]
        print(
            f"{len(common)} images are in both files; {len(captions) - len(common)} captions and "
            f"{len(references.captions) - len(common)} images with references are left out",
            file=sys.stderr,
        )
        captions, references = {index: captions[index] for index in common}, references.only(common)
    empty = sum(not caption.strip() for caption in captions.values())
    if empty:
        print(f"warning: {empty} captions are empty", file=sys.stderr)
    scores = score_captions(references.captions, captions, with_java=with_java)
    domains = score_by_domain(references.captions, captions, references.domains)
    result: dict[str, Any] = {"images": len(captions), **scores.corpus, "skipped": scores.skipped}
    if domains:
        result["domains"] = domains
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{len(captions)} images; values times 100, as in papers")
        print(format_scores(scores, domains))
    if args.output:
        write_json_atomic(args.output, result | ({"per_image": scores.per_image} if args.per_image else {}), indent=2)


def read_predictions(path: str) -> dict[int, str]:
    """Image id → caption, of a prediction file.

    Raises:
        DataError: the file is broken or of another form, or an image stands twice; the entry is named.
    """
    from data.errors import DataError
    from data.files import read_json

    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise DataError(f'{path}: needs a non-empty list of {{"image_id": ..., "caption": ...}}')
    captions: dict[int, str] = {}
    for place, row in enumerate(rows):
        image_id, caption = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if type(image_id) is not int or type(caption) is not str:
            raise DataError(
                f'{path}: entry {place} needs a whole number "image_id" and a text "caption", it is {row!r:.80}'
            )
        if image_id in captions:
            raise DataError(f"{path}: entry {place}: image {image_id} stands twice; the servers refuse that")
        captions[image_id] = caption
    return captions


if __name__ == "__main__":
    run(main)
