"""VLE's parameter groups, schedules and six training steps against recorded ones.

Measured: see the tolerances; groups and rates equal.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from data.files import read_json
from engine.optim import build_optimizer
from engine.schedule import warmup_decay
from engine.weights import read_state_dict
from models.loading import load_weights
from models.losses import vqa_loss
from models.vle.config import VLEConfig
from models.vle.loading import prepare_vle_state_dict
from models.vle.vle import VLEForVQA
from scripts.vle_config import warmup_steps_of
from scripts.vle_optim import vle_parameter_groups
from tests.parity.fixture_files import fixture_path, load_fixture

PREFIX = "model."  # of the names in the original's train module


def tiny_model() -> VLEForVQA:
    folder = fixture_path("vle_tiny_for_vqa")
    config = VLEConfig.from_dict(read_json(folder / "config.json"))
    text = replace(config.text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = replace(config, text=text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = VLEForVQA(config)
    load_weights(model, prepare_vle_state_dict(read_state_dict(folder), config))
    return model


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return load_fixture("vle_optim.pt")


def groups_of(model: VLEForVQA, settings: dict[str, Any]) -> list[dict[str, Any]]:
    names = ("weight_decay", "lr_mult_head", "lr_mult_cross_modal")
    return vle_parameter_groups(model.named_parameters(), **{name: settings[name] for name in names})


def test_groups(recording):
    settings = recording["config"]["groups"]
    groups = groups_of(tiny_model(), settings)
    for group, expected in zip(groups, recording["outputs"]["groups"], strict=True):
        assert [PREFIX + name for name in group["param_names"]] == expected["names"]
        assert group["weight_decay"] == expected["weight_decay"]
        assert settings["learning_rate"] * group["lr_scale"] == pytest.approx(expected["initial_lr"], rel=1e-12)


def test_schedules(recording):
    for case in recording["outputs"]["schedules"]:
        total, rate = case["max_steps"], case["learning_rate"]
        warmup = warmup_steps_of(case["warmup_steps_setting"], total)
        assert warmup == case["warmup_steps"]
        power = None if case["decay_power"] == "cosine" else case["decay_power"]
        schedule = warmup_decay(rate, case["end_lr"], warmup_steps=warmup, total_steps=total, power=power)
        for step, expected in enumerate(case["lr_before_step"]):
            found = [multiplier * schedule(step) for multiplier in case["multipliers"]]
            assert found == pytest.approx(expected, rel=1e-12, abs=1e-18), (case, step)


def test_six_steps(recording):
    settings, outputs = recording["config"]["training"], recording["outputs"]
    model = tiny_model().train()
    groups = groups_of(model, settings)
    optimizer = build_optimizer("transformers_adamw", groups, lr=settings["learning_rate"], betas=(0.9, 0.98))
    schedule = warmup_decay(
        settings["learning_rate"],
        settings["end_lr"],
        warmup_steps=settings["warmup_steps"],
        total_steps=settings["max_steps"],
        power=settings["decay_power"],
    )
    batch = load_fixture("vle_e2e.pt")["outputs"]["train_batch"]
    targets = torch.zeros(len(batch["input_ids"]), len(model.config.labels))
    for row, (labels, scores) in enumerate(
        zip(recording["inputs"]["vqa_labels"], recording["inputs"]["vqa_scores"], strict=True)
    ):
        targets[row, labels] = torch.tensor(scores)
    for number, expected in enumerate(outputs["steps"]):
        rate = schedule(number)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected["lr"], rel=1e-12, abs=1e-18)
        loss = vqa_loss(model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]), targets)
        assert_close(loss.item(), expected["loss"], atol=5e-6, rtol=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parameters = {PREFIX + name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, expected in outputs["final_params"].items():
        assert_close(parameters[name], expected, atol=2e-6, rtol=0)
    for name, expected in outputs["final_norms"].items():
        assert parameters[name].double().norm().item() == pytest.approx(expected, abs=2e-5), name
    for name, expected in outputs["final_sums"].items():
        assert parameters[name].double().sum().item() == pytest.approx(expected, abs=5e-4), name
