"""What people wrote about the images of a split, from the annotation file of the data set or one of one's own."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_json
from data.own_captions import read_caption_file

_FORMS = "a COCO caption file, Karpathy's dataset_coco.json, or a .jsonl file of your own"


@dataclass(frozen=True)
class CaptionReferences:
    """Reference captions of some images.

    captions: image id → captions, at least one each.
    domains: image id → domain (NoCaps: in-domain, near-domain, out-domain); empty where the file has none.
    """

    captions: dict[int, tuple[str, ...]]
    domains: dict[int, str]

    def only(self, ids: Collection[int]) -> "CaptionReferences":
        """Those of the images ``ids``, all of which must be there."""
        return CaptionReferences(
            {index: self.captions[index] for index in ids},
            {index: self.domains[index] for index in ids if index in self.domains},
        )


def read_caption_references(path: str | Path, split: str | None = None) -> CaptionReferences:
    """Reference captions of a file.

    Args:
        path: COCO's form (``images`` and ``annotations``; also NoCaps), Karpathy's ``dataset_coco.json``, or a
            ``.jsonl`` file of one's own, of which lines without captions are passed over (all may be).
        split: val or test of Karpathy's file; without it all its images count. Other forms have no splits.

    Raises:
        DataError: the file is broken, of another kind, or has no caption.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        rows = read_caption_file(path)
        captions = {row.image_id: row.captions for row in rows if row.captions}
        domains: dict[int, str] = {}
    else:
        content = read_json(path)
        images = content.get("images") if isinstance(content, dict) else None
        if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
            raise DataError(f'{path}: needs a list under "images": give {_FORMS}')
        if isinstance(content.get("annotations"), list):
            captions = _coco_captions(content["annotations"], path)
            domains = {image["id"]: image["domain"] for image in images if type(image.get("domain")) is str}
        elif any("sentences" in image for image in images):
            captions, domains = _karpathy_captions(images, split, path), {}
        else:
            raise DataError(f'{path} has no captions, only a list of images (no "annotations"): give {_FORMS}')
    if not captions and path.suffix != ".jsonl":
        of_split = f" of split {split}" if split else ""
        raise DataError(f"{path} has no captions{of_split}: give {_FORMS}")
    return CaptionReferences(captions, domains)


def _coco_captions(annotations: list[Any], path: Path) -> dict[int, tuple[str, ...]]:
    found: dict[int, list[str]] = defaultdict(list)
    for place, row in enumerate(annotations):
        image_id, caption = (row.get("image_id"), row.get("caption")) if isinstance(row, dict) else (None, None)
        if type(image_id) is not int or type(caption) is not str:
            raise DataError(
                f'{path}: annotations[{place}] needs a whole number "image_id" and a text "caption", it is '
                f"{row!r:.80}: give {_FORMS}"
            )
        found[image_id].append(caption)
    return {image_id: tuple(captions) for image_id, captions in found.items()}


def _karpathy_captions(images: list[dict[str, Any]], split: str | None, path: Path) -> dict[int, tuple[str, ...]]:
    found = {}
    for place, image in enumerate(images):
        if split is not None and image.get("split") != split:
            continue
        sentences = image.get("sentences")
        texts = [one.get("raw") if isinstance(one, dict) else None for one in sentences or ()]
        if type(image.get("cocoid")) is not int or not texts or not all(type(text) is str for text in texts):
            raise DataError(
                f'{path}: images[{place}] needs a whole number "cocoid" and "sentences" with a text "raw", it is '
                f"{image!r:.120}"
            )
        found[image["cocoid"]] = tuple(texts)
    return found
