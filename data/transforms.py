"""Images to model inputs, BEiT-3's recipe: (H, W, 3) uint8 array in, (3, S, S) uint8 tensor out.

Training: random crop, flip, RandAugment. Evaluation: resize to S x S, aspect ratio not kept, equal to Pillow's bicubic.
Bytes travel to the device and are normalised there (``normalize``): a quarter of the memory and of the copying.

Deliberate differences: all draws of a sample come from the one generator passed in (the original used three global
ones); the crop is resized by torch's uint8 kernel, which differs from Pillow's by at most 2 gray levels in 0.1 to 0.2 %
of the values and takes an eighth of the time (``exact=True`` brings Pillow back).
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.errors import DataError
from data.randaugment import RandAugment

IMAGE_MEAN = (0.5, 0.5, 0.5)
IMAGE_STD = (0.5, 0.5, 0.5)
INTERPOLATIONS = ("bicubic", "bilinear", "random")
ASPECT_RANGE = (3 / 4, 4 / 3)
_PILLOW_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class TrainTransform:
    """Random crop resized to a square, flip with probability 0.5, RandAugment."""

    def __init__(
        self,
        size: int,
        interpolation: str = "bicubic",
        randaugment: RandAugment | None = None,
        min_crop_scale: float = 0.5,
        hflip: bool = True,
        exact: bool = False,
    ) -> None:
        """Set up the recipe.

        Args:
            size: side S of the output in pixels.
            interpolation: ``bicubic``, ``bilinear``, or ``random``: one of the two drawn per image.
            randaugment: policy applied after crop and flip; None for none.
            min_crop_scale: least fraction of the area that a crop keeps; 1.0 means no crop at all, the whole image is
                resized.
            hflip: flip at all. Questions with "left" and "right" are not changed by a flip.
            exact: resize with Pillow instead of torch.
        """
        _check_side(size)
        if interpolation not in INTERPOLATIONS:
            raise DataError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}, got {interpolation!r}")
        if not 0 < min_crop_scale <= 1:
            raise DataError(f"min_crop_scale must lie in (0, 1], got {min_crop_scale}")
        self.size, self.interpolation, self.randaugment = size, interpolation, randaugment
        self.min_crop_scale, self.hflip, self.exact = min_crop_scale, hflip, exact

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Transform one image.

        Args:
            image: (H, W, 3) uint8, left as it is.
            rng: source of all draws, one per sample.

        Returns:
            (3, S, S) uint8, contiguous.
        """
        height, width, _ = image.shape
        if self.min_crop_scale < 1:
            top, left, crop_height, crop_width = draw_crop(height, width, self.min_crop_scale, rng)
            image = image[top : top + crop_height, left : left + crop_width]
        interpolation = self.interpolation
        if interpolation == "random":
            interpolation = "bilinear" if rng.random() < 0.5 else "bicubic"
        resize = _resize_with_pillow if self.exact else _resize_with_torch
        image = resize(image, self.size, interpolation)
        if self.hflip and rng.random() < 0.5:
            image = torch.from_numpy(image).flip(1).numpy()  # a copy, ten times faster than numpy's
        if self.randaugment is not None:
            image = self.randaugment(image, rng)
        return _channels_first(image)


class EvalTransform:
    """Resize to exactly S x S, bicubic with antialiasing, equal to Pillow bit for bit."""

    def __init__(self, size: int) -> None:
        """Set the side S of the output in pixels."""
        _check_side(size)
        self.size = size

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """Transform one image; nothing is drawn, ``rng`` is there so that both transforms are called alike.

        Args:
            image: (H, W, 3) uint8, left as it is.
            rng: not used.

        Returns:
            (3, S, S) uint8, contiguous.
        """
        return _channels_first(_resize_with_pillow(image, self.size, "bicubic"))


def normalize(
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = IMAGE_MEAN,
    std: Sequence[float] = IMAGE_STD,
) -> Tensor:
    """Bytes to the model's range: (x / 255 - mean) / std in float32, then to ``dtype``; meant to run on the device.

    Args:
        images: (..., 3, H, W) uint8.
        dtype: of the result.
        mean: per channel, on the scale 0..1.
        std: per channel, on the scale 0..1.

    Returns:
        (..., 3, H, W).
    """
    shift, scale = _per_channel(tuple(mean), images.device), _per_channel(tuple(std), images.device)
    return images.to(torch.float32).div_(255).sub_(shift).div_(scale).to(dtype)


@lru_cache(maxsize=32)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Constants on a device, kept there: copying them at every step would wait for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def draw_crop(height: int, width: int, min_scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a crop: area uniform in [min_scale, 1], logarithm of the aspect ratio uniform, ten tries to fit.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        min_scale: least fraction of the area.
        rng: source of the draws.

    Returns:
        (top, left, height, width) in pixels. If no try fits: the largest centred crop of an allowed aspect ratio.
    """
    log_aspects = (math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1]))
    for _ in range(10):
        area = height * width * rng.uniform(min_scale, 1.0)
        aspect = math.exp(rng.uniform(*log_aspects))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ASPECT_RANGE[0]:
        crop_height = round(width / ASPECT_RANGE[0])
    elif width / height > ASPECT_RANGE[1]:
        crop_width = round(height * ASPECT_RANGE[1])
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def _resize_with_torch(image: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    # (1, 3, H, W), channels last in memory and in its strides: permuted first and given its batch axis afterwards,
    # torch would not see that and return planes, three times slower.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (size, size), mode=interpolation, antialias=True)
    return resized.permute(0, 2, 3, 1)[0].contiguous().numpy()  # no copy, channels are last already


def _resize_with_pillow(image: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    return np.array(Image.fromarray(image).resize((size, size), _PILLOW_FILTERS[interpolation]))


def _channels_first(image: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def _check_side(size: int) -> None:
    if size < 1:
        raise DataError(f"the image side must be at least 1 pixel, got {size}")
