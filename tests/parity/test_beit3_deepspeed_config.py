"""DeepSpeed's settings file as the original writes it for itself, given to us as a user's file."""

import json

import torch

from engine.deepspeed_config import choose_precision, choose_stage, resolve_config
from tests.parity.fixture_files import load_fixture


def test_a_file_that_the_original_wrote_is_taken_but_for_its_optimizer():
    cases = load_fixture("beit3_data.pt")["outputs"]["deepspeed_configs"]
    assert {case["args"]["zero_stage"] for case in cases} == {0, 1}
    for case in cases:
        args, file = case["args"], json.loads(case["json"])
        assert choose_stage(None, file) == args["zero_stage"]
        assert choose_precision("auto", file) == "fp16"
        config, notices = resolve_config(
            file,
            zero_stage=args["zero_stage"],
            batch_size=args["batch_size"],
            accumulation_steps=args["update_freq"],
            world_size=case["world_size"],
            dtype=torch.float16,
            clip_grad=args["clip_grad"],
            initial_scale_power=1,  # the file has its own
        )
        kept = {key: value for key, value in file.items() if key not in ("optimizer", "amp")}
        kept["zero_optimization"] = {"stage": 0} | kept.get("zero_optimization", {})
        assert {key: config[key] for key in kept} == kept
        assert config["fp16"]["initial_scale_power"] == args["initial_scale_power"]
        assert config["gradient_clipping"] == (args["clip_grad"] or 0)
        assert not {"optimizer", "amp"} & config.keys()
        (notice,) = notices
        assert notice.startswith("DeepSpeed's settings: optimizer is not used")
