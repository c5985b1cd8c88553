"""run_beit3_finetuning.py on captions: training, validation, prediction files, scores, own data, stops."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from data.caption_index import SPLIT_FILES
from engine.weights import load_torch_file, read_state_dict
from models.beit3 import decoding
from scripts import ask, beit3_captioning
from tests.helpers import run_in_processes, run_program
from tests.scripts.caption_run import (
    NUM_NOCAPS,
    NUM_RESTVAL,
    NUM_TEST,
    NUM_TRAIN,
    NUM_VAL,
    caption_data,
    caption_flags,
    eval_flags,
    train_flags,
    trained_captioner,
)
from tests.scripts.vqa_run import MODEL, differences, program, read_lines


def submission(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"submit_{name}.json").read_text())


def ids_of(split: str, task: str = "coco_captioning") -> list[int]:
    return sorted(row["image_id"] for row in read_lines(caption_data() / SPLIT_FILES[task][split]))


def _run(rank: int, argv: list[str]) -> None:
    program(*argv)


def _run_unevenly(rank: int, argv: list[str]) -> None:
    """The first process takes each of its batches for finished after one step."""
    if rank == 0:
        decoding._Search._drop_finished = lambda self: True
    program(*argv)


_KILLS_ITSELF = """
import os, signal, sys
import run_beit3_finetuning
from scripts import beit3_captioning
from scripts.program import run
name, number, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
function, calls = getattr(beit3_captioning, name), []

def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)

setattr(beit3_captioning, name, killed)
run(lambda: run_beit3_finetuning.main(argv))
"""


def kill(name: str, number: int, argv: list[str]) -> None:
    """Run the program; it kills itself where it calls this function of the task for the ``number``-th time."""
    done = run_program("-c", _KILLS_ITSELF, name, str(number), *argv)
    assert done.returncode == -signal.SIGKILL, done.stderr


# ---- training and validation ----


def test_an_epoch_ends_with_the_scores_of_every_validation_image_and_a_best_checkpoint():
    output = trained_captioner()
    (row,) = read_lines(output / "log.txt")
    scores = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"]
    assert [key for key in row if key.startswith("val_")] == [f"val_{name}" for name in scores]
    assert all(0 <= row[f"val_{name}"] for name in scores)
    entries = submission(output, "coco_captioning_val_e0")
    assert [entry["image_id"] for entry in entries] == ids_of("val")
    assert len(entries) == NUM_VAL
    result = json.loads((output / "result_coco_captioning_val_e0.json").read_text())
    assert result["CIDEr"] == row["val_CIDEr"]
    assert (
        load_torch_file(output / "checkpoint-best" / "training_state.pth")["extra"]["position"]["best"]
        == (row["val_CIDEr"])
    )


def test_training_reads_a_sample_for_each_caption_of_train_and_restval_and_logs_the_share_of_words_guessed_right():
    run = json.loads((trained_captioner() / "run.json").read_text())
    assert run["steps_per_epoch"] == 3 * (NUM_TRAIN + NUM_RESTVAL) // 10
    assert all(0 <= row["acc"] <= 1 for row in read_lines(trained_captioner() / "metrics.jsonl"))


def test_a_checkpoint_of_captions_has_no_answer_list_and_says_its_task():
    best = trained_captioner() / "checkpoint-best"
    config = json.loads((best / "config.json").read_text())
    assert (config["task"], config["model"], config["num_max_bpe_tokens"]) == ("coco_captioning", MODEL, 12)
    assert "num_answers" not in config
    assert not (best / "answer2label.txt").exists()
    assert "mlm_head.weight" in read_state_dict(best)


def test_the_worst_words_are_left_out_beyond_the_step_that_the_flag_names(monkeypatch):
    seen = []

    def loss(logits, targets, *, label_smoothing, drop_worst_ratio):
        seen.append((label_smoothing, drop_worst_ratio))
        return logits.sum()

    monkeypatch.setattr(beit3_captioning, "captioning_loss", loss)
    batch = {
        "image": torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "masked_tokens": None, "padding_mask": None,
        "masked_positions": None, "targets": torch.tensor([1]), "images_replaced": 0,
    }  # fmt: skip
    for step in (0, 7, 8):
        beit3_captioning.loss_fn(
            lambda *_: torch.eye(2)[:1], batch, step, label_smoothing=0.1, drop_worst_ratio=0.3, drop_worst_after=7
        )
    assert seen == [(0.1, 0.0), (0.1, 0.0), (0.1, 0.3)]


def test_without_reference_captions_a_run_trains_says_so_and_keeps_no_best_checkpoint(tmp_path, capsys):
    data = shutil.copytree(caption_data(), tmp_path / "data")
    (data / "dataset_coco.json").unlink()
    program(*train_flags(tmp_path / "run", "--max_steps", "1", data=data))
    said = capsys.readouterr().err
    assert "warning: no validation, and so no checkpoint-best: no dataset_coco.json or" in said
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-step1"]


def test_nocaps_trains_on_the_captions_of_coco_and_validates_on_its_own_images(tmp_path):
    program(*train_flags(tmp_path, "--max_steps", "1", task="nocaps"))
    entries = submission(tmp_path, "nocaps_val_e0")
    assert [entry["image_id"] for entry in entries] == ids_of("val", "nocaps") == list(range(NUM_NOCAPS))
    (row,) = read_lines(tmp_path / "log.txt")
    assert "val_CIDEr" in row


_TWO_EPOCHS = ["--epochs", "2", "--drop_path", "0.1", "--drop_worst_after", "4", "--num_workers", "1"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Output folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("unbroken")
    program(*train_flags(folder, *_TWO_EPOCHS))
    return folder


def test_a_run_that_was_stopped_inside_an_epoch_ends_with_the_weights_of_an_unbroken_one(unbroken, tmp_path):
    program(*train_flags(tmp_path, *_TWO_EPOCHS, "--max_steps", "4"))
    program(*train_flags(tmp_path, *_TWO_EPOCHS))
    assert differences(*(read_state_dict(folder / "checkpoint-1") for folder in (unbroken, tmp_path))) == []
    for name in ("submit_coco_captioning_val_e1.json", "result_coco_captioning_val_e1.json"):
        assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "number"), [("captioning_loss", 5), ("captioning_loss", 9), ("_generate", 2), ("write_and_score", 2)]
)
def test_a_run_killed_in_a_step_in_validation_or_before_the_scores_ends_like_an_unbroken_one(
    unbroken, tmp_path, name, number
):
    kill(name, number, train_flags(tmp_path, *_TWO_EPOCHS))
    program(*train_flags(tmp_path, *_TWO_EPOCHS))
    assert differences(*(read_state_dict(folder / "checkpoint-1") for folder in (unbroken, tmp_path))) == []
    kept_log = {"metrics.jsonl.old"}  # where nothing was saved yet the run starts again
    assert set(os.listdir(tmp_path)) - kept_log == set(os.listdir(unbroken))
    for epoch in (0, 1):
        for kind in ("submit", "result"):
            file = f"{kind}_coco_captioning_val_e{epoch}.json"
            assert (tmp_path / file).read_bytes() == (unbroken / file).read_bytes(), file


def test_processes_under_zero_stage_3_take_as_many_steps_as_the_slowest_and_caption_every_image_once(tmp_path):
    run_in_processes(
        _run_unevenly, 2, train_flags(tmp_path, "--batch_size", "5", "--enable_deepspeed", "--zero_stage", "3")
    )
    entries = submission(tmp_path, "coco_captioning_val_e0")
    assert [entry["image_id"] for entry in entries] == ids_of("val")


# ---- evaluation ----


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Output folder of an evaluation of test in one process."""
    folder = tmp_path_factory.mktemp("evaluated")
    program(*eval_flags(trained_captioner() / "checkpoint-best", folder))
    return folder


