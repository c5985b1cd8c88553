"""A complete tiny checkpoint folder: picture and question to ids, pixels, logits and the answers of the pipeline.

Measured: ids and pixels equal; logits within 1e-6.
"""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from data.clip_images import CLIPTransform, normalize
from data.collate import pad_tokens
from data.images import decode_image
from models.vle.vle import VLEForVQA
from scripts.vle_model import VLEFolder, build_model, read_model_folder
from scripts.vle_vqa import softmax
from scripts.vqa_evaluation import top_answers
from tests.parity.fixture_files import fixture_path, load_fixture


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return load_fixture("vle_e2e.pt")


@pytest.fixture(scope="module")
def loaded() -> tuple[VLEFolder, VLEForVQA]:
    path = fixture_path("vle_tiny_for_vqa")
    folder = read_model_folder(path)
    return folder, build_model(folder, path, folder.answers, for_training=False).eval()


def test_questions_about_pictures(recording, loaded):
    folder, model = loaded
    for row, image in zip(recording["outputs"]["rows"], recording["inputs"]["images"], strict=True):
        ids = folder.tokenizer.build_segment(folder.tokenizer.encode(row["question"]), 10**6)
        assert [ids] == row["input_ids"].tolist()
        pixels = normalize(
            CLIPTransform(folder.images)(decode_image(bytes(image.tolist()), "recorded"))[None], folder.images
        )
        assert torch.equal(pixels, row["pixel_values"])
        with torch.inference_mode():
            logits = model(pixels, torch.tensor([ids]))
        assert_close(logits, row["logits"], atol=1e-5, rtol=0)
        top = top_answers(logits[0], folder.answers, len(row["top_k"]), softmax)
        assert [answer for answer, _ in top] == [entry["answer"] for entry in row["top_k"]]
        assert [p for _, p in top] == pytest.approx([entry["score"] for entry in row["top_k"]], abs=1e-6)
    assert len(top_answers(logits[0], folder.answers, 1000, softmax)) == recording["outputs"]["top_k_1000_len"]
    for given, row in zip(recording["outputs"]["default_call"], recording["outputs"]["rows"], strict=True):
        assert given[0]["answer"] == row["top_k"][0]["answer"]


def test_padding_to_the_longest_question_gives_the_logits_of_padding_to_fifty(recording, loaded):
    folder, model = loaded
    batch = recording["outputs"]["train_batch"]
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    tokens, padding = pad_tokens(rows, folder.tokenizer.pad_id)
    assert tokens.shape[1] < batch["input_ids"].shape[1]
    with torch.inference_mode():
        logits = model(batch["pixel_values"], tokens, None if padding is None else 1 - padding)
    assert_close(logits, batch["logits"], atol=1e-5, rtol=0)
