"""Drawn scenes with captions, in the file layouts of COCO captions (Karpathy's split) and NoCaps.

The pictures are those of ``data/drawn_scenes.py``; five captions an image for COCO, ten for NoCaps, say which objects
there are, in reading order, and some say where they are or on what. NoCaps' domains go by the number of objects.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.drawn_scenes import PLACES, SIDE_PX, DrawnImage, DrawnObject, Scene, render_scene
from data.files import open_atomic

CAPTIONS_PER_IMAGE, NOCAPS_CAPTIONS_PER_IMAGE = 5, 10
RESTVAL_SHARE = 0.1  # of the number of train images come from val2014, as in Karpathy's split
DOMAINS = ("in-domain", "in-domain", "near-domain", "out-domain")  # for 1, 2, 3, 4 objects
COCO_FOLDERS = ("train2014", "val2014")
NOCAPS_SPLITS = ("val", "test")


def describe(scene: Scene, rng: random.Random, number: int = CAPTIONS_PER_IMAGE) -> list[str]:
    """Captions of a scene: ``number`` sentences in different forms, every object in each of them."""
    forms = [FORMS[place % len(FORMS)] for place in range(number)]
    return [form(scene, rng) for form in forms]


def _listed(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _named(scene: Scene) -> list[str]:
    return [f"a {item.name}" for item in scene.objects]


def _placed(item: DrawnObject) -> str:
    place = PLACES[item.cell]
    where = f"in the {place}" if place == "center" or " " in place else f"at the {place}"
    return f"a {item.name} {where}"


def _plain(scene: Scene, rng: random.Random) -> str:
    return f"{_listed(_named(scene))}."


def _there_is(scene: Scene, rng: random.Random) -> str:
    return f"there {'is' if len(scene.objects) == 1 else 'are'} {_listed(_named(scene))}."


def _on_background(scene: Scene, rng: random.Random) -> str:
    return f"{_listed(_named(scene))} on a {scene.background} background."


def _with_a_place(scene: Scene, rng: random.Random) -> str:
    names = _named(scene)
    chosen = rng.randrange(len(names))
    names[chosen] = _placed(scene.objects[chosen])
    return f"{_listed(names)}."


def _picture_of(scene: Scene, rng: random.Random) -> str:
    return f"a picture of {_listed(_named(scene))}."


FORMS = (_plain, _there_is, _on_background, _with_a_place, _picture_of)


def write_drawn_captions(
    folder: Path, images: dict[str, list[DrawnImage]], seed: int, *, num_val: int, num_test: int
) -> None:
    """Draw the pictures of ``draw_splits`` and write ``dataset_coco.json`` and the two files of NoCaps.

    Args:
        folder: made if need be; gets ``train2014/`` and ``val2014/`` for COCO, ``val/`` and ``test/`` for NoCaps.
        images: of train2014; of val2014, which are divided into restval, val and test; of test2015, into NoCaps' two.
        seed: of the sentences and of the noise on the pictures.
        num_val: images of COCO's val, and of NoCaps val.
        num_test: images of COCO's test; the others of test2015 are NoCaps test.
    """
    rng = random.Random(f"drawn captions, {seed}")
    splits = ["test"] * num_test + ["val"] * num_val
    splits += ["restval"] * (len(images["val2014"]) - len(splits))
    coco = [(image, "train2014", "train") for image in images["train2014"]]
    coco += [(image, "val2014", split) for image, split in zip(images["val2014"], splits, strict=True)]
    nocaps = {"val": images["test2015"][:num_val], "test": images["test2015"][num_val:]}
    places = [(f"{place}/{image.file_name}", image) for image, place, _ in coco]
    places += [(f"{split}/{_nocaps_name(image)}", image) for split, drawn in nocaps.items() for image in drawn]
    for name in (*COCO_FOLDERS, *NOCAPS_SPLITS):
        (folder / name).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([seed % 2**64, 7])
    for place, image in places:
        render_scene(image.scene, noise).save(folder / place, quality=95)
    contents = {"dataset_coco.json": {"images": list(_karpathy_records(coco, rng)), "dataset": "coco"}}
    for split, name in (("val", "nocaps_val_4500_captions.json"), ("test", "nocaps_test_image_info.json")):
        contents[name] = _nocaps_content(nocaps[split], split, rng)
    for name, content in contents.items():
        with open_atomic(folder / name) as file:
            file.write(json.dumps(content) + "\n")


def _karpathy_records(images: list[tuple[DrawnImage, str, str]], rng: random.Random) -> Iterator[dict[str, Any]]:
    sentence_id = 0
    for row, (image, folder, split) in enumerate(images):
        sentences = []
        for text in describe(image.scene, rng):
            words = text.replace(",", "").rstrip(".").split()
            sentences.append({"tokens": words, "raw": text, "imgid": row, "sentid": sentence_id})
            sentence_id += 1
        yield {
            "filepath": folder,
            "sentids": [sentence["sentid"] for sentence in sentences],
            "filename": image.file_name,
            "imgid": row,
            "split": split,
            "sentences": sentences,
            "cocoid": image.image_id,
        }


def _nocaps_name(image: DrawnImage) -> str:
    """Names of NoCaps' images are 16 hexadecimal digits."""
    return f"{image.image_id:016x}.jpg"


def _nocaps_content(images: list[DrawnImage], split: str, rng: random.Random) -> dict[str, Any]:
    records = [
        {
            "id": row,
            "open_images_id": _nocaps_name(image).removesuffix(".jpg"),
            "file_name": _nocaps_name(image),
            "width": SIDE_PX,
            "height": SIDE_PX,
            "domain": DOMAINS[len(image.scene.objects) - 1],
        }
        for row, image in enumerate(images)
    ]
    content: dict[str, Any] = {"info": {"description": "Drawn scenes in the layout of NoCaps."}, "images": records}
    if split == "val":
        texts = [
            (row, text)
            for row, image in enumerate(images)
            for text in describe(image.scene, rng, NOCAPS_CAPTIONS_PER_IMAGE)
        ]
        content["annotations"] = [
            {"id": number, "image_id": row, "caption": text} for number, (row, text) in enumerate(texts)
        ]
    return content
