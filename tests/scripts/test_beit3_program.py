"""The fine-tuning program from end to end, in this process or in several."""

import errno
import functools
import json
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.files import resolve_inside
from data.images import load_image
from data.metrics.vqa import vqa_accuracy
from data.transforms import EvalTransform
from data.vqa_answers import AnswerVocabulary
from engine.weights import load_torch_file, read_state_dict
from scripts import beit3_vqa
from scripts.program import run
from tests.helpers import run_in_processes, run_program
from tests.paths import ROOT
from tests.scripts.bad_inputs import the_error_line
from tests.scripts.vqa_run import (
    LARGER,
    PATCH,
    SIDE,
    differences,
    drawn_data,
    eval_flags,
    failure,
    program,
    read_lines,
    train_flags,
    trained_checkpoint,
    tree,
)

LOG_KEYS = ["train_lr", "train_min_lr", "train_loss", "train_loss_scale", "train_weight_decay", "train_grad_norm"]
LOG_KEYS += ["val_score", "epoch", "n_parameters"]  # the original's order
IMAGE_POSITIONS = "beit3.encoder.embed_positions.A.weight"


def question_ids(name: str) -> list[int]:
    return [row["qid"] for row in read_lines(drawn_data() / name)]


def write_own(path: Path, count: int, *, answers: bool = True, split: str = "train2014") -> Path:
    """The first questions of a drawn split as lines of one's own data, without ids."""
    folder = drawn_data() / "vqa"
    questions = json.loads((folder / f"v2_OpenEnded_mscoco_{split}_questions.json").read_text())["questions"]
    annotations = json.loads((folder / f"v2_mscoco_{split}_annotations.json").read_text())["annotations"]
    by_id = {row["question_id"]: row for row in annotations}
    rows = []
    for question in questions[:count]:
        row = {"image": f"{split}/COCO_{split}_{question['image_id']:012d}.jpg", "question": question["question"]}
        if answers:
            row["answers"] = [answer["answer"] for answer in by_id[question["question_id"]]["answers"]]
        rows.append(json.dumps(row) + "\n")
    path.write_text("".join(rows))
    return path


# ---- training ----


def test_a_run_of_two_steps_leaves_checkpoints_logs_and_its_arguments(tmp_path):
    program(*train_flags(tmp_path / "run", "--max_steps", 2, "--log_every", 1, "--log_dir", tmp_path / "tb"))
    run_folder = tmp_path / "run"
    names = {path.name for path in run_folder.iterdir()}
    assert names == {"checkpoint-step2", "checkpoint-best", "latest", "log.txt", "metrics.jsonl", "run.json"}
    saved = {path.name for path in (run_folder / "checkpoint-step2").iterdir()}
    assert saved >= {"model.pth", "training_state.pth", "config.json", "answer2label.txt", "beit3.spm", "manifest.json"}
    (epoch,) = read_lines(run_folder / "log.txt")
    assert list(epoch) == LOG_KEYS
    assert [row["step"] for row in read_lines(run_folder / "metrics.jsonl")] == [1, 2]
    record = json.loads((run_folder / "run.json").read_text())
    assert record["arguments"]["max_steps"] == 2
    assert record["samples_per_step"] == 4
    assert record["torch"] == torch.__version__
    assert list((tmp_path / "tb").glob("events.out.tfevents.*"))


def test_limit_samples_cuts_each_split_and_epochs_get_shorter(tmp_path, capsys):
    program(*train_flags(tmp_path, "--limit_samples", 8))
    err = capsys.readouterr().err
    assert "train: 8 questions" in err
    assert "val: 8 questions" in err
    assert "done after 2 steps" in err
    assert (tmp_path / "checkpoint-0").is_dir()


