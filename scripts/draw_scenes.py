"""Draw the quick-start data: pictures with questions in the layout of VQA v2, or with captions in that of COCO."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from collections import Counter
from typing import TYPE_CHECKING

from data.errors import DataError
from data.files import read_json, write_json_atomic
from scripts.arguments import OneLineParser
from scripts.program import run

if TYPE_CHECKING:
    from data.drawn_scenes import DrawnImage

SETTINGS_FILE = "drawn_scenes.json"
LAYOUTS = {  # what each one writes
    "vqav2": ("train2014", "val2014", "test2015", "vqa"),
    "captions": ("train2014", "val2014", "val", "test", "dataset_coco.json"),
}
INDEX_THRESHOLD = 9  # answers that are rarer over train and val get no label in scripts/make_index.py


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=Path("quickstart/data"), help="folder to make (default: %(default)s)"
    )
    parser.add_argument(
        "--layout",
        choices=list(LAYOUTS),
        default="vqav2",
        help="vqav2; captions: COCO in Karpathy's split, and NoCaps (default: vqav2)",
    )
    parser.add_argument(
        "--num_train", type=int, default=3000, help="train images, six questions or five captions each (default: 3000)"
    )
    parser.add_argument("--num_val", type=int, default=300, help="val images (default: 300)")
    parser.add_argument("--num_test", type=int, default=300, help="test images (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other scenes (default: 0)")
    parser.add_argument(
        "--regions",
        action="store_true",
        help="with layout vqav2: also boxes with features, and a vocabulary",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier drawing with other settings")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Draw, unless the folder holds this very drawing already; then print what the text alone would score."""
    args = build_parser().parse_args(argv)
    from data.drawn_captions import RESTVAL_SHARE, write_drawn_captions
    from data.drawn_scenes import draw_splits, write_drawn_vqav2

    _check_output(args.output)
    settings = {name: getattr(args, name) for name in ("num_train", "num_val", "num_test", "seed")}
    sizes = {"train2014": args.num_train, "val2014": args.num_val, "test2015": args.num_test}
    if args.regions:
        settings["regions"] = True
    if args.layout == "captions":
        if args.regions:
            raise DataError("--regions goes with --layout vqav2")
        settings["layout"] = args.layout
        in_both = args.num_val + args.num_test
        sizes |= {"val2014": in_both + int(RESTVAL_SHARE * args.num_train), "test2015": in_both}
    start = time.perf_counter()
    for name in ("num_train", "num_val", "num_test"):
        if settings[name] < 1:
            raise DataError(f"--{name} must be at least 1, got {settings[name]}")
    images = draw_splits(sizes, seed=args.seed)
    if _is_drawn(args.output, settings, args.overwrite):
        print(f"{args.output} holds this drawing already: {_described(settings)}")
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        _write_settings(args.output, settings, complete=False)
        if args.layout == "captions":
            write_drawn_captions(args.output, images, args.seed, num_val=args.num_val, num_test=args.num_test)
        else:
            write_drawn_vqav2(args.output, images, seed=args.seed)
        if args.regions:
            from data.drawn_regions import write_drawn_regions

            write_drawn_regions(args.output, images, seed=args.seed)
        _write_settings(args.output, settings, complete=True)
        print(f"drew {_described(settings)} into {args.output} in {time.perf_counter() - start:.1f} s")
    if args.layout == "vqav2":
        _print_vqav2(images)


def _print_vqav2(images: dict[str, list["DrawnImage"]]) -> None:
    from data.drawn_scenes import annotation_records, question_records

    train, val = annotation_records(images["train2014"]), annotation_records(images["val2014"])
    texts = {r["question_id"]: r["question"] for s in ("train2014", "val2014") for r in question_records(images[s])}
    _print_answers(train + val)
    _print_priors(train, val, texts)


def _check_output(folder: Path) -> None:
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise DataError(f"--output {folder}: {nearest} is a file, not a folder: give another --output")


def _is_drawn(folder: Path, settings: dict, overwrite: bool) -> bool:
    """Whether nothing is left to do; clears an earlier drawing if told to, and never touches other people's files."""
    note = folder / SETTINGS_FILE
    if not note.exists():
        taken = [name for name in LAYOUTS[settings.get("layout", "vqav2")] if (folder / name).exists()]
        if taken:
            raise DataError(f"{folder} has a {taken[0]} that this program did not draw: give another --output")
        return False
    earlier = read_json(note, advice=f"delete {folder} or give another --output")
    if earlier == {**settings, "complete": True}:
        return True
    if earlier == {**settings, "complete": False}:  # stopped half way: draw the same files again
        return False
    if not isinstance(earlier, dict):
        raise DataError(f"{note} is not a note of this program: delete {folder} or give another --output")
    if not overwrite:
        raise DataError(
            f"{folder} holds another drawing ({_described(earlier)}): "
            "give another --output, or --overwrite to replace it"
        )
    drawn = ("vgbua_res101_precomputed/*/*.json", "annotations/*.json", "bert_drawn/vocab.txt")
    drawn += ("*20*/COCO_*_*.jpg", "vqa/*", "val/*.jpg", "test/*.jpg", "dataset_coco.json", "nocaps_*.json")
    index = ("*.jsonl", "*.tokenizer.json", "answer2label.txt")  # of the pictures that go
    for pattern in (*drawn, *index):
        for old in folder.glob(pattern):
            old.unlink()
    return False


def _write_settings(folder: Path, settings: dict, complete: bool) -> None:
    write_json_atomic(folder / SETTINGS_FILE, {**settings, "complete": complete})


def _described(settings: dict) -> str:
    sizes = " + ".join(f"{settings.get(f'num_{split}')} {split}" for split in ("train", "val", "test"))
    layout = f", layout {settings['layout']}" if "layout" in settings else ""
    regions = ", with regions" if settings.get("regions") else ""
    return f"{sizes} images, seed {settings.get('seed')}{layout}{regions}"


def _print_answers(annotations: list[dict]) -> None:
    counts = Counter(record["multiple_choice_answer"] for record in annotations)
    rare = sorted(answer for answer, count in counts.items() if count < INDEX_THRESHOLD)
    print(f"{len(annotations)} train and val questions, {len(counts)} different answers")
    if rare:
        print(f"note: without a label, because fewer than {INDEX_THRESHOLD} (draw more images): {', '.join(rare)}")


def _print_priors(train: list[dict], val: list[dict], texts: dict[int, str]) -> None:
    from data.metrics.vqa import vqa_accuracy
    from scripts.report import priors

    print("accuracy on val without looking at the pictures (official VQA accuracy):")
    for name, predictions in (
        ("most frequent answer", priors.most_frequent_answer(train, val)),
        ("most frequent per answer type", priors.most_frequent_per_answer_type(train, val)),
        ("question-only prior", priors.question_only_prior(train, val, texts)),
    ):
        print(f"  {name:<30} {100 * vqa_accuracy(predictions, val).overall:5.1f} %")


if __name__ == "__main__":
    run(main)
