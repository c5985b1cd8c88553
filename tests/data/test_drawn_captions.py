import json
import random

import pytest

from data.drawn_captions import FORMS, NOCAPS_CAPTIONS_PER_IMAGE, describe, write_drawn_captions
from data.drawn_scenes import DrawnObject, Scene, draw_scene, draw_splits


def item(cell, color, shape):
    return DrawnObject(cell, shape, color, "big", (0.0, 0.0))


def test_the_sentences_of_a_scene_in_reading_order():
    scene = Scene("gray", (item(0, "red", "star"), item(1, "blue", "circle"), item(4, "green", "cross")))
    assert describe(scene, random.Random(3)) == [
        "a red star, a blue circle and a green cross.",
        "there are a red star, a blue circle and a green cross.",
        "a red star, a blue circle and a green cross on a gray background.",
        "a red star in the top left, a blue circle and a green cross.",
        "a picture of a red star, a blue circle and a green cross.",
    ]


def test_one_object_is_there_and_two_are_joined_by_and():
    assert describe(Scene("white", (item(4, "red", "star"),)), random.Random(0))[1:4] == [
        "there is a red star.",
        "a red star on a white background.",
        "a red star in the center.",
    ]
    two = Scene("white", (item(0, "red", "star"), item(8, "blue", "star")))
    assert describe(two, random.Random(0), 1) == ["a red star and a blue star."]


def test_every_sentence_names_every_object():
    rng = random.Random(1)
    for _ in range(50):
        scene = draw_scene(rng, rng.randint(1, 4))
        for text in describe(scene, rng, len(FORMS)):
            assert all(found.name in text for found in scene.objects)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    images = draw_splits({"train2014": 20, "val2014": 9, "test2015": 7}, seed=1)
    write_drawn_captions(folder, images, 1, num_val=3, num_test=4)
    return folder


def test_karpathys_file_has_its_splits_and_keys(drawn):
    images = json.loads((drawn / "dataset_coco.json").read_text())["images"]
    splits = [image["split"] for image in images]
    assert {split: splits.count(split) for split in splits} == {"train": 20, "test": 4, "val": 3, "restval": 2}
    assert len({image["cocoid"] for image in images}) == len(images)
    assert {image["filepath"] for image in images if image["split"] != "train"} == {"val2014"}
    for image in images:
        assert (drawn / image["filepath"] / image["filename"]).is_file()
        assert len(image["sentences"]) == 5
        for sentence in image["sentences"]:
            assert sentence["raw"].replace(",", "").rstrip(".").split() == sentence["tokens"]
            assert sentence["imgid"] == image["imgid"]
    ids = [number for image in images for number in image["sentids"]]
    assert ids == list(range(5 * len(images)))


def test_nocaps_has_ten_captions_and_a_domain_an_image_and_none_in_test(drawn):
    val = json.loads((drawn / "nocaps_val_4500_captions.json").read_text())
    assert len(val["annotations"]) == NOCAPS_CAPTIONS_PER_IMAGE * len(val["images"]) == 30
    assert {image["domain"] for image in val["images"]} <= {"in-domain", "near-domain", "out-domain"}
    assert all((drawn / "val" / image["file_name"]).is_file() for image in val["images"])
    test = json.loads((drawn / "nocaps_test_image_info.json").read_text())
    assert "annotations" not in test
    assert len(test["images"]) == 4
    assert all((drawn / "test" / image["file_name"]).is_file() for image in test["images"])


def test_the_same_seed_gives_the_same_files(drawn, tmp_path):
    images = draw_splits({"train2014": 20, "val2014": 9, "test2015": 7}, seed=1)
    write_drawn_captions(tmp_path, images, 1, num_val=3, num_test=4)
    files = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(files) == 20 + 9 + 7 + 3
    for file in files:
        assert (drawn / file).read_bytes() == (tmp_path / file).read_bytes()
