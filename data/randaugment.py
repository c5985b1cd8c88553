"""RandAugment of BEiT-3's training transform: fourteen operations on (H, W, 3) uint8 arrays, two drawn per image.

Source: the array implementation that the original trained with (OpenCV up to 4.x). Its bilinear warps are fixed-point
integer arithmetic; they are reproduced bit for bit in both modes: shears move whole rows or columns by a shift and a
weight of their own, a rotation gathers through an index table kept per image size and angle.

Deliberate difference: AutoContrast and Sharpness clip to 0..255. The original wraps around modulo 256 (a channel whose
minimum is not 0 turns almost white, strong edges turn to speckles); ``reference=True`` brings that back.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from PIL import Image

# The policy draws from these, in this order (the order decides what a seed draws).
POLICY_OPS = (
    "Identity",
    "AutoContrast",
    "Equalize",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
MAX_MAGNITUDE = 10
# Weights of the gray value in Color and Contrast. The original gives channel 0 the weight of blue although its images
# are RGB; neither operation is in its policy.
GRAY_WEIGHTS = (0.114, 0.587, 0.299)


class RandomDraws(Protocol):
    """What the policy asks of a random generator: ``np.random.Generator`` and ``np.random.RandomState`` have it."""

    def choice(self, a: int, size: int) -> np.ndarray:
        """Draw ``size`` integers below ``a`` with replacement."""

    def random(self) -> float:
        """Draw a float in [0, 1)."""


def apply_op(
    image: np.ndarray, name: str, arg: float | None = None, reference: bool = False, fill: int = 128
) -> np.ndarray:
    """Apply one operation.

    Args:
        image: (H, W, 3) uint8, C-contiguous or not; never written to.
        name: key of ``OPS``.
        arg: final argument, level and sign included (pixels, degrees, factor, …); None for Identity, AutoContrast and
            Equalize.
        reference: wrap around in AutoContrast and Sharpness as the original does, instead of clipping.
        fill: gray level of what a geometric operation brings in from outside the image.

    Returns:
        (H, W, 3) uint8, C-contiguous; may be ``image`` itself where nothing changes.

    Raises:
        ValueError: unknown ``name`` or an image of another shape or type.
    """
    if name not in OPS:
        raise ValueError(f"unknown operation {name!r}: use one of {', '.join(OPS)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"RandAugment needs an (H, W, 3) uint8 array, got {image.dtype} {image.shape}")
    return OPS[name](np.ascontiguousarray(image), arg, reference, fill)


class RandAugment:
    """Draws operations with replacement and applies each with probability 0.5."""

    def __init__(self, num_ops: int = 2, magnitude: float = 7, fill: int = 128, reference: bool = False) -> None:
        """Set up the policy.

        Args:
            num_ops: operations drawn per image.
            magnitude: 0 (weakest) to 10.
            fill: gray level of what a geometric operation brings in from outside the image.
            reference: the original's wrap-around, see the head of this file.
        """
        if num_ops < 0:
            raise ValueError(f"num_ops must be at least 0, got {num_ops}")
        if not 0 <= magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"magnitude must lie in 0..{MAX_MAGNITUDE}, got {magnitude}")
        if not 0 <= fill <= 255:
            raise ValueError(f"fill must lie in 0..255, got {fill}")
        self.num_ops, self.magnitude, self.fill, self.reference = num_ops, magnitude, fill, reference

    def __call__(self, image: np.ndarray, rng: RandomDraws) -> np.ndarray:
        """Augment one image.

        With ``reference=True`` and ``np.random.RandomState(seed)`` the draws are those of the original after
        ``np.random.seed(seed)``.

        Args:
            image: (H, W, 3) uint8, never written to.
            rng: source of all draws.

        Returns:
            (H, W, 3) uint8; ``image`` itself where nothing was applied.
        """
        for name, arg in self.draw(rng):
            image = apply_op(image, name, arg, self.reference, self.fill)
        return image

    def draw(self, rng: RandomDraws) -> list[tuple[str, float | None]]:
        """Draw names and final arguments of the operations for one image; those skipped are left out."""
        names = [POLICY_OPS[index] for index in rng.choice(len(POLICY_OPS), self.num_ops)]
        return [(name, self.draw_argument(name, rng)) for name in names if rng.random() <= 0.5]

    def draw_argument(self, name: str, rng: RandomDraws) -> float | None:
        """Argument of one operation at this magnitude; draws only a sign, and only where there is one."""
        level = self.magnitude / MAX_MAGNITUDE
        if name in ("Brightness", "Sharpness"):
            return level * 1.8 + 0.1
        if name in ("ShearX", "ShearY"):
            return -(level * 0.3) if rng.random() > 0.5 else level * 0.3
        if name in ("TranslateX", "TranslateY"):  # 10 pixels at most, whatever the image size
            return -(level * 10.0) if rng.random() > 0.5 else level * 10.0
        if name == "Rotate":  # the other way round than the shears, as the original
            return -(level * 30.0) if rng.random() < 0.5 else level * 30.0
        return None


# ------------------------------------------------------------------------------------------------ points and colours
def _identity(image: np.ndarray, arg: None, reference: bool, fill: int) -> np.ndarray:
    return image


def _autocontrast(image: np.ndarray, arg: None, reference: bool, fill: int) -> np.ndarray:
    height, width, _ = image.shape
    rows = image.reshape(height, width * 3)  # whole rows first: a reduction over contiguous memory
    low = rows.min(axis=0).reshape(width, 3).min(axis=0)
    high = rows.max(axis=0).reshape(width, 3).max(axis=0)
    tables = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    for table, lo, hi in zip(tables, low.tolist(), high.tolist(), strict=True):
        if hi > lo:
            scale = 255 / (hi - lo)
            offset = -(lo - 256 if reference and lo else lo) * scale  # the original negates an unsigned byte
            table[:] = (np.arange(256) * scale + offset).clip(0, 255).astype(np.uint8)
    return _apply_tables(image, tables)


def _equalize(image: np.ndarray, arg: None, reference: bool, fill: int) -> np.ndarray:
    pixels = Image.fromarray(image)
    histograms = np.array(pixels.histogram()).reshape(3, 256)
    tables = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    for table, histogram in zip(tables, histograms, strict=True):
        step = (histogram.sum() - histogram[histogram.nonzero()[0][-1]]) // 255
        if step:
            below = np.concatenate([[0], np.cumsum(histogram)[:-1]])
            table[:] = ((step // 2 + below) // step).clip(0, 255)
    return np.array(pixels.point(tables.ravel().tolist()))


def _brightness(image: np.ndarray, factor: float, reference: bool, fill: int) -> np.ndarray:
    return _apply_table(image, (np.arange(256, dtype=np.float32) * np.float32(factor)).clip(0, 255))


def _contrast(image: np.ndarray, factor: float, reference: bool, fill: int) -> np.ndarray:
    mean = np.sum(np.mean(image, axis=(0, 1)) * np.array(GRAY_WEIGHTS))
    return _apply_table(image, ((np.arange(256) - mean) * factor + mean).clip(0, 255))


def _solarize(image: np.ndarray, threshold: int, reference: bool, fill: int) -> np.ndarray:
    levels = np.arange(256)
    return _apply_table(image, np.where(levels < threshold, levels, 255 - levels))


def _posterize(image: np.ndarray, bits: int, reference: bool, fill: int) -> np.ndarray:
    return _apply_table(image, np.arange(256) & (255 << (8 - int(bits)) & 255))


def _color(image: np.ndarray, factor: float, reference: bool, fill: int) -> np.ndarray:
    # (3 in, 3 out): every output channel gets the gray value
    gray = np.repeat(np.array(GRAY_WEIGHTS)[:, None], 3, axis=1)
    mix = (np.eye(3) - gray).astype(np.float32) * np.float32(factor) + gray.astype(np.float32)
    return np.matmul(image, mix).clip(0, 255).astype(np.uint8)


def _sharpness(image: np.ndarray, factor: float, reference: bool, fill: int) -> np.ndarray:
    height, width, _ = image.shape
    out = image.copy()  # border pixels stay
    if height < 3 or width < 3:
        return out
    rows = image.reshape(height, width * 3)  # the neighbour to the right is 3 bytes on
    centre = rows[1:-1, 3:-3]
    columns = np.add(rows[:-2], rows[1:-1], dtype=np.uint16)
    columns += rows[2:]
    total = columns[:, :-6] + columns[:, 3:-3]
    total += columns[:, 6:]
    total += np.multiply(centre, 4, dtype=np.uint16)  # ones, and 5 in the centre: the weights sum up to 13
    smooth = np.multiply(total, np.float32(1 / 13), dtype=np.float32)
    np.rint(smooth, out=smooth)  # halves cannot occur, 13 is odd
    sharp = np.subtract(centre, smooth, dtype=np.float32)
    sharp *= np.float32(factor)
    sharp += smooth
    if reference:
        sharp = sharp.astype(np.int32)  # toward zero; the cast to a byte then wraps modulo 256
    else:
        np.clip(sharp, 0, 255, out=sharp)
    out.reshape(height, width * 3)[1:-1, 3:-3] = sharp.astype(np.uint8)
    return out


def _apply_table(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look every byte up in one table of 256 values (truncated to uint8)."""
    out = bytearray(image.data).translate(table.astype(np.uint8).tobytes())
    return np.frombuffer(out, np.uint8).reshape(image.shape)