def test_a_dry_run_takes_two_steps_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(drawn_data(), tmp_path)
    program(*train_flags(tmp_path / "run", "--dry_run", "--log_dir", tmp_path / "tb"))
    err = capsys.readouterr().err
    assert "dry run: two steps taken, nothing written" in err
    assert '"steps_per_epoch": 75' in err
    assert tree(drawn_data(), tmp_path) == before
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_an_evaluation_answers_two_batches_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program(*eval_flags(trained_checkpoint(), tmp_path / "run", "--dry_run", "--eval_batch_size", 3))
    assert "dry run: 6 questions answered, nothing written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_finished_run_given_again_only_says_so(tmp_path, capsys):
    argv = train_flags(tmp_path, "--limit_samples", 8)
    program(*argv)
    before = {name: value for name, value in tree(tmp_path).items() if not name.endswith("run.json")}
    capsys.readouterr()
    program(*argv)
    assert "done after 2 steps" in capsys.readouterr().err
    assert {name: value for name, value in tree(tmp_path).items() if not name.endswith("run.json")} == before


def test_without_a_launcher_each_epoch_reads_the_same_questions_in_another_order(tmp_path, monkeypatch):
    seen = _watch_forward(monkeypatch)
    program(*train_flags(tmp_path, "--limit_samples", 8, "--epochs", 2, "--no_save_ckpt"))
    read = [question for batch in seen if batch["training"] for question in batch["question_id"]]
    first, second = read[:8], read[8:]
    assert len(set(first)) == 8
    assert sorted(first) == sorted(second)
    assert first != second


def test_validation_counts_every_question_once_under_the_evaluation_transform(tmp_path, monkeypatch):
    seen = _watch_forward(monkeypatch)
    augmented = ["--randaug", "--hflip", "--min_crop_scale", 0.5]
    program(*train_flags(tmp_path, "--limit_samples", 7, "--eval_batch_size", 3, "--no_save_ckpt", *augmented))
    rows = read_lines(drawn_data() / "vqa.rest_val.jsonl")[:7]
    batches = [batch for batch in seen if not batch["training"]]
    assert [len(batch["question_id"]) for batch in batches] == [3, 3, 1]
    assert [question for batch in batches for question in batch["question_id"]] == [row["qid"] for row in rows]
    paths = [resolve_inside(drawn_data(), row["image_path"]) for row in rows]
    plain = torch.stack([EvalTransform(SIDE)(load_image(path)) for path in paths])
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), plain)


