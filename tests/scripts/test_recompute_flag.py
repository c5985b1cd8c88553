"""--recompute of every training program: the same weights whatever is recomputed, and what is refused."""

import json
from pathlib import Path

import pytest

from engine.weights import read_state_dict
from models.recompute import Recompute
from scripts import beit3_args, llava_args, vlbert_args, vle_args
from tests.scripts import llava_run, vlbert_run, vle_run, vqa_run
from tests.scripts.bad_inputs import failure
from tests.scripts.vqa_run import differences

FAMILIES = {"beit3": vqa_run, "llava": llava_run, "vle": vle_run, "vlbert": vlbert_run}
_TWO_STEPS = {"vle": ("--stop_after", 2, "--limit_samples", 60), "llava": ("--bf16", "False")}


def argv(name: str, output: Path, *more: object, **which: object) -> list[str]:
    two_steps = _TWO_STEPS.get(name, ()) if name == "vle" else ("--max_steps", 2, *_TWO_STEPS.get(name, ()))
    return [str(flag) for flag in FAMILIES[name].train_flags(output, *two_steps, *more, **which)]


def folder_of(name: str, output: Path, strategy: str = "standard") -> Path:
    return vlbert_run.run_dir(output, strategy) if name == "vlbert" else output


def weights_of(name: str, output: Path, strategy: str = "standard") -> dict:
    (checkpoint,) = folder_of(name, output, strategy).glob("checkpoint-step2")
    file = checkpoint / ("adapter_model.safetensors" if name == "llava" else "model.pth")
    return read_state_dict(file if file.is_file() else checkpoint, model_key="model|module|state_dict")


def run_of(name: str, output: Path) -> dict:
    return json.loads((folder_of(name, output) / "run.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_layers_train_the_same_weights(name, tmp_path, monkeypatch):
    layers = []
    run = Recompute.run
    monkeypatch.setattr(Recompute, "run", lambda self, *more, **rest: layers.append(self) or run(self, *more, **rest))
    for policy in ("none", "every_2"):
        FAMILIES[name].program(*argv(name, tmp_path / policy, "--recompute", policy))
        assert {str(used) for used in layers} - {"none"} == {policy} - {"none"}
        assert run_of(name, tmp_path / policy)["arguments"]["recompute"] == policy
    assert not differences(*(weights_of(name, tmp_path / policy) for policy in ("none", "every_2")))


def parsed(name: str, output: Path, *more: object):
    parsers = {"beit3": beit3_args, "llava": llava_args, "vle": vle_args, "vlbert": vlbert_args}
    return parsers[name].parse_args(argv(name, output, *more))


def test_without_the_flag_every_family_has_the_default_that_it_had(tmp_path):
    assert {name: parsed(name, tmp_path).recompute for name in FAMILIES} == {
        "beit3": "none", "llava": "full", "vle": "none", "vlbert": "none",
    }  # fmt: skip
    large = parsed("beit3", tmp_path, "--model", "beit3_large_patch16_480", "--finetune", "")
    assert large.recompute == "full"


@pytest.mark.parametrize(
    ("name", "flags", "policy"),
    [
        ("beit3", ["--checkpoint_activations"], "full"),
        ("beit3", ["--no_checkpoint_activations", "--model", "beit3_large_patch16_480", "--finetune", ""], "none"),
        ("beit3", ["--checkpoint_activations", "--recompute", "full"], "full"),
        ("llava", ["--gradient_checkpointing", "False"], "none"),
        ("llava", ["--gradient_checkpointing", "True", "--recompute", "full"], "full"),
        ("vlbert", ["--set", "TRAIN.RECOMPUTE=every_3"], "every_3"),
        ("vlbert", ["--set", "TRAIN.RECOMPUTE=every_3", "--recompute", "none"], "none"),
    ],
)
def test_the_originals_flags_and_the_configs_key_say_the_same_thing(name, flags, policy, tmp_path):
    assert parsed(name, tmp_path, *flags).recompute == policy


def test_vles_config_file_may_say_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recompute": "every_4"}))
    assert parsed("vle", tmp_path, "--train_config_file", tmp_path / "config.json").recompute == "every_4"
    (tmp_path / "config.json").write_text(json.dumps({"recompute": "half"}))
    with pytest.raises(SystemExit, match="2"):
        parsed("vle", tmp_path, "--train_config_file", tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("beit3", ["--recompute", "every_1"], "must be none, full, or every_K with K of 2 or more, got 'every_1'"),
        ("llava", ["--recompute", "True"], "must be none, full, or every_K with K of 2 or more, got 'True'"),
        ("vle", ["--recompute", "some"], "must be none, full, or every_K with K of 2 or more, got 'some'"),
        ("vlbert", ["--recompute", "2"], "must be none, full, or every_K with K of 2 or more, got '2'"),
        ("vlbert", ["--set", "TRAIN.RECOMPUTE=2"], "TRAIN.RECOMPUTE must be"),
        (
            "beit3",
            ["--recompute", "every_2", "--checkpoint_activations"],
            "--recompute every_2 and --checkpoint_activations contradict each other: leave one of them out",
        ),
        (
            "beit3",
            ["--recompute", "full", "--no_checkpoint_activations"],
            "--recompute full and --no_checkpoint_activations contradict each other",
        ),
        (
            "llava",
            ["--recompute", "none", "--gradient_checkpointing", "True"],
            "--recompute none and --gradient_checkpointing True contradict each other",
        ),
    ],
)
def test_what_cannot_be_recomputed_is_one_line_and_exit_code_2(name, flags, message, tmp_path, capsys):
    code, line = failure(capsys, argv(name, tmp_path, *flags), FAMILIES[name].program)
    assert code == 2
    assert message in line
