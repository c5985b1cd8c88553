"""The index files of captioning, BEiT-3's format: names of the splits, lines to checked records."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import check_relative, iterate_jsonl
from data.images import IMAGE_SUFFIXES
from data.own_captions import OwnCaption
from data.tokenizers.spm import XLMRTokenizer

# task → split → index file; NoCaps has no captions to train on and takes COCO's
SPLIT_FILES = {
    "coco_captioning": {split: f"coco_captioning.{split}.jsonl" for split in ("train", "val", "test")},
    "nocaps": {
        "train": "coco_captioning.train.jsonl",
        "val": "nocaps.val.jsonl",
        "test": "nocaps.test.jsonl",
    },
}
TRAINING_INDEX = "coco_captioning"  # the one that holds token ids


@dataclass(frozen=True, slots=True)
class CaptionRecord:
    """One caption to train on, or one image to caption.

    Attributes:
        image_path: relative to the image folder.
        image_id: the data set's own number; several training records may share it.
        tokens: ids of the caption without begin and end; None where it is to be found.
    """

    image_path: str
    image_id: int
    tokens: tuple[int, ...] | None = None


def index_advice(name: str) -> str:
    """What to do about a file that is missing or wrong."""
    return f"run scripts/make_index.py {name} --data_path DIR first"


def read_caption_index(path: str | Path, *, vocab_size: int | None) -> list[CaptionRecord]:
    """Read one index file.

    Args:
        path: ``coco_captioning.*.jsonl`` or ``nocaps.*.jsonl``.
        vocab_size: training: every line needs a text, whose ids must be below it; None: no line may have one, and an
            image stands once.

    Raises:
        DataError: a wrong key, type or range, or an image to caption that stands twice; file and line are named.
    """
    advice = index_advice(Path(path).name.split(".")[0])
    records: list[CaptionRecord] = []
    line_of: dict[int, int] = {}
    for number, row in iterate_jsonl(path, advice=advice):
        record = _parse_line(row, vocab_size, f"{path}:{number}", advice)
        if vocab_size is None:
            first = line_of.setdefault(record.image_id, number)
            if first != number:
                raise DataError(f"{path}:{number}: image {record.image_id} stands on line {first} already: {advice}")
        records.append(record)
    return records


def _parse_line(row: dict[str, Any], vocab_size: int | None, where: str, advice: str) -> CaptionRecord:
    image_id, tokens = row.get("image_id"), row.get("text_segment")
    if type(image_id) is not int:
        raise DataError(f"{where}: image_id must be a whole number, got {image_id!r:.80}: {advice}")
    if vocab_size is None and tokens is not None:
        raise DataError(f"{where}: text_segment must be null outside training, got {tokens!r:.80}: {advice}")
    if vocab_size is not None and not (
        type(tokens) is list and tokens and all(type(t) is int and 0 <= t < vocab_size for t in tokens)
    ):
        raise DataError(
            f"{where}: text_segment must be a list of ids of at least 0 and below {vocab_size}, the size of the "
            f"vocabulary, got {tokens!r:.80}: {advice}, or give the matching file"
        )
    image_path = check_relative(row.get("image_path"), where)
    return CaptionRecord(image_path, image_id, None if tokens is None else tuple(tokens))


def own_training_records(rows: Iterable[OwnCaption], tokenizer: XLMRTokenizer, source: str) -> list[CaptionRecord]:
    """A record for each caption of one's own images; images without captions are passed over.

    Raises:
        DataError: a caption without tokens, or no caption at all; names the source.
    """
    records = [
        CaptionRecord(
            row.image_path, row.image_id, tuple(tokenizer.encode_filled(text, "caption", f"{source}: {row.image_path}"))
        )
        for row in rows
        for text in row.captions or ()
    ]
    if not records:
        raise DataError(f'{source}: no line has "captions": training needs them')
    return records


def own_evaluation_records(rows: Iterable[OwnCaption]) -> list[CaptionRecord]:
    """A record for each image of one's own, to be captioned."""
    return [CaptionRecord(row.image_path, row.image_id) for row in rows]


def folder_records(folder: str | Path) -> list[CaptionRecord]:
    """A record for each image file directly in a folder, by name; ids count from 0.

    Raises:
        DataError: there is none.
    """
    names = sorted(path.name for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise DataError(f"no image in {folder}: it needs files that end in {', '.join(IMAGE_SUFFIXES)}")
    return [CaptionRecord(name, number) for number, name in enumerate(names)]
