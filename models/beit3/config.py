"""Sizes of the BEiT-3 models and their names (original: the registered functions of ``modeling_finetune.py``).

Differences: an image size is part of the name as in the original, but every size that the patch divides is accepted,
not only the published ones; ``tiny`` is ours, a size that trains on a CPU in minutes.
"""

import difflib
import re
from dataclasses import dataclass

from models.errors import ModelError

VOCAB_SIZE = 64010  # rows of the published embedding: 64000 pieces, specials, and eight rows that nothing uses

# --task -> suffix of the model's full name
TASK_SUFFIXES = {
    "vqav2": "vqav2",
    "coco_captioning": "captioning",
    "nocaps": "captioning",
    "nlvr2": "nlvr2",
    "flickr30k": "retrieval",
    "coco_retrieval": "retrieval",
    "imagenet": "imageclassification",
}
# the tasks that read raw encoder outputs; the others end the encoder with a layer norm
_WITHOUT_FINAL_NORM = ("vqav2", "imageclassification")


@dataclass(frozen=True)
class StartValues:
    """Standard deviations of random weights; the defaults are the original's, meant for loading a checkpoint over them.

    Training from scratch needs larger ones: with the original's, a tiny model does not learn to look at the image.
    """

    linear: float = 0.02  # cut off at one deviation
    image_positions: float = 1.0
    text_positions: float = 1.0
    words: float | None = None  # None: width^-0.5


@dataclass(frozen=True)
class BEiT3Config:
    """All that a BEiT-3 trunk is built from; defaults are those of the base model."""

    image_size: int
    patch_size: int = 16
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    vocab_size: int = VOCAB_SIZE
    max_text_positions: int = 1024  # rows of the text position table; the first two are never read
    normalize_output: bool = False
    drop_path: float = 0.0  # rate of the last layer; layer i has i / (num_layers - 1) of it
    layernorm_eps: float = 1e-5
    in_chans: int = 3
    start: StartValues = StartValues()

    def __post_init__(self) -> None:
        """Check what cannot work.

        Raises:
            ModelError: naming the two numbers that do not fit.
        """
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise ModelError(
                f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}: "
                f"use {max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ModelError(
                f"width {self.embed_dim} cannot be split into {self.num_heads} heads: it must be a multiple"
            )
        if not 0 <= self.drop_path < 1:
            raise ModelError(f"--drop_path must be in [0, 1), got {self.drop_path}")
        if self.vocab_size < 1:
            raise ModelError(f"--vocab_size must be at least 1, got {self.vocab_size}")

    @property
    def grid(self) -> int:
        """Patches per image side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return self.grid * self.grid

    @property
    def num_image_tokens(self) -> int:
        """Patches and the class token."""
        return self.num_patches + 1


@dataclass(frozen=True)
class _Size:
    embed_dim: int
    num_layers: int
    num_heads: int
    patch_size: int
    published: dict[str, tuple[int, ...]]  # task suffix -> image sizes of the released weights
    start: StartValues = StartValues()


MODELS = {
    # not published: the size of the quick start, from random weights; nine patches, one for each cell of a drawn scene
    "beit3_tiny_patch32": _Size(
        96, 3, 4, 32, {}, StartValues(linear=0.16, image_positions=2.0, text_positions=0.3, words=0.5)
    ),
    "beit3_base_patch16": _Size(
        768,
        12,
        12,
        16,
        {
            "vqav2": (384, 480),
            "captioning": (224, 480),
            "nlvr2": (224,),
            "imageclassification": (224,),
            "retrieval": (224, 384),
        },
    ),
    "beit3_large_patch16": _Size(
        1024,
        24,
        16,
        16,
        {
            "vqav2": (384, 480, 768),
            "captioning": (480,),
            "nlvr2": (224,),
            "imageclassification": (224,),
            "retrieval": (384,),
        },
    ),
}


def beit3_config(
    name: str, task: str, *, image_size: int | None = None, drop_path: float = 0.0, vocab_size: int = VOCAB_SIZE
) -> BEiT3Config:
    """Configuration of ``--model`` for ``--task``.

    Args:
        name: ``beit3_base_patch16_480``, with or without the task's suffix (``_vqav2``); any image size that the
            patch divides.
        task: a key of ``TASK_SUFFIXES``.
        image_size: ``--input_size``, checked against the name; None takes the name's.
        drop_path: rate of the last layer.
        vocab_size: rows of the word embedding.

    Raises:
        ModelError: for an unknown name or task, or two image sizes that differ.
    """
    if task not in TASK_SUFFIXES:
        raise ModelError(f"unknown task {task!r}: choose one of {', '.join(TASK_SUFFIXES)}")
    suffix = TASK_SUFFIXES[task]
    stem, size_of_name, suffix_of_name = _parse(name, suffix)
    if suffix_of_name not in (None, suffix):
        raise ModelError(
            f"the model {name!r} belongs to another task than {task!r}: use {stem}_{size_of_name}_{suffix}"
        )
    if image_size is not None and image_size != size_of_name:
        raise ModelError(
            f"--input_size {image_size} is not the image size {size_of_name} of the model {name!r}: "
            f"use --input_size {size_of_name} or --model {stem}_{image_size}"
        )
    size = MODELS[stem]
    return BEiT3Config(
        image_size=size_of_name,
        patch_size=size.patch_size,
        embed_dim=size.embed_dim,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        vocab_size=vocab_size,
        normalize_output=suffix not in _WITHOUT_FINAL_NORM,
        drop_path=drop_path,
        start=size.start,
    )


def model_names(suffix: str | None = None) -> list[str]:
    """Names to offer: the published sizes (of one task) and the tiny one."""
    names = {"beit3_tiny_patch32_96"}
    for stem, size in MODELS.items():
        for task, image_sizes in size.published.items():
            if suffix in (None, task):
                names.update(f"{stem}_{image_size}" for image_size in image_sizes)
    return sorted(names)


def _parse(name: str, suffix: str) -> tuple[str, int, str | None]:
    """Split a model name into its stem, image size and task suffix."""
    suffixes = "|".join(sorted(set(TASK_SUFFIXES.values())))
    match = re.fullmatch(rf"({'|'.join(MODELS)})_(\d+)(?:_({suffixes}))?", name)
    if match is None:
        names = model_names(suffix)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ModelError(
            f"unknown model {name!r}{hint}: choose one of {', '.join(names)}, or another size that the patch divides"
        )
    return match[1], int(match[2]), match[3]
