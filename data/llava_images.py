"""Images to LLaVA's model inputs, bit-equal to the reference: expanded to a square if wanted, then as for CLIP.

Source: ``expand2square`` and ``process_images`` of LLaVA (``llava/mm_utils.py``, ``llava/train/train.py``). Bytes
travel to the device; ``data.clip_images.normalize`` makes the model's numbers of them there.

Deliberate difference: the tiles of LLaVA-1.6 (``anyres``) are refused, where other unknown values mean no padding.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from data.clip_images import CLIPImageSettings, CLIPTransform
from data.errors import DataError


def pad_color(settings: CLIPImageSettings) -> tuple[int, ...]:
    """What an image is filled up with: the mean of the channels as bytes, rounded down; (122, 116, 104) for CLIP."""
    return tuple(int(255 * mean) for mean in settings.mean)


def expand_to_square(image: np.ndarray, color: Sequence[int]) -> np.ndarray:
    """Put an image into the middle of a square of its longer side.

    Args:
        image: (H, W, 3) uint8, left as it is.
        color: of the margins, a byte a channel. The first margin is the smaller one if the two cannot be equal.

    Returns:
        (L, L, 3) uint8 with L = max(H, W); the image itself if it is square.
    """
    height, width, channels = image.shape
    if height == width:
        return image
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.empty((side, side, channels), dtype=np.uint8)
    square[:] = np.array(color, dtype=np.uint8)
    square[top : top + height, left : left + width] = image
    return square


class LlavaTransform:
    """Expand, resize and crop; nothing is drawn, in training as in evaluation."""

    def __init__(self, settings: CLIPImageSettings, aspect_ratio: str | None = None) -> None:
        """Choose what becomes of images that are not square.

        Args:
            settings: of the vision tower, such as ``CLIPImageSettings().resized(336)``.
            aspect_ratio: ``image_aspect_ratio`` of the model. ``pad`` expands to a square, so that nothing is lost;
                None or any other value leaves only the middle of the image.

        Raises:
            DataError: for ``anyres`` and its kin.
        """
        if aspect_ratio is not None and aspect_ratio.startswith("anyres"):
            raise DataError(
                f"image_aspect_ratio {aspect_ratio!r:.40} (tiles of LLaVA-1.6) is not implemented here: "
                "set pad, with which such models can be fine-tuned too"
            )
        self.settings, self._is_padded = settings, aspect_ratio == "pad"
        self._color, self._clip = pad_color(settings), CLIPTransform(settings)

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> Tensor:
        """Transform one image.

        Args:
            image: (H, W, 3) uint8, left as it is.
            rng: not used.

        Returns:
            (3, S, S) uint8 of the crop's size, contiguous.
        """
        return self._clip(expand_to_square(image, self._color) if self._is_padded else image)