def _apply_tables(image: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Look channel c up in ``tables[c]``, (3, 256) uint8."""
    if (tables[0] == tables[1]).all() and (tables[0] == tables[2]).all():
        return _apply_table(image, tables[0])
    return np.array(Image.fromarray(image).point(tables.ravel().tolist()))


# --------------------------------------------------------------------------------------------------------- geometry
# Fixed point: source coordinates have 5 bits of fraction, so the four weights of a pixel are multiples of 1/1024.
def _shear_x(image: np.ndarray, factor: float, reference: bool, fill: int) -> np.ndarray:
    height, width, _ = image.shape
    shift, weight = _axis_shifts(-float(np.float32(factor)), height)
    reach = int(np.abs(shift).max()) + 1
    padded = np.full((height, width + 2 * reach, 3), fill, np.uint8)
    padded[:, reach : reach + width] = image
    rows = padded.reshape(height, -1)
    moved = np.empty((height, (width + 1) * 3), np.uint8)
    for start, stop in _equal_runs(shift):  # neighbouring rows move by the same whole number of pixels
        left = 3 * (reach + int(shift[start]))
        moved[start:stop] = rows[start:stop, left : left + moved.shape[1]]
    return _blend(moved[:, :-3], moved[:, 3:], weight[:, None]).reshape(image.shape)


def _shear_y(image: np.ndarray, factor: float, reference: bool, fill: int) -> np.ndarray:
    height, width, _ = image.shape
    shift, weight = _axis_shifts(-float(np.float32(factor)), width)
    reach = int(np.abs(shift).max()) + 1
    padded = np.full((height + 2 * reach, width * 3), fill, np.uint8)
    padded[reach : reach + height] = image.reshape(height, -1)
    moved = np.empty((height + 1, width * 3), np.uint8)
    for start, stop in _equal_runs(shift):
        top = reach + int(shift[start])
        moved[:, 3 * start : 3 * stop] = padded[top : top + height + 1, 3 * start : 3 * stop]
    return _blend(moved[:-1], moved[1:], np.repeat(weight, 3)).reshape(image.shape)


def _axis_shifts(slope: float, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole shift and weight (32nds) of the second neighbour, for each row or column of a shear."""
    position = (np.rint(np.arange(length) * slope * 1024).astype(np.int64) + 16) >> 5
    return position >> 5, (position & 31).astype(np.int16)


def _equal_runs(values: np.ndarray) -> list[tuple[int, int]]:
    bounds = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _blend(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """First + (second - first) * weight / 32, rounded: the four-weight rule with one axis whole, in 14 bits."""
    mixed = np.subtract(second, first, dtype=np.int16)
    mixed *= weight
    mixed += 16
    mixed >>= 5
    mixed += first
    return mixed.astype(np.uint8)


def _translate_x(image: np.ndarray, pixels: float, reference: bool, fill: int) -> np.ndarray:
    if pixels != int(pixels):
        return warp_affine(image, np.array([[1, 0, -pixels], [0, 1, 0]], np.float32), fill)
    width = image.shape[1]
    shift = max(-width, min(width, int(pixels)))  # positive moves the content to the left
    out = np.full_like(image, fill)
    out[:, max(0, -shift) : width - max(0, shift)] = image[:, max(0, shift) : width - max(0, -shift)]
    return out


def _translate_y(image: np.ndarray, pixels: float, reference: bool, fill: int) -> np.ndarray:
    if pixels != int(pixels):
        return warp_affine(image, np.array([[1, 0, 0], [0, 1, -pixels]], np.float32), fill)
    height = image.shape[0]
    shift = max(-height, min(height, int(pixels)))  # positive moves the content up
    out = np.full_like(image, fill)
    out[max(0, -shift) : height - max(0, shift)] = image[max(0, shift) : height - max(0, -shift)]
    return out


def _rotate(image: np.ndarray, degrees: float, reference: bool, fill: int) -> np.ndarray:
    height, width, _ = image.shape
    angle = degrees * (math.pi / 180)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    matrix = np.array([[cos, sin, (1 - cos) * x - sin * y], [-sin, cos, sin * x + (1 - cos) * y]])
    return warp_affine(image, matrix, fill)


def warp_affine(image: np.ndarray, matrix: np.ndarray, fill: int = 128) -> np.ndarray:
    """Bilinear affine warp in OpenCV's fixed-point arithmetic, same size, constant border.

    Args:
        image: (H, W, 3) uint8.
        matrix: (2, 3), maps source pixels to output pixels; computed with in float64.
        fill: gray level outside the image.

    Returns:
        (H, W, 3) uint8.
    """
    height, width, _ = image.shape
    index, weights = _warp_tables(height, width, tuple(matrix.astype(np.float64).ravel().tolist()))
    # The three channels of a pixel travel in one 64-bit number, 21 bits each: a weighted sum needs 18.
    stride = width + 4  # a frame of two pixels on each side
    padded = np.full((height + 4, stride), fill * LANES, np.uint64)
    source = padded[2:-2, 2:-2]
    source[...] = image[..., 2]
    source <<= np.uint64(21)
    source |= image[..., 1]
    source <<= np.uint64(21)
    source |= image[..., 0]
    flat = padded.ravel()
    total = np.full(height * width, 512 * LANES, np.uint64)
    for offset, weight in zip((0, 1, stride, stride + 1), weights, strict=True):
        neighbour = flat[offset:].take(index)
        neighbour *= weight
        total += neighbour
    out = np.empty((height * width, 3), np.uint8)
    for channel in range(3):
        total >>= np.uint64(10 if channel == 0 else 21)
        out[:, channel] = total  # the low byte
    return out.reshape(height, width, 3)


LANES = (1 << 42) | (1 << 21) | 1


@lru_cache(
    maxsize=8
)  # the two angles of the policy at one image size, with room for a few sizes; 12 bytes a pixel each
def _warp_tables(height: int, width: int, matrix: tuple[float, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Where each output pixel reads (index of the top left neighbour in the padded image) and its four weights."""
    a, b, c, d, e, f = matrix
    scale = a * e - b * d
    scale = 1 / scale if scale else 0.0
    a, b, d, e = e * scale, -b * scale, -d * scale, a * scale
    c, f = -a * c - b * f, -d * c - e * f
    ys, xs = np.arange(height)[:, None], np.arange(width)[None]
    x = (np.rint((b * ys + c) * 1024).astype(np.int64) + 16 + np.rint(a * xs * 1024).astype(np.int64)) >> 5
    y = (np.rint((e * ys + f) * 1024).astype(np.int64) + 16 + np.rint(d * xs * 1024).astype(np.int64)) >> 5
    # A pixel wholly outside reads nothing but fill: any place outside will do, so clamp to the frame.
    left, top = np.clip(x >> 5, -2, width), np.clip(y >> 5, -2, height)
    index = ((top + 2) * (width + 4) + left + 2).ravel()
    fx, fy = (x & 31).ravel(), (y & 31).ravel()
    weights = [(32 - fx) * (32 - fy), fx * (32 - fy), (32 - fx) * fy, fx * fy]
    return index, [weight.astype(np.uint16) for weight in weights]


OPS: dict[str, Callable[[np.ndarray, Any, bool, int], np.ndarray]] = {
    "Identity": _identity,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "Color": _color,
    "Contrast": _contrast,
    "Solarize": _solarize,
    "Posterize": _posterize,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}
