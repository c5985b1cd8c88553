"""LLaVA's training samples: what a file may hold, what a sample and a batch are."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from data.clip_images import CLIPImageSettings
from data.errors import DataError
from data.image_reader import ImageReader
from data.llava_conversation import IGNORE_INDEX, TEMPLATES
from data.llava_dataset import LlavaDataset, read_conversations
from data.llava_images import LlavaTransform
from data.tokenizers.llama import IMAGE_TOKEN_ID, LlamaTokenizer
from data.vizwiz import ANSWERS_KEY
from tests.parity.fixture_files import DEFAULT_FOLDER

SIDE = 20


def said(question: str = "<image>\nWhat is this?", answer: str = "a cup", **more: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "one", "image": "a.png", "conversations": turns} | more


def write(folder, rows) -> str:
    path = folder / "train.json"
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.fixture
def dataset_of(tmp_path):
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "a.png")
    tokenizer = LlamaTokenizer.load(DEFAULT_FOLDER / "llava_tiny" / "llava")
    settings = CLIPImageSettings().resized(SIDE)
    images = ImageReader(tmp_path, LlavaTransform(settings, "pad"), image_size=SIDE)

    def make(*rows: dict) -> LlavaDataset:
        samples = read_conversations(write(tmp_path, list(rows)))
        return LlavaDataset(samples, images, tokenizer, TEMPLATES["v1"], image_size=SIDE)

    return make


def test_a_sample_has_an_image_place_labels_of_its_answer_and_pixels(dataset_of):
    sample = dataset_of(said()).sample(0, np.random.default_rng(0))
    assert sample.encoded.ids.count(IMAGE_TOKEN_ID) == 1
    learned = [label for label in sample.encoded.labels if label != IGNORE_INDEX]
    assert learned == sample.encoded.ids[-len(learned) :]
    assert sample.image.shape == (3, SIDE, SIDE)
    assert sample.image.float().mean() > 10


def test_a_batch_mixes_images_and_text_alone(dataset_of):
    text = said("Who are you?", "an assistant")
    del text["image"]
    dataset = dataset_of(said(), text)
    batch = dataset.collate([dataset.sample(place, np.random.default_rng(0)) for place in (0, 1)])
    assert batch["ids"].shape == batch["labels"].shape == batch["mask"].shape
    assert torch.equal(batch["mask"], batch["ids"] != 0)
    assert batch["image"].shape == (2, 3, SIDE, SIDE)
    assert not batch["image"][1].any()
    first, second = dataset.lengths()
    assert first > 0 > second


BAD = {
    "no list": ({"a": 1}, "must hold a list of samples"),
    "no turns": ([{"id": "x"}], 'needs "conversations"'),
    "no turn": ([said(conversations=[])], 'has no turn in its "conversations"'),
    "no text": ([said(answer=3)], "has a turn whose value is no text"),
    "an image without its place": ([said("What?")], "has an image but no <image> in its text"),
    "a place without an image": ([said(image=None)], "has <image> but no image"),
    "two places": ([said(answer="<image> here")], "has <image> in 2 turns and one image"),
    "a path that leads out": ([said(image="../a.png")], "must stay inside the data folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_do_not_fit_are_refused_with_the_sample(tmp_path, name):
    rows, message = BAD[name]
    with pytest.raises(DataError, match=re.escape(message)):
        read_conversations(write(tmp_path, rows))


def test_a_sample_that_cannot_be_learned_or_read_is_named(dataset_of):
    with pytest.raises(DataError, match=r"sample 0 \(one\): no token of an answer"):
        dataset_of(said(answer="")).sample(0, np.random.default_rng(0))
    with pytest.raises(DataError, match=r"sample 1 \(one\): "):
        dataset_of(said(), said(image="gone.png")).sample(1, np.random.default_rng(0))
    wrong = said()
    wrong["conversations"][1]["from"] = "robot"
    with pytest.raises(DataError, match=r"sample 0 \(one\): turn 2 is from 'robot'"):
        dataset_of(wrong).sample(0, np.random.default_rng(0))


def test_of_several_answers_each_epoch_learns_one(dataset_of):
    dataset = dataset_of(said(**{ANSWERS_KEY: ["a cup", "a mug", "a glass"]}))

    def learned(seed: int) -> tuple[int, ...]:
        labels = dataset.sample(0, np.random.default_rng(seed)).encoded.labels
        return tuple(label for label in labels if label != IGNORE_INDEX)

    assert learned(3) == learned(3)
    assert len({learned(seed) for seed in range(40)}) == 3
    plain = dataset_of(said(answer="a mug")).sample(0, np.random.default_rng(0)).encoded.labels
    assert tuple(label for label in plain if label != IGNORE_INDEX) in {learned(seed) for seed in range(40)}


def test_answers_that_are_no_texts_are_refused(tmp_path):
    with pytest.raises(DataError, match=r'"plainvl_answers" must be a list of texts'):
        read_conversations(write(tmp_path, [said(**{ANSWERS_KEY: ["a", 3]})]))


def test_keys_of_other_peoples_files_change_nothing(tmp_path):
    """Data sets of questions often keep what people said under "answers"."""
    (sample,) = read_conversations(write(tmp_path, [said(answers=["a mug"], category="x")]))
    assert sample.variants() == [sample.turns]
    assert sample.turns[-1] == ("gpt", "a cup")
