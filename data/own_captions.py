"""Images of one's own with captions: a JSON-lines file.

A line is {"image": path, "captions": [text, ...] or absent, "image_id": whole number or absent}; the path is relative
to the data folder.
"""

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.files import check_relative
from data.own_rows import OwnSchema, optional_texts

OWN_CAPTIONS = OwnSchema(
    what="an image",
    example='{"image": "photos/1.jpg", "captions": ["a dog on a sofa"]}',
    keys=frozenset({"image", "captions", "image_id"}),
    id_key="image_id",
)


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
    first_line: dict[str | int, str] = {}
    for where, row, image_id in OWN_CAPTIONS.numbered(OWN_CAPTIONS.lines(path)):
        number = where.rpartition(":")[2]
        image = check_relative(row.get("image"), f'{where}: "image"')
        for what, key in (("image", image), ("image_id", image_id)):
            before = first_line.setdefault(key, number)
            if before != number:
                raise DataError(f"{where}: {what} {key} stands on line {before} already; give it one line")
        captions = optional_texts(row, "captions", where, example='["a dog on a sofa"]')
        rows.append(OwnCaption(image, image_id, captions and tuple(captions)))
    return rows
