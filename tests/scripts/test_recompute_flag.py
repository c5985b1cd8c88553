"""--recompute of every training program: the same weights whatever is recomputed, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.weights import read_state_dict
from models.recompute import Recompute
from scripts import beit3_args, llava_args, vlbert_args, vle_args
from tests.scripts import caption_run, llava_run, vlbert_run, vle_run, vqa_run
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
        (
            "beit3",
            ["--recompute", "every_1"],
            "must be none, full, auto, or every_K with K of 2 or more, got 'every_1'",
        ),
        ("llava", ["--recompute", "True"], "must be none, full, auto, or every_K with K of 2 or more, got 'True'"),
        ("vle", ["--recompute", "some"], "must be none, full, auto, or every_K with K of 2 or more, got 'some'"),
        ("vlbert", ["--recompute", "2"], "must be none, full, auto, or every_K with K of 2 or more, got '2'"),
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


# ---- auto ----


def _peaks(line: str) -> float:
    """GB that the error line predicts with all layers recomputed."""
    return float(line.split("predicted to take ")[1].split(" GB")[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_recomputes_what_the_memory_wants_and_trains_the_same_weights(name, tmp_path, capsys):
    # so many samples that the optimizer's step is not where the most memory is taken
    model = {"beit3": ("--batch_size", 64), "vlbert": ("--strategy", "SpotTune")}.get(name, ())
    strategy = "SpotTune" if name == "vlbert" else "standard"

    def facts(place: str, *more: object) -> dict:
        FAMILIES[name].program(*argv(name, tmp_path / place, *model, *more))
        return json.loads((folder_of(name, tmp_path / place, strategy) / "run.json").read_text())

    plenty = facts("plenty", "--recompute", "auto")
    assert plenty["recompute"] == "none"
    assert plenty["arguments"]["recompute"] == "auto"
    most = plenty["recompute_forecast"]["peak_bytes"]["none"]
    capsys.readouterr()
    little = facts("little", "--recompute", "auto", "--memory_gb", (most - 1) / 1e9)
    assert little["recompute"] != "none"
    predicted = little["recompute_forecast"]
    assert list(predicted["peak_bytes"])[-1] == little["recompute"]
    assert predicted["peak_bytes"][little["recompute"]] <= predicted["limit_bytes"] < most
    assert f"recompute: {little['recompute']}, with which a step is predicted to take" in capsys.readouterr().err
    asked = facts("asked", "--recompute", "none")
    assert "recompute_forecast" not in asked
    trained = [weights_of(name, tmp_path / place, strategy) for place in ("plenty", "little", "asked")]
    assert not differences(trained[0], trained[1])
    assert not differences(trained[0], trained[2])


@pytest.mark.parametrize("name", FAMILIES)
def test_where_nothing_fits_auto_says_so_and_leaves_the_folder_alone(name, tmp_path, capsys):
    code, line = failure(
        capsys, argv(name, tmp_path / "run", "--recompute", "auto", "--memory_gb", 1e-6), FAMILIES[name].program
    )
    assert code == 2
    assert "even with all layers recomputed a step is predicted to take" in line
    assert "lower the batch size" in line
    assert 0 < _peaks(line) < 1
    assert not list((tmp_path / "run").rglob("run.json"))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("beit3", ["--memory_gb", "3"], "--memory_gb goes with --recompute auto, not none: leave it out"),
        ("llava", ["--memory_gb", "3"], "--memory_gb goes with --recompute auto, not full: leave it out"),
        ("beit3", ["--recompute", "auto", "--memory_gb", "0"], "must be above 0"),
        ("beit3", ["--recompute", "auto", "--zero_stage", "1"], "--recompute auto does not go with DeepSpeed"),
        ("vle", ["--recompute", "auto", "--use_deepspeed", "true"], "--recompute auto does not go with DeepSpeed"),
        ("vlbert", ["--recompute", "auto", "--enable_deepspeed"], "--recompute auto does not go with DeepSpeed"),
        ("llava", ["--recompute", "auto", "--deepspeed", "scripts/zero2.json"], "does not go with DeepSpeed"),
        ("beit3", ["--recompute", "auto", "--checkpoint_activations"], "contradict each other"),
    ],
)
def test_what_auto_does_not_go_with_is_refused(name, flags, message, tmp_path, capsys):
    code, line = failure(capsys, argv(name, tmp_path, *flags), FAMILIES[name].program)
    assert code == 2
    assert message in line


def test_a_dry_run_with_auto_predicts_what_the_chosen_policy_alone_does(tmp_path, capsys):
    def predicted(*more: object) -> str:
        flags = vqa_run.train_flags(tmp_path, "--batch_size", 64, "--dry_run", *more)
        vqa_run.program(*flags)
        return re.search(r"peak \d+ MiB of tensors: .* activations \d+", capsys.readouterr().err)[0]

    most = predicted("--recompute", "none")
    assert predicted("--recompute", "auto") == most
    least = predicted("--recompute", "full")
    assert least != most
    with pytest.raises(EngineError) as raised:
        vqa_run.program(*vqa_run.train_flags(tmp_path, "--recompute", "auto", "--memory_gb", 1e-6, "--batch_size", 64))
    full = _peaks(str(raised.value)) + 1e-4
    del raised  # its traceback holds a model
    assert predicted("--recompute", "auto", "--memory_gb", full) == least


def test_auto_counts_the_moving_average_of_the_weights(tmp_path):
    found = {}
    for place, more in {"without": (), "with": ("--model_ema",)}.items():
        flags = ("--max_steps", 1, "--recompute", "auto", "--no_validation", *more)
        vqa_run.program(*vqa_run.train_flags(tmp_path / place, *flags))
        found[place] = run_of("beit3", tmp_path / place)
    peaks = {place: run["recompute_forecast"]["peak_bytes"]["none"] for place, run in found.items()}
    weights = sum(value.nbytes for value in weights_of_first_step(tmp_path / "with").values())
    assert peaks["with"] - peaks["without"] == weights


def weights_of_first_step(output: Path) -> dict:
    return read_state_dict(output / "checkpoint-step1" / "model.pth", model_key="model|module|state_dict")


def test_flags_of_recomputed_layers_have_no_effect_on_an_evaluation_and_it_says_so(tmp_path):
    flags = ("--eval", "--finetune", tmp_path, "--recompute", "auto", "--memory_gb", 3, "--checkpoint_activations")
    args = beit3_args.parse_args([str(flag) for flag in vqa_run.train_flags(tmp_path, *flags)])
    notes = [f"--{name} has no effect: an evaluation recomputes nothing" for name in ("recompute", "memory_gb")]
    assert [note for note in args.notes if "recomputes" in note] == notes


def test_a_run_of_captions_may_be_auto_too(tmp_path):
    caption_run.program(*caption_run.train_flags(tmp_path, "--max_steps", 1, "--recompute", "auto", "--no_validation"))
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["recompute"] == "none"
    assert facts["recompute_forecast"]["peak_bytes"]["none"] > 1e6


def test_a_run_goes_on_with_other_layers_recomputed(tmp_path):
    for place, policies in (("one", ("none", "none")), ("two", ("every_2", "auto"))):
        for steps, policy in zip((1, 2), policies, strict=True):
            vqa_run.program(*vqa_run.train_flags(tmp_path / place, "--max_steps", steps, "--recompute", policy))
    assert not differences(*(weights_of("beit3", tmp_path / place) for place in ("one", "two")))
