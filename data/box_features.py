"""Regions of images that a detector has found: the original's JSON file an image, and a packed form that is mapped.

A JSON file holds base64 of float32; reading one takes milliseconds, most of them for decoding. ``pack`` writes the same
numbers once as plain arrays, of which an image's part is read where it lies.

Packed folder: ``regions.json`` (what it is, and the sizes of the others), ``images.npy`` (number, width, height of each
image, in order), ``first.npy`` (its first region), ``boxes.npy``, ``features.npy``, ``whole.npy`` (feature of the whole
image).
"""

import base64
import binascii
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from data.errors import DataError
from data.files import open_atomic, parse_json, read_json, write_json_atomic
from data.zip_folder import ZipFolder

FEATURE_SIZE = 2048
_META, _FORMAT = "regions.json", "plainvl regions 1"
_ARRAYS = ("images", "first", "boxes", "features", "whole")
_ADVICE = "run python scripts/pack_box_features.py again"
_EVERY_IMAGE = "every image of the questions needs its box file"


@dataclass(frozen=True)
class Regions:
    """What was found in one image.

    Attributes:
        boxes: (K, 4) float32, x1 y1 x2 y2 in pixels; not to be written to, nor are the others.
        features: (K, 2048) float32.
        whole: (2048,) float32, of the whole image.
        size: width and height of the image.
    """

    boxes: np.ndarray
    features: np.ndarray
    whole: np.ndarray
    size: tuple[int, int]


class RegionSource(Protocol):
    """Regions by image number; travels to other processes."""

    def image_ids(self) -> set[int]:
        """Numbers of the images that it knows."""
        ...

    def sizes(self) -> dict[int, tuple[int, int]] | None:
        """Image number → width and height where they are at hand; None where every file would have to be read."""
        ...

    def regions(self, image_id: int) -> Regions:
        """Of one image.

        Raises:
            DataError: there are none, or they are broken.
        """
        ...


class JSONRegions:
    """A folder of ``<image number>.json`` files."""

    def __init__(self, folder: str | Path) -> None:
        """Look at the folder.

        Raises:
            DataError: it is not there.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"no folder of box files at {folder}: see docs/datasets.md for the layout")

    def image_ids(self) -> set[int]:
        """From the names of the files."""
        return _numbers(os.listdir(self.folder))

    def sizes(self) -> None:
        """They stand inside the files."""

    def regions(self, image_id: int) -> Regions:
        """Read and decode one file."""
        path = self.folder / f"{image_id}.json"
        return _parse(read_json(path, advice=_EVERY_IMAGE), path)


class ZippedRegions:
    """The same files in a zip archive, below a folder that is named like the archive."""

    def __init__(self, path: str | Path) -> None:
        """Read the archive's list of files.

        Raises:
            DataError: it is missing or broken.
        """
        self._files = ZipFolder(path)

    def image_ids(self) -> set[int]:
        """From the names of the files."""
        return _numbers(self._files.names())

    def sizes(self) -> None:
        """They stand inside the files."""

    def regions(self, image_id: int) -> Regions:
        """Read and decode one file."""
        name = f"{image_id}.json"
        place = f"{self._files.path}@/{name}"
        return _parse(parse_json(self._files.read(name, advice=_EVERY_IMAGE), place), place)


def open_regions(place: str | Path) -> RegionSource:
    """A packed folder, a folder of JSON files, or a zip archive of one, told apart by what is there.

    Raises:
        DataError: there is nothing.
    """
    place = Path(place)
    if (place / _META).is_file():
        return PackedRegions(place)
    return ZippedRegions(place) if place.suffix == ".zip" else JSONRegions(place)


def _numbers(names: Iterable[str]) -> set[int]:
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return {int(stem) for stem in stems if stem.isascii() and stem.isdigit()}


def _parse(content: Any, path: str | Path) -> Regions:
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold one JSON object")
    count = content.get("num_boxes")
    size = content.get("image_w"), content.get("image_h")
    if type(count) is not int or count < 1:
        raise DataError(f"{path}: num_boxes must be a whole number above 0, got {count!r:.40}")
    if not all(type(side) is int and side > 0 for side in size):
        raise DataError(f"{path}: image_w and image_h must be whole numbers above 0, got {size!r:.60}")
    boxes = _decode(content, "boxes", path, count, 4)
    features = _decode(content, "features", path, count, FEATURE_SIZE)
    if content.get("image_box_feature"):
        whole = _decode(content, "image_box_feature", path, 1, FEATURE_SIZE)[0]
    else:
        whole = features.mean(axis=0)
    return Regions(boxes, features, whole, size)


def _decode(content: dict[str, Any], key: str, path: str | Path, rows: int, width: int) -> np.ndarray:
    text = content.get(key)
    if not isinstance(text, str):
        raise DataError(f"{path}: {key} must be base64 text, got {text!r:.40}")
    try:
        raw = base64.b64decode(text, validate=False)
    except (binascii.Error, ValueError):
        raise DataError(f"{path}: {key} is not base64: make or fetch the file again") from None
    if len(raw) != 4 * rows * width:
        raise DataError(
            f"{path}: {key} has {len(raw)} bytes, {rows} x {width} float32 numbers have {4 * rows * width}: make or "
            "fetch the file again"
        )
    values = np.frombuffer(raw, dtype="<f4").reshape(rows, width)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: {key} holds NaN or infinite numbers: make or fetch the file again")
    return values


def pack(
    source: RegionSource,
    image_ids: Iterable[int],
    output: str | Path,
    *,
    dtype: str = "float32",
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> int:
    """Write the packed form of some images, whole or not at all; returns the number of regions.

    Args:
        source: where the regions come from.
        image_ids: numbers of the images.
        output: folder; one that holds a packed form already is replaced at the end.
        dtype: of the features: ``float32`` (equal) or ``float16`` (half the size, relative error 5e-4).
        progress: wraps the sorted numbers for display.

    Raises:
        DataError: no images, broken regions, or features too large for ``float16``.
    """
    ids = sorted(set(image_ids))
    if not ids:
        raise DataError("no box file to pack: give a folder of <image number>.json files")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    images, first, whole = [], [0], []
    # files without a name, on the disk of the packed ones: the number of regions, which goes first, is known at the end
    with tempfile.TemporaryFile(dir=output) as box_file, tempfile.TemporaryFile(dir=output) as feature_file:
        for image_id in progress(ids):
            found = source.regions(image_id)
            features = found.features.astype(dtype)
            if not np.isfinite(features).all():
                raise DataError(f"image {image_id}: its features do not fit into {dtype}: give --dtype float32")
            box_file.write(found.boxes.astype("<f4").tobytes())
            feature_file.write(features.tobytes())
            images.append((image_id, *found.size))
            first.append(first[-1] + len(found.boxes))
            whole.append(found.whole.astype(dtype))
        total = first[-1]
        (output / _META).unlink(missing_ok=True)  # written last: without it the folder is not taken for whole
        _finish(box_file, output / "boxes.npy", (total, 4), "<f4")
        _finish(feature_file, output / "features.npy", (total, FEATURE_SIZE), np.dtype(dtype).str)
    small = {"images": np.array(images, "<i8"), "first": np.array(first, "<i8"), "whole": np.stack(whole)}
    for name, values in small.items():
        with open_atomic(output / f"{name}.npy", binary=True) as file:
            np.save(file, values, allow_pickle=False)
    sizes = {name: (output / f"{name}.npy").stat().st_size for name in _ARRAYS}
    write_json_atomic(output / _META, {"format": _FORMAT, "dtype": dtype, "images": len(ids), "bytes": sizes})
    return total


def _finish(raw: IO[bytes], target: Path, shape: tuple[int, int], dtype: str) -> None:
    """Put numpy's header before raw numbers, under the final name."""
    raw.seek(0)
    with open_atomic(target, binary=True) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        shutil.copyfileobj(raw, file, 1 << 24)


