import json
import os

import pytest

from data.coco_captions import build_coco_captioning_index, build_nocaps_index
from data.errors import DataError
from data.tokenizers.spm import XLMRTokenizer
from tests.data.vqav2_tree import SPM, edit_json, read_lines, write_json

COCO_FILES = {f"coco_captioning.{split}.jsonl" for split in ("train", "val", "test")}
NOCAPS_FILES = {"nocaps.val.jsonl", "nocaps.test.jsonl"}


@pytest.fixture(scope="module")
def tokenizer():
    return XLMRTokenizer(SPM)


def image(number, split, *captions):
    folder = "train2014" if split == "train" else "val2014"
    return {
        "filepath": folder,
        "filename": f"COCO_{folder}_{number:012d}.jpg",
        "split": split,
        "cocoid": number,
        "sentences": [{"raw": text} for text in captions],
    }


def write_coco(root):
    images = [
        image(9, "train", "a red circle", "the circle is red"),
        image(3, "val", "a circle"),
        image(5, "restval", "two circles"),
        image(4, "test", "a circle", "one circle"),
        image(2, "train", "a blue circle"),
    ]
    write_json(root / "dataset_coco.json", {"images": images})
    for folder in ("train2014", "val2014"):
        (root / folder).mkdir()
    return root


def write_nocaps(root):
    write_json(
        root / "nocaps_val_4500_captions.json",
        {"images": [{"id": 5, "file_name": "b.jpg"}, {"id": 0, "file_name": "a.jpg"}]},
    )
    write_json(root / "nocaps_test_image_info.json", {"images": [{"id": 7, "file_name": "c.jpg"}]})
    for folder in ("val", "test"):
        (root / folder).mkdir()
    return root


def test_training_has_a_line_for_each_caption_of_train_and_restval_in_file_order(tmp_path, tokenizer):
    build_coco_captioning_index(write_coco(tmp_path), None, tokenizer)
    rows = read_lines(tmp_path / "coco_captioning.train.jsonl")
    assert [row["image_id"] for row in rows] == [9, 9, 5, 2]
    assert rows[1]["text_segment"] == tokenizer.encode("the circle is red")
    assert rows[2]["image_path"] == "val2014/COCO_val2014_000000000005.jpg"


def test_validation_and_test_have_a_line_for_each_image_without_text(tmp_path, tokenizer):
    build_coco_captioning_index(write_coco(tmp_path), None, tokenizer)
    line = '{"image_path": "val2014/COCO_val2014_%012d.jpg", "text_segment": null, "image_id": %d}\n'
    assert (tmp_path / "coco_captioning.val.jsonl").read_text() == line % (3, 3)
    assert (tmp_path / "coco_captioning.test.jsonl").read_text() == line % (4, 4)


def test_the_summary_names_the_input_and_counts_lines(tmp_path, tokenizer):
    summary = build_coco_captioning_index(write_coco(tmp_path), None, tokenizer)
    assert summary.found == [("captions", str(tmp_path / "dataset_coco.json"))]
    assert list(summary.num_lines.values()) == [4, 1, 1]
    assert summary.warnings == []


def test_the_official_file_may_lie_elsewhere_and_the_index_go_to_another_folder(tmp_path, tokenizer):
    write_coco(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "dataset_coco.json").rename(tmp_path / "annotations" / "dataset_coco.json")
    build_coco_captioning_index(tmp_path, None, tokenizer, tmp_path / "one")
    build_coco_captioning_index(tmp_path, tmp_path / "annotations", tokenizer, tmp_path / "two")
    assert set(os.listdir(tmp_path / "one")) == set(os.listdir(tmp_path / "two")) == COCO_FILES


def test_images_in_a_folder_of_that_name_are_found(tmp_path, tokenizer):
    write_coco(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "val2014").rename(tmp_path / "images" / "val2014")
    build_coco_captioning_index(tmp_path, None, tokenizer)
    (row,) = read_lines(tmp_path / "coco_captioning.val.jsonl")
    assert row["image_path"] == "images/val2014/COCO_val2014_000000000003.jpg"


def test_a_missing_image_folder_is_a_warning(tmp_path, tokenizer):
    (write_coco(tmp_path) / "val2014").rmdir()
    summary = build_coco_captioning_index(tmp_path, None, tokenizer)
    assert summary.warnings == [f"no image folder val2014 in {tmp_path}: add it before training"]


