"""A short run of the original's trainer with adapters: groups, rates, losses and weights.

Measured: losses as recorded (four decimals), weights at most 1e-6 apart.
"""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from engine.optim import build_adamw
from engine.schedule import warmup_decay
from models.llava.llama import IGNORED
from models.loading import load_weights
from models.lora import LoRAConfig, add_adapters
from scripts.llava_optim import llava_parameter_groups
from tests.parity.fixture_files import load_fixture
from tests.parity.llava_fixtures import llava_model

PREFIX = "base_model.model."


def own_name(name: str) -> str:
    return name.removeprefix(PREFIX).replace(".default.", ".")


@pytest.fixture(scope="module")
def recording() -> dict[str, Any]:
    return load_fixture("llava_lora_training.pt")


def start(recording: dict[str, Any]) -> Any:
    config, base = recording["config"], load_fixture("llava_lora.pt")
    model = llava_model(config, base["state_dict"]).requires_grad_(False)
    adapter = LoRAConfig(r=config["lora_r"], lora_alpha=config["lora_alpha"], lora_dropout=config["lora_dropout"])
    add_adapters(model.model.layers, adapter)
    model.model.mm_projector.requires_grad_(True)
    first = {own_name(name): value for name, value in recording["inputs"]["start_trainable"].items()}
    load_weights(model, first, may_miss=("*",))
    return model.train()


def groups_of(model: Any, settings: dict[str, Any]) -> list[dict[str, Any]]:
    return llava_parameter_groups(
        model.named_parameters(),
        lr=settings["learning_rate"],
        projector_lr=settings["mm_projector_lr"],
        weight_decay=settings["weight_decay"],
    )


def test_groups(recording):
    settings = recording["config"]["training"]
    found = groups_of(start(recording), settings)
    recorded = [group for group in recording["outputs"]["optimizer_groups"] if group["names"]]
    for group, expected in zip(found, recorded, strict=True):
        assert set(group["param_names"]) == set(map(own_name, expected["names"]))
        assert group["weight_decay"] == expected["weight_decay"]
        assert settings["learning_rate"] * group["lr_scale"] == pytest.approx(expected["lr"], rel=1e-12)


def batch_of(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(key: str, value: int) -> torch.Tensor:
        rows = [torch.nn.functional.pad(s[key], (0, longest - len(s[key])), value=value) for s in samples]
        return torch.stack(rows)

    ids = padded("input_ids", 0)
    images = torch.stack([sample["image"] for sample in samples])
    return {"ids": ids, "labels": padded("labels", IGNORED), "mask": ids != 0, "pixels": images}


def test_steps(recording):
    settings, outputs = recording["config"]["training"], recording["outputs"]
    model, data = start(recording), recording["inputs"]["data"]
    size, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    total = settings["optimizer_steps"]
    for number, expected in enumerate(outputs["first_batches"]):
        batch = batch_of(data[number * size : (number + 1) * size])
        assert torch.equal(batch["ids"], expected["input_ids"])
        assert torch.equal(batch["labels"], expected["labels"])
    betas = settings["adam_beta1"], settings["adam_beta2"]
    groups = groups_of(model, settings)
    optimizer = build_adamw(groups, lr=settings["learning_rate"], betas=betas, eps=settings["adam_epsilon"])
    warmup = math.ceil(total * settings["warmup_ratio"])
    rate = warmup_decay(settings["learning_rate"], 0.0, warmup_steps=warmup, total_steps=total, power=None)
    parameters = [parameter for group in groups for parameter in group["params"]]
    place = 0
    for step in range(total):
        losses = []
        for _ in range(accumulation):
            batch = batch_of(data[place : place + size])
            place += size
            loss = model(batch["ids"], batch["pixels"], mask=batch["mask"], labels=batch["labels"]).loss
            (loss / accumulation).backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["lr_scale"]
        optimizer.step()
        optimizer.zero_grad()
        assert sum(losses) / len(losses) == pytest.approx(outputs["step_loss"][step], abs=1e-4)
        assert rate(step + 1) == pytest.approx(outputs["step_lr"][step], abs=1e-12)
    state = model.state_dict()
    for name, expected in outputs["end_trainable"].items():
        assert_close(state[own_name(name)], expected, atol=1e-5, rtol=1e-4, msg=name)
