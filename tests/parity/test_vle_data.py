"""VLE's preparation of VQA v2 and its boxes against recorded ones: equal."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.patch_boxes import box_to_patches, tags_to_token_types
from data.vle_rows import ANSWER_FILE, LABEL_FILE, build_vle_rows, rows_file
from data.vqa_answers import PUNCTUATION, normalize_answer, soft_score
from tests.parity.fixture_files import load_fixture


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return load_fixture("vle_vqa_data.pt")


@pytest.fixture(scope="module")
def built(recording, tmp_path_factory) -> Path:
    """The recorded annotations as official files, with empty image files, and the rows made from them."""
    folder, inputs = tmp_path_factory.mktemp("vqav2"), recording["inputs"]
    for split, name in inputs["file_names"].items():
        (folder / name).write_text(json.dumps({"questions": inputs["questions"][split]}))
        if inputs["annotations"].get(split):
            answers = name.replace("OpenEnded_", "").replace("questions", "annotations")
            (folder / answers).write_text(json.dumps({"annotations": inputs["annotations"][split]}))
        place = "test2015" if split.startswith("test") else f"{split}2014"
        (folder / place).mkdir(exist_ok=True)
        for question in inputs["questions"][split]:
            name = recording["inputs"]["image_name"].format(folder=place, image_id=question["image_id"])
            (folder / place / name).touch()
    config = recording["config"]
    build_vle_rows(
        folder, None, folder, min_answer_count=config["min_count"], num_rest_val_images=config["rest_val_rows"]
    )
    return folder


def test_answer_list(recording, built):
    assert json.loads((built / LABEL_FILE).read_text()) == recording["outputs"]["label2answer"]
    assert json.loads((built / ANSWER_FILE).read_text()) == recording["outputs"]["answer2label"]


def test_rows_and_their_numbers(recording, built):
    for split, count in recording["outputs"]["counts"].items():
        lines = (built / rows_file(split, "jsonl")).read_text().splitlines()
        assert len(lines) == count, split
        rows = sorted((json.loads(line) for line in lines), key=lambda row: row["image_id"])
        for row in rows:
            assert (built / row.pop("image")).is_file()
        if split in recording["outputs"]["rows"]:
            assert rows == recording["outputs"]["rows"][split], split


def test_normalisation(recording):
    outputs = recording["outputs"]
    for text, expected in outputs["normalize"].items():
        assert normalize_answer(text) == expected, text
    assert [soft_score(count) for count in range(11)] == outputs["score_of_count"][:11]
    for table in ("contractions", "number_words"):
        for word, expected in outputs[table].items():
            assert normalize_answer(word) == expected, word
    assert sorted(outputs["punctuation"]) == sorted(PUNCTUATION)


def test_boxes():
    outputs = load_fixture("vle_patch_box.pt")["outputs"]
    for case in outputs["cases"]:
        sizes = {key: case[key] for key in ("width", "height", "image_size", "patch_size")}
        for box, patches, snapped in zip(case["boxes"], case["patch_ids"], case["snapped"], strict=True):
            found, place = box_to_patches(box, **sizes)
            assert found == patches
            assert place == pytest.approx(snapped)
    for case in outputs["tags"]:
        assert tags_to_token_types(case["object_tags"]) == (
            case["related_box_ids"],
            case["image_added_token_type_ids"],
            case["text_token_type_ids"],
        )