def test_an_empty_split_is_a_warning_but_nothing_to_train_on_an_error(tmp_path, tokenizer):
    path = write_coco(tmp_path) / "dataset_coco.json"
    edit_json(path, lambda c: c["images"].pop(3))
    summary = build_coco_captioning_index(tmp_path, None, tokenizer)
    assert summary.warnings == [f"coco_captioning.test.jsonl has no line: {path} has no image of this split"]
    edit_json(path, lambda c: c.update(images=[image(3, "val", "a circle")]))
    with pytest.raises(DataError, match='no image of "split" train or restval'):
        build_coco_captioning_index(tmp_path, None, tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), 'needs a non-empty list under "images"'),
        (lambda c: c["images"].insert(1, 3), r'images\[1\]: "filepath" must be of type str'),
        (lambda c: c["images"][1].pop("cocoid"), r'images\[1\]: "cocoid" must be of type int'),
        (
            lambda c: c["images"][1].update(split="dev"),
            r"images\[1\]: .split. must be one of train, restval, val, test",
        ),
        (lambda c: c["images"][1].update(cocoid=9), "image 9 stands twice"),
        (lambda c: c["images"][0].update(filepath="../train2014"), "contains '..'"),
        (lambda c: c["images"][0].update(filename="../a.jpg"), r"images\[0\]: .* contains '..'"),
        (lambda c: c["images"][0]["sentences"].insert(0, "red"), r'images\[0\]: sentences\[0\]: "raw" must be a text'),
        (lambda c: c["images"][0]["sentences"][1].update(raw=" "), r"sentences\[1\]: the caption ' ' has no tokens"),
        (lambda c: c["images"][0]["sentences"][1].update(raw="\ud800"), r"sentences\[1\]: .*surrogate"),
    ],
)
def test_a_broken_file_is_named_by_place_and_leaves_no_index(tmp_path, tokenizer, change, message):
    path = write_coco(tmp_path) / "dataset_coco.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        build_coco_captioning_index(tmp_path, None, tokenizer)
    assert set(os.listdir(tmp_path)) == {"dataset_coco.json", "train2014", "val2014"}


def test_a_missing_official_file_is_named_with_the_places(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no dataset_coco.json in .*/annotations: give the folder"):
        build_coco_captioning_index(tmp_path, None, tokenizer)


def test_nocaps_lines_keep_file_order_and_have_no_text(tmp_path):
    build_nocaps_index(write_nocaps(tmp_path), None)
    assert (tmp_path / "nocaps.val.jsonl").read_text() == (
        '{"image_path": "val/b.jpg", "text_segment": null, "image_id": 5}\n'
        '{"image_path": "val/a.jpg", "text_segment": null, "image_id": 0}\n'
    )
    assert read_lines(tmp_path / "nocaps.test.jsonl") == [
        {"image_path": "test/c.jpg", "text_segment": None, "image_id": 7}
    ]


def test_a_nocaps_split_without_its_file_is_left_out_and_said(tmp_path):
    (write_nocaps(tmp_path) / "nocaps_test_image_info.json").unlink()
    (tmp_path / "nocaps.test.jsonl").write_text("{}\n")
    summary = build_nocaps_index(tmp_path, None)
    assert summary.num_lines == {"nocaps.val.jsonl": 2}
    (note,) = summary.notes
    assert note.startswith(
        "nocaps.test.jsonl not written (the nocaps.test.jsonl there is of an earlier run): no nocaps_"
    )


def test_nocaps_without_any_official_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no nocaps_val_4500_captions.json in"):
        build_nocaps_index(tmp_path, None)


def test_a_failed_build_leaves_the_old_index_as_it_was(tmp_path):
    build_nocaps_index(write_nocaps(tmp_path), None)
    before = {name: (tmp_path / name).read_bytes() for name in NOCAPS_FILES}
    edit_json(tmp_path / "nocaps_val_4500_captions.json", lambda c: c["images"][0].update(file_name="new.jpg"))
    edit_json(tmp_path / "nocaps_test_image_info.json", lambda c: c["images"][0].update(id="7"))
    with pytest.raises(DataError, match=r'nocaps_test_image_info.json: images\[0\]: "id" must be of type int'):
        build_nocaps_index(tmp_path, None)
    assert {name: (tmp_path / name).read_bytes() for name in NOCAPS_FILES} == before
