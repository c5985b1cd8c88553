"""Captions of an evaluation against what people wrote: which file holds that, the prediction file, the scores."""

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from data.caption_references import CaptionReferences, read_caption_references
from data.coco_captions import ANNOTATION_PLACES, COCO_FILE, NOCAPS_FILES
from data.errors import DataError
from data.files import write_json_atomic
from data.metrics.captions import check_java, format_scores, score_by_domain, score_captions
from data.official_files import annotation_folders
from engine import distributed
from engine.log import say
from scripts.beit3_args import CAPTION_METRICS
from scripts.evaluation_files import clear_temporaries

# task, split → files that may hold its reference captions, in the order of preference; the test captions of NoCaps are
# known to its server alone. The `_gt` files are those that the original downloads.
REFERENCE_FILES = {
    ("coco_captioning", "val"): (COCO_FILE, "coco_karpathy_val_gt.json"),
    ("coco_captioning", "test"): (COCO_FILE, "coco_karpathy_test_gt.json"),
    ("nocaps", "val"): (NOCAPS_FILES["val"], "nocaps_val_gt.json"),
}


def find_references(args: argparse.Namespace, split: str) -> tuple[Path | None, str]:
    """The file with reference captions of a split, or None and why there is none."""
    if args.annotations:
        return Path(args.annotations), ""
    if split == "val" and args.val_file:
        return Path(args.val_file), ""
    if split.endswith(".jsonl"):
        return Path(split), ""
    names = REFERENCE_FILES.get((args.task, split), ())
    if not names:
        reason = "only the evaluation server has the captions" if split == "test" else "it is a folder of images"
        return None, f"{split} of {args.task} has no reference captions here: {reason}"
    folders = annotation_folders(Path(args.data_path), None, ANNOTATION_PLACES)
    for folder in folders:
        for name in names:
            if (folder / name).is_file():
                return folder / name, ""
    looked = " or ".join(map(str, folders))
    return None, f"no {' or '.join(names)} in {looked}: give the file of reference captions as --annotations"


def load_references(args: argparse.Namespace, split: str, ids: Collection[int]) -> CaptionReferences | None:
    """Reference captions of the images to be captioned; None, with word of it, where there are none.

    The main process reads them, the others get None.

    Raises:
        DataError: the file is broken, an official one lacks images, or a metric that is asked for cannot run.
    """
    check_java(CAPTION_METRICS[args.caption_metrics])
    path, reason = find_references(args, split)
    if path is None:
        say(f"no scores: {reason}")
        return None
    if not distributed.is_main():
        return None
    references = read_caption_references(path, split=split if split in ("val", "test") else None)
    known = [index for index in ids if index in references.captions]
    if len(known) < len(ids):
        missing = [index for index in ids if index not in references.captions]
        if path.suffix != ".jsonl":
            raise DataError(
                f"{path} has no captions of {len(missing)} of the {len(ids)} images to be captioned, such as "
                f"{', '.join(map(str, missing[:3]))}: give the --annotations of this split"
            )
        say(f"no scores of {len(missing)} of {len(ids)} images: they have no captions in {path}")
    return references.only(known) if known else None


def write_and_score(
    args: argparse.Namespace, name: str, captions: Mapping[int, str], references: CaptionReferences | None
) -> dict[str, float]:
    """Write ``submit_<name>.json`` first, then score and write ``result_<name>.json``; all processes call it together.

    Args:
        args: of the program.
        name: task and split, in the names of the files.
        captions: image id → caption.
        references: what ``load_references`` gave on this process.

    Returns:
        Metric → value, a fraction (CIDEr 1.33 is 133 in papers); empty without references.
    """
    metrics: dict[str, float] = {}
    if distributed.is_main():
        output = Path(args.output_dir)
        submission, result_file = output / f"submit_{name}.json", output / f"result_{name}.json"
        clear_temporaries(submission, result_file)
        entries = [{"image_id": index, "caption": caption} for index, caption in captions.items()]
        write_json_atomic(submission, entries, indent=2)
        say(f"wrote {len(entries)} captions to {submission}")
        result: dict[str, Any] = {"images": len(entries)}
        if references is not None:
            scored = {index: captions[index] for index in references.captions}
            scores = score_captions(references.captions, scored, with_java=CAPTION_METRICS[args.caption_metrics])
            metrics = scores.corpus
            result |= {"scored_images": len(scored), **metrics, "skipped": scores.skipped}
            domains = score_by_domain(references.captions, scored, references.domains)
            if domains:
                result["domains"] = domains
            print(format_scores(scores, domains))
        write_json_atomic(result_file, result, indent=2)
    return distributed.broadcast_object(metrics)
