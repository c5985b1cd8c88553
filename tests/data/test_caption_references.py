import json

import pytest

from data.caption_references import read_caption_references
from data.errors import DataError
from data.own_captions import OwnCaption, read_caption_file

KARPATHY = {
    "images": [
        {"cocoid": 1, "split": "val", "sentences": [{"raw": "one"}, {"raw": "two"}]},
        {"cocoid": 2, "split": "test", "sentences": [{"raw": "three"}]},
        {"cocoid": 3, "split": "train", "sentences": []},
    ]
}
COCO = {
    "images": [{"id": 1, "domain": "in-domain"}, {"id": 2}],
    "annotations": [{"image_id": 1, "caption": "a"}, {"image_id": 2, "caption": "b"}, {"image_id": 1, "caption": "c"}],
}


def written(tmp_path, content, name="file.json"):
    path = tmp_path / name
    lines = content if isinstance(content, list) else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_karpathys_file_gives_the_captions_of_one_split(tmp_path):
    path = written(tmp_path, KARPATHY)
    assert read_caption_references(path, "val").captions == {1: ("one", "two")}
    assert read_caption_references(path, "test").captions == {2: ("three",)}


def test_a_coco_file_gives_captions_in_order_and_domains_where_it_has_them(tmp_path):
    found = read_caption_references(written(tmp_path, COCO), "val")
    assert found.captions == {1: ("a", "c"), 2: ("b",)}
    assert found.domains == {1: "in-domain"}
    assert found.only([2]).captions == {2: ("b",)}
    assert found.only([2]).domains == {}


def test_ones_own_file_gives_the_lines_that_have_captions(tmp_path):
    path = written(tmp_path, [{"image": "a.jpg"}, {"image": "b.jpg", "captions": ["x"]}], "own.jsonl")
    assert read_caption_references(path).captions == {1: ("x",)}


@pytest.mark.parametrize(
    ("content", "split", "message"),
    [
        ({"annotations": []}, None, 'needs a list under "images": give a COCO caption file'),
        ({"images": [{"id": 1}]}, None, r"has no captions, only a list of images \(no \"annotations\"\)"),
        ({"images": [], "annotations": []}, None, "has no captions: give"),
        (KARPATHY | {"images": KARPATHY["images"][:1]}, "test", "has no captions of split test"),
        (KARPATHY, None, r"images\[2\] needs a whole number \"cocoid\" and \"sentences\""),
        (COCO | {"annotations": [{"image_id": "1", "caption": "a"}]}, None, r"annotations\[0\] needs a whole number"),
        (COCO | {"annotations": [{"image_id": 1, "caption": None}]}, None, r"annotations\[0\] needs .* a text"),
    ],
)
def test_a_file_that_holds_no_captions_says_what_it_lacks(tmp_path, content, split, message):
    with pytest.raises(DataError, match=message):
        read_caption_references(written(tmp_path, content), split)


# ---- own captions ----


def test_own_images_are_numbered_from_zero_unless_they_have_ids(tmp_path):
    rows = [{"image": "a.jpg", "captions": ["x", "y"]}, {"image": "b.jpg"}]
    assert read_caption_file(written(tmp_path, rows, "own.jsonl")) == [
        OwnCaption("a.jpg", 0, ("x", "y")),
        OwnCaption("b.jpg", 1, None),
    ]
    with_ids = [row | {"image_id": 7 - place} for place, row in enumerate(rows)]
    assert [row.image_id for row in read_caption_file(written(tmp_path, with_ids, "own.jsonl"))] == [7, 6]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "b.jpg", "caption": ["x"]}, ":2: unknown key 'caption'"),
        ({"image": "b.jpg", "image_id": 3}, ":2: image_id must stand on every line or on none"),
        ({"image": "a.jpg"}, ":2: image a.jpg stands on line 1 already; give it one line"),
        ({"image": "../b.jpg"}, ":2"),
        ({"image": "b.jpg", "captions": []}, ':2: "captions" must be a list of texts that are not empty'),
        ({"image": "b.jpg", "captions": [" "]}, ':2: "captions" must be a list of texts that are not empty'),
        ({"image": "b.jpg", "captions": "x"}, ':2: "captions" must be a list of texts that are not empty'),
        ({"captions": ["x"]}, ':2: "image"'),
    ],
)
def test_a_wrong_line_of_own_captions_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_caption_file(written(tmp_path, [{"image": "a.jpg"}, row], "own.jsonl"))
