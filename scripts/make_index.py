"""Build the index files that training and evaluation read from the official annotation files of a data set.

python scripts/make_index.py                                           # data and beit3.spm at the default places
python scripts/make_index.py vqav2 --data_path /data/vqav2 --sentencepiece_model beit3.spm
python scripts/make_index.py vqav2 --data_path /data/vqav2 --check     # look the written files over
python scripts/make_index.py coco_captioning --data_path /data/coco    # Karpathy's split, dataset_coco.json
python scripts/make_index.py nocaps --data_path /data/nocaps           # needs no tokenizer
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.errors import DataError
from scripts.arguments import OneLineParser
from scripts.beit3_args import DEFAULT_DATA_FOLDERS
from scripts.beit3_checkpoint import TOKENIZER_FILE
from scripts.program import run


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("dataset", nargs="?", choices=sorted(DATASETS), help="which index; found from the files if left out")
    p.add_argument("--data_path", help=f"folder with the image folders; default: {' or '.join(_places(None))}")
    p.add_argument(
        "--annotation_path", help="folder of the official JSON files; default: --data_path and its usual ones"
    )
    p.add_argument("--output_path", help="folder for the index files; default: --data_path, where training looks")
    p.add_argument("--sentencepiece_model", help=f"default: ./{TOKENIZER_FILE}, then {TOKENIZER_FILE} in --data_path")
    p.add_argument("--seed", type=int, default=42, help="vqav2: of the choice of the rest_val images (%(default)s)")
    p.add_argument(
        "--num_rest_val_images", type=int, default=1000, help="vqav2: images of the own validation split (%(default)s)"
    )
    p.add_argument(
        "--min_answer_count", type=int, default=9, help="vqav2: occurrences that give an answer a label (%(default)s)"
    )
    p.add_argument("--check", action="store_true", help="build nothing: check the index files and their images")
    return p


def main(argv: list[str] | None = None) -> None:
    """Build or check the index of each data set asked for or found."""
    args = build_parser().parse_args(argv)
    for flag in ("num_rest_val_images", "min_answer_count"):
        if getattr(args, flag) < 1:
            raise DataError(f"--{flag} must be at least 1, got {getattr(args, flag)}")
    folders = _data_folders(args)
    found: list[tuple[str, Path]] = []
    for name, dataset in DATASETS.items():
        if args.dataset in (None, name):
            found += [(name, folder) for folder in folders if dataset.is_there(folder, args)][:1]
    if not found and args.dataset:
        found = [(args.dataset, folders[0])]  # which says what it misses
    if not found:
        places = " or ".join(map(str, folders))
        if args.check:
            folder = args.output_path or places
            raise DataError(
                f"no index in {folder} yet: run python scripts/make_index.py --data_path {folders[0]} first"
            )
        wanted = "; ".join(f"{name}: {dataset.signs}" for name, dataset in DATASETS.items())
        raise DataError(f"no known data set in {places} ({wanted}): give --data_path, and --annotation_path if apart")
    for name, folder in found:
        action = DATASETS[name].check if args.check else DATASETS[name].build
        action(folder, args)


def build_vqav2(data_path: Path, args: argparse.Namespace) -> None:
    """Write the VQA v2 index and print what was found, written and left out."""
    from data.vqa_index import write_tokenizer_stamp
    from data.vqav2 import build_vqav2_index

    output_path = Path(args.output_path or data_path)
    existing = {path.name for path in output_path.glob("*")}
    tokenizer = _tokenizer(data_path, args)
    print(f"vqav2: reading the annotations below {args.annotation_path or data_path}", flush=True)
    summary = build_vqav2_index(
        data_path,
        args.annotation_path,
        tokenizer,
        output_path,
        seed=args.seed,
        min_answer_count=args.min_answer_count,
        num_rest_val_images=args.num_rest_val_images,
        progress=_progress,
    )
    write_tokenizer_stamp(output_path, "vqa", tokenizer.fingerprint)
    _print_summary(summary, output_path, existing)
    print(f"  {summary.num_answers} answers (the published VQA weights have 3129), seed of rest_val {args.seed}")


def check_vqav2(data_path: Path, args: argparse.Namespace) -> None:
    """Check lines, labels, token ids and image files of an existing VQA v2 index; print counts.

    Raises:
        DataError: a bad line, no index at all, or images that are missing (after the counts are printed).
    """
    from data.vqa_answers import AnswerVocabulary
    from data.vqa_index import (
        ADVICE,
        ANSWER_FILE,
        MAY_BE_EMPTY,
        SPLIT_FILES,
        check_tokenizer_stamp,
        read_vqa_index,
    )

    folder = Path(args.output_path or data_path)
    vocabulary = AnswerVocabulary.load(folder / ANSWER_FILE)
    tokenizer = _tokenizer(data_path, args)
    check_tokenizer_stamp(folder, "vqa", tokenizer.fingerprint)
    vocab_size = tokenizer.vocab_size
    print(f"vqav2: {folder / ANSWER_FILE}: {len(vocabulary)} answers")
    needed = {*SPLIT_FILES["train"], *SPLIT_FILES["val"]}
    others = {"vqa.val.jsonl", *SPLIT_FILES["test"], *SPLIT_FILES["test-dev"], *MAY_BE_EMPTY}
    missing: dict[str, None] = {}  # a set that keeps its order
    for name in sorted(needed | others):
        if name not in needed and not (folder / name).exists():
            print(f"  {name}: not there")
            continue
        labelled = not (name.startswith("vqa.test") or name.endswith(".unlabelled.jsonl"))
        records = read_vqa_index(folder / name, len(vocabulary), vocab_size, labelled, name in MAY_BE_EMPTY)
        images = {record.image_path for record in records}
        absent = _absent_files(data_path, images)
        missing.update(dict.fromkeys(absent))
        print(f"  {name}: {len(records)} questions, {len(images)} images, {len(absent)} of them missing")
    _end_check(missing, data_path, ADVICE)


def build_coco_captioning(data_path: Path, args: argparse.Namespace) -> None:
    """Write the index of COCO captions and print what was found, written and left out."""
    from data.coco_captions import build_coco_captioning_index
    from data.vqa_index import write_tokenizer_stamp

    output_path = Path(args.output_path or data_path)
    existing = {path.name for path in output_path.glob("*")}
    tokenizer = _tokenizer(data_path, args)
    print(f"coco_captioning: reading the captions below {args.annotation_path or data_path}", flush=True)
    summary = build_coco_captioning_index(data_path, args.annotation_path, tokenizer, output_path, progress=_progress)
    write_tokenizer_stamp(output_path, "coco_captioning", tokenizer.fingerprint)
    _print_summary(summary, output_path, existing)


def build_nocaps(data_path: Path, args: argparse.Namespace) -> None:
    """Write the index of NoCaps and print what was found, written and left out."""
    from data.coco_captions import build_nocaps_index

    output_path = Path(args.output_path or data_path)
    existing = {path.name for path in output_path.glob("*")}
    print(f"nocaps: reading the image lists below {args.annotation_path or data_path}", flush=True)
    _print_summary(build_nocaps_index(data_path, args.annotation_path, output_path), output_path, existing)


def check_captions(data_path: Path, args: argparse.Namespace, name: str, splits: tuple[str, ...]) -> None:
    """Check lines, token ids and image files of an existing caption index; print counts.

    Raises:
        DataError: a bad line, no index at all, or images that are missing (after the counts are printed).
    """
    from data.caption_index import SPLIT_FILES, index_advice, read_caption_index

    folder = Path(args.output_path or data_path)
    advice = index_advice(name)
    files = [folder / SPLIT_FILES[name][split] for split in splits]
    if not any(path.exists() for path in files):
        raise DataError(f"no index of {name} in {folder}: {advice}")
    print(f"{name}: {folder}")
    missing: dict[str, None] = {}
    for path in files:
        if not path.exists():
            print(f"  {path.name}: not there")
            continue
        training = path.name == SPLIT_FILES[name]["train"]
        records = read_caption_index(path, vocab_size=_tokenizer(data_path, args).vocab_size if training else None)
        images = {record.image_path for record in records}
        absent = _absent_files(data_path, images)
        missing.update(dict.fromkeys(absent))
        print(f"  {path.name}: {len(records)} lines, {len(images)} images, {len(absent)} of them missing")
    _end_check(missing, data_path, advice)


@dataclass(frozen=True)
class Dataset:
    """One row of the table: how to tell that the files are there, and what to do with them."""

    signs: str  # the file that shows it, for messages
    is_there: Callable[[Path, argparse.Namespace], bool]
    build: Callable[[Path, argparse.Namespace], None]
    check: Callable[[Path, argparse.Namespace], None]


def _has_vqav2(data_path: Path, args: argparse.Namespace) -> bool:
    from data.official_files import annotation_folders
    from data.vqa_index import ANSWER_FILE
    from data.vqav2_files import ANNOTATION_PLACES, QUESTION_FILE, TRAIN

    if args.check:
        return (Path(args.output_path or data_path) / ANSWER_FILE).is_file()
    folders = annotation_folders(data_path, args.annotation_path, ANNOTATION_PLACES)
    return any((folder / QUESTION_FILE.format(TRAIN)).is_file() for folder in folders)


def _has_captions(data_path: Path, args: argparse.Namespace, official: tuple[str, ...], index: str) -> bool:
    from data.coco_captions import ANNOTATION_PLACES
    from data.official_files import annotation_folders

    if args.check:
        return any(Path(args.output_path or data_path).glob(index))
    folders = annotation_folders(data_path, args.annotation_path, ANNOTATION_PLACES)
    return any((folder / name).is_file() for folder in folders for name in official)


DATASETS = {
    "vqav2": Dataset(
        "v2_OpenEnded_mscoco_train2014_questions.json",
        _has_vqav2,
        build_vqav2,
        check_vqav2,
    ),
    "coco_captioning": Dataset(
        "dataset_coco.json",
        partial(_has_captions, official=("dataset_coco.json",), index="coco_captioning.*.jsonl"),
        build_coco_captioning,
        partial(check_captions, name="coco_captioning", splits=("train", "val", "test")),
    ),
    "nocaps": Dataset(
        "nocaps_val_4500_captions.json",
        partial(
            _has_captions,
            official=("nocaps_val_4500_captions.json", "nocaps_test_image_info.json"),
            index="nocaps.*.jsonl",
        ),
        build_nocaps,
        partial(check_captions, name="nocaps", splits=("val", "test")),
    ),
}


def _places(dataset: str | None) -> list[str]:
    """Default places of a data set, or of all, each once."""
    return list(
        dict.fromkeys(place for name in ([dataset] if dataset else DATASETS) for place in DEFAULT_DATA_FOLDERS[name])
    )


def _data_folders(args: argparse.Namespace) -> list[Path]:
    """The folder given, else the default places that are folders."""
    places = [args.data_path] if args.data_path else _places(args.dataset)
    folders = [Path(place) for place in places if Path(place).is_dir()]
    if not folders:
        looked = " and ".join(f"{place}/" for place in places)
        raise DataError(f"no data folder (looked for {looked}): give --data_path DIR")
    return folders


def _tokenizer(data_path: Path, args: argparse.Namespace) -> "XLMRTokenizer":  # noqa: F821 (imported late, for --help)
    from data.tokenizers.spm import WAY_OUT, XLMRTokenizer

    places = [args.sentencepiece_model] if args.sentencepiece_model else [TOKENIZER_FILE, data_path / TOKENIZER_FILE]
    for place in places:
        if Path(place).is_file():
            return XLMRTokenizer(place)
    raise DataError(f"no sentencepiece model (looked for {', '.join(map(str, places))}): {WAY_OUT}")


def _progress(images: list, description: str) -> Any:
    from tqdm import tqdm

    return tqdm(images, desc=description, unit="image", mininterval=1.0, disable=None)  # None: only on a terminal


def _print_summary(summary: Any, output_path: Path, existing: set[str]) -> None:
    for what, where in summary.found:
        print(f"  found   {what}: {where}")
    for name, lines in summary.num_lines.items():
        print(f"  {'rewritten' if name in existing else 'written'}  {output_path / name}: {lines} lines")
    for note in summary.notes:
        print(f"  skipped {note}")
    for warning in summary.warnings:
        print(f"  warning {warning}")


def _end_check(missing: dict[str, None], data_path: Path, advice: str) -> None:
    if missing:
        first = ", ".join(list(missing)[:5])
        raise DataError(f"{len(missing)} images are missing in {data_path}, the first {first}: add them or {advice}")
    print("  every line is sound and every image is there")


def _absent_files(root: Path, relative: set[str]) -> list[str]:
    """Sorted paths that are not there; lists each folder once instead of asking for every file."""
    listings: dict[str, set[str]] = {}
    absent = []
    for path in sorted(relative):
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        if name not in listings[folder]:
            absent.append(path)
    return absent


if __name__ == "__main__":
    run(main)
