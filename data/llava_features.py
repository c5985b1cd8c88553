"""Features of images on disk, so that a frozen image tower runs once an image and later readers decode nothing.

The folder holds parts, which are added and never changed. A part is one file: a line of JSON (what the features were
made with; name, size, time and digest of each image file, and a checksum of its features), then the numbers, image by
image. It takes its name once it is whole, and names are random, so that any number of processes may add parts. An
image is known by its content: one that was changed is a new one, one that was moved or copied is not.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.files import open_atomic, parse_json, resolve_inside
from data.image_reader import ImageReader

_FORMAT, _PATTERN = "plainvl image features 1", "part-*.bin"
_BEGINNING = json.dumps({"format": _FORMAT})[:-1].encode()  # of every part, so that no other file is read to its end
_LONGEST_SHOWN = 30  # characters of a setting in a message, fewer than a checksum has
_LEFTOVER_AGE_S = 3600.0
_WAY_OUT = "remove it (its images are then computed again) or give another --feature_cache"


@dataclass(frozen=True)
class FeatureKind:
    """What is kept of every image: (rows, width) numbers of one dtype, all bits of them."""

    rows: int
    width: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of one image."""
        return self.rows * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class ImageFile:
    """Which image it is: its path below the image folder, size, time and content."""

    name: str
    num_bytes: int
    mtime_ns: int
    digest: str


@dataclass(frozen=True)
class Place:
    """Where the features of an image lie."""

    part: str
    first_byte: int
    checksum: int


def image_file(root: Path, name: str) -> ImageFile:
    """Look at a file; it is read once.

    Raises:
        OSError: it cannot be read.
        DataError: the path leads out of the folder.
    """
    path = resolve_inside(root, name)
    facts = path.stat()
    return ImageFile(name, facts.st_size, facts.st_mtime_ns, _digest(path))


