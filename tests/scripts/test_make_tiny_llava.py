"""scripts/make_tiny_llava.py: the folder that it writes is one that every program for LLaVA reads."""

import sys
from functools import partial

import pytest
import torch

from data.drawn_vizwiz import draw_rows, write_drawn_vizwiz
from data.errors import DataError
from data.image_reader import ImageReader
from data.llava_conversation import IGNORE_INDEX, TEMPLATES
from data.llava_dataset import LlavaDataset, read_conversations
from data.llava_images import LlavaTransform
from data.tokenizers.llama import LlamaTokenizer
from data.vizwiz import read_rows
from models.errors import ModelError
from models.llava.generation import Decoding, generate
from scripts import format_dataset_for_llava, make_tiny_llava
from scripts.llava_folder import read_llava_folder
from scripts.program import run

SIZES = ["--image_size", "24", "--patch_size", "12", "--vision_width", "16", "--vision_layers", "1"]
SIZES += ["--hidden_size", "16", "--layers", "1", "--heads", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_drawn_vizwiz(folder, draw_rows({"train": 40, "valid": 5, "pretrain": 20}, seed=0), seed=0)
    return folder


@pytest.fixture(scope="module")
def tiny(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_llava.main(["--data", str(data), "--output", str(folder), *SIZES])
    return folder


def test_the_folder_loads_with_its_own_tower(tiny):
    folder = read_llava_folder(tiny, dtype=None)
    assert folder.layout == "llava"
    assert folder.values["unfreeze_mm_vision_tower"] is True
    assert {value.dtype for value in folder.model.state_dict().values()} == {torch.float32}
    assert folder.images.crop_size == (24, 24)
    assert folder.model.tower(torch.zeros(1, 3, 24, 24)).shape == (1, 5, 16)
    ids = torch.tensor([folder.tokenizer.encode_with_images("<image>\nwhat is this")])
    joined = folder.model.join(ids, torch.zeros(1, 3, 24, 24), padding_side="left")
    assert generate(folder.model, joined, Decoding(max_new_tokens=3)).shape[0] == 1


def test_the_tokenizer_has_llamas_ids_and_rules(tiny, data):
    tokenizer = LlamaTokenizer.load(tiny)
    assert tokenizer.legacy is False
    for row in read_rows(data / "train.json"):
        assert tokenizer.decode(tokenizer.encode(row.question)) == row.question
    for text in ("a  b", "Ünanswerable 2025?", "\n"):  # spaces kept, letters unknown to it as bytes
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.unk_id not in tokenizer.encode(text)
    assert len(tokenizer.encode("12")) == 1 + 1 + 2  # <s>, a word's start, digits one by one
    assert tokenizer.encode("</s>USER", bos=False)[0] == tokenizer.eos_id
    assert len(tokenizer.encode(TEMPLATES["v1"].opening)) < 40  # whole words


@pytest.mark.parametrize("name", ["pretrain_for_llava.json", "train_for_llava.json"])
def test_every_sample_has_labels_and_they_are_its_answers(tiny, data, name):
    format_dataset_for_llava.main(["--data_path", str(data)])
    folder = read_llava_folder(tiny, dtype=None)
    samples = read_conversations(data / name)
    reader = ImageReader(data / name.split("_")[0], LlavaTransform(folder.images, "pad"), image_size=24)
    dataset = LlavaDataset(samples, reader, folder.tokenizer, TEMPLATES["v1"], image_size=24)
    for index, sample in enumerate(samples):
        found = dataset.sample(index, None)
        assert found.image.shape == (3, 24, 24)
        learnt = [label for label in found.encoded.labels if label != IGNORE_INDEX]
        answers = [text for role, text in sample.turns if role == "gpt"]
        assert learnt.count(folder.tokenizer.eos_id) == len(answers)
        assert folder.tokenizer.decode(learnt) == " ".join(answers)


def test_the_seed_draws_the_weights_and_nothing_else(tiny, data, tmp_path):
    make = partial(_made, data, tmp_path)
    assert make("same") == _files(tiny)
    other = make("other", "--seed", "1")
    assert {name for name, content in _files(tiny).items() if content != other[name]} == {"model.safetensors"}


def _made(data, parent, name, *more):
    make_tiny_llava.main(["--data", str(data), "--output", str(parent / name), *SIZES, *more])
    return _files(parent / name)


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_existing_folder_is_replaced_only_if_told(tiny, data, tmp_path):
    _made(data, tmp_path, "there")
    with pytest.raises(DataError, match="exists: give another folder, or --overwrite"):
        _made(data, tmp_path, "there")
    assert _made(data, tmp_path, "there", "--overwrite") == _files(tiny)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--data", "missing"], DataError, "no folder at --data missing: draw one"),
        (["--vocab_size", "3"], DataError, "sentencepiece cannot train with --vocab_size 3"),
        (["--hidden_size", "15"], ModelError, "hidden_size"),
        (["--patch_size", "30"], ModelError, "image_size 24 is smaller than patch_size 30"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(data, tmp_path, flags, error, message):
    with pytest.raises(error, match=message):
        _made(data, tmp_path, "out", *flags)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_line_and_exit_code_two(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", "--data", str(tmp_path), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        run(make_tiny_llava.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.json" in line
