"""Images to CLIP's model inputs, bit-equal to the reference: shorter side resized by Pillow, centre crop, normalised.

Source: transformers' CLIPImageProcessor 4.26, with the settings of ``preprocessor_config.json``. Used by VLE.

Bytes travel to the device; ``normalize`` looks each one up in a table of 256 values a channel, so that the numbers are
the reference's, which are computed in float64 and float32 by turns.
"""

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import DataError
from data.files import read_object

CONFIG_FILE = "preprocessor_config.json"
_MUST_BE_TRUE = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
_BICUBIC = 3


@dataclass(frozen=True)
class CLIPImageSettings:
    """What is done to an image.

    Attributes:
        shortest_edge: side in pixels to which the shorter one is resized.
        crop_size: height and width of the middle part that is kept.
        rescale_factor: what bytes are multiplied by.
        mean: per channel, after that.
        std: per channel.
    """

    shortest_edge: int = 224
    crop_size: tuple[int, int] = (224, 224)
    rescale_factor: float = 0.00392156862745098
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def load(cls, path: str | Path) -> "CLIPImageSettings":
        """Read a ``preprocessor_config.json``; absent keys have CLIP's values.

        Raises:
            DataError: names the key that is of a wrong kind or asks for what is not implemented.
        """
        values = read_object(path, advice="it comes with the published weights")
        for key in _MUST_BE_TRUE:
            if values.get(key, True) is not True:
                raise DataError(f"{path}: {key} {values[key]!r:.40} is not implemented here, only true")
        if values.get("resample", _BICUBIC) != _BICUBIC:
            raise DataError(f"{path}: resample {values['resample']!r:.40} is not implemented here, only 3 (bicubic)")
        edge, crop = values.get("size", 224), values.get("crop_size", 224)
        if isinstance(edge, dict):
            edge = edge.get("shortest_edge")
        crop = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
        for name, value in (("size", edge), ("crop_size", crop[0]), ("crop_size", crop[1])):
            if type(value) is not int or value < 1:
                raise DataError(f"{path}: {name} must be a whole number of pixels, got {values.get(name)!r:.80}")
        numbers = {
            key: _three_numbers(values.get(f"image_{key}", getattr(cls, key)), path, f"image_{key}")
            for key in ("mean", "std")
        }
        factor = values.get("rescale_factor", cls.rescale_factor)
        if type(factor) not in (int, float) or not factor > 0 or 0 in numbers["std"]:
            raise DataError(f"{path}: rescale_factor and image_std must be numbers other than 0")
        return cls(edge, crop, float(factor), **numbers)

    def resized(self, side: int) -> "CLIPImageSettings":
        """The same for square images of another side."""
        return replace(self, shortest_edge=side, crop_size=(side, side))

    def to_json(self) -> bytes:
        """Content of a ``preprocessor_config.json`` that the reference reads."""
        values: dict[str, Any] = dict.fromkeys(_MUST_BE_TRUE, True) | {
            "size": {"shortest_edge": self.shortest_edge},
            "crop_size": dict(zip(("height", "width"), self.crop_size, strict=True)),
            "resample": _BICUBIC,
            "rescale_factor": self.rescale_factor,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "VLEProcessor",
        }
        return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _three_numbers(value: Any, path: str | Path, key: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(v) in (int, float) for v in value):
        raise DataError(f"{path}: {key} must be three numbers, got {value!r:.80}")
    return tuple(map(float, value))


class CLIPTransform:
    """Resize and crop; nothing is drawn, in training as in evaluation."""

    def __init__(self, settings: CLIPImageSettings) -> None:
        """Hold the settings."""
        self.settings = settings

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """Transform one image.

        Args:
            image: (H, W, 3) uint8, left as it is.
            rng: not used.

        Returns:
            (3, h, w) uint8 of the crop's size, contiguous.
        """
        return torch.from_numpy(
            np.ascontiguousarray(center_crop(self._resize(image), *self.settings.crop_size).transpose(2, 0, 1))
        )

    def _resize(self, image: np.ndarray) -> np.ndarray:
        height, width, _ = image.shape
        short, edge = min(height, width), self.settings.shortest_edge
        size = [edge if side == short else int(edge * side / short) for side in (width, height)]
        return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of an (H, W, 3) image, margins rounded down; zeros around one that is too small.

    As in the reference, one that lacks an odd number of pixels comes out one pixel short.
    """
    for axis, side in ((0, height), (1, width)):
        own = image.shape[axis]
        start = (own - side) // 2
        if own < side:
            before = (side - own) // 2
            padding = [(0, 0)] * 3
            padding[axis] = (before, side - own - before)
            image = np.pad(image, padding)
            start += before
        image = image.take(range(max(start, 0), min(start + side, image.shape[axis])), axis=axis)
    return image


def normalize(images: Tensor, settings: CLIPImageSettings, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes to the model's range; meant to run on the device.

    Args:
        images: (B, 3, H, W) uint8.
        settings: factor, mean and deviation.
        dtype: of the result; the numbers are made in float32.

    Returns:
        (B, 3, H, W).
    """
    table, channel = _tables(settings, images.device)
    return table[channel, images.long()].to(dtype)


@lru_cache(maxsize=16)
@torch.inference_mode(mode=False)  # kept tensors must be ordinary ones: a training step may be the next to use them
def _tables(settings: CLIPImageSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    """(3, 256) values, and the (3, 1, 1) numbers of the channels, kept on the device."""
    values = (np.arange(256) * settings.rescale_factor).astype(np.float32)
    mean, std = (np.array(numbers, dtype=np.float32)[:, None] for numbers in (settings.mean, settings.std))
    table = torch.from_numpy((values - mean) / std)
    return table.to(device), torch.arange(3, device=device)[:, None, None]
