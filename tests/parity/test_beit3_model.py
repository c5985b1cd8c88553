"""Our BEiT-3 against numbers recorded from the original release (float32, CPU).

Measured on the default recordings: logits within 3e-6, losses equal, gradients 2e-6 of the largest entry, tables equal.
The tolerances leave room for other recordings and kernels.
"""

import re
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from models.beit3.config import BEiT3Config
from models.beit3.loading import prepare_beit3_state_dict
from models.beit3.tasks import (
    BEiT3ForCaptioning,
    BEiT3ForImageClassification,
    BEiT3ForRetrieval,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
    captioning_loss,
    contrastive_loss,
)
from models.losses import vqa_loss
from models.pos_embed import resize_pos_embed
from tests.parity.beit3_fixtures import assert_grads_match, config_of, with_weights
from tests.parity.fixture_files import load_fixture

LOGITS = {"atol": 1e-5, "rtol": 0}
LOSS = {"atol": 1e-5, "rtol": 1e-5}
GRAD_RTOL = 1e-4
DROP_WORST_AFTER = 12000  # the iteration to which the names of recorded losses refer, the reference's default


def vqa_model(recording: dict[str, Any]) -> BEiT3ForVisualQuestionAnswering:
    model = BEiT3ForVisualQuestionAnswering(config_of(recording["config"]), recording["config"]["num_classes"])
    return with_weights(model, recording["state_dict"])


