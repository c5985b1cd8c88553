"""run_beit3_finetuning.py with DeepSpeed: flags, launchers, resume, and what the checkpoints are good for."""

import json
import sys
from pathlib import Path

import pytest
import torch

from engine.weights import load_torch_file, read_state_dict
from tests.helpers import free_port, run_program
from tests.paths import ROOT
from tests.scripts.bad_inputs import the_error_line
from tests.scripts.deepspeed_run import TORCHRUN, deepspeed_train, stage_3_run
from tests.scripts.vqa_run import (
    differences,
    drawn_data,
    eval_flags,
    failure,
    program,
    read_lines,
    train_flags,
    trained_checkpoint,
)


def test_stage_3_in_two_processes_trains_validates_and_saves_with_a_settings_file():
    output, said = stage_3_run()
    assert "note: --deepspeed_config implies --enable_deepspeed" in said
    assert "note: DeepSpeed's settings: optimizer is not used: the run's own settings decide" in said
    resolved = json.loads((output / "run.json").read_text())["deepspeed"]
    assert resolved["zero_optimization"]["stage"] == 3
    assert resolved["gradient_clipping"] == 1.0
    assert resolved["train_batch_size"] == 8
    assert (output / "latest").read_text() == "checkpoint-step2\n"
    (row,) = read_lines(output / "log.txt")
    assert 0 <= row["val_score"] <= 100
    lines = [line for line in said.splitlines() if "WARNING" in line or "INFO" in line]
    assert lines == []  # one line an event: none of DeepSpeed's own


def test_its_checkpoints_are_evaluated_and_asked_like_any_other(tmp_path, capsys):
    best = stage_3_run()[0] / "checkpoint-best"
    program(*eval_flags(best, tmp_path, "--eval_split", "val"))
    (row,) = read_lines(stage_3_run()[0] / "log.txt")
    score = json.loads((tmp_path / "result_vqav2_val.json").read_text())["score"]
    assert score == pytest.approx(row["val_score"], abs=1e-4)  # written with four digits
    picture = next((drawn_data() / "val2014").glob("*.jpg"))
    result = run_program(
        "scripts/ask.py", "--checkpoint", str(best), "--image", str(picture), "--question", "what is this?"
    )
    assert result.returncode == 0, result.stderr


def test_the_moving_average_of_a_partitioned_model_is_whole_and_can_be_evaluated(tmp_path):
    best = stage_3_run()[0] / "checkpoint-best"
    average, weights = read_state_dict(best / "model_ema.pth"), read_state_dict(best)
    assert {name: value.shape for name, value in average.items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert any(not torch.equal(average[name], weights[name]) for name in weights)
    flags = ("--sentencepiece_model", str(best / "beit3.spm"), "--answer_list", str(best / "answer2label.txt"))
    program(*eval_flags(best / "model_ema.pth", tmp_path, "--dry_run", *flags))


def test_a_run_without_deepspeed_refuses_its_checkpoints_with_the_way_out(tmp_path, capsys):
    code, line = failure(capsys, train_flags(tmp_path, "--resume", str(stage_3_run()[0] / "checkpoint-step2")))
    assert code == 2
    assert "was written with DeepSpeed" in line


def test_a_run_with_deepspeed_refuses_a_plain_checkpoint_with_the_way_out(tmp_path):
    flags = train_flags(tmp_path, "--resume", str(trained_checkpoint()), "--zero_stage", "1")
    result = run_program("run_beit3_finetuning.py", *flags)
    assert result.returncode == 2
    assert "was written without DeepSpeed: go on without it, or start anew" in the_error_line(result.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_stopped_and_resumed_run_ends_bitwise_like_an_unbroken_one(tmp_path, stage):
    more = ("--zero_stage", str(stage), "--enable_deepspeed", "--model_ema", "--drop_path", "0.2", "--amp", "bf16")
    more += ("--update_freq", "2")
    deepspeed_train(tmp_path / "whole", *more, "--max_steps", "4", launcher=TORCHRUN)
    deepspeed_train(tmp_path / "parts", *more, "--max_steps", "2", launcher=TORCHRUN)
    said = deepspeed_train(tmp_path / "parts", *more, "--max_steps", "4", launcher=TORCHRUN)
    assert "resumed from" in said
    whole, parts = tmp_path / "whole" / "checkpoint-step4", tmp_path / "parts" / "checkpoint-step4"
    for name in ("model.pth", "model_ema.pth"):
        assert differences(load_torch_file(whole / name), load_torch_file(parts / name)) == []
    rows, resumed = (
        [
            (row["step"], row["loss"], row["grad_norm"])
            for row in read_lines(tmp_path / name / "metrics.jsonl")
            if "loss" in row
        ]
        for name in ("whole", "parts")
    )
    assert rows == resumed


@pytest.mark.slow
def test_a_plain_process_trains_without_a_launcher(tmp_path):
    said = deepspeed_train(tmp_path / "out", "--zero_stage", "2", "--max_steps", "2")
    assert "note: --zero_stage 2 implies --enable_deepspeed" in said
    assert (tmp_path / "out" / "checkpoint-step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").is_file()


@pytest.mark.slow
def test_a_dry_run_takes_two_steps_and_writes_nothing(tmp_path):
    said = deepspeed_train(tmp_path / "out", "--enable_deepspeed", "--zero_stage", "3", "--dry_run")
    assert "dry run: two steps taken, nothing written" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_deepspeeds_own_launcher_starts_two_processes(tmp_path):
    launcher = Path(sys.executable).with_name("deepspeed")
    code = "import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    flags = train_flags(tmp_path / "out", "--enable_deepspeed", "--max_steps", "2")
    start = ("--num_gpus", "2", "--master_port", str(free_port()), "run_beit3_finetuning.py")
    result = run_program("-c", code, str(launcher), *start, *flags, cwd=ROOT, PATH="/usr/bin:/bin")
    assert result.returncode == 0, result.stderr
    state = load_torch_file(tmp_path / "out" / "checkpoint-step2" / "deepspeed_run.pth")
    assert (state["world_size"], state["zero_stage"]) == (2, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--zero_stage", "3", "--compile"), "--compile does not go with ZeRO stage 3"),
        (("--deepspeed_config", "{file}", "--zero_stage", "2"), "ZeRO stage 2 but zero_optimization.stage 3"),
        (("--deepspeed_config", "{file}", "--amp", "no"), "precision no but bf16.enabled true"),
        (("--deepspeed_config", "{file}.absent"), "no such file"),
        (("--zero_stage", "4"), "invalid choice: 4"),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(tmp_path, capsys, flags, words):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}')
    code, line = failure(capsys, train_flags(tmp_path / "out", *(flag.format(file=path) for flag in flags)))
    assert code == 2
    assert words in line
    assert not (tmp_path / "out").exists()


def test_an_evaluation_says_that_it_needs_no_deepspeed(tmp_path, capsys):
    program(*eval_flags(trained_checkpoint(), tmp_path, "--dry_run", "--zero_stage", "2"))
    assert "note: --zero_stage 2 has no effect: --eval needs no optimizer" in capsys.readouterr().err