def _watch_forward(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Every batch that the model is given from now on, with whether it is one of training."""
    seen, original = [], beit3_vqa._forward

    def forward(model, batch):
        seen.append({**batch, "training": model.training})
        return original(model, batch)

    monkeypatch.setattr(beit3_vqa, "_forward", forward)
    return seen


# ---- resume, bitwise ----

# 48 questions, 4 x 2 a step: 6 steps an epoch, 12 in all; every source of randomness is on
RANDOM = ["--limit_samples", 48, "--update_freq", 2, "--epochs", 2, "--save_ckpt_freq", 1, "--drop_path", 0.2]
RANDOM += ["--model_ema", "--model_ema_decay", 0.9, "--randaug", "--hflip", "--min_crop_scale", 0.5, "--log_every", 4]
RANDOM += ["--save_ckpt_steps", 2, "--warmup_epochs", 0.5]


@functools.cache
def unbroken_run() -> Path:
    """A run that nobody stopped, with no worker processes."""
    folder = Path(_kept().name) / "unbroken"
    program(*train_flags(folder, *RANDOM))
    return folder


@functools.cache
def _kept() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()  # removed when the session ends


def assert_same_end(one: Path, other: Path) -> None:
    """Weights, averages, optimizer and position of the last checkpoint, and the log, bit by bit."""
    for name in ("model.pth", "model_ema.pth", "training_state.pth"):
        first, second = (load_torch_file(folder / "checkpoint-1" / name) for folder in (one, other))
        for state in (first, second):  # the validation at an early stop counts for the best score
            state.get("extra", {"position": {}})["position"].pop("best", None)
        assert differences(first, second) == [], name
    assert (one / "log.txt").read_text() == (other / "log.txt").read_text()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [4, 5, 6, 11], ids=["at a saved step", "between", "at the epoch's end", "in the last"])
def test_a_stopped_and_resumed_run_ends_bitwise_like_an_unbroken_one(tmp_path, stop, num_workers, capsys):
    argv = train_flags(tmp_path, *RANDOM, "--num_workers", num_workers)
    program(*argv, "--max_steps", str(stop))
    capsys.readouterr()
    program(*argv)
    assert f"resumed from {tmp_path / f'checkpoint-step{stop}' if stop != 6 else tmp_path / 'checkpoint-0'}" in (
        capsys.readouterr().err
    )
    assert_same_end(unbroken_run(), tmp_path)


def test_a_resume_from_an_older_checkpoint_forgets_what_was_logged_after_it(tmp_path):
    program(*train_flags(tmp_path, *RANDOM))
    program(*train_flags(tmp_path, *RANDOM, "--resume", tmp_path / "checkpoint-0"))
    assert_same_end(unbroken_run(), tmp_path)
    assert [row["epoch"] for row in read_lines(tmp_path / "log.txt")] == [0, 1]
    steps = [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")]
    assert steps == sorted(set(steps))


def test_a_run_that_left_no_checkpoint_starts_anew_and_keeps_its_older_log_aside(tmp_path):
    argv = train_flags(tmp_path, "--limit_samples", 8, "--no_save_ckpt")
    program(*argv)
    program(*argv)
    assert [row["epoch"] for row in read_lines(tmp_path / "log.txt")] == [0]
    assert [row["epoch"] for row in read_lines(tmp_path / "log.txt.old")] == [0]


def test_a_resumed_run_keeps_the_best_score_and_the_best_checkpoint_can_be_resumed(tmp_path, monkeypatch, capsys):
    scores = iter([50.0, 45.0, 40.0, 60.0])
    monkeypatch.setattr(beit3_vqa, "evaluate", lambda *_, **__: {"score": next(scores)})
    argv = train_flags(tmp_path, "--limit_samples", 8, "--epochs", 2, "--save_ckpt_freq", 1)
    program(*argv, "--max_steps", "3")  # the first epoch has 50, the stop inside the second 45
    best = tree(tmp_path / "checkpoint-best")
    program(*argv)  # 40
    assert tree(tmp_path / "checkpoint-best") == best
    assert "done after 4 steps; best validation score 50.00" in capsys.readouterr().err
    program(*argv, "--resume", str(tmp_path / "checkpoint-best"))  # 60
    err = capsys.readouterr().err
    assert f"resumed from {tmp_path / 'checkpoint-best'}: epoch 1, step 2" in err
    assert "done after 4 steps; best validation score 60.00" in err


def test_a_resume_with_another_answer_list_is_refused(tmp_path, capsys):
    own = [write_own(tmp_path / f"own{count}.jsonl", count) for count in (30, 60)]
    argv = train_flags(tmp_path / "run", "--max_steps", 1, "--train_file")
    program(*argv, str(own[0]))
    code, line = failure(capsys, [*argv, str(own[1])])
    assert code == 2
    assert "cannot resume: " in line
    assert "another answer list" in line


def test_a_resume_takes_the_vocabulary_size_of_its_checkpoint(tmp_path, capsys):
    program(*train_flags(tmp_path / "first", "--max_steps", 1, "--vocab_size", 100))
    argv = train_flags(tmp_path / "second", "--finetune", tmp_path / "first" / "checkpoint-step1")
    program(*argv, "--max_steps", "1")
    program(*argv, "--max_steps", "2")
    assert read_state_dict(tmp_path / "second" / "checkpoint-step2")["beit3.text_embed.weight"].shape[0] == 100


# ---- several processes ----


def _call_each(rank: int, calls: list[list[str]]) -> None:
    for argv in calls:
        program(*argv)


@pytest.mark.parametrize("launcher", ["torch.distributed.launch", "torch.distributed.run"])
def test_torchs_launchers_start_two_processes(tmp_path, launcher):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = ["-m", launcher, "--nproc_per_node=2", f"--master_port={port}", "run_beit3_finetuning.py"]
    more = ["--max_steps", "1", "--limit_samples", "16", "--dist_timeout", "120"]
    done = run_program(*start, *train_flags(tmp_path, *more))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("done after 1 steps") == 1  # the main process alone speaks
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["samples_per_step"] == 8
    # torch.distributed.launch hands --local-rank to the program, torchrun (torch.distributed.run) the environment alone
    assert record["arguments"]["local_rank"] == (0 if launcher.endswith("launch") else -1)
    saved = {path.name for path in (tmp_path / "checkpoint-step1").iterdir()}
    assert saved >= {"model.pth", "rng-rank0.pth", "rng-rank1.pth"}


def test_two_processes_resume_bitwise_inside_an_epoch(tmp_path):
    argv = [*RANDOM, "--batch_size", 2]
    unbroken, resumed = train_flags(tmp_path / "unbroken", *argv), train_flags(tmp_path / "resumed", *argv)
    run_in_processes(_call_each, 2, [unbroken, [*resumed, "--max_steps", "5"], resumed])
    assert_same_end(tmp_path / "unbroken", tmp_path / "resumed")


def test_two_processes_train_like_one_with_the_same_batch(tmp_path):
    more = ["--limit_samples", 32, "--warmup_epochs", 0, "--lr", 1e-4]
    program(*train_flags(tmp_path / "one", *more))
    run_in_processes(_call_each, 2, [train_flags(tmp_path / "two", *more, "--batch_size", 2)])
    one, two = (read_state_dict(tmp_path / name / "checkpoint-0") for name in ("one", "two"))
    # 8 steps of Adam at a rate of 1e-4; measured: 5.6e-6, from the order of sums in the gradients
    worst = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert worst < 5e-5, worst
    rows = [read_lines(tmp_path / name / "log.txt")[0] for name in ("one", "two")]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-5)
    assert rows[0]["train_lr"] == rows[1]["train_lr"]
    assert rows[0]["val_score"] == pytest.approx(rows[1]["val_score"], abs=1e-6)


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_evaluation_over_processes_equals_that_of_one(tmp_path, world_size):
    sizes = (1, 2, 3, 5, 7)

    def calls(name: str) -> list[list[str]]:
        more = ["--eval_split", "val", "--eval_batch_size", 2, "--limit_samples"]
        return [eval_flags(trained_checkpoint(), tmp_path / name / str(size), *more, size) for size in sizes]

    run_in_processes(_call_each, world_size, calls("several"))
    for size, argv in zip(sizes, calls("one"), strict=True):
        program(*argv)
        for name in ("submit_vqav2_val.json", "result_vqav2_val.json"):
            several = (tmp_path / "several" / str(size) / name).read_text()
            assert several == (tmp_path / "one" / str(size) / name).read_text()
        answers = json.loads((tmp_path / "several" / str(size) / "submit_vqav2_val.json").read_text())
        assert sorted(row["question_id"] for row in answers) == sorted(question_ids("vqa.rest_val.jsonl")[:size])


# ---- evaluation ----


@pytest.mark.parametrize(
    ("split", "index"),
    [
        ("val", "vqa.rest_val.jsonl"),
        ("val2014", "vqa.val.jsonl"),
        ("test", "vqa.test.jsonl"),
        ("test-dev", "vqa.test-dev.jsonl"),
    ],
)
def test_the_prediction_file_is_what_the_server_takes(tmp_path, split, index):
    program(*eval_flags(trained_checkpoint(), tmp_path, "--eval_split", split))
    entries = json.loads((tmp_path / f"submit_vqav2_{split}.json").read_text())
    assert {tuple(entry) for entry in entries} == {("question_id", "answer")}
    assert {(type(entry["question_id"]), type(entry["answer"])) for entry in entries} == {(int, str)}
    assert Counter(entry["question_id"] for entry in entries) == Counter(question_ids(index))
    known = AnswerVocabulary.load(drawn_data() / "answer2label.txt")
    assert all(entry["answer"] in known for entry in entries)
    top = read_lines(tmp_path / f"top_answers_vqav2_{split}.jsonl")
    assert {row["question_id"]: row["top"][0][0] for row in top} == {e["question_id"]: e["answer"] for e in entries}
    result = json.loads((tmp_path / f"result_vqav2_{split}.json").read_text())
    assert ("score" in result) == split.startswith("val")


@pytest.mark.parametrize("split", ["val", "val2014"])
def test_annotations_give_the_official_accuracy_over_all_questions(tmp_path, split, capsys):
    path = drawn_data() / "vqa" / "v2_mscoco_val2014_annotations.json"
    program(*eval_flags(trained_checkpoint(), tmp_path, "--eval_split", split, "--annotations", path))
    out = capsys.readouterr().out
    result = json.loads((tmp_path / f"result_vqav2_{split}.json").read_text())
    entries = json.loads((tmp_path / f"submit_vqav2_{split}.json").read_text())
    chosen = {entry["question_id"]: entry["answer"] for entry in entries}
    annotations = [row for row in json.loads(path.read_text())["annotations"] if row["question_id"] in chosen]
    assert len(chosen) == {"val": 12, "val2014": 24}[split] * 6  # also those without a known label
    assert result["questions"] > result["labelled_questions"]
    assert result["official"] == vqa_accuracy(chosen, annotations).official()
    assert set(result["official"]["perAnswerType"]) == {"yes/no", "number", "other"}
    assert len(result["official"]["perQuestionType"]) > 3
    assert f"official VQA accuracy {result['official']['overall']:.2f}" in out


def test_an_evaluation_reads_no_other_files_than_those_of_its_split(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("vqa.rest_val.jsonl", "beit3.spm"):  # the answer list is in the checkpoint's folder
        shutil.copy(drawn_data() / name, data)
    (data / "val2014").symlink_to(drawn_data() / "val2014")
    program(*eval_flags(trained_checkpoint(), tmp_path / "eval", "--eval_split", "val", data=data))
    entries = json.loads((tmp_path / "eval" / "submit_vqav2_val.json").read_text())
    assert Counter(entry["question_id"] for entry in entries) == Counter(question_ids("vqa.rest_val.jsonl"))


def test_an_evaluation_says_that_resume_has_no_effect(tmp_path, capsys):
    more = ["--limit_samples", 1, "--resume", tmp_path / "absent"]
    program(*eval_flags(trained_checkpoint(), tmp_path / "eval", "--eval_split", "val", *more))
    assert "note: --resume has no effect" in capsys.readouterr().err


def test_shuffled_images_change_the_image_of_every_question(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(beit3_vqa, "VQADataset", _recorder(seen, beit3_vqa.VQADataset))
    program(*eval_flags(trained_checkpoint(), tmp_path, "--eval_split", "val", "--shuffle_images"))
    own = {row["qid"]: row["image_path"] for row in read_lines(drawn_data() / "vqa.rest_val.jsonl")}
    given = {record.question_id: record.image_path for record in seen[0]}
    assert given.keys() == own.keys()
    assert all(given[question_id] != path for question_id, path in own.items())
    assert set(given.values()) == set(own.values())
    assert (tmp_path / "submit_vqav2_val_shuffled_images.json").is_file()


def _recorder(seen: list, original: type):
    def build(records, *arguments, **options):
        seen.append(records)
        return original(records, *arguments, **options)

    return build


# ---- own data ----


def test_own_data_trains_and_evaluates_with_the_answer_list_that_was_built_from_it(tmp_path, capsys):
    train, val = write_own(tmp_path / "train.jsonl", 40), write_own(tmp_path / "my.val.jsonl", 20, split="val2014")
    run_folder = tmp_path / "run"
    program(*train_flags(run_folder, "--max_steps", 2, "--train_file", train, "--val_file", val))
    assert read_lines(run_folder / "log.txt")[0]["val_score"] >= 0
    answers = AnswerVocabulary.load(run_folder / "checkpoint-best" / "answer2label.txt")
    said = {answer for path in (train, val) for row in read_lines(path) for answer in row["answers"]}
    assert len(answers) == len(said)
    blind = write_own(tmp_path / "blind.jsonl", 5, answers=False)
    for path, stem in ((val, "my.val"), (blind, "blind")):
        program(*eval_flags(run_folder / "checkpoint-best", tmp_path / "eval", "--eval_split", path))
        entries = json.loads((tmp_path / "eval" / f"submit_vqav2_{stem}.json").read_text())
        assert [entry["question_id"] for entry in entries] == list(range(len(read_lines(path))))
        assert all(entry["answer"] in answers for entry in entries)
        assert ("score" in json.loads((tmp_path / "eval" / f"result_vqav2_{stem}.json").read_text())) == (path == val)


def test_own_training_data_without_a_validation_file_trains_without_validation(tmp_path):
    program(*train_flags(tmp_path / "run", "--max_steps", 1, "--train_file", write_own(tmp_path / "own.jsonl", 20)))
    assert list(read_lines(tmp_path / "run" / "log.txt")[0]) == [key for key in LOG_KEYS if key != "val_score"]
    assert not (tmp_path / "run" / "checkpoint-best").exists()


# ---- weights to start from ----


def _still_run(output: Path, weights: Path, *more) -> dict[str, torch.Tensor]:
    """Weights after a step of rate 0 that started from ``weights``."""
    program(*train_flags(output, "--max_steps", 1, "--lr", 0, "--min_lr", 0, "--finetune", weights, *more))
    return read_state_dict(output / "checkpoint-step1")


@pytest.mark.parametrize("kind", ["folder", "model.pth", "safetensors"])
def test_fine_tuning_starts_from_a_folder_its_weights_file_or_a_safetensors_copy(tmp_path, kind, capsys):
    state = read_state_dict(trained_checkpoint())
    weights = {"folder": trained_checkpoint(), "model.pth": trained_checkpoint() / "model.pth"}.get(kind)
    if weights is None:
        weights = tmp_path / "weights.safetensors"
        save_file(state, weights)
    assert differences(_still_run(tmp_path / "run", weights), state) == []
    err = capsys.readouterr().err
    assert f"loaded {len(state)} weights from {weights}" in err
    assert "NEWLY INITIALISED" not in err


def test_fine_tuning_starts_from_the_moving_average_of_a_checkpoint(tmp_path):
    program(*train_flags(tmp_path / "first", "--max_steps", 3, "--model_ema", "--model_ema_decay", 0.5))
    folder = tmp_path / "first" / "checkpoint-step3"
    average = read_state_dict(folder / "model_ema.pth")
    assert differences(average, read_state_dict(folder))
    assert differences(_still_run(tmp_path / "second", folder / "model_ema.pth"), average) == []


def test_an_evaluation_finds_the_answer_list_beside_a_weights_file_of_a_checkpoint(tmp_path):
    own = write_own(tmp_path / "own.jsonl", 30)
    program(*train_flags(tmp_path / "run", "--max_steps", 1, "--train_file", own))
    weights = tmp_path / "run" / "checkpoint-step1" / "model.pth"
    program(*eval_flags(weights, tmp_path / "eval", "--eval_split", own))
    assert len(json.loads((tmp_path / "eval" / "submit_vqav2_own.json").read_text())) == 30


@pytest.mark.parametrize("same_length", [True, False])
def test_training_on_another_answer_list_starts_the_output_layer_anew_and_says_so(tmp_path, same_length, capsys):
    answers = AnswerVocabulary.load(trained_checkpoint() / "answer2label.txt").answers
    other = [*answers[1:], answers[0] if same_length else "zebra", *(() if same_length else ("a", "b"))]
    AnswerVocabulary(other).save(tmp_path / "other.txt")
    train = write_own(tmp_path / "own.jsonl", 30)
    more = ["--train_file", train, "--answer_list", tmp_path / "other.txt"]
    state = _still_run(tmp_path / "run", trained_checkpoint(), *more)
    err = capsys.readouterr().err
    assert f"trained on another answer list ({len(answers)} answers there, {len(other)} here)" in err
    assert "NEWLY INITIALISED, to be trained: head.3.bias, head.3.weight" in err
    old = read_state_dict(trained_checkpoint())
    same = {name for name in state if not differences(state[name], old[name])}
    assert old.keys() - same == {"head.3.weight", "head.3.bias"}


def test_training_at_another_image_size_resizes_the_positions(tmp_path):
    state = _still_run(tmp_path / "run", trained_checkpoint(), "--model", LARGER)
    old = read_state_dict(trained_checkpoint())
    assert state[IMAGE_POSITIONS].shape[0] == 3 + (SIDE // PATCH + 1) ** 2
    assert torch.equal(state[IMAGE_POSITIONS][:3], old[IMAGE_POSITIONS][:3])
    del state[IMAGE_POSITIONS], old[IMAGE_POSITIONS]
    assert differences(state, old) == []


# ---- numbers that are not finite ----


def _spoil(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    original = beit3_vqa.loss_fn

    def loss_fn(model, batch, step):
        losses = original(model, batch, step)
        return losses | {"loss": losses["loss"] * float("nan")} if step in steps else losses

    monkeypatch.setattr(beit3_vqa, "loss_fn", loss_fn)


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run_with_exit_code_1(tmp_path, monkeypatch, capsys):
    _spoil(monkeypatch, range(3, 1000))
    argv = train_flags(tmp_path, "--log_every", 1)
    code, line = failure(capsys, argv)
    assert code == 1
    assert "10 steps in a row were not finite, the last one step 12 with samples [" in line
    assert f"saved {tmp_path / 'checkpoint-step13'}, the same command goes on from it" in line
    assert all(torch.isfinite(value).all() for value in read_state_dict(tmp_path / "checkpoint-step13").values())


def test_a_single_step_that_is_not_finite_is_skipped_and_named_and_training_goes_on(tmp_path, monkeypatch, capsys):
    _spoil(monkeypatch, range(1, 2))
    program(*train_flags(tmp_path, "--log_every", 1, "--max_steps", 4))
    err = capsys.readouterr().err
    assert "warning: step 1: loss or gradients are not finite, the weights were left as they were; samples [" in err
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row["loss"] is None for row in rows] == [False, True, False, False]
    finite = [row["loss"] for row in rows if row["loss"] is not None]
    assert read_lines(tmp_path / "log.txt")[0]["train_loss"] == pytest.approx(sum(finite) / 3)


# ---- as programs ----

PROGRAMS = ["run_beit3_finetuning.py"]
PROGRAMS += [
    f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in path.read_text()
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_quick_and_needs_no_torch(name):
    code = (
        "import runpy, sys, time\n"
        f"sys.argv = [{name!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({name!r}, run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    print('left', left.code, 'torch' in sys.modules, time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    _, exit_code, has_torch, seconds = done.stdout.splitlines()[-1].split()
    assert exit_code in ("0", "None")
    assert has_torch == "False"
    assert float(seconds) < 1
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/full"),
            1,
            "could not write /full (the disk is full): free",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "could not write a file (the disk is full): free"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/a"), 1, "could not write /a (the disk quota is used up): free"),
        (OSError(errno.ESTALE, "Stale file handle", "/share"), 1, "cannot use /share (Stale file handle): check"),
        (OSError(errno.EROFS, "Read-only file system", "/usr"), 2, "cannot use /usr (Read-only file system): choose"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "cannot use /x (Permission denied): choose"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a/b"), 2, "cannot use /a/b (Not a directory): choose"),
    ],
)
def test_a_failure_of_the_file_system_is_one_line_and_the_exit_code_says_who_can_mend_it(capsys, error, code, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == code
    assert line in the_error_line(capsys.readouterr().err)


def test_ctrl_c_is_exit_code_130_and_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(": stopped by Ctrl-C")


def test_a_bug_of_ours_shows_its_traceback_and_asks_for_a_report(capsys):
    def main():
        raise KeyError("a bug")

    with pytest.raises(SystemExit) as left:
        run(main)
    assert left.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1].endswith("KeyError: 'a bug'; this is a bug, please report it with the lines above")
