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
    boxes: Tensor,
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
    whole = torch.tensor([[0.0, 0.0, width - 1.0, height - 1.0]])
    boxes = torch.cat([whole, boxes.to(torch.float32)]) * torch.tensor([*ratios, *ratios])
    if flip:
        left, right = new_width - 1 - boxes[:, 2], new_width - 1 - boxes[:, 0]
        boxes = torch.stack([left, boxes[:, 1], right, boxes[:, 3]], dim=1)
    limits = torch.tensor([new_width - 1.0, new_height - 1.0] * 2)
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    pixels = None
    if image is not None:
        if (new_width, new_height) != (width, height):
            image = np.array(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR))
        if flip:
            image = image[:, ::-1]
        bgr = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))).to(torch.float32)
        pixels = bgr - torch.tensor(PIXEL_MEANS)[:, None, None]
    return Sized(pixels, boxes, torch.tensor([new_width, new_height, *ratios], dtype=torch.float32))


def pad_images(images: Sequence[Tensor]) -> Tensor:
    """(3, h, w) each -> (B, 3, largest h, largest w), zeros at the right and at the bottom."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = images[0].new_zeros(len(images), 3, height, width)
    for place, image in enumerate(images):
        batch[place, :, : image.shape[1], : image.shape[2]] = image
    return batch


def pad_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """(K, n) each -> (B, largest K, n), -2 where there is none."""
    batch = boxes[0].new_full((len(boxes), max(map(len, boxes)), boxes[0].shape[1]), PADDING)
    for place, rows in enumerate(boxes):
        batch[place, : len(rows)] = rows
    return batch
