"""Images of one's own with captions: a JSON-lines file.

A line is {"image": path, "captions": [text, ...] or absent, "image_id": whole number or absent}; the path is relative
to the data folder.
"""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.files import check_relative, iterate_jsonl
from data.own_rows import optional_texts

OWN_KEYS = {"image", "captions", "image_id"}
SCHEMA = '{"image": "photos/1.jpg", "captions": ["a dog on a sofa"]}'


@dataclass(frozen=True, slots=True)
class OwnCaption:
    """One image; ``captions`` is None where nobody has written any."""

    image_path: str
    image_id: int
    captions: tuple[str, ...] | None


def read_caption_file(path: str | Path) -> list[OwnCaption]:
    """Images of one file, in its order; ids that are absent are running numbers from 0.

    Raises:
        DataError: a wrong key or type, an empty caption, an image or an id that stands twice, ids on some lines only;
            file and line are named.
    """
    rows: list[OwnCaption] = []
    first_line: dict[str | int, int] = {}
    own_ids: bool | None = None
    for number, row in iterate_jsonl(path, advice=f"write one line an image, such as {SCHEMA}"):
        where = f"{path}:{number}"
        unknown = sorted(row.keys() - OWN_KEYS)
        if unknown:
            raise DataError(f"{where}: unknown key {unknown[0]!r}; a line is {SCHEMA}, with an optional image_id")
        has_id = row.get("image_id") is not None
        own_ids = has_id if own_ids is None else own_ids
        if has_id != own_ids:
            raise DataError(f"{where}: image_id must stand on every line or on none")
        image_id = row["image_id"] if has_id else len(rows)
        if type(image_id) is not int:
            raise DataError(f"{where}: image_id must be a whole number, got {image_id!r:.80}")
        image = check_relative(row.get("image"), f'{where}: "image"')
        for what, key in (("image", image), ("image_id", image_id)):
            before = first_line.setdefault(key, number)
            if before != number:
                raise DataError(f"{where}: {what} {key} stands on line {before} already; give it one line")
        captions = optional_texts(row, "captions", where, example='["a dog on a sofa"]')
        rows.append(OwnCaption(image, image_id, captions and tuple(captions)))
    return rows