def vqa_inputs(recording: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    inputs = recording["inputs"]
    return inputs["image"], inputs["question"], inputs["padding_mask"]


def caption_model(recording: dict[str, Any]) -> BEiT3ForCaptioning:
    return with_weights(BEiT3ForCaptioning(config_of(recording["config"])), recording["state_dict"])


def caption_inputs(recording: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    inputs = recording["inputs"]
    return inputs["image"], inputs["masked_tokens"], inputs["padding_mask"]


def trunk_state(recording: dict[str, Any], task: str, *, final_norm: bool) -> dict[str, Tensor]:
    """Trunk and one head of the shared recording; a model without final norm has no place for that norm."""
    trunk = {k: v for k, v in recording["state_dict"].items() if final_norm or "encoder.layer_norm" not in k}
    return {**trunk, **recording["tasks"][task]["head_state_dict"]}


def test_vqa_state_dict_has_the_recorded_names_in_the_recorded_order():
    recording = load_fixture("beit3_vqav2.pt")
    assert list(vqa_model(recording).state_dict()) == list(recording["state_dict"])


def test_captioning_state_dict_has_the_recorded_names_in_the_recorded_order():
    recording = load_fixture("beit3_captioning.pt")
    assert list(caption_model(recording).state_dict()) == list(recording["state_dict"])


@torch.no_grad()
def test_vqa_logits_match():
    recording = load_fixture("beit3_vqav2.pt")
    assert_close(vqa_model(recording)(*vqa_inputs(recording)), recording["outputs"]["logits"], **LOGITS)


@torch.no_grad()
def test_all_tokens_of_the_vqa_encoder_match():
    recording = load_fixture("beit3_vqav2.pt")
    streams = vqa_model(recording).beit3(*vqa_inputs(recording))
    assert_close(torch.cat(streams, dim=1), recording["outputs"]["encoder_out"], **LOGITS)


@torch.no_grad()
def test_vqa_embeddings_before_positions_match():
    recording = load_fixture("beit3_vqav2.pt")
    image, question, _ = vqa_inputs(recording)
    trunk = vqa_model(recording).beit3
    embedded = torch.cat([trunk.vision_embed(image), trunk.text_embed(question)], dim=1)
    assert_close(embedded, recording["outputs"]["encoder_embedding"], **LOGITS)


@torch.no_grad()
def test_pooled_class_token_matches():
    recording = load_fixture("beit3_vqav2.pt")
    model = vqa_model(recording)
    image_tokens, _ = model.beit3(*vqa_inputs(recording), keep=(1, 0))
    assert_close(model.pooler(image_tokens[:, 0]), recording["outputs"]["pooled"], **LOGITS)


def test_vqa_loss_and_gradients_match_with_the_same_ones_none_and_zero():
    recording = load_fixture("beit3_vqav2.pt")
    model = vqa_model(recording).train()
    loss = vqa_loss(model(*vqa_inputs(recording)), recording["inputs"]["labels"])
    assert_close(loss.detach(), recording["loss"], **LOSS)
    loss.backward()
    assert_grads_match(model, recording, rtol=GRAD_RTOL)


@torch.no_grad()
def test_caption_logits_at_masked_positions_match():
    recording = load_fixture("beit3_captioning.pt")
    logits = caption_model(recording)(*caption_inputs(recording), recording["inputs"]["language_masked_pos"])
    assert_close(logits, recording["outputs"]["masked_logits"], **LOGITS)


@torch.no_grad()
def test_caption_logits_at_all_positions_match():
    recording = load_fixture("beit3_captioning.pt")
    assert_close(
        caption_model(recording)(*caption_inputs(recording)), recording["outputs"]["all_text_logits"], **LOGITS
    )


@torch.no_grad()
def test_caption_accuracy_at_masked_positions_matches():
    recording = load_fixture("beit3_captioning.pt")
    logits = caption_model(recording)(*caption_inputs(recording), recording["inputs"]["language_masked_pos"])
    correct = logits.argmax(dim=-1) == recording["outputs"]["targets"]
    assert_close(correct.float().mean(), recording["outputs"]["acc"], **LOSS)


def loss_case(name: str, config: dict[str, Any]) -> dict[str, float]:
    """Smoothing and drop ratio that the name of a recorded loss tells, such as iter_12001_drop_worst_0.2."""
    match = re.fullmatch(
        r"(?=.)(?:iter_(?P<iter>\d+)_?)?(?:no_smoothing_?|smoothing_(?P<smoothing>[\d.]+)_?)?"
        r"(?:no_drop|drop_worst_(?P<drop>[\d.]+))?",
        name,
    )
    assert match is not None, f"no rule to read the recorded loss {name!r}"
    smoothing = 0.0 if "no_smoothing" in name else float(match["smoothing"] or config["label_smoothing"])
    dropping = match["iter"] is None or int(match["iter"]) > DROP_WORST_AFTER
    return {"label_smoothing": smoothing, "drop_worst_ratio": float(match["drop"] or 0) if dropping else 0.0}


def test_every_recorded_caption_loss_matches():
    recording = load_fixture("beit3_captioning.pt")
    outputs = recording["outputs"]
    assert outputs["losses"]
    for name, expected in outputs["losses"].items():
        loss = captioning_loss(outputs["masked_logits"], outputs["targets"], **loss_case(name, recording["config"]))
        assert_close(loss, expected, **LOSS, msg=lambda text, name=name: f"{name}: {text}")


def test_caption_loss_and_gradients_match_with_the_same_ones_none_and_zero():
    recording = load_fixture("beit3_captioning.pt")
    model = caption_model(recording).train()
    masked = recording["inputs"]["language_masked_pos"]
    targets = recording["inputs"]["language_tokens"][masked.bool()]
    assert_close(targets, recording["outputs"]["targets"])
    logits = model(*caption_inputs(recording), masked)
    loss = captioning_loss(logits, targets, label_smoothing=recording["config"]["label_smoothing"])
    assert_close(loss.detach(), recording["loss"], **LOSS)
    loss.backward()
    assert_grads_match(model, recording, rtol=GRAD_RTOL)


@torch.no_grad()
def test_caption_steps_with_the_words_so_far_and_one_mask_match():
    """The recorded steps used a cache; the same logits come from the whole prefix in one pass, the mask last."""
    recording = load_fixture("beit3_captioning.pt")
    model, forced = caption_model(recording), recording["inputs"]["forced_tokens"]
    image = recording["inputs"]["image"]
    bos, mask = (torch.full_like(forced[:, :1], recording["config"][f"{name}_token_id"]) for name in ("bos", "mask"))
    for step, expected in enumerate(recording["outputs"]["step_logits"]):
        tokens = torch.cat([bos, forced[:, :step], mask], dim=1)
        assert_close(model(image, tokens)[:, -1], expected, **LOGITS)


@torch.no_grad()
def test_nlvr2_logits_and_loss_match():
    recording = load_fixture("beit3_extra_heads.pt")
    task = recording["tasks"]["nlvr2"]
    config = config_of(recording["config"], normalize_output=True)
    model = BEiT3ForVisualReasoning(config, task["outputs"]["logits"].shape[-1])
    with_weights(model, trunk_state(recording, "nlvr2", final_norm=True))
    inputs = task["inputs"]
    logits = model(inputs["image_a"], inputs["image_b"], inputs["text_description"], inputs["padding_mask"])
    assert_close(logits, task["outputs"]["logits"], **LOGITS)
    assert_close(torch.nn.functional.cross_entropy(logits, inputs["label"]), task["outputs"]["loss"], **LOSS)


@torch.no_grad()
def test_image_classification_logits_match():
    recording = load_fixture("beit3_extra_heads.pt")
    task = recording["tasks"]["imageclassification"]
    config = config_of(recording["config"], normalize_output=False)
    model = BEiT3ForImageClassification(config, task["outputs"]["logits"].shape[-1])
    with_weights(model, trunk_state(recording, "imageclassification", final_norm=False))
    assert_close(model(task["inputs"]["image"]), task["outputs"]["logits"], **LOGITS)


@torch.no_grad()
def test_retrieval_features_and_loss_match():
    recording = load_fixture("beit3_extra_heads.pt")
    task = recording["tasks"]["retrieval"]
    model = BEiT3ForRetrieval(config_of(recording["config"], normalize_output=True))
    with_weights(model, trunk_state(recording, "retrieval", final_norm=True))
    inputs = task["inputs"]
    vision, language, logit_scale = model(inputs["image"], inputs["text_description"], inputs["padding_mask"])
    assert_close(vision, task["outputs"]["vision_cls"], **LOGITS)
    assert_close(language, task["outputs"]["language_cls"], **LOGITS)
    assert_close(contrastive_loss(vision, language, logit_scale), task["outputs"]["loss"], **LOSS)


def test_position_tables_are_resized_as_the_original_does():
    for case in load_fixture("beit3_pos_embed_interp.pt")["outputs"]["cases"]:
        assert_close(resize_pos_embed(case["input"], case["to_grid"], 3), case["output"], **LOGITS)


def test_preparing_a_checkpoint_resizes_its_position_table():
    name = "beit3.encoder.embed_positions.A.weight"
    for case in load_fixture("beit3_pos_embed_interp.pt")["outputs"]["cases"]:
        config = BEiT3Config(image_size=case["to_grid"] * case["patch_size"], patch_size=case["patch_size"])
        state = prepare_beit3_state_dict({name: case["input"]}, config)
        assert_close(state[name], case["output"], **LOGITS)