def test_the_prediction_file_is_the_servers_form(evaluated):
    path = evaluated / "submit_coco_captioning_test.json"
    entries = json.loads(path.read_text())
    assert path.read_text() == json.dumps(entries, indent=2) + "\n"
    assert [entry["image_id"] for entry in entries] == ids_of("test")
    assert len(entries) == NUM_TEST
    assert all(list(entry) == ["image_id", "caption"] and type(entry["caption"]) is str for entry in entries)


def test_the_result_holds_the_scores_and_the_captions_file_the_images(evaluated):
    result = json.loads((evaluated / "result_coco_captioning_test.json").read_text())
    assert (result["images"], result["scored_images"]) == (NUM_TEST, NUM_TEST)
    assert result["CIDEr"] >= 0
    rows = read_lines(evaluated / "captions_coco_captioning_test.jsonl")
    by_id = {entry["image_id"]: entry["caption"] for entry in submission(evaluated, "coco_captioning_test")}
    assert {row["image_id"]: row["caption"] for row in rows} == by_id
    assert all((caption_data() / row["image"]).is_file() and row["score"] <= 0 for row in rows)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_write_the_files_of_one(evaluated, tmp_path, world_size):
    run_in_processes(_run, world_size, eval_flags(trained_captioner() / "checkpoint-best", tmp_path))
    name = "submit_coco_captioning_test.json"
    assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes()
    scores, of_one = (
        [row.pop("score") for row in read_lines(folder / "captions_coco_captioning_test.jsonl")]
        for folder in (tmp_path, evaluated)
    )
    assert scores == pytest.approx(of_one, abs=1e-5)  # the batches are other ones, and so is the order of summation


