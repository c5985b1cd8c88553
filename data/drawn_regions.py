"""Regions of the drawn scenes, as a detector might give them: boxes with features, in VL-BERT's files.

A feature is the sum of fixed random directions, one for each trait of the object, plus noise, and no value is negative,
as behind a ReLU. Two boxes of mere background are among them.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from data.box_features import FEATURE_SIZE, Regions, write_json
from data.drawn_scenes import (
    BACKGROUNDS,
    CELL_PX,
    COLORS,
    PLACES,
    RADIUS_PX,
    SHAPES,
    SIDE_PX,
    SPLITS,
    DrawnImage,
    DrawnObject,
    Scene,
)
from data.files import open_atomic, write_json_atomic
from data.tokenizers.wordpiece import basic_words
from data.vlbert_files import REGION_ROOT, SIZE_FILES, region_folder

BERT_FOLDER = "bert_drawn"  # in the data folder: the vocabulary of the questions and answers
NOISE = 0.5  # against directions of spread 1
_NUM_BACKGROUND = 2
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def scene_regions(scene: Scene, noise: np.random.Generator) -> Regions:
    """Boxes and features of one scene, in random order."""
    traits = _trait_directions()
    boxes = [object_box(item) for item in scene.objects]
    meanings = [(item.shape, item.color, item.size) for item in scene.objects]
    for _ in range(_NUM_BACKGROUND):
        left, top = noise.uniform(0, SIDE_PX - CELL_PX, size=2)
        boxes.append((left, top, left + CELL_PX, top + CELL_PX))
        meanings.append((scene.background,))
    features = np.stack([sum(traits[trait] for trait in meaning) for meaning in meanings])
    features = np.maximum(features + noise.normal(0, NOISE, features.shape), 0).astype(np.float32)
    order = noise.permutation(len(boxes))
    whole = np.maximum(features.mean(axis=0) + traits[scene.background], 0).astype(np.float32)
    corners = np.array(boxes, dtype=np.float32).clip(0, SIDE_PX - 1)
    return Regions(corners[order], features[order], whole, (SIDE_PX, SIDE_PX))


def object_box(item: DrawnObject) -> tuple[float, float, float, float]:
    """x1 y1 x2 y2 of a shape in pixels."""
    row, column = divmod(item.cell, 3)
    x = (column + 0.5) * CELL_PX + item.offset_px[0]
    y = (row + 0.5) * CELL_PX + item.offset_px[1]
    radius = RADIUS_PX[item.size]
    return x - radius, y - radius, x + radius, y + radius


def _trait_directions() -> dict[str, np.ndarray]:
    names = [*SHAPES, *COLORS, *RADIUS_PX, *BACKGROUNDS]
    directions = np.random.default_rng(20190822).normal(0, 1, (len(names), FEATURE_SIZE))
    return dict(zip(names, directions, strict=True))


def write_drawn_regions(folder: Path, images: dict[str, list[DrawnImage]], seed: int) -> None:
    """Box files, sizes and a vocabulary for drawn images, in VL-BERT's folder layout; the same bytes each time.

    Args:
        folder: the data folder.
        images: what ``draw_splits`` gave.
        seed: of the noise on the features.
    """
    for place, split in enumerate(SPLITS):
        noise = np.random.default_rng([seed % 2**64, place, 1])
        target = folder / REGION_ROOT / region_folder(split, "10-100ada")
        target.mkdir(parents=True, exist_ok=True)
        for image in images[split]:
            write_json(target / f"{image.image_id}.json", image.image_id, scene_regions(image.scene, noise))
        sizes = [{"id": image.image_id, "width": SIDE_PX, "height": SIDE_PX} for image in images[split]]
        write_json_atomic(folder / SIZE_FILES[split], {"images": sizes})
    with open_atomic(folder / BERT_FOLDER / "vocab.txt") as file:
        file.writelines(f"{token}\n" for token in drawn_vocabulary(images))


def drawn_vocabulary(images: dict[str, list[DrawnImage]]) -> list[str]:
    """Whole words only: those of the questions and answers."""
    texts = {q.text for drawn in images.values() for image in drawn for q in image.questions}
    said = {a for drawn in images.values() for image in drawn for answers in image.answers for a in answers}
    return [*_SPECIAL, *sorted(_words(texts | said | set(PLACES)) - set(_SPECIAL))]


def _words(texts: Iterable[str]) -> set[str]:
    return {word for text in texts for word in basic_words(text)}
