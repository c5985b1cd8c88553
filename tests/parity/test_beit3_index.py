"""The index files of VQA v2, COCO captions and NoCaps against those of the reference, line by line.

For VQA v2 the reference draws the order of images and the 1000 images of rest_val without a seed, so the files are
compared as sets of lines, and rest_val and trainable_val by their union and the rule. The answer list and the caption
files are compared in order.
"""

import json

import pytest

from data.coco_captions import build_coco_captioning_index, build_nocaps_index
from data.tokenizers.spm import XLMRTokenizer
from data.vqav2 import build_vqav2_index
from tests.parity.fixture_files import load_fixture

NUM_REST_VAL_IMAGES = 1000  # the reference's constant
VQA_SPLITS = ("train", "val", "rest_val", "trainable_val", "test", "test-dev")
MAY_BE_LEFT_OUT = ("vqa.test.jsonl", "vqa.test-dev.jsonl")  # the reference writes them empty


@pytest.fixture
def unpacked(tmp_path):
    """The recording, its tokenizer, and the folder with its raw files."""
    recorded = load_fixture("beit3_index.pt")
    model_file = tmp_path / "recorded.spm"
    model_file.write_bytes(bytes(load_fixture("beit3_tokenizer.pt")["inputs"]["spm_bytes"].tolist()))
    root = tmp_path / "data"
    for name, text in recorded["inputs"]["files"].items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    for name in recorded["inputs"]["image_files"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return recorded, XLMRTokenizer(model_file), root


@pytest.fixture
def built(unpacked):
    """Recorded outputs and the folder in which our VQA v2 index was built from the same inputs."""
    recorded, tokenizer, root = unpacked
    build_vqav2_index(
        root,
        None,
        tokenizer,
        min_answer_count=recorded["config"]["min_answer_count"],
        num_rest_val_images=NUM_REST_VAL_IMAGES,
    )
    return recorded["outputs"], root


def lines(root, name):
    """Lines of a file; none where a test split without images was left out."""
    if name in MAY_BE_LEFT_OUT and not (root / name).exists():
        return []
    return (root / name).read_text(encoding="utf-8").splitlines()


def test_answer_list_equals_the_recorded_one_in_order(built):
    outputs, root = built
    index = outputs["index"]
    assert lines(root, "answer2label.txt") == index["answer2label.txt"]


@pytest.mark.parametrize("name", ["vqa.train.jsonl", "vqa.val.jsonl", "vqa.test.jsonl", "vqa.test-dev.jsonl"])
def test_index_lines_equal_the_recorded_ones(built, name):
    outputs, root = built
    index = outputs["index"]
    assert sorted(lines(root, name)) == sorted(index[name])


def test_rest_val_and_trainable_val_divide_val_by_the_recorded_rule(built):
    outputs, root = built
    index = outputs["index"]
    rest, trainable = lines(root, "vqa.rest_val.jsonl"), lines(root, "vqa.trainable_val.jsonl")
    assert sorted(rest + trainable) == sorted(index["vqa.rest_val.jsonl"] + index["vqa.trainable_val.jsonl"])

    def images(rows):
        return {json.loads(row)["image_path"] for row in rows}

    assert images(rest).isdisjoint(images(trainable))
    assert len(images(rest)) == len(images(index["vqa.rest_val.jsonl"]))


def test_questions_of_one_image_follow_the_question_file_as_recorded(built):
    outputs, root = built
    index = outputs["index"]
    for name in ("vqa.train.jsonl", "vqa.val.jsonl"):
        orders = []
        for rows in (lines(root, name), index[name]):
            order = {}
            for row in map(json.loads, rows):
                order.setdefault(row["image_path"], []).append(row["qid"])
            orders.append(order)
        assert orders[0] == orders[1]


def test_each_split_has_the_recorded_question_ids(built):
    outputs, root = built
    ids = {split: [json.loads(row)["qid"] for row in lines(root, f"vqa.{split}.jsonl")] for split in VQA_SPLITS}
    recorded = outputs["question_ids"]
    assert recorded.keys() <= ids.keys()
    for split in recorded.keys() - {"rest_val", "trainable_val"}:
        assert sorted(ids[split]) == sorted(recorded[split]), split
    assert sorted(ids["rest_val"] + ids["trainable_val"]) == sorted(recorded["rest_val"] + recorded["trainable_val"])


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_coco_caption_lines_equal_the_recorded_ones_in_order(unpacked, split):
    recorded, tokenizer, root = unpacked
    build_coco_captioning_index(root, None, tokenizer)
    name = f"coco_captioning.{split}.jsonl"
    assert lines(root, name) == recorded["outputs"]["index"][name]


@pytest.mark.parametrize("split", ["val", "test"])
def test_nocaps_lines_equal_the_recorded_ones_in_order(unpacked, split):
    recorded, _, root = unpacked
    build_nocaps_index(root, None)
    name = f"nocaps.{split}.jsonl"
    assert lines(root, name) == recorded["outputs"]["index"][name]