class PackedRegions:
    """A packed folder, mapped into memory."""

    def __init__(self, folder: str | Path) -> None:
        """Map the arrays.

        Raises:
            DataError: a file is missing, cut off or of another format.
        """
        self.folder = folder = Path(folder)
        meta = read_json(folder / _META, advice="make it by scripts/pack_box_features.py")
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT or not isinstance(meta.get("bytes"), dict):
            raise DataError(f"{folder / _META} is of another format: {_ADVICE}")
        arrays = {}
        for name in _ARRAYS:
            path = folder / f"{name}.npy"
            size = path.stat().st_size if path.is_file() else 0
            if size != meta["bytes"].get(name):
                raise DataError(f"{path} has {size} bytes, {_META} says {meta['bytes'].get(name)}: {_ADVICE}")
            try:
                # slices of a plain array cost less than memmap's
                arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            except (ValueError, OSError) as error:
                raise DataError(f"{path} cannot be mapped ({error}): {_ADVICE}") from None
        images = np.array(arrays["images"])
        self._place = {int(number): place for place, number in enumerate(images[:, 0])}
        self._sizes, self._first = images[:, 1:], np.array(arrays["first"])
        self._boxes, self._features, self._whole = arrays["boxes"], arrays["features"], arrays["whole"]

    def __len__(self) -> int:
        """Number of images."""
        return len(self._place)

    def image_ids(self) -> set[int]:
        """All of them."""
        return set(self._place)

    def sizes(self) -> dict[int, tuple[int, int]]:
        """Of all images."""
        return {number: tuple(map(int, self._sizes[place])) for number, place in self._place.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Mapped files cannot travel to another process; it opens them itself."""
        return PackedRegions, (self.folder,)

    def regions(self, image_id: int) -> Regions:
        """Of one image; where the numbers are stored as float32, views of the map, read as they are looked at."""
        place = self._place.get(image_id)
        if place is None:
            raise DataError(f"{self.folder} has no regions of image {image_id}: pack the box files of all images")
        rows = slice(int(self._first[place]), int(self._first[place + 1]))
        width, height = map(int, self._sizes[place])
        features, whole = (
            np.asarray(values, dtype=np.float32) for values in (self._features[rows], self._whole[place])
        )
        return Regions(self._boxes[rows], features, whole, (width, height))


def write_json(path: str | Path, image_id: int, regions: Regions) -> None:
    """One image's regions as the original's file."""

    def encoded(values: np.ndarray) -> str:
        return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")

    content = {
        "image_id": image_id,
        "image_w": regions.size[0],
        "image_h": regions.size[1],
        "num_boxes": len(regions.boxes),
        "boxes": encoded(regions.boxes),
        "features": encoded(regions.features),
        "image_box_feature": encoded(regions.whole),
    }
    Path(path).write_text(json.dumps(content), encoding="utf-8")
