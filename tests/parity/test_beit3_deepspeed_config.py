"""The DeepSpeed settings file as the original writes it, character by character."""

import json

import pytest

from engine.deepspeed_config import fused_adam_fp16_config
from engine.errors import EngineError
from tests.parity.fixture_files import load_fixture


def test_settings_are_the_recorded_text():
    cases = load_fixture("beit3_data.pt")["outputs"]["deepspeed_configs"]
    assert cases
    for case in cases:
        args = case["args"]
        config = fused_adam_fp16_config(
            batch_size=args["batch_size"],
            accumulation_steps=args["update_freq"],
            world_size=case["world_size"],
            lr=args["lr"],
            weight_decay=args["weight_decay"],
            betas=tuple(args["opt_betas"]),
            eps=args["opt_eps"],
            initial_scale_power=args["initial_scale_power"],
            clip_grad=args["clip_grad"],
            zero_stage=args["zero_stage"],
        )
        assert json.dumps(config, indent=2) == case["json"].strip()


def test_a_stage_that_the_original_refuses_is_refused():
    with pytest.raises(EngineError, match="stages 0 and 1, got 2"):
        fused_adam_fp16_config(
            batch_size=1,
            accumulation_steps=1,
            world_size=1,
            lr=1.0,
            weight_decay=0.0,
            betas=(0.9, 0.999),
            zero_stage=2,
        )
