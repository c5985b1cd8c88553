"""Heads, losses, start values, and what the models tell the optimizer about their parameters."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from models.beit3.config import BEiT3Config
from models.beit3.tasks import (
    BEiT3ForImageClassification,
    BEiT3ForRetrieval,
    build_beit3,
    captioning_loss,
    contrastive_loss,
)
from models.losses import vqa_loss

TASKS = ["vqav2", "coco_captioning", "nlvr2", "imagenet", "coco_retrieval"]


def tiny(task: str) -> nn.Module:
    torch.manual_seed(0)
    normalize_output = task not in ("vqav2", "imagenet")
    config = BEiT3Config(32, embed_dim=96, num_layers=3, num_heads=4, vocab_size=60, normalize_output=normalize_output)
    return build_beit3(task, config, num_classes=7 if task == "vqav2" else None)


def loss_of(model: nn.Module, task: str) -> torch.Tensor:
    torch.manual_seed(1)
    image, text = torch.randn(2, 3, 32, 32), torch.randint(0, 60, (2, 5))
    if task == "vqav2":
        return vqa_loss(model(image, text), torch.rand(2, 7))
    if task == "coco_captioning":
        masked = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 0, 0]])
        return captioning_loss(model(image, text, None, masked), text[masked.bool()])
    if task == "nlvr2":
        return F.cross_entropy(model(image, image.flip(0), text), torch.tensor([0, 1]))
    if task == "imagenet":
        return F.cross_entropy(model(image), torch.tensor([3, 999]))
    return contrastive_loss(*model(image, text))


@pytest.mark.parametrize("task", TASKS)
def test_every_parameter_but_the_unused_ones_gets_a_gradient(task: str):
    model = tiny(task)
    loss_of(model, task).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == model.unused_in_finetuning()


@pytest.mark.parametrize("task", TASKS)
def test_layer_ids_follow_the_depth(task: str):
    model = tiny(task)
    last = model.num_layers + 1
    ids = {name: model.layer_id(name) for name, _ in model.named_parameters()}
    for name, layer_id in ids.items():
        if "embed" in name:
            assert layer_id == 0, name
        elif ".layers." in name:
            assert layer_id == int(name.split(".layers.")[1].split(".")[0]) + 1, name
        else:
            assert layer_id == last, name
    assert set(ids.values()) == set(range(last + 1))


@pytest.mark.parametrize("task", TASKS)
def test_names_without_decay_are_those_of_the_original_that_exist(task: str):
    expected = {"beit3.encoder.embed_positions.A.weight", "beit3.vision_embed.cls_token"}
    assert tiny(task).no_weight_decay() == expected | ({"logit_scale"} if task == "coco_retrieval" else set())


def test_untrained_question_answering_starts_near_its_known_loss():
    model = tiny("vqav2")
    assert loss_of(model, "vqav2").item() == pytest.approx(7 * math.log(2), rel=0.05)


def test_start_values_are_those_of_the_original():
    torch.manual_seed(0)
    model = BEiT3ForRetrieval(BEiT3Config(image_size=32, embed_dim=96, num_layers=2, num_heads=4, vocab_size=500))
    state = model.state_dict()
    assert state["beit3.encoder.layers.1.ffn.B.fc1.weight"].abs().max() <= 0.02
    assert state["beit3.text_embed.weight"].std().item() == pytest.approx(96**-0.5, rel=0.03)
    assert state["beit3.encoder.embed_positions.B.weight"].std().item() == pytest.approx(1, rel=0.03)
    assert state["logit_scale"].item() == pytest.approx(math.log(1 / 0.07))
    assert not state["beit3.vision_embed.cls_token"].any()
    assert not any(value.any() for name, value in state.items() if name.endswith("_proj.A.bias"))


@pytest.mark.parametrize("task", ["nlvr2", "imagenet"])
def test_new_classification_heads_start_near_zero(task: str):
    head = {name: value for name, value in tiny(task).state_dict().items() if name.startswith("head.")}
    assert max(v.abs().max().item() for name, v in head.items() if "norm" not in name) <= 0.02 * 0.001


def test_the_same_seed_builds_the_same_model():
    first, second = tiny("vqav2").state_dict(), tiny("vqav2").state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_question_loss_sums_over_answers_and_averages_over_the_batch():
    logits, targets = torch.randn(4, 9), torch.rand(4, 9)
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / 4
    assert_close(vqa_loss(logits, targets), expected)


def test_caption_loss_is_the_divergence_from_the_smoothed_targets():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 11), torch.randint(0, 11, (6,))
    q = torch.full((6, 11), 0.2 / 10).scatter(1, targets[:, None], 0.8)
    expected = F.kl_div(logits.log_softmax(-1), q, reduction="sum") / 6
    assert_close(captioning_loss(logits, targets, label_smoothing=0.2), expected)


def test_caption_loss_of_a_perfect_guess_is_zero():
    smoothed = torch.full((1, 5), 0.1 / 4)
    smoothed[0, 2] = 0.9
    assert captioning_loss(smoothed.log(), torch.tensor([2]), label_smoothing=0.1).item() == pytest.approx(0, abs=1e-6)


def test_dropping_the_worst_keeps_the_rounded_down_number_of_best_positions():
    torch.manual_seed(0)
    logits, targets = torch.randn(7, 11), torch.randint(0, 11, (7,))
    each = torch.stack([captioning_loss(logits[i : i + 1], targets[i : i + 1]) for i in range(7)])
    expected = each.sort().values[: int(7 * 0.8)].mean()
    assert_close(captioning_loss(logits, targets, drop_worst_ratio=0.2), expected)


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(3, 8).bfloat16()
    assert vqa_loss(logits, torch.rand(3, 8)).dtype == torch.float32
    assert captioning_loss(logits, torch.zeros(3, dtype=torch.long)).dtype == torch.float32


def test_contrastive_loss_over_two_processes_averages_to_that_of_one():
    torch.manual_seed(0)
    vision, language = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    scale = torch.tensor(1.5)
    whole = contrastive_loss(vision, language, scale)
    gathered = {"all_vision": vision, "all_language": language}
    parts = [contrastive_loss(vision[i : i + 3], language[i : i + 3], scale, **gathered, first_label=i) for i in (0, 3)]
    assert_close(sum(parts) / 2, whole)


def test_retrieval_encodes_one_modality_alone():
    model = tiny("coco_retrieval").eval()
    image, text = torch.randn(2, 3, 32, 32), torch.randint(0, 60, (2, 5))
    vision, language, _ = model(image, text)
    assert_close(model(image)[0], vision)
    assert_close(model(text=text)[1], language)
    assert model(image)[1] is None
    assert_close(vision.norm(dim=-1), torch.ones(2))


def test_image_classification_averages_the_patches_without_the_class_token():
    torch.manual_seed(0)
    model = BEiT3ForImageClassification(BEiT3Config(image_size=32, embed_dim=24, num_layers=1, num_heads=3), 4).eval()
    image = torch.randn(1, 3, 32, 32)
    tokens = model.beit3(image)[0]
    assert_close(model(image), model.head(model.fc_norm(tokens[:, 1:].mean(1))))
