"""The VQA v2 index against the recorded files of the reference, line by line.

The reference draws the order of images and the 1000 images of rest_val without a seed, so the files are compared as
sets of lines, and rest_val and trainable_val by their union and the rule.
"""

import json

import pytest

from data.tokenizers.spm import XLMRTokenizer
from data.vqav2 import build_vqav2_index
from tests.parity.fixture_files import load_fixture

NUM_REST_VAL_IMAGES = 1000  # the reference's constant


@pytest.fixture
def built(tmp_path):
    """Recorded index files and the folder in which ours were built from the same inputs."""
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
    build_vqav2_index(
        root,
        None,
        XLMRTokenizer(model_file),
        min_answer_count=recorded["config"]["min_answer_count"],
        num_rest_val_images=NUM_REST_VAL_IMAGES,
    )
    return recorded["outputs"]["index"], root


def lines(root, name):
    return (root / name).read_text(encoding="utf-8").splitlines()


def test_answer_list_equals_the_recorded_one_in_order(built):
    index, root = built
    assert lines(root, "answer2label.txt") == index["answer2label.txt"]


@pytest.mark.parametrize("name", ["vqa.train.jsonl", "vqa.val.jsonl", "vqa.test.jsonl", "vqa.test-dev.jsonl"])
def test_index_lines_equal_the_recorded_ones(built, name):
    index, root = built
    assert index[name]
    assert sorted(lines(root, name)) == sorted(index[name])


def test_rest_val_and_trainable_val_divide_val_by_the_recorded_rule(built):
    index, root = built
    rest, trainable = lines(root, "vqa.rest_val.jsonl"), lines(root, "vqa.trainable_val.jsonl")
    assert sorted(rest + trainable) == sorted(index["vqa.rest_val.jsonl"] + index["vqa.trainable_val.jsonl"])

    def images(rows):
        return {json.loads(row)["image_path"] for row in rows}

    assert images(rest).isdisjoint(images(trainable))
    assert len(images(rest)) == len(images(index["vqa.rest_val.jsonl"]))


def test_questions_of_one_image_follow_the_question_file_as_recorded(built):
    index, root = built
    for name in ("vqa.train.jsonl", "vqa.val.jsonl"):
        orders = []
        for rows in (lines(root, name), index[name]):
            order = {}
            for row in map(json.loads, rows):
                order.setdefault(row["image_path"], []).append(row["qid"])
            orders.append(order)
        assert orders[0] == orders[1]
