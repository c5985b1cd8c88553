import json

import pytest
import torch

from engine.deepspeed_config import choose_precision, choose_stage, read_config, resolve_config
from engine.errors import EngineError

BF16 = torch.bfloat16


def resolve(user=None, **changes):
    facts = {"zero_stage": 1, "batch_size": 4, "accumulation_steps": 2, "world_size": 3, "dtype": None}
    facts |= {"clip_grad": None, "initial_scale_power": 12}
    return resolve_config(user, **facts | changes)


def test_without_a_file_everything_comes_from_the_flags():
    config, notices = resolve(clip_grad=0.5, dtype=BF16)
    assert notices == []
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == {"stage": 1}
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"]) == (True, False)


def test_gradient_clipping_is_always_written():
    assert resolve()[0]["gradient_clipping"] == 0.0
    assert resolve({"gradient_clipping": "auto"})[0]["gradient_clipping"] == 0.0
    assert resolve({"gradient_clipping": 2})[0]["gradient_clipping"] == 2.0
    assert resolve({"gradient_clipping": 2}, clip_grad=2.0)[0]["gradient_clipping"] == 2.0


def test_every_auto_is_resolved():
    user = {
        **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
        "gradient_clipping": "auto",
        "steps_per_print": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "initial_scale_power": "auto", "loss_scale_window": 500},
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto", "overlap_comm": False},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    before = json.dumps(user)
    config, _ = resolve(user, dtype=torch.float16, zero_stage=3)
    assert '"auto"' not in json.dumps(config)
    assert json.dumps(user) == before
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": False}
    assert config["fp16"] == {"enabled": True, "initial_scale_power": 12, "loss_scale_window": 500}


@pytest.mark.parametrize(
    ("key", "value", "flags"),
    [
        ("train_micro_batch_size_per_gpu", 8, "batch size 4"),
        ("gradient_accumulation_steps", 1, "accumulation 2"),
        ("train_batch_size", 32, "batch size 4 x accumulation 2 x 3 processes gives 24"),
        ("gradient_clipping", 0.1, "gradients are clipped to 1.0"),
    ],
)
def test_a_value_that_contradicts_a_flag_is_refused_with_both(key, value, flags):
    with pytest.raises(EngineError) as raised:
        resolve({key: value}, clip_grad=1.0)
    assert f"{key} " in str(raised.value)
    assert f" {value}" in str(raised.value)
    assert flags in str(raised.value)


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation': did you mean 'zero_optimization'?"),
        ({"qqqq": 1}, "unknown key 'qqqq': leave it out"),
        ({"zero_optimization": 2}, "zero_optimization must be an object, got 2"),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "reduce_bucket_size must be a whole number, got 1.5"),
        ({"zero_optimization": {"elastic_checkpoint": True}}, "elastic_checkpoint is not offered"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm must be true"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "'nvme' is not offered here: 'cpu' is"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param needs stage 3, got stage 1"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is not offered here: choose the precision"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is not offered"),
        ({"gradient_clipping": "much"}, "gradient_clipping must be a number"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is not offered"),
    ],
)
def test_what_is_unknown_or_not_offered_is_refused_by_name(user, words):
    with pytest.raises(EngineError) as raised:
        resolve(user)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sections_that_are_switched_off_or_not_used_are_left_out():
    config, notices = resolve(
        {
            "amp": {"enabled": False, "opt_level": "O2"},
            "elasticity": {"enabled": False},
            "optimizer": {"type": "Adam"},
            "scheduler": {"type": "WarmupLR"},
        }
    )
    assert not {"amp", "elasticity", "optimizer", "scheduler"} & config.keys()
    assert [notice.split(":")[1].split()[0] for notice in notices] == ["optimizer", "scheduler"]


def test_numbers_that_deepspeed_would_not_take_are_translated():
    config, notices = resolve(
        {"fp16": {"min_loss_scale": 2e-10}, "zero_optimization": {"reduce_bucket_size": 5e8}}, dtype=torch.float16
    )
    assert config["fp16"]["min_loss_scale"] == 1
    assert config["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert isinstance(config["zero_optimization"]["reduce_bucket_size"], int)
    assert any("2e-10 is taken as 1" in notice for notice in notices)


def test_the_check_for_non_finite_gradients_cannot_be_switched_off():
    config, notices = resolve({"bf16": {"check_grad_overflow": False}}, dtype=BF16)
    assert config["bf16"]["check_grad_overflow"] is True
    assert "check_grad_overflow stays true" in notices[0]


def test_offloading_to_the_host_allows_our_optimizer():
    config, _ = resolve({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert (
        "offload_optimizer"
        not in resolve({"zero_optimization": {"offload_optimizer": {"device": "none"}}})[0]["zero_optimization"]
    )


@pytest.mark.parametrize(
    ("flag", "in_file", "stage"), [(None, None, 0), (2, None, 2), (None, 3, 3), (1, 1, 1), (0, "auto", 0)]
)
def test_the_stage_comes_from_the_flag_or_the_file(flag, in_file, stage):
    user = None if in_file is None else {"zero_optimization": {"stage": in_file}}
    assert choose_stage(flag, user) == stage


@pytest.mark.parametrize("in_file", [1, 4, True, "two"])
def test_another_stage_in_the_file_or_none_at_all_is_refused(in_file):
    with pytest.raises(EngineError, match="zero_optimization.stage"):
        choose_stage(0, {"zero_optimization": {"stage": in_file}})


@pytest.mark.parametrize(
    ("amp", "user", "chosen"),
    [
        ("auto", None, "auto"),
        ("auto", {"bf16": {"enabled": "auto"}}, "auto"),
        ("auto", {"bf16": {"enabled": True}}, "bf16"),
        ("auto", {"bfloat16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
        ("auto", {"fp16": {"enabled": False}}, "no"),
        ("fp16", {"fp16": {"enabled": True}}, "fp16"),
        ("no", {"bf16": {}}, "no"),
    ],
)
def test_amp_auto_follows_the_file_and_the_others_must_agree(amp, user, chosen):
    assert choose_precision(amp, user) == chosen


@pytest.mark.parametrize(
    ("amp", "user", "words"),
    [
        ("no", {"bf16": {"enabled": True}}, "precision no but bf16.enabled true"),
        ("bf16", {"fp16": {"enabled": True}}, "precision bf16 but fp16.enabled true"),
        ("bf16", {"bf16": {"enabled": False}}, "precision bf16 but bf16.enabled false"),
        ("auto", {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "enable bf16 and fp16"),
        ("auto", {"bf16": {"enabled": "yes"}}, "must be true, false or 'auto', got 'yes'"),
    ],
)
def test_a_precision_that_contradicts_amp_is_refused(amp, user, words):
    with pytest.raises(EngineError) as raised:
        choose_precision(amp, user)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON (line 1"),
        (b"[]", "must hold one JSON object, has a list"),
        (b'{"bf16": {}, "bf16": {}}', "has the key 'bf16' twice"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    with pytest.raises(EngineError) as raised:
        read_config(path)
    assert words in str(raised.value)
    with pytest.raises(EngineError, match="No such file"):
        read_config(tmp_path / "absent.json")
