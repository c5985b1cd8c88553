"""COCO captions (Karpathy's split) and NoCaps: official files to index files, BEiT-3's format.

Source: the index builders of BEiT-3's captioning data sets. Lines keep the order of the official files. As in the
original an image need not be there to get its line; ``scripts/make_index.py --check`` counts the missing ones.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data.caption_index import SPLIT_FILES
from data.errors import DataError
from data.files import check_relative, read_json
from data.index_writer import IndexSummary, IndexWriter
from data.official_files import IMAGE_PLACES, AbsentError, find_annotation
from data.tokenizers.spm import XLMRTokenizer

COCO_FILE = "dataset_coco.json"
# split of the official file -> index file; restval are the val2014 images that train
COCO_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}
NOCAPS_FILES = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
ANNOTATION_PLACES = ("", "annotations")  # below the data folder
COCO_KEYS = {"filepath": str, "filename": str, "split": str, "cocoid": int, "sentences": list}
NOCAPS_KEYS = {"id": int, "file_name": str}

Progress = Callable[[Iterable, str], Iterable]


def build_coco_captioning_index(
    data_path: str | Path,
    annotation_path: str | Path | None,
    tokenizer: XLMRTokenizer,
    output_path: str | Path | None = None,
    *,
    progress: Progress = lambda items, _: items,
) -> IndexSummary:
    """Write ``coco_captioning.{train,val,test}.jsonl`` from ``dataset_coco.json``.

    Training has a line for each caption of train and restval, val and test a line for each image, without text. The
    files take their names together at the end.

    Args:
        data_path: folder with ``train2014`` and ``val2014``, directly or in ``images``.
        annotation_path: folder of ``dataset_coco.json``; None looks in ``data_path`` and ``annotations`` below.
        tokenizer: turns captions into the ids that the index holds.
        output_path: folder for the index files; ``data_path`` if None.
        progress: wraps an iterable of images for display, given a description.

    Raises:
        DataError: the file is missing or broken, an image stands twice, a caption has no tokens, nothing to train on.
    """
    data_path = Path(data_path)
    path = find_annotation(COCO_FILE, data_path, annotation_path, ANNOTATION_PLACES)
    images = _images(path, COCO_KEYS, "cocoid")
    summary = IndexSummary(found=[("captions", str(path))])
    folders = _ImageFolders(data_path, summary)
    with ExitStack() as stack:
        writer = IndexWriter(stack, Path(output_path or data_path), summary.num_lines)
        writer.open(*(SPLIT_FILES["coco_captioning"][split] for split in dict.fromkeys(COCO_SPLITS.values())))
        for where, image in progress(images, COCO_FILE):
            if image["split"] not in COCO_SPLITS:
                known = ", ".join(COCO_SPLITS)
                raise DataError(f'{where}: "split" must be one of {known}, got {image["split"]!r:.80}')
            split = COCO_SPLITS[image["split"]]
            image_path = check_relative(f"{folders.find(image['filepath'])}/{image['filename']}", where)
            texts = _captions(image, where, tokenizer) if split == "train" else (None,)
            for tokens in texts:
                row = {"image_path": image_path, "text_segment": tokens, "image_id": image["cocoid"]}
                writer.write(SPLIT_FILES["coco_captioning"][split], row)
        if summary.num_lines[SPLIT_FILES["coco_captioning"]["train"]] == 0:
            raise DataError(f'{path}: no image of "split" train or restval has a caption; is the file whole?')
        for name, count in summary.num_lines.items():
            if count == 0:
                summary.warnings.append(f"{name} has no line: {path} has no image of this split")
    return summary


def build_nocaps_index(
    data_path: str | Path, annotation_path: str | Path | None, output_path: str | Path | None = None
) -> IndexSummary:
    """Write ``nocaps.{val,test}.jsonl`` from the official files, a line for each image; they hold no text.

    Args:
        data_path: folder with the images in ``val`` and ``test``, directly or in ``images``.
        annotation_path: folder of the two official files; None looks in ``data_path`` and ``annotations`` below.
        output_path: folder for the index files; ``data_path`` if None.

    Returns:
        Counts and remarks. A split whose official file is not there is left out, with a remark.

    Raises:
        DataError: both files are missing, or one is broken.
    """
    data_path = Path(data_path)
    output_path = Path(output_path or data_path)
    summary = IndexSummary()
    folders = _ImageFolders(data_path, summary)
    absent: list[AbsentError] = []
    with ExitStack() as stack:
        writer = IndexWriter(stack, output_path, summary.num_lines)
        for split, file_name in NOCAPS_FILES.items():
            name = SPLIT_FILES["nocaps"][split]
            try:
                path = find_annotation(file_name, data_path, annotation_path, ANNOTATION_PLACES)
            except AbsentError as error:
                stale = f" (the {name} there is of an earlier run)" if (output_path / name).exists() else ""
                summary.notes.append(f"{name} not written{stale}: {error}")
                absent.append(error)
                continue
            summary.found.append((f"{split} images", str(path)))
            writer.open(name)
            for where, image in _images(path, NOCAPS_KEYS, "id"):
                image_path = check_relative(f"{folders.find(split)}/{image['file_name']}", where)
                writer.write(name, {"image_path": image_path, "text_segment": None, "image_id": image["id"]})
    if len(absent) == len(NOCAPS_FILES):
        raise absent[0]
    return summary


class _ImageFolders:
    """Folder of the images relative to the data folder, looked for once each; a warning if it is nowhere."""

    def __init__(self, data_path: Path, summary: IndexSummary) -> None:
        self._data_path, self._summary = data_path, summary
        self._known: dict[str, str] = {}

    def find(self, name: str) -> str:
        if name not in self._known:
            check_relative(name, "image folder")
            folders = [f"{place}/{name}".removeprefix("/") for place in IMAGE_PLACES]
            there = [folder for folder in folders if (self._data_path / folder).is_dir()]
            if not there:
                self._summary.warnings.append(f"no image folder {name} in {self._data_path}: add it before training")
            self._known[name] = (there or folders)[0]
        return self._known[name]


def _images(path: Path, kinds: dict[str, type], id_key: str) -> list[tuple[str, dict[str, Any]]]:
    """(place for messages, image) in file order, with keys of the wanted types and distinct ids."""
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise DataError(f'{path}: needs a non-empty list under "images"; is it the official file?')
    rows = []
    for place, image in enumerate(images):
        where = f"{path}: images[{place}]"
        for key, kind in kinds.items():
            if not isinstance(image, dict) or type(image.get(key)) is not kind:
                raise DataError(f'{where}: "{key}" must be of type {kind.__name__}, the entry is {image!r:.120}')
        rows.append((where, image))
    twice = [number for number, count in Counter(image[id_key] for _, image in rows).items() if count > 1]
    if twice:
        raise DataError(f"{path}: image {twice[0]} stands twice; image ids must be unique")
    return rows


def _captions(image: dict[str, Any], where: str, tokenizer: XLMRTokenizer) -> Iterator[list[int]]:
    for number, sentence in enumerate(image["sentences"]):
        text = sentence.get("raw") if isinstance(sentence, dict) else None
        place = f"{where}: sentences[{number}]"
        if type(text) is not str:
            raise DataError(f'{place}: "raw" must be a text, the entry is {sentence!r:.120}')
        yield tokenizer.encode_filled(text, "caption", place)
