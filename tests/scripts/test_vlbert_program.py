"""scripts/vqa: training and prediction with every strategy, stops, several processes, formats, own data."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet50

from data.vlbert_files import REGION_ROOT
from data.vqav2_files import ANSWERS_FILE, QUESTION_FILE
from engine.weights import read_state_dict
from models.errors import ModelError
from models.vlbert import vqa
from models.vlbert.vqa import AdaptiveVQA, Answered
from scripts import pack_box_features, vlbert_vqa
from scripts.report.usage import read_usages
from scripts.vlbert_args import _decisions, parse_args
from scripts.vlbert_model import build_network, load_tokenizer
from tests.engines import assert_same_result, assert_sound
from tests.helpers import run_in_processes
from tests.nursery import Nursery
from tests.paths import ROOT
from tests.scripts.vlbert_run import (
    LAYERS,
    STRATEGIES,
    WITH_POLICY,
    drawn_regions,
    open_nursery,
    predict,
    predict_flags,
    program,
    run_dir,
    start,
    train_flags,
    trained_run,
)
from tests.scripts.vqa_run import differences, read_lines


def _run(rank: int, argv: list[str]) -> None:
    program(*argv)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = open_nursery()
    yield nursery
    nursery.close()


def question_ids(split: str) -> list[int]:
    content = json.loads((drawn_regions() / "vqa" / f"v2_OpenEnded_mscoco_{split}_questions.json").read_text())
    return [question["question_id"] for question in content["questions"]]


# ---- a run ----


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains_validates_and_predicts_the_test_set(tmp_path, strategy):
    run = trained_run(strategy)
    (row,) = read_lines(run / "log.txt")
    assert 0 <= row["val_score"] <= 100
    assert 0 <= row["train_acc"] <= 1
    flags = ("--ckpt", run / "checkpoint-best", "--result-path", tmp_path, "--result-name", "mine")
    predict(*predict_flags(tmp_path, *flags, strategy=strategy))
    entries = json.loads((tmp_path / "mine_vqa2_test2015.json").read_text())
    assert [entry["question_id"] for entry in entries] == sorted(question_ids("test2015"))
    answers = (run / "checkpoint-best" / "answers_vqa.txt").read_text().splitlines()
    assert {entry["answer"] for entry in entries} <= set(answers)
    assert not (tmp_path / "drawn_standard").exists()


def start_weights(strategy: str) -> dict[str, torch.Tensor]:
    """The random weights that a run of ``train_flags`` begins with."""
    args = parse_args(train_flags(Path("none"), strategy=strategy))
    answers = (trained_run(strategy) / "checkpoint-best" / "answers_vqa.txt").read_text().splitlines()
    torch.manual_seed(args.seed)
    return build_network(args.config, len(answers), load_tokenizer(args.config), reference=False)


@pytest.mark.parametrize(
    ("strategy", "frozen"),
    [
        ("standard", set()),
        ("pretrained_frozen", {0, 1, 2}),
        ("last_1", {0, 1}),
        ("specific_k", {0, 2}),
        ("SpotTune", set()),
        ("SpotTune_Block", set()),
        ("BlockDrop", set()),
    ],
)
def test_after_three_steps_exactly_the_parameters_of_the_plan_have_moved(tmp_path, strategy, frozen):
    model = start_weights(strategy)
    before = {name: value.clone() for name, value in model.named_parameters()}
    still = {name for name in before if "parallel_" in name}
    still |= {name for name in before for layer in frozen if name.startswith(f"vlbert.encoder.layer.{layer}.")}
    program(*train_flags(tmp_path, "--max_steps", 3, "--no_validation", strategy=strategy))
    after = read_state_dict(run_dir(tmp_path, strategy) / "checkpoint-step3")
    assert {name for name, value in before.items() if torch.equal(value, after[name])} == still


def test_a_checkpoint_brings_words_answers_and_settings_with_it(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained_run() / "checkpoint-best", folder)
    elsewhere = ("--set=NETWORK.BERT_MODEL_NAME=nowhere", "--set=DATASET.ANSWER_VOCAB_FILE=nowhere.txt")
    flags = ("--ckpt", folder, "--result-path", tmp_path, "--limit_samples", 9, *elsewhere)
    predict(*predict_flags(tmp_path, *flags, "--result-name", "a"))
    from_file = ["--cfg", folder / "config.yaml", "--ckpt", folder, "--result-path", tmp_path, "--limit_samples", 9]
    predict(*from_file, "--result-name", "b", "--device", "cpu", "--num_workers", "0")
    one, two = (json.loads((tmp_path / f"{name}_vqa2_test2015.json").read_text()) for name in "ab")
    assert one == two
    assert len(one) == 9


def test_predictions_with_other_weights_leave_those_of_the_run_alone(tmp_path):
    own, other = run_dir(tmp_path), tmp_path / "other"
    for run in (own, other):
        shutil.copytree(trained_run(), run)
    predict(*predict_flags(tmp_path, "--limit_samples", 9))
    predict(*predict_flags(tmp_path, "--limit_samples", 5, "--ckpt", other / "checkpoint-best"))
    for run, questions in ((own, 9), (other, 5)):
        assert len(json.loads((run / "test" / "drawn_vqa2_test2015.json").read_text())) == questions


def test_a_checkpoint_of_the_originals_trainer_predicts_the_same(tmp_path):
    state = read_state_dict(trained_run("SpotTune") / "checkpoint-best")
    own = {f"module.{name}": value for name, value in state.items() if not name.startswith("policy")}
    policy = {f"module.{n.removeprefix('policy.')}": v for n, v in state.items() if n.startswith("policy.")}
    content = {"state_dict": own, "policy_state_dict": policy, "validation_monitor": {"best_epoch": 0, "best_val": 0.1}}
    torch.save(content, tmp_path / "vl-bert_base_res101_vqa-best.model")
    folder = trained_run("SpotTune") / "checkpoint-best"
    answers = f"--set=DATASET.ANSWER_VOCAB_FILE={folder / 'answers_vqa.txt'}"
    for name, weights in (("a", folder), ("b", tmp_path / "vl-bert_base_res101_vqa-best.model")):
        flags = ("--ckpt", weights, "--result-path", tmp_path, "--result-name", name, answers)
        predict(*predict_flags(tmp_path, *flags, strategy="SpotTune"))
    one, two = ((tmp_path / f"{name}_vqa2_test2015.json").read_bytes() for name in "ab")
    assert one == two


def test_the_official_accuracy_is_given_where_annotations_are(tmp_path):
    annotations = drawn_regions() / "vqa" / "v2_mscoco_val2014_annotations.json"
    flags = ("--ckpt", trained_run() / "checkpoint-best", "--split", "val2014", "--annotations", annotations)
    predict(*predict_flags(tmp_path, *flags, "--result-path", tmp_path))
    result = json.loads((tmp_path / "result_drawn_vqa2_val2014.json").read_text())
    assert 0 <= result["official"]["overall"] <= 100
    assert result["questions"] == len(question_ids("val2014"))


def test_do_test_predicts_with_the_best_checkpoint(tmp_path):
    program(*train_flags(tmp_path, "--do-test", strategy="BlockDrop"))
    run = run_dir(tmp_path, "BlockDrop")
    again = ("--result-path", tmp_path / "again", "--limit_samples", 60)
    predict(*predict_flags(tmp_path, *again, strategy="BlockDrop"))
    name = "drawn_vqa2_test2015.json"
    assert (run / "test" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("strategy", ["standard", *WITH_POLICY])
def test_bfloat16_takes_steps_and_predicts(tmp_path, strategy):
    program(*train_flags(tmp_path, "--amp", "bf16", "--max_steps", 2, "--tensorboard", strategy=strategy))
    assert list((run_dir(tmp_path, strategy) / "tensorboard_logs").glob("events.*"))
    best = run_dir(tmp_path, strategy) / "checkpoint-best"
    flags = ("--ckpt", best, "--amp", "bf16", "--result-path", tmp_path, "--limit_samples", 9)
    predict(*predict_flags(tmp_path, *flags, strategy=strategy))
    assert len(json.loads((tmp_path / "drawn_vqa2_test2015.json").read_text())) == 9


def test_the_launcher_takes_the_originals_arguments(tmp_path):
    """./scripts/dist_run_single.sh <num_gpus> <program> <config> <model directory>, then flags of ours."""
    config, model_dir, *flags = train_flags(tmp_path, "--max_steps", 1, "--no_validation")
    command = ["bash", "scripts/dist_run_single.sh", "2", "vqa/train_end2end.py", config, model_dir, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PLAINVL_VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir(tmp_path) / "run.json").read_text())["world_size"] == 2
    command[command.index("--limit_samples")] = "--limit_sample"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "did you mean --limit_samples?" in line


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    program(*train_flags(tmp_path / "none", "--dry_run", strategy="SpotTune"))
    assert not (tmp_path / "none").exists()
    assert "dry run: two steps taken" in capsys.readouterr().err


def test_validation_questions_that_are_trained_on_are_said(tmp_path, capsys):
    program(*train_flags(tmp_path, "--dry_run", "--limit_samples", 1000))
    assert "are trained on" not in capsys.readouterr().err
    both = ("--set", "DATASET.TRAIN_IMAGE_SET=train2014+val2014")
    program(*train_flags(tmp_path, "--dry_run", "--limit_samples", 1000, *both))
    # 24 val images with six questions each
    assert "warning: 144 of the validation questions are trained on" in capsys.readouterr().err


def test_a_first_network_of_pretrained_weights_starts_both_branches_alike(tmp_path, capsys):
    weights = trained_run() / "checkpoint-best"
    argv = train_flags(
        tmp_path, "--partial-pretrain", weights, "--max_steps", 1, "--no_validation", strategy="SpotTune_Block"
    )
    argv.remove("--from_scratch")
    program(*argv)
    state, first = read_state_dict(run_dir(tmp_path, "SpotTune_Block") / "checkpoint-step1"), read_state_dict(weights)
    for name, value in first.items():
        if name.startswith("vlbert.encoder.layer."):
            assert torch.equal(state[name.replace("encoder.layer", "encoder.parallel_layer")], value), name
    assert "all weights come from PARTIAL_PRETRAIN" in capsys.readouterr().err


# ---- stops ----

_TWO_EPOCHS = ("--set=TRAIN.END_EPOCH=2", "--limit_samples", "40", "--save_ckpt_steps", "3")
# 40 questions in batches of 25 a process are two batches or one in each of the two validations: the last of them
_OCCASIONS = {"after optimizer step": (6, 6), "mid file": (10, 10), "during evaluation": (4, 2)}
_whole: dict[tuple[str, int], Path] = {}


def unbroken(nursery: Nursery, strategy: str, world_size: int, folder: Path) -> Path:
    if (strategy, world_size) not in _whole:
        ended = start(nursery, world_size, argv_of(folder, strategy, world_size), folder.with_name("stderr"))
        assert ended.codes == [0] * world_size, ended.describe()
        _whole[strategy, world_size] = run_dir(folder, strategy)
    return _whole[strategy, world_size]


def argv_of(folder: Path, strategy: str, world_size: int) -> list[str]:
    micro = f"--set=TRAIN.GRAD_ACCUMULATE_STEPS={2 // world_size}"
    return train_flags(folder, *_TWO_EPOCHS, micro, strategy=strategy)


@pytest.mark.parametrize(
    "place",
    [
        "after optimizer step",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mid file", "during evaluation")),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["SpotTune", "BlockDrop"])
def test_a_run_that_is_killed_and_started_again_ends_like_an_unbroken_one(
    nursery, tmp_path_factory, strategy, world_size, place
):
    expected = unbroken(nursery, strategy, world_size, tmp_path_factory.mktemp("whole") / "runs")
    folder = tmp_path_factory.mktemp("killed")
    argv = argv_of(folder / "runs", strategy, world_size)
    killed = start(nursery, world_size, argv, folder / "killed", place, 0, _OCCASIONS[place][world_size - 1])
    assert killed.codes[0] == -signal.SIGKILL, killed.describe()
    assert not killed.hung
    run = run_dir(folder / "runs", strategy)
    assert_sound(run)
    resumed = start(nursery, world_size, argv, folder / "resumed")
    assert resumed.codes == [0] * world_size, resumed.describe()
    assert_same_result(run, expected)
    usages = [
        sorted((usage.stem, usage.shares) for usage in read_usages(r / "visualizations")) for r in (run, expected)
    ]
    assert usages[0] == usages[1]
    assert len(usages[0]) == 4


def test_a_resumed_run_keeps_its_frozen_copies(tmp_path):
    argv = train_flags(tmp_path, "--no_validation", strategy="SpotTune")
    before = {name: value.clone() for name, value in start_weights("SpotTune").named_parameters()}
    program(*argv, "--max_steps", "2")
    program(*argv, "--max_steps", "4")
    after = read_state_dict(run_dir(tmp_path, "SpotTune") / "checkpoint-step4")
    for name in [name for name in before if "parallel_" in name]:
        assert torch.equal(before[name], after[name]), name
        assert not torch.equal(after[name.replace("parallel_", "")], after[name]), name


# ---- several processes ----


def _run_without_dropout(rank: int, argv: list[str]) -> None:
    vqa.DROPOUT = 0.0  # fixed in the original, so it is no setting
    program(*argv)


def test_two_processes_train_like_one_and_count_all_decisions(tmp_path, monkeypatch):
    """Decisions are drawn by each process for itself, so the weights are compared without a policy."""
    kinds = ("hidden_dropout", "attention_probs_dropout")
    no_dropout = [f"--set={part}.VLBERT.{kind}_prob=0" for part in ("NETWORK", "POLICY") for kind in kinds]
    for strategy in ("standard", "BlockDrop"):
        argv = train_flags(tmp_path / "two", *no_dropout, "--lr", "1e-3", strategy=strategy)
        run_in_processes(_run_without_dropout, 2, [*argv, "--set=TRAIN.GRAD_ACCUMULATE_STEPS=1"])
        monkeypatch.setattr(vqa, "DROPOUT", 0.0)
        program(*train_flags(tmp_path / "one", *no_dropout, "--lr", "1e-3", strategy=strategy))
    one, two = (read_state_dict(run_dir(tmp_path / name) / "checkpoint-0") for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    for name in ("one", "two"):
        usages = {usage.mode: usage for usage in read_usages(run_dir(tmp_path / name, "BlockDrop") / "visualizations")}
        assert usages["train"].samples == 60
        assert usages["val"].samples == 60
        state = read_state_dict(run_dir(tmp_path / name, "BlockDrop") / "checkpoint-0")
        assert state["policy_samples"] == 60
        assert [count / 60 for count in state["policy_decisions"].tolist()] == pytest.approx(
            [row[0] for row in usages["train"].shares], abs=1e-6
        )


@pytest.mark.parametrize("strategy", [pytest.param("standard", marks=pytest.mark.slow), "SpotTune"])
def test_zero_2_takes_the_steps_of_ddp(tmp_path, strategy):
    more = ("--set=TRAIN.GRAD_ACCUMULATE_STEPS=1", "--set=TRAIN.CLIP_GRAD_NORM=0", "--set=POLICY.CLIP_GRAD_NORM=0")
    for name, flags in (("ddp", ()), ("zero", ("--enable_deepspeed", "--zero_stage", "2"))):
        run_in_processes(_run, 2, train_flags(tmp_path / name, *more, *flags, "--lr", "1e-3", strategy=strategy))
    ddp, zero = (read_state_dict(run_dir(tmp_path / name, strategy) / "checkpoint-0") for name in ("ddp", "zero"))
    assert max((ddp[name].float() - zero[name].float()).abs().max().item() for name in ddp) < 1e-4


# ---- decisions ----


@pytest.mark.parametrize("strategy", WITH_POLICY)
def test_every_epoch_has_numbers_and_pictures_of_what_the_policy_chose(strategy):
    folder = trained_run(strategy) / "visualizations"
    for mode in ("train", "val"):
        content = json.loads((folder / f"{strategy}_{mode}_epoch_0.json").read_text())
        assert np.array(content["shares"]).shape == (LAYERS, 5 if strategy == "SpotTune" else 1)
        assert content["samples"] == 60
        assert Image.open(folder / f"{strategy}_{mode}_epoch_0.png").size[0] > 400
        if mode == "val":  # the most probable decision: no noise, and none in the middle
            assert content["score"] == pytest.approx(read_lines(folder.parent / "log.txt")[0]["val_score"])
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3


def test_a_validation_without_noise_gives_the_same_score_each_time(tmp_path):
    best = trained_run("SpotTune") / "checkpoint-best"
    for name in "ab":
        flags = ("--ckpt", best, "--split", "val2014", "--result-path", tmp_path, "--result-name", name)
        predict(*predict_flags(tmp_path, *flags, strategy="SpotTune"))
    one, two = ((tmp_path / f"{name}_vqa2_val2014.json").read_bytes() for name in "ab")
    assert one == two


def test_a_global_decision_does_not_ask_the_policy(tmp_path, monkeypatch):
    program(*train_flags(tmp_path, "--set=POLICY_GLOBAL_DECISION=true", strategy="BlockDrop"))
    usages = {u.mode: u for u in read_usages(run_dir(tmp_path, "BlockDrop") / "visualizations")}
    wanted = [float(row[0] > 0.5) for row in usages["train"].shares]
    assert [row[0] for row in usages["val"].shares] == wanted

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the policy was asked")

    build = AdaptiveVQA.__init__

    def deaf(self: AdaptiveVQA, *arguments: object, **more: object) -> None:
        build(self, *arguments, **more)
        self.policy.forward = asked

    monkeypatch.setattr(AdaptiveVQA, "__init__", deaf)
    flags = ("--set=POLICY_GLOBAL_DECISION=true", "--result-path", tmp_path / "out")
    predict(*predict_flags(tmp_path, *flags, strategy="BlockDrop"))
    assert (tmp_path / "out" / "drawn_vqa2_test2015.json").is_file()


def test_the_losses_on_decisions_are_logged_and_reach_the_policy_alone_where_they_are_all_there_is(tmp_path):
    more = (
        "--set=USE_CONSTRAIN_K_LOSS=true",
        "--set=CONSTRAIN_K_NUM_BLOCKS=1",
        "--set=USE_DETERMINISTIC_POLICY_LOSS=true",
    )
    program(*train_flags(tmp_path, *more, "--log_every", "1", strategy="BlockDrop"))
    rows = read_lines(run_dir(tmp_path, "BlockDrop") / "metrics.jsonl")
    for row in rows:
        parts = row["answer_loss"] + row["constrain_k_loss"] + row["deterministic_policy_loss"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert 0 <= row["decisions"] <= LAYERS


def test_the_policy_has_a_rate_and_a_schedule_of_its_own(tmp_path):
    more = ("--set=TRAIN.LR=1.5e-5", "--set=POLICY.LR=3e-5", "--set=POLICY.WARMUP_STEPS=4", "--no_validation")
    program(*train_flags(tmp_path, *more, "--log_every", "1", strategy="SpotTune_Block"))
    rows = read_lines(run_dir(tmp_path, "SpotTune_Block") / "metrics.jsonl")
    # --lr 1e-2 stands for TRAIN.LR, and twice as much for the policy; six steps
    assert [row["lr"] for row in rows] == pytest.approx([1e-2 * f for f in (1 / 2, 1, 3 / 4, 2 / 4, 1 / 4, 0)])
    assert [row["lr_policy"] for row in rows] == pytest.approx([2e-2 * f for f in (1 / 4, 2 / 4, 3 / 4, 1, 1 / 2, 0)])


def test_a_step_that_is_not_finite_counts_no_decisions(tmp_path, monkeypatch):
    original, calls = vlbert_vqa.forward, []

    def spoiled(model: torch.nn.Module, batch: dict) -> Answered:
        answered = original(model, batch)
        calls.append(1)
        return (
            Answered(answered.logits * float("nan"), answered.decisions * float("nan")) if len(calls) == 3 else answered
        )

    monkeypatch.setattr(vlbert_vqa, "forward", spoiled)
    program(*train_flags(tmp_path, "--no_validation", strategy="BlockDrop"))
    state = read_state_dict(run_dir(tmp_path, "BlockDrop") / "checkpoint-0")
    assert state["policy_samples"] == 55
    assert 0 <= int(state["policy_decisions"].min()) <= int(state["policy_decisions"].max()) <= 55


def test_resume_of_the_config_goes_on_after_its_checkpoint_is_gone(tmp_path):
    more = ("--set=TRAIN.END_EPOCH=3", "--set=TRAIN.AUTO_RESUME=false", "--no_validation", "--limit_samples", 20)
    program(*train_flags(tmp_path, *more, "--max_steps", 2))
    resume = ("--set=TRAIN.RESUME=true", "--set=TRAIN.BEGIN_EPOCH=1")
    program(*train_flags(tmp_path, *more, *resume, "--max_steps", 4))
    assert not (run_dir(tmp_path) / "checkpoint-0").exists()
    program(*train_flags(tmp_path, *more, *resume))
    assert (run_dir(tmp_path) / "checkpoint-2").is_dir()


@pytest.mark.parametrize("more", [["--reference_adamw"], ["--set=TRAIN.OPTIMIZER=SGD", "--set=POLICY.OPTIMIZER=SGD"]])
def test_other_optimizers_and_the_step_schedule_train(tmp_path, more):
    schedule = ("--set=TRAIN.LR_SCHEDULE=step", "--set=TRAIN.LR_STEP=0.5", "--set=TRAIN.WARMUP=false")
    more = [*more, *schedule, "--log_every", "1", "--no_validation", "--lr", "1e-3"]
    program(*train_flags(tmp_path, *more, strategy="SpotTune_Block"))
    rows = read_lines(run_dir(tmp_path, "SpotTune_Block") / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([1e-3] * 3 + [1e-4] * 3)
    weights = read_state_dict(run_dir(tmp_path, "SpotTune_Block") / "checkpoint-0")
    assert all(torch.isfinite(value.float()).all() for value in weights.values())


def test_reference_behaviour_differs_where_the_published_code_does(tmp_path):
    for name, flags in (("ours", ()), ("theirs", ("--reference_behaviour",))):
        program(*train_flags(tmp_path / name, "--max_steps", 3, "--no_validation", *flags, strategy="SpotTune"))
    states = [read_state_dict(run_dir(tmp_path / name, "SpotTune") / "checkpoint-step3") for name in ("ours", "theirs")]
    assert differences(*states)


@pytest.mark.parametrize("layers", [2, 7])
def test_the_number_of_decisions_is_the_strategies_own(layers):
    from models.adaptive import num_decisions

    for strategy in WITH_POLICY:
        assert _decisions(strategy, layers, 5) == num_decisions(strategy, layers, 5)


# ---- data ----


def test_packed_and_zipped_regions_train_like_the_json_files(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(drawn_regions(), data)
    weights = {}
    for name in ("json", "packed", "zip", "given"):
        more: tuple[object, ...] = ("--max_steps", 2, "--no_validation")
        if name == "packed":
            for folder in list((data / REGION_ROOT).iterdir()):
                pack_box_features.main(["--input", str(folder), "--output", f"{folder}.packed"])
                shutil.rmtree(folder)
        elif name == "zip":
            for folder in list((drawn_regions() / REGION_ROOT).iterdir()):
                with zipfile.ZipFile(data / REGION_ROOT / f"{folder.name}.zip", "w") as archive:
                    for file in folder.iterdir():
                        archive.write(file, f"{folder.name}/{file.name}")
            more += ("--set=DATASET.ZIP_MODE=true", "--num_workers", "2")
        elif name == "given":
            more += ("--regions", data / REGION_ROOT / "trainval2014_resnet101_faster_rcnn_genome.packed")
        program(*train_flags(tmp_path / name, *more, data=data))
        weights[name] = read_state_dict(run_dir(tmp_path / name) / "checkpoint-step2")
    for name in ("packed", "zip", "given"):
        assert differences(weights["json"], weights[name]) == [], name


def test_sizes_come_from_the_box_files_where_cocos_are_not_there(tmp_path):
    data = tmp_path / "data"
    shutil.copytree(drawn_regions(), data)
    program(*train_flags(tmp_path / "with", "--max_steps", 1, "--no_validation", data=data))
    shutil.rmtree(data / "annotations")
    program(*train_flags(tmp_path / "without", "--max_steps", 1, "--no_validation", data=data))
    one, two = (read_state_dict(run_dir(tmp_path / name) / "checkpoint-step1") for name in ("with", "without"))
    assert differences(one, two) == []


@pytest.mark.parametrize(
    "more", ["--contiguous_shards", "--set=TRAIN.ASPECT_GROUPING=true", "--set=TRAIN.SHUFFLE=false"]
)
def test_the_originals_orders_of_samples_train_and_resume(tmp_path, more):
    program(*train_flags(tmp_path / "whole", more, "--no_validation"))
    program(*train_flags(tmp_path / "run", more, "--no_validation", "--max_steps", 2))
    program(*train_flags(tmp_path / "run", more, "--no_validation"))
    one, two = (read_state_dict(run_dir(tmp_path / name) / "checkpoint-0") for name in ("whole", "run"))
    assert differences(one, two) == []


def test_the_image_path_takes_a_step_and_predicts(tmp_path):
    """With a ResNet-50 on small pictures; boxes still come from the box files."""
    more = ["--set=NETWORK.IMAGE_FEAT_PRECOMPUTED=false", "--set=NETWORK.IMAGE_NUM_LAYERS=50", "--set=SCALES=[48, 64]"]
    argv = train_flags(tmp_path, *more, "--max_steps", 1, "--no_validation", "--set=TRAIN.BATCH_IMAGES=2")
    program(*argv, "--set=TRAIN.GRAD_ACCUMULATE_STEPS=1", "--limit_samples", "4")
    weights = run_dir(tmp_path) / "checkpoint-step1"
    predict(*predict_flags(tmp_path, *more, "--ckpt", weights, "--result-path", tmp_path, "--limit_samples", 3))
    assert len(json.loads((tmp_path / "drawn_vqa2_test2015.json").read_text())) == 3


def test_the_image_path_begins_with_the_resnet_that_the_config_names(tmp_path, capsys):
    image = ["--set=NETWORK.IMAGE_FEAT_PRECOMPUTED=false", "--set=NETWORK.IMAGE_NUM_LAYERS=50"]
    torch.manual_seed(7)
    resnet = resnet50().state_dict()
    torch.save(resnet, tmp_path / "resnet-0003.model")
    weights = [f"--set=NETWORK.IMAGE_PRETRAINED={tmp_path / 'resnet'}", "--set=NETWORK.IMAGE_PRETRAINED_EPOCH=3"]
    more = [*image, *weights, "--set=SCALES=[48, 64]", "--set=TRAIN.BATCH_IMAGES=2", "--limit_samples", "4"]
    more += ["--partial-pretrain", trained_run() / "checkpoint-best", "--max_steps", "1", "--no_validation"]
    argv = train_flags(tmp_path, *more, strategy="BlockDrop")
    argv.remove("--from_scratch")
    program(*argv)
    state = read_state_dict(run_dir(tmp_path, "BlockDrop") / "checkpoint-0")
    for prefix in ("", "policy."):
        place = f"{prefix}image_feature_extractor"
        assert torch.equal(state[f"{place}.backbone.conv1.weight"], resnet["conv1.weight"])  # frozen
        head = state[f"{place}.roi_head_feature_extractor.2.conv3.weight"]
        assert (head - resnet["layer4.2.conv3.weight"]).abs().max() < 0.1  # one step away
    assert "loaded the ResNet from" in capsys.readouterr().err
    torch.save({name: value for name, value in resnet.items() if "layer4" not in name}, tmp_path / "resnet-0003.model")
    with pytest.raises(ModelError, match="roi_head_feature_extractor"):
        program(argv[0], str(tmp_path / "other"), *argv[2:])


def test_own_questions_train_and_are_predicted(tmp_path):
    rows = [
        {"image": f"photos/{number}.jpg", "question": "what color is the circle?", "answers": ["red"] * 2 + ["blue"]}
        for number in (1, 4, 7, 10) * 3
    ]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    boxes = ("--regions", drawn_regions() / REGION_ROOT / "trainval2014_resnet101_faster_rcnn_genome")
    flags = ("--train_file", own, "--val_file", own, *boxes, "--build_answers", 1)
    program(*train_flags(tmp_path / "runs", *flags))
    (row,) = read_lines(run_dir(tmp_path / "runs") / "log.txt")
    assert row["val_score"] > 0
    predict(*predict_flags(tmp_path / "runs", "--split", own, *boxes, "--result-path", tmp_path))
    assert len(json.loads((tmp_path / "drawn_vqa2_own.json").read_text())) == 12


def cp_data(folder: Path) -> Path:
    """The drawn data in the files of VQA-CP."""
    shutil.copytree(drawn_regions(), folder)
    for split, part in (("train2014", "train"), ("val2014", "test")):
        for what, name in (("questions", QUESTION_FILE), ("annotations", ANSWERS_FILE)):
            path = folder / "vqa" / name.format(split)
            rows = [row | {"coco_split": split} for row in json.loads(path.read_text())[what]]
            (folder / "vqa" / f"vqacp_v2_{part}_{what}.json").write_text(json.dumps(rows))
            path.unlink()
    return folder


def test_vqa_cp_trains_and_validates_like_vqa_on_the_same_questions(tmp_path):
    data = cp_data(tmp_path / "data")
    cp = ("--set=DATASET.DATASET=vqa_cp", "--set=DATASET.TRAIN_IMAGE_SET=train", "--set=DATASET.VAL_IMAGE_SET=val")
    program(*train_flags(tmp_path, *cp, data=data))
    run = tmp_path / "output" / "vl-bert" / "vqa" / "drawn_standard" / "train_train"
    assert differences(read_state_dict(run / "checkpoint-0"), read_state_dict(trained_run() / "checkpoint-0")) == []
    more = ("--ckpt", run / "checkpoint-0", "--split", "val", "--result-path", tmp_path)
    predict(*predict_flags(tmp_path, *cp, *more, data=data))
    assert len(json.loads((tmp_path / "drawn_vqa_cp2_val.json").read_text())) == len(question_ids("val2014"))
