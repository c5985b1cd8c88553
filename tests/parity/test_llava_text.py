"""LLaVA's tokenizer, prompts, labels and collator against the recordings of the original: exact."""

import pytest

from data.errors import DataError
from data.llava_conversation import (
    IGNORE_INDEX,
    TEMPLATES,
    Encoded,
    build_prompt,
    collate,
    encode_conversation,
    move_image_token,
)
from data.tokenizers.llama import IMAGE_TOKEN_ID, LlamaTokenizer
from tests.original_labels import encode_as_the_original
from tests.parity.fixture_files import fixture_path, load_fixture

LEGACY = {"legacy": True, "non_legacy": False}
LONG = 2048  # the original's model_max_length where the recording's name does not say another


@pytest.fixture(scope="module")
def recorded():
    return load_fixture("llava_conversation.pt")


@pytest.fixture(scope="module", params=sorted(LEGACY))
def runs(recorded, request, tmp_path_factory):
    """(tokenizer, its recorded outputs) for each recorded sentencepiece model."""
    found = []
    for name, model in recorded["inputs"]["sentencepiece"].items():
        outputs = recorded["outputs"].get(f"{name}_{request.param}")
        if outputs is None:
            continue
        path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
        path.write_bytes(bytes(model.tolist()))
        found.append((LlamaTokenizer.load(path, legacy=LEGACY[request.param]), outputs))
    assert found
    return found


def conversations(recorded, group):
    """(name of the input group, template, has_image, max_length) of a recorded group of samples."""
    name, _, limit = group.partition("_max_length_")
    inputs, template, has_image = {
        "v1": ("conversations", "v1", True),
        "v1_text_only": ("text_only", "v1", False),
        "plain": ("plain", "plain", True),
        "llava_llama_2": ("conversations", "llava_llama_2", True),
    }[name]
    return recorded["inputs"][inputs], TEMPLATES[template], has_image, int(limit) if limit else LONG


def cases(recorded, outputs):
    """(name, turns, arguments of encode_conversation, recorded result) of every recorded sample."""
    groups = [key for key in outputs if key.startswith(("v1", "plain", "llava_llama_2"))]
    assert len(groups) >= 4
    for group in groups:
        inputs, template, has_image, max_length = conversations(recorded, group)
        for name, expected in outputs[group].items():
            settings = {"template": template, "has_image": has_image, "max_length": max_length}
            yield f"{group}/{name}", inputs[name], settings, expected


def learned(labels):
    return any(label != IGNORE_INDEX for label in labels)


def test_encoded_ids_equal_the_recorded_ones(runs):
    for tokenizer, outputs in runs:
        assert outputs["encode"]
        for text, ids in outputs["encode"].items():
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.encode(text, bos=False) == ids[1:], text


def test_ids_around_images_equal_the_recorded_ones(runs):
    for tokenizer, outputs in runs:
        assert outputs["tokenizer_image_token"]
        for text, ids in outputs["tokenizer_image_token"].items():
            assert tokenizer.encode_with_images(text) == ids, text
            assert tokenizer.locate(text, images=True)[0] == ids, text


def test_decoded_texts_equal_the_recorded_ones(runs):
    for tokenizer, outputs in runs:
        assert outputs["decode"]
        assert outputs["decode_ids"]
        for row in [*outputs["decode"].values(), *outputs["decode_ids"]]:
            assert tokenizer.decode(row["ids"]) == row["text"], row["ids"]
        for row in outputs["decode"].values():
            assert tokenizer.decode(row["ids"][1:]) == row["without_bos"], row["ids"]


def test_prompts_equal_the_recorded_ones(recorded):
    one = [("human", "<image>\nWhat is this?"), ("gpt", None)]
    two = [*one[:1], ("gpt", "a cup"), ("human", "Which color?"), ("gpt", "red")]
    ours = {name: template for name, template in TEMPLATES.items() if name in recorded["outputs"]["prompts"]}
    assert set(ours) == set(TEMPLATES)
    for name, template in ours.items():
        for turns, prompt in zip((one, two), ("one_open_turn", "two_full_turns"), strict=True):
            expected = recorded["outputs"]["prompts"][name][prompt]
            if expected is not None:
                assert build_prompt(turns, template) == expected, name
            else:  # the original cannot write it either
                with pytest.raises(DataError, match="no place for answers"):
                    build_prompt(turns, template)


