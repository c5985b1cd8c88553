"""Groups, schedules and AdamW runs as recorded from the original (numbers made by its own code, float32 on the CPU)."""

import argparse

import pytest
import torch

from engine.backend import TorchBackend
from engine.optim import build_adamw, parameter_groups
from engine.schedule import warmup_cosine
from models.beit3.tasks import BEiT3ForCaptioning, BEiT3ForVisualQuestionAnswering
from models.losses import vqa_loss
from run_beit3_finetuning import choose_rule
from tests.parity.beit3_fixtures import config_of
from tests.parity.fixture_files import load_fixture


@pytest.fixture(scope="module")
def recording():
    return load_fixture("beit3_optim.pt")


def build(recording, task="vqav2"):
    sizes = recording["config"]
    config = config_of(sizes, normalize_output=task == "captioning")
    if task == "captioning":
        return BEiT3ForCaptioning(config)
    model = BEiT3ForVisualQuestionAnswering(config, sizes["num_classes"])
    model.load_state_dict(recording["state_dict"])
    return model


def groups_of(model, settings):
    rule = choose_rule(
        argparse.Namespace(layer_decay=settings["layer_decay"], task_head_lr_weight=settings["task_head_lr_weight"]),
        model,
    )
    return parameter_groups(
        model.named_parameters(),
        weight_decay=settings["weight_decay"],
        no_decay=model.no_weight_decay(),
        rule=rule,
    )


def test_parameter_groups_have_the_recorded_names_members_decay_and_scales(recording):
    for table in recording["outputs"]["group_tables"]:
        groups = groups_of(build(recording, table["task"]), table)
        assert [group["name"] for group in groups] == [group["name"] for group in table["groups"]]
        for ours, theirs in zip(groups, table["groups"], strict=True):
            assert ours["param_names"] == theirs["params"]
            assert ours["weight_decay"] == theirs["weight_decay"]
            assert ours["lr_scale"] == pytest.approx(theirs["lr_scale"], rel=1e-15)


def test_schedules_are_the_recorded_ones_to_float64_rounding(recording):
    for schedule in recording["outputs"]["schedules"]:
        warmup = schedule["warmup_epochs"] * schedule["steps_per_epoch"]
        if schedule["warmup_steps"] > 0:
            warmup = schedule["warmup_steps"]
        values = schedule["values"].tolist()
        rate = warmup_cosine(schedule["lr"], schedule["min_lr"], warmup_steps=warmup, total_steps=len(values))
        ours = [rate(step) for step in range(len(values))]
        assert ours == pytest.approx(values, rel=1e-15, abs=1e-20)  # measured: equal, or one unit in the last place


def test_training_runs_end_with_the_recorded_parameters(recording):
    inputs = recording["inputs"]
    for run in recording["outputs"]["runs"]:
        model = build(recording)
        rate = warmup_cosine(
            run["lr"],
            run["min_lr"],
            warmup_steps=run["warmup_epochs"] * run["steps_per_epoch"],
            total_steps=run["epochs"] * run["steps_per_epoch"],
        )
        backend = TorchBackend(
            model,
            build_adamw(groups_of(model, run), lr=run["lr"], betas=tuple(run["betas"]), eps=run["eps"]),
            device=torch.device("cpu"),
            accumulation_steps=run["update_freq"],
            clip_grad=run["clip_grad"],
        )
        losses, norms = [], []
        for micro_batch in range(len(run["losses"])):
            batch = micro_batch % len(inputs["images"])
            logits = model(inputs["images"][batch], inputs["questions"][batch], inputs["padding_masks"][batch])
            loss = vqa_loss(logits, inputs["labels"][batch])
            backend.backward(loss)
            losses.append(loss.item())
            info = backend.step(rate(len(norms)))
            if info is not None:
                norms.append(info.grad_norm.item())
        assert losses == pytest.approx(run["losses"], rel=1e-5)  # measured 4e-7
        # measured 4e-7, with AVX2 2.3e-5: Adam's first steps are whole ones along mere rounding errors too
        assert norms == pytest.approx(run["grad_norms"], rel=1e-4)
        state = model.state_dict()
        for name, expected in run["params_after"].items():
            torch.testing.assert_close(state[name], expected, atol=2e-6, rtol=1e-5)  # measured 4e-7
        with torch.no_grad():
            logits = model(inputs["images"][0], inputs["questions"][0], inputs["padding_masks"][0])
        torch.testing.assert_close(logits, run["final_logits_batch0"], atol=1e-5, rtol=1e-5)
