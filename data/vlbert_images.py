"""VL-BERT's images and boxes: whole-image box, resize, flip, BGR minus means, clamp; and their batches.

Source: the transforms and the collator of VL-BERT's VQA part. Boxes go through the same steps where no image is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError

PIXEL_MEANS = (102.9801, 115.9465, 122.7717)  # BGR
PADDING = -2.0  # of boxes


@dataclass(frozen=True)
class Sized:
    """One image after the transform.

    Attributes:
        image: (3, height, width) float32, BGR from 0 to 255 minus means; None where only boxes are wanted.
        boxes: (K + 1, 4) float32 in its pixels, the whole image first.
        info: width, height, and what both were multiplied by.
    """

    image: Tensor | None
    boxes: Tensor
    info: Tensor


def target_size(width: int, height: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Width and height after the resize: the shorter side as wanted unless the longer one would exceed its limit."""
    short, long = min(width, height), max(width, height)
    if long / short * short_side > long_side:
        short_side = int(long_side * short / long)
    if short == short_side:
        return width, height
    other = int(short_side * long / short)
    return (short_side, other) if width < height else (other, short_side)


def transform(
    boxes: Tensor | np.ndarray,
    size: tuple[int, int],
    image: np.ndarray | None = None,
    *,
    flip: bool = False,
    scales: tuple[int, int] = (600, 1000),
) -> Sized:
    """Resize, flip and clamp.

    Args:
        boxes: (K, 4) float32, x1 y1 x2 y2 in pixels of the image.
        size: width and height of the image.
        image: (H, W, 3) uint8 RGB, or None.
        flip: mirror left and right.
        scales: shorter side, and limit of the longer one.

    Raises:
        DataError: an image of another size than its boxes belong to.
    """
    width, height = size
    if image is not None and image.shape[:2] != (height, width):
        raise DataError(f"the image is {image.shape[1]} x {image.shape[0]}, its boxes are of {width} x {height}")
    new_width, new_height = target_size(width, height, *scales)
    ratios = new_width / width, new_height / height
    # in numpy: a handful of numbers, for which torch's operators would cost more than everything else of a sample
    given = np.asarray(boxes, dtype=np.float32)
    rows = np.empty((len(given) + 1, 4), np.float32)
    rows[0], rows[1:] = (0, 0, width - 1, height - 1), given
    rows *= np.array([*ratios, *ratios], np.float32)
    if flip:
        rows[:, [0, 2]] = np.float32(new_width - 1) - rows[:, [2, 0]]
    np.maximum(rows, 0, out=rows)
    np.minimum(rows, np.array([new_width - 1, new_height - 1] * 2, np.float32), out=rows)
    pixels = None
    if image is not None:
        if (new_width, new_height) != (width, height):
            image = np.array(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
        if flip:
            image = image[:, ::-1]
        bgr = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))).to(torch.float32)
        pixels = bgr - torch.tensor(PIXEL_MEANS)[:, None, None]
    info = np.array([new_width, new_height, *ratios], np.float32)
    return Sized(pixels, torch.from_numpy(rows), torch.from_numpy(info))


def pad_images(images: Sequence[Tensor]) -> Tensor:
    """(3, h, w) each -> (B, 3, largest h, largest w), zeros at the right and at the bottom."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for place, image in enumerate(images):
        batch[place, :, : image.shape[1], : image.shape[2]] = image
    return batch


def pad_boxes(boxes: Sequence[Tensor], features: Sequence[Sequence[np.ndarray]] = ()) -> Tensor:
    """(K, 4) each -> (B, largest K, 4), -2 where there is none.

    With ``features``, for each image arrays whose rows together are its K ones, they stand behind the boxes. Nothing
    else copies them on the way from the disk.

    Raises:
        DataError: another number of features than boxes.
    """
    width = boxes[0].shape[1] + (features[0][0].shape[-1] if features else 0)
    batch = np.empty((len(boxes), max(map(len, boxes)), width), np.float32)
    for place, rows in enumerate(boxes):
        batch[place, : len(rows), : rows.shape[1]] = rows
        first = 0
        for part in features[place] if features else ():
            batch[place, first : first + len(part), rows.shape[1] :] = part
            first += len(part)
        if features and first != len(rows):
            raise DataError(f"{len(rows)} boxes with features of {first}: pack the regions of this image again")
        batch[place, len(rows) :] = PADDING
    return torch.from_numpy(batch)