def test_image_tokens_are_moved_as_recorded(recorded, runs):
    for _, outputs in runs:
        for name, turns, settings, expected in cases(recorded, outputs):
            texts = [move_image_token(text) if settings["has_image"] else text for _, text in turns]
            assert texts == expected["turns_after_preprocess_multimodal"], name


def test_default_labels_equal_the_recorded_ones_wherever_those_learn_something(recorded, runs):
    for tokenizer, outputs in runs:
        compared = 0
        for name, turns, settings, expected in cases(recorded, outputs):
            whole = Encoded(expected["input_ids"], expected["labels"])
            # with this stand-in for the original ours is compared elsewhere
            assert encode_as_the_original(turns, tokenizer, **settings) == whole, name
            assert not (expected["mismatch_warning"] and learned(expected["labels"])), name
            if not learned(expected["labels"][: settings["max_length"]]):
                continue
            assert encode_conversation(turns, tokenizer, **settings) == whole, name
            compared += 1
        assert compared >= 10


def test_default_labels_of_samples_that_the_original_masks_are_answers_or_an_error(recorded, runs):
    for tokenizer, outputs in runs:
        for name, turns, settings, expected in cases(recorded, outputs):
            if not expected["mismatch_warning"]:
                continue
            if not any(text for role, text in turns if role == "gpt"):
                with pytest.raises(DataError, match="sample 7: no token of an answer"):
                    encode_conversation(turns, tokenizer, **settings, where="sample 7")
                continue
            encoded = encode_conversation(turns, tokenizer, **settings)
            assert encoded.ids == expected["input_ids"], name
            answers = [label for label in encoded.labels if label != IGNORE_INDEX]
            assert answers == tokenizer.encode(turns[-1][1] + "</s>", bos=False), name


def test_what_the_original_refuses_is_an_error_that_names_the_place(runs):
    turns = {
        "two_humans_in_a_row": [("human", "a"), ("human", "b")],
        "unknown_role": [("human", "a"), ("robot", "b")],
    }
    for tokenizer, outputs in runs:
        assert set(outputs["errors"]) == set(turns)
        for name, expected in outputs["errors"].items():
            assert expected["raises"]
            settings = {"has_image": False, "max_length": LONG, "where": "train.json sample a1"}
            with pytest.raises(DataError, match="train.json sample a1: turn 2 is from"):
                encode_conversation(turns[name], tokenizer, TEMPLATES["v1"], **settings)


def test_batches_equal_the_recorded_ones(recorded, runs):
    for tokenizer, outputs in runs:
        names = outputs["collator"]["instances"]
        samples = [Encoded(outputs["v1"][name]["input_ids"], outputs["v1"][name]["labels"]) for name in names]
        groups = [key for key in outputs if key.startswith("collator")]
        assert len(groups) >= 2
        for group in groups:
            _, _, limit = group.partition("_max_length_")
            batch = collate(samples, tokenizer.pad_id, int(limit) if limit else LONG)
            assert batch["ids"].equal(outputs[group]["input_ids"])
            assert batch["labels"].equal(outputs[group]["labels"])
            assert batch["mask"].equal(outputs[group]["attention_mask"])


def test_the_tokenizer_of_a_model_folder_follows_its_config():
    folder = fixture_path("llava_tiny") / "llava"
    tokenizer = LlamaTokenizer.load(folder)
    assert tokenizer.legacy is False
    assert tokenizer.vocab_size == LlamaTokenizer.load(folder / "tokenizer.model").vocab_size
    assert IMAGE_TOKEN_ID in tokenizer.encode_with_images("<image>\nWhat is this?")
