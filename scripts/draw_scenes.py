"""Draw the quick-start data: pictures with questions in the layout of VQA v2 or VizWiz, or captions in that of COCO."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.files import read_json, write_json_atomic
from scripts.arguments import OneLineParser
from scripts.program import run

if TYPE_CHECKING:
    from data.drawn_scenes import DrawnImage
    from data.drawn_vizwiz import Drawing

SETTINGS_FILE = "drawn_scenes.json"
LAYOUTS = {  # what each one writes
    "vqav2": ("train2014", "val2014", "test2015", "vqa"),
    "captions": ("train2014", "val2014", "val", "test", "dataset_coco.json"),
    "vizwiz": ("train", "valid", "pretrain", "train.json", "valid.json"),
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
        help="vqav2; captions: COCO in Karpathy's split, and NoCaps; vizwiz: the course's files (default: vqav2)",
    )
    parser.add_argument(
        "--num_train",
        type=int,
        default=3000,
        help="train images, six questions, five captions or (vizwiz) one question each (default: 3000)",
    )
    parser.add_argument("--num_val", type=int, default=300, help="val images; of vizwiz valid (default: 300)")
    parser.add_argument("--num_test", type=int, default=300, help="test images; vizwiz has none (default: 300)")
    parser.add_argument(
        "--num_pretrain", type=int, default=3000, help="with layout vizwiz: images to learn before (default: 3000)"
    )
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
    _check_output(args.output)
    settings = _settings(args)
    start = time.perf_counter()
    for name in settings:
        if name.startswith("num_") and settings[name] < 1:
            raise DataError(f"--{name} must be at least 1, got {settings[name]}")
    drawing = _draw(args)
    if _is_drawn(args.output, settings, args.overwrite):
        print(f"{args.output} holds this drawing already: {_described(settings)}")
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        _write_settings(args.output, settings, complete=False)
        _write(args, drawing)
        _write_settings(args.output, settings, complete=True)
        print(f"drew {_described(settings)} into {args.output} in {time.perf_counter() - start:.1f} s")
    if args.layout == "vqav2":
        _print_vqav2(drawing)
    if args.layout == "vizwiz":
        _print_vizwiz(drawing)


def _settings(args: argparse.Namespace) -> dict:
    """What tells one drawing from another."""
    if args.regions and args.layout != "vqav2":
        raise DataError("--regions goes with --layout vqav2")
    names = ("num_train", "num_val", "num_pretrain" if args.layout == "vizwiz" else "num_test", "seed")
    settings = {name: getattr(args, name) for name in names}
    if args.regions:
        settings["regions"] = True
    if args.layout != "vqav2":
        settings["layout"] = args.layout
    return settings


def _draw(args: argparse.Namespace) -> Any:
    """Everything but the pictures."""
    from data.drawn_captions import RESTVAL_SHARE
    from data.drawn_scenes import draw_splits
    from data.drawn_vizwiz import draw_rows

    if args.layout == "vizwiz":
        sizes = {"train": args.num_train, "valid": args.num_val, "pretrain": args.num_pretrain}
        return draw_rows(sizes, seed=args.seed)
    sizes = {"train2014": args.num_train, "val2014": args.num_val, "test2015": args.num_test}
    if args.layout == "captions":
        in_both = args.num_val + args.num_test
        sizes |= {"val2014": in_both + int(RESTVAL_SHARE * args.num_train), "test2015": in_both}
    return draw_splits(sizes, seed=args.seed)


def _write(args: argparse.Namespace, drawing: Any) -> None:
    from data.drawn_captions import write_drawn_captions
    from data.drawn_scenes import write_drawn_vqav2
    from data.drawn_vizwiz import write_drawn_vizwiz

    if args.layout == "captions":
        write_drawn_captions(args.output, drawing, args.seed, num_val=args.num_val, num_test=args.num_test)
    elif args.layout == "vizwiz":
        write_drawn_vizwiz(args.output, drawing, seed=args.seed)
    else:
        write_drawn_vqav2(args.output, drawing, seed=args.seed)
    if args.regions:
        from data.drawn_regions import write_drawn_regions

        write_drawn_regions(args.output, drawing, seed=args.seed)


def _print_vqav2(images: dict[str, list["DrawnImage"]]) -> None:
    from data.drawn_scenes import annotation_records, question_records

    train, val = annotation_records(images["train2014"]), annotation_records(images["val2014"])
    texts = {r["question_id"]: r["question"] for s in ("train2014", "val2014") for r in question_records(images[s])}
    _print_answers(train + val)
    _print_priors(train, val, texts)


def _print_vizwiz(drawing: "Drawing") -> None:
    from data.drawn_vizwiz import text_only_scores

    flawed = sum(photo.flaw is not None for photo in drawing.valid)
    print(f"{len(drawing.valid)} valid questions, {flawed} about pictures on which nothing can be seen")
    print("accuracy on valid without looking at the pictures (rule of the course):")
    for name, score in text_only_scores(drawing).items():
        print(f"  {name:<32} {100 * score:5.1f} %")


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
            f"{folder} holds another drawing ({_described(earlier)}) than the one asked for ({_described(settings)}): "
            "give another --output, or --overwrite to replace it"
        )
    drawn = ("vgbua_res101_precomputed/*/*.json", "annotations/*.json", "bert_drawn/vocab.txt")
    drawn += ("*20*/COCO_*_*.jpg", "vqa/*", "val/*.jpg", "test/*.jpg", "dataset_coco.json", "nocaps_*.json")
    drawn += ("train/train_*.jpg", "valid/valid_*.jpg", "pretrain/pretrain_*.jpg", "train.json", "valid.json")
    drawn += ("valid_annotations.json", "*_for_llava.json", "heldout_annotations.json")
    index = ("*.jsonl", "*.tokenizer.json", "answer2label.txt")  # of the pictures that go
    for pattern in (*drawn, *index):
        for old in folder.glob(pattern):
            old.unlink()
    return False


def _write_settings(folder: Path, settings: dict, complete: bool) -> None:
    write_json_atomic(folder / SETTINGS_FILE, {**settings, "complete": complete})


def _described(settings: dict) -> str:
    splits = [split for split in ("train", "val", "test", "pretrain") if f"num_{split}" in settings]
    sizes = " + ".join(f"{settings[f'num_{split}']} {split}" for split in splits)
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
