"""Our VLE against numbers recorded from the original (float32, CPU).

Measured on the default recordings: see each tolerance. Padded rows are compared too.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models.clip_vision import CLIPVisionConfig, CLIPVisionTransformer
from models.loading import load_weights
from models.losses import vqa_loss
from models.pos_embed import resize_pos_embed
from models.vle.config import VLEConfig, VLETextConfig
from models.vle.deberta import DebertaV2, distance_buckets
from models.vle.loading import prepare_vle_state_dict
from models.vle.vle import VLE, Boxes, VLEForVQA
from tests.parity.fixture_files import load_fixture

CLOSE = {"atol": 1e-5, "rtol": 0}
GRAD_RTOL = 1e-4
TRUE_ZERO = 1e-6  # key biases of softmax attentions: their gradient is rounding noise on both sides


def without_place_numbers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.endswith("position_ids")}


def loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    load_weights(model, state)
    return model.eval()


def check_grads(model: nn.Module, recorded: dict[str, torch.Tensor], prefix: str = "") -> None:
    own = dict(model.named_parameters())
    for name, expected in recorded.items():
        found = own[name.removeprefix(prefix)].grad
        largest = max(expected.abs().max().item(), TRUE_ZERO / GRAD_RTOL)
        assert (found - expected).abs().max().item() <= GRAD_RTOL * largest, name


def vision_tower() -> tuple[CLIPVisionTransformer, dict[str, Any]]:
    recording = load_fixture("vle_clip_vision.pt")
    state = {name.removeprefix("vision_model."): v for name, v in recording["state_dict"].items()}
    model = CLIPVisionTransformer(CLIPVisionConfig.from_dict(recording["config"]))
    return loaded(model, without_place_numbers(state)), recording


def test_image_tower():
    model, recording = vision_tower()
    inputs, outputs = recording["inputs"], recording["outputs"]
    states = model.hidden_states(inputs["pixel_values"])
    for found, expected in zip(states, outputs["hidden_states"], strict=True):
        assert_close(found, expected, **CLOSE)
    assert_close(states[-1], model(inputs["pixel_values"]), atol=0, rtol=0)
    post = model.post_layernorm(states[-1])
    assert_close(post, outputs["post"], **CLOSE)
    assert_close(post[:, 0], outputs["pooler_output"], **CLOSE)


def test_image_tower_gradients():
    model, recording = vision_tower()
    inputs = recording["inputs"]
    post = model.post_layernorm(model(inputs["pixel_values"]))
    loss = ((post * inputs["weight_tokens"]).sum() + (post[:, 0] * inputs["weight_pool"]).sum()) / 10
    assert_close(loss, recording["loss"], **CLOSE)
    loss.backward()
    check_grads(model, recording["grads"], prefix="vision_model.")


def text_tower() -> tuple[DebertaV2, dict[str, Any]]:
    recording = load_fixture("vle_deberta.pt")
    model = DebertaV2(VLETextConfig.from_dict(recording["config"], "config"))
    return loaded(model, without_place_numbers(recording["state_dict"])), recording


def test_text_tower():
    model, recording = text_tower()
    for inputs, outputs in zip(recording["inputs"]["cases"], recording["outputs"]["cases"], strict=True):
        found = model(inputs["input_ids"], inputs["attention_mask"])
        assert_close(found, outputs["last_hidden_state"], **CLOSE)
        if "last_hidden_state_without_mask" in outputs:
            assert_close(model(inputs["input_ids"]), outputs["last_hidden_state_without_mask"], **CLOSE)


def test_distance_buckets():
    _, recording = text_tower()
    for sizes, table in recording["outputs"]["log_buckets"].items():
        num_buckets, max_positions = map(int, sizes.split(","))
        assert torch.equal(distance_buckets(table["relative"], num_buckets, max_positions), table["bucket"]), sizes


def test_text_tower_gradients():
    model, recording = text_tower()
    case = recording["inputs"]["cases"][recording["inputs"]["loss_case"]]
    out = model(case["input_ids"], case["attention_mask"])
    loss = (out * recording["inputs"]["weight"]).sum() / 10
    assert_close(loss, recording["loss"], **CLOSE)
    loss.backward()
    check_grads(model, recording["grads"])
    assert not model.embeddings.word_embeddings.weight.grad[model.config.pad_token_id].any()


def trunk() -> tuple[VLE, dict[str, Any]]:
    recording = load_fixture("vle_trunk.pt")
    model = VLE(VLEConfig.from_dict(recording["config"]))
    return loaded(model, without_place_numbers(recording["state_dict"])), recording


def boxes_of(inputs: dict[str, Any]) -> Boxes:
    return Boxes(inputs["patch_ids"], *inputs["extend_token_type_ids"])


@pytest.mark.parametrize("with_boxes", [False, True])
def test_trunk(with_boxes):
    model, recording = trunk()
    inputs, expected = recording["inputs"], recording["outputs"]["boxes" if with_boxes else "plain"]
    boxes = boxes_of(inputs) if with_boxes else None
    found = model(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"], boxes)
    assert_close(found.pooled, expected["pooler_output"], **CLOSE)
    assert_close(found.text, expected["text_embeds"], **CLOSE)
    assert_close(found.image, expected["image_embeds"], **CLOSE)


def test_trunk_gradients():
    model, recording = trunk()
    inputs = recording["inputs"]
    out = model(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])
    loss = (out.pooled * inputs["weight_pool"]).sum() + (out.text * inputs["weight_text"]).sum()
    loss = loss + (out.image * inputs["weight_image"]).sum()
    loss = loss / 10
    assert_close(loss, recording["loss"], **CLOSE)
    loss.backward()
    check_grads(model, recording["grads"])


def vqa_model(config: dict[str, Any] | None = None) -> tuple[VLEForVQA, dict[str, Any]]:
    recording = load_fixture("vle_vqa.pt")
    config = VLEConfig.from_dict(recording["config"])
    state = prepare_vle_state_dict(recording["state_dict"], config)
    return loaded(VLEForVQA(config), state), recording


def test_answers_loss_and_gradients():
    model, recording = vqa_model()
    inputs, outputs = recording["inputs"], recording["outputs"]
    logits = model(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])
    assert_close(logits, outputs["logits"], **CLOSE)
    loss = vqa_loss(logits, outputs["targets"])
    assert_close(loss, recording["loss"], atol=2e-5, rtol=0)
    loss.backward()
    check_grads(model, recording["grads"])
    for name, parameter in model.named_parameters():
        expected = recording["grad_norms"][name]
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-4, abs=TRUE_ZERO), name


def test_layer_norm_epsilons():
    """Weights so small that each epsilon decides."""
    model, _ = vqa_model()
    recording, inputs = load_fixture("vle_eps.pt"), load_fixture("vle_vqa.pt")["inputs"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(recording["config"]["multiply"].get(name, 1.0))
        outputs = recording["outputs"]
        fused = model.vle(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])
        vision = model.vle.vision_model.vision_model
        found = {
            "image_features": vision.post_layernorm(vision(inputs["pixel_values"])),
            "text_features": model.vle.text_model(inputs["input_ids"], inputs["attention_mask"]),
            "pooler_output": fused.pooled,
            "text_embeds": fused.text,
            "image_embeds": fused.image,
            "logits": model.vqa_classifier(fused.pooled),
        }
    for name, value in found.items():
        assert (value - outputs[name]).abs().max() <= 1e-4 * outputs[name].abs().max(), name


def test_resized_position_tables():
    for case in load_fixture("vle_pos_embed.pt")["outputs"]["cases"]:
        grid = case["image_size_after"] // case["patch_size"]
        assert_close(
            resize_pos_embed(case["before"], grid, 1), case["after"], atol=1e-6, rtol=1e-6
        )  # values of up to 3: two roundings
