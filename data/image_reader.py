"""Images of a data set by relative path: read, transformed, and replaced by a grey one if that is wanted."""

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.files import resolve_inside
from data.images import load_image

NUM_SHOWN = 5  # missing images named in the message
ImageTransform = Callable[[Any, np.random.Generator], Tensor]


class ImageReader:
    """Relative path → (3, S, S) uint8."""

    def __init__(
        self,
        root: Path,
        transform: ImageTransform,
        *,
        image_size: int,
        replace_broken_images: bool = False,
        load: Callable[[str], np.ndarray] | None = None,
    ) -> None:
        """Set what every image goes through.

        Args:
            root: folder that image paths are relative to, and must not leave.
            transform: image → (3, S, S) uint8.
            image_size: S in pixels, for the grey stand-in of a broken image.
            replace_broken_images: put a grey image where one cannot be read, instead of stopping.
            load: relative path → (H, W, 3) uint8, where images are not files below ``root``.
        """
        self._transform, self._load = transform, load or partial(_load_below, root)
        self._image_size, self._replace_broken_images = image_size, replace_broken_images

    def read(self, relative: str, rng: np.random.Generator, where: str) -> tuple[Tensor, str]:
        """The transformed image, and why it is a grey stand-in (empty for a good one).

        Args:
            relative: path below the root.
            rng: source of the transform's draws.
            where: sample and its id, for messages.

        Raises:
            DataError: the image cannot be read, and is not to be replaced; names sample, file and reason.
        """
        try:
            return self._transform(self._load(relative), rng), ""
        except DataError as error:
            message = f"{where}: {error}"
            if not self._replace_broken_images:
                raise DataError(message) from None
            return torch.full((3, self._image_size, self._image_size), 128, dtype=torch.uint8), message


def _load_below(root: Path, relative: str) -> np.ndarray:
    return load_image(resolve_inside(root, relative))


def check_images_exist(relative: Iterable[str], root: Path, *, flag: str = "--data_path") -> None:
    """Refuse a data set with missing images before any work starts.

    Each folder is listed once: asking for every file alone takes minutes on a network share.

    Args:
        relative: image paths of the records.
        root: folder that they are relative to.
        flag: by which the user gives it.

    Raises:
        DataError: with the number of missing images and the first few.
    """
    by_folder: dict[str, set[str]] = {}
    for path in relative:
        by_folder.setdefault(os.path.dirname(path), set()).add(path)
    missing = []
    for folder, paths in by_folder.items():
        present = set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
        # a file system may spell a name differently in its list, in case or in accents
        missing += [path for path in paths if os.path.basename(path) not in present and not (root / path).is_file()]
    if missing:
        total = sum(map(len, by_folder.values()))
        raise DataError(
            f"{len(missing)} of {total} images are not in {root}, the first: {', '.join(sorted(missing)[:NUM_SHOWN])}; "
            f"check {flag}, or give --skip_broken_images to put a grey image in their place"
        )