class FeatureFolder:
    """Adds features and finds them; nothing happens before a method is called."""

    def __init__(self, folder: Path, kind: FeatureKind, made_with: Mapping[str, Any]) -> None:
        """Say what the features are to be.

        Args:
            folder: of the parts.
            kind: what is kept of an image.
            made_with: everything else that the numbers depend on, by the names that messages have for it.
        """
        self.folder, self.kind = folder, kind
        stored = {"rows of features": kind.rows, "width of features": kind.width, "dtype": _name_of(kind.dtype)}
        self._made_with = json.loads(json.dumps({**made_with, **stored}))

    def create(self) -> None:
        """Make the folder, and remove what writers that were killed have left.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f".{_PATTERN}.tmp*"):
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:  # a younger one may be in the making
                path.unlink(missing_ok=True)

    def add(self, images: Sequence[ImageFile], features: Tensor) -> None:
        """Write a part, whole or not at all.

        Args:
            images: one for each row of ``features``.
            features: (N, rows, width), on the CPU.

        Raises:
            OSError: no room, or not writable.
        """
        content = features.to(self.kind.dtype).contiguous().view(torch.uint8).numpy().reshape(len(images), -1)
        assert content.shape[1] == self.kind.num_bytes
        listed = [[*astuple(image), zlib.crc32(row)] for image, row in zip(images, content, strict=True)]
        line = json.dumps({"format": _FORMAT, "made_with": self._made_with, "images": listed}).encode() + b"\n"
        final = self.folder / _PATTERN.replace("*", uuid.uuid4().hex)
        with open_atomic(final, binary=True) as file:
            file.write(line)
            file.write(content)

    def find(
        self,
        names: Sequence[str],
        root: Path,
        *,
        progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    ) -> dict[str, Place]:
        """Where the features of images lie; those that are not there yet, or whose file was changed, are left out.

        A file is read only where another time or name stands beside a size that is known.

        Args:
            names: paths below ``root``.
            root: folder of the images.
            progress: wraps the names for display.

        Raises:
            DataError: the folder holds something else, features that were made differently, or a damaged part.
        """
        by_facts: dict[tuple[str, int, int], Place] = {}
        by_content: dict[tuple[int, str], Place] = {}
        for image, place in self._entries():
            by_facts[image.name, image.num_bytes, image.mtime_ns] = place
            by_content[image.num_bytes, image.digest] = place
        known_sizes = {size for size, _ in by_content}
        found = {}
        for name in progress(names):
            path = resolve_inside(root, name)
            try:
                facts = path.stat()
                place = by_facts.get((name, facts.st_size, facts.st_mtime_ns))
                if place is None and facts.st_size in known_sizes:
                    place = by_content.get((facts.st_size, _digest(path)))
            except OSError:  # whoever reads the image says so, or puts a grey one in its place
                continue
            if place is not None:
                found[name] = place
        return found

    def _entries(self) -> Iterator[tuple[ImageFile, Place]]:
        folder = self.folder
        try:
            paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"--feature_cache {folder} cannot be read ({error.strerror}): give a folder") from None
        for path in paths:
            if not path.match(_PATTERN) or not path.is_file():
                raise DataError(
                    f"--feature_cache {folder} holds {path.name}, which is no part of a feature cache: give a folder "
                    "of its own, which may be new"
                )
            yield from self._read_part(path)

    def _read_part(self, path: Path) -> Iterator[tuple[ImageFile, Place]]:
        try:
            with path.open("rb") as file:
                line = file.readline() if file.read(len(_BEGINNING)) == _BEGINNING else b""
                first, size = file.tell(), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}): {_WAY_OUT}") from None
        if not line.endswith(b"\n"):
            raise DataError(f"{path} is no part of a feature cache, or cut off in its first line: {_WAY_OUT}")
        try:
            content = parse_json(_BEGINNING + line, path)
            made_with = dict(content["made_with"])
            images = [(ImageFile(*facts), int(checksum)) for *facts, checksum in content["images"]]
        except (KeyError, TypeError, ValueError):  # not JSON is one of the last
            raise DataError(f"{path} has a damaged first line: {_WAY_OUT}") from None
        self._refuse_others(made_with)
        needed = first + len(images) * self.kind.num_bytes
        if size != needed:
            raise DataError(f"{path} has {size} bytes, its {len(images)} images need {needed}: {_WAY_OUT}")
        for number, (image, checksum) in enumerate(images):
            yield image, Place(path.name, first + number * self.kind.num_bytes, checksum)

    def _refuse_others(self, theirs: dict[str, Any]) -> None:
        ours, others = self._made_with, []
        for key in dict.fromkeys((*ours, *theirs)):
            if ours.get(key) != theirs.get(key):
                values = [json.dumps(made.get(key)) for made in (theirs, ours)]
                is_short = max(map(len, values)) <= _LONGEST_SHOWN
                others.append(f"{key} ({values[0]}, now {values[1]})" if is_short else key)
        if others:
            raise DataError(
                f"--feature_cache {self.folder} was made with other {', '.join(others)}: give another folder, or "
                "remove this one if it is no longer needed"
            )


class FeatureReader:
    """Relative path → (rows, width) features, in place of an ``ImageReader``; travels to other processes."""

    def __init__(
        self,
        folder: Path,
        kind: FeatureKind,
        places: Mapping[str, Place],
        *,
        broken: Mapping[str, str] | None = None,
        grey: Tensor | None = None,
    ) -> None:
        """Hold what ``FeatureFolder.find`` has found.

        Args:
            folder: of the parts.
            kind: what is kept of an image.
            places: of every image but the broken ones.
            broken: images that cannot be read, and why.
            grey: features of the grey image that stands for them.
        """
        self.kind = kind
        self._folder, self._places, self._broken, self._grey = folder, places, broken or {}, grey

    def blank(self) -> Tensor:
        """In place of the features of a sample without an image, which nobody looks at."""
        return torch.zeros(self.kind.rows, self.kind.width, dtype=self.kind.dtype)

    def read(self, relative: str, rng: np.random.Generator, where: str) -> tuple[Tensor, str]:
        """The features, and why they are those of a grey image (empty for a good one); ``rng`` is not used.

        Raises:
            DataError: a part has vanished or was changed; names sample and file.
        """
        if relative in self._broken:
            return self._grey, f"{where}: {self._broken[relative]}"
        place = self._places[relative]
        path = self._folder / place.part
        content = np.empty(self.kind.num_bytes, dtype=np.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(place.first_byte)
                length = file.readinto(content)
        except OSError as error:
            raise DataError(f"{where}: cannot read {path} ({error.strerror}): start the command again") from None
        if length != content.size or zlib.crc32(content) != place.checksum:
            raise DataError(f"{where}: {path} is damaged, the features of {relative} are others now: {_WAY_OUT}")
        return torch.from_numpy(content).view(self.kind.dtype).view(self.kind.rows, self.kind.width), ""


@dataclass(frozen=True)
class Picture:
    """pixels: (3, S, S) uint8; file: which image it is, or None for a grey stand-in, of which ``error`` says why."""

    name: str
    pixels: Tensor
    file: ImageFile | None
    error: str


class PictureDataset:
    """Images alone, to be given to the tower."""

    def __init__(self, names: Sequence[str], root: Path, images: ImageReader) -> None:
        """Read the images ``names`` below ``root`` by ``images``."""
        self._names, self._root, self._images = names, root, images

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def sample(self, index: int, rng: np.random.Generator) -> Picture:
        """Read one.

        Raises:
            DataError: it cannot be read, and is not to be replaced.
        """
        name = self._names[index]
        pixels, error = self._images.read(name, rng, name)
        try:
            file = None if error else image_file(self._root, name)
        except OSError as raised:
            raise DataError(f"cannot read image {self._root / name}: {raised.strerror or raised}") from None
        return Picture(name, pixels, file, error.removeprefix(f"{name}: "))

    @staticmethod
    def collate(pictures: list[Picture]) -> dict[str, Any]:
        """``image`` (B, 3, S, S) uint8; ``name``, ``file`` and ``error`` of each."""
        batch: dict[str, Any] = {key: [getattr(p, key) for p in pictures] for key in ("name", "file", "error")}
        return {"image": torch.stack([picture.pixels for picture in pictures]), **batch}


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