def test_an_evaluation_that_was_killed_goes_on_to_the_same_files(evaluated, tmp_path, monkeypatch):
    argv = eval_flags(trained_captioner() / "checkpoint-best", tmp_path)
    kill("_generate", 4, argv)
    # nobody holds the lock any more
    assert sorted(os.listdir(tmp_path)) == [
        ".lock-coco_captioning_test",
        ".partial-coco_captioning_test-rank0.jsonl",
    ]
    calls, original = [], beit3_captioning._generate
    monkeypatch.setattr(
        beit3_captioning, "_generate", lambda *a, **options: (calls.append(1), original(*a, **options))[1]
    )
    program(*argv)
    assert len(calls) == 2  # three of five batches were there
    for name in sorted(os.listdir(evaluated)):
        assert (tmp_path / name).read_bytes() == (evaluated / name).read_bytes(), name
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(evaluated))


def test_the_test_split_of_nocaps_is_predicted_without_scores(tmp_path, capsys):
    program(*eval_flags(trained_captioner() / "checkpoint-best", tmp_path, task="nocaps"))
    assert "no scores: test of nocaps has no reference captions here" in capsys.readouterr().err
    assert [entry["image_id"] for entry in submission(tmp_path, "nocaps_test")] == list(range(NUM_NOCAPS))


def test_the_val_split_of_nocaps_is_scored_by_domain(tmp_path, capsys):
    program(*eval_flags(trained_captioner() / "checkpoint-best", tmp_path, "--eval_split", "val", task="nocaps"))
    result = json.loads((tmp_path / "result_nocaps_val.json").read_text())
    assert set(result["domains"]) == {"in-domain", "near-domain", "out-domain"}
    assert sum(part["images"] for part in result["domains"].values()) == NUM_NOCAPS


@pytest.mark.parametrize("decoding", ["greedy", "nucleus"])
def test_other_ways_of_decoding_give_a_caption_for_every_image_and_do_not_depend_on_the_batch(tmp_path, decoding):
    argv = ["--decoding", decoding, "--num_max_bpe_tokens", "10"]
    for size in ("1", "4"):
        program(*eval_flags(trained_captioner() / "checkpoint-best", tmp_path / size, *argv, "--eval_batch_size", size))
    one, four = (submission(tmp_path / size, "coco_captioning_test") for size in ("1", "4"))
    assert one == four
    assert len(one) == NUM_TEST


def test_a_dry_run_of_an_evaluation_writes_nothing(tmp_path):
    program(*eval_flags(trained_captioner() / "checkpoint-best", tmp_path / "none", "--dry_run"))
    assert not (tmp_path / "none").exists()


# ---- own data ----


def test_own_captions_train_validate_and_are_scored(tmp_path, capsys):
    names = sorted(path.name for path in (caption_data() / "val2014").iterdir())[:6]
    rows = [{"image": f"val2014/{name}", "captions": ["a star", "the red star"]} for name in names]
    for file, part in (("train.jsonl", rows[:4]), ("val.jsonl", rows[4:])):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in part))
    own = ["--train_file", tmp_path / "train.jsonl", "--val_file", tmp_path / "val.jsonl", "--batch_size", "4"]
    program(*train_flags(tmp_path / "run", *own))
    (row,) = read_lines(tmp_path / "run" / "log.txt")
    assert "val_CIDEr" in row
    (tmp_path / "new.jsonl").write_text(json.dumps({"image": f"val2014/{names[0]}"}) + "\n")
    best = tmp_path / "run" / "checkpoint-best"
    program(*eval_flags(best, tmp_path / "out", "--eval_split", tmp_path / "new.jsonl"))
    assert [entry["image_id"] for entry in submission(tmp_path / "out", "coco_captioning_new")] == [0]


def test_a_folder_of_images_needs_no_index_no_data_path_and_no_references(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((caption_data() / "val2014").iterdir())[:3]:
        shutil.copy(path, photos)
    argv = ["--task", "coco_captioning", "--eval", "--finetune", str(trained_captioner() / "checkpoint-best")]
    argv += ["--eval_split", str(photos), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    program(*argv, "--num_workers", "0")
    rows = read_lines(tmp_path / "out" / "captions_coco_captioning_photos.jsonl")
    assert [row["image"] for row in rows] == sorted(path.name for path in photos.iterdir())
    assert "it is a folder of images" in capsys.readouterr().err


def test_one_picture_is_described(capsys):
    photo = next((caption_data() / "val2014").iterdir())
    argv = ["--checkpoint", str(trained_captioner() / "checkpoint-best"), "--image", str(photo), "--device", "cpu"]
    capsys.readouterr()
    ask.main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert type(found["caption"]) is str
    assert found["score"] < 0
    ask.main(argv)
    assert capsys.readouterr().out == found["caption"] + "\n"


def test_flags_of_the_other_task_are_said_to_have_no_effect(tmp_path, capsys):
    program(*eval_flags(trained_captioner() / "checkpoint-best", tmp_path, "--shuffle_images", "--limit_samples", "1"))
    assert "--shuffle_images has no effect: it belongs to vqav2" in capsys.readouterr().err
    assert caption_flags()[1] == "coco_captioning"
