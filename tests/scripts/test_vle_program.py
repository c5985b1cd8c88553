"""run_vle_vqa.py: training, validation, prediction, stops, several processes, conversion, own data."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from data.clip_images import CLIPImageSettings
from data.errors import DataError
from data.tokenizers.deberta import DebertaTokenizer
from data.vle_rows import read_labels
from engine.weights import read_state_dict
from models.vle.config import VLEConfig
from scripts import (
    ask,
    convert_checkpoint_after_ft,
    draw_scenes,
    make_report,
    train_sentencepiece,
    write_vqa,
    zero_to_fp32,
)
from scripts.vle_args import launch_command, parse_args, settle_batch_sizes
from tests.helpers import run_in_processes, run_program
from tests.parity.fixture_files import fixture_path
from tests.paths import ROOT
from tests.scripts.vle_run import (
    TINY_CONFIG,
    drawn_rows,
    eval_flags,
    flags,
    model_folder,
    program,
    train_flags,
    trained_run,
)
from tests.scripts.vqa_run import differences, drawn_data, read_lines


def _run(rank: int, argv: list[str]) -> None:
    program(*argv)


def submission(folder: Path, split: str = "test") -> list[dict]:
    return json.loads((folder / f"submit_vqav2_{split}.json").read_text())


def question_ids(split: str) -> list[int]:
    return sorted(qid for row in read_lines(drawn_rows() / f"vqav2_{split}.jsonl") for qid in row["question_id"])


# ---- a run ----


def test_an_epoch_ends_with_a_score_and_the_run_with_predictions_of_the_test_split_by_the_best_checkpoint(tmp_path):
    program(*train_flags(tmp_path))
    (row,) = read_lines(tmp_path / "log.txt")
    assert 0 <= row["val_score"] <= 100
    entries = submission(tmp_path)
    assert sorted(entry["question_id"] for entry in entries) == question_ids("test")
    assert {entry["answer"] for entry in entries} <= set(read_labels(drawn_rows()).answers)
    assert len(read_lines(tmp_path / "top_answers_vqav2_test.jsonl")) == len(entries)


def test_a_checkpoint_is_a_whole_model_folder_with_answers_and_image_size(tmp_path):
    program(*train_flags(tmp_path, "--image_size", "48", "--max_steps", "2", "--no_validation"))
    folder = tmp_path / "checkpoint-step2"
    config = VLEConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert config.labels == read_labels(drawn_rows()).answers
    assert config.vision.image_size == 48
    assert CLIPImageSettings.load(folder / "preprocessor_config.json").crop_size == (48, 48)
    assert (folder / "spm.model").read_bytes() == (model_folder() / "spm.model").read_bytes()
    program(*eval_flags(folder, tmp_path / "predicted", "--limit_samples", "7", "--image_size", "32"))
    assert len(submission(tmp_path / "predicted")) == 7


def test_the_shipped_config_is_found_and_its_values_hold_unless_a_flag_says_otherwise(tmp_path):
    args = parse_args(
        flags("--train_config_file=vqa_train_config.json", "--precision", "bf16", "--use_deepspeed", "true")
    )
    assert (args.seed, args.learning_rate, args.lr_mult_head, args.max_epoch) == (0, 1e-5, 50, 10)
    assert args.deepspeed_config["zero_optimization"]["stage"] == 2
    assert (args.deepspeed_config["fp16"]["enabled"], args.deepspeed_config["bf16"]["enabled"]) == (False, True)
    own = tmp_path / "own.json"
    own.write_text('{"learning_rate": 0.5, "max_steps": null, "warmup_steps": 7}')
    args = parse_args(flags("--train_config_file", own, "--warmup_steps", "0.25"))
    assert (args.learning_rate, args.max_steps, args.warmup_steps, args.weight_decay) == (0.5, None, 0.25, 0.01)


@pytest.mark.parametrize(
    ("batch_size", "micro", "processes", "accumulation"), [(16, 4, 1, 4), (16, 4, 4, 1), (16, 4, 8, 1), (10, 4, 2, 1)]
)
def test_accumulation_follows_from_the_global_batch_size(batch_size, micro, processes, accumulation):
    args = parse_args(flags("--batch_size", batch_size, "--per_gpu_batchsize", micro))
    settle_batch_sizes(args, processes)
    assert args.update_freq == accumulation
    assert ("is no multiple of" in " ".join(args.notes)) == (accumulation * micro * processes != batch_size)


def test_num_gpus_of_the_config_starts_so_many_processes(tmp_path):
    argv = train_flags(tmp_path, "--num_gpus", "2", "--max_steps", "2", "--no_validation", "--log_every", "1")
    environment = {"OMP_NUM_THREADS": "1", "RANK": None, "WORLD_SIZE": None}
    done = run_program(ROOT / "run_vle_vqa.py", *argv, **{k: v for k, v in environment.items() if v})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["world_size"] == 2


def test_nodes_and_device_numbers_of_the_config_make_the_command_of_torchrun(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    program_and_flags = ("run_vle_vqa.py", ["--seed", "1"])
    assert launch_command(parse_args(flags()), *program_and_flags) is None
    command, changes = launch_command(parse_args(flags("--num_gpus", "[0, 3]")), *program_and_flags)
    assert command[1:] == [
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        "run_vle_vqa.py",
        "--seed",
        "1",
    ]
    assert changes == {"CUDA_VISIBLE_DEVICES": "0,3"}
    two_nodes = parse_args(flags("--num_gpus", "4", "--num_nodes", "2"))
    with pytest.raises(DataError, match="num_nodes 2 needs the environment variable MASTER_ADDR"):
        launch_command(two_nodes, *program_and_flags)
    for name, value in (("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500"), ("NODE_RANK", "1")):
        monkeypatch.setenv(name, value)
    command, _ = launch_command(two_nodes, *program_and_flags)
    assert command[2:7] == [
        *("--nproc_per_node=4", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29500"),
    ]
    monkeypatch.setenv("RANK", "0")
    assert launch_command(two_nodes, *program_and_flags) is None


def test_max_steps_is_the_length_of_the_schedule_and_goes_beyond_an_epoch(tmp_path):
    program(*train_flags(tmp_path, "--max_steps", "8", "--limit_samples", "50", "--no_validation", "--log_every", "1"))
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["lr"] == pytest.approx(1e-3 * 5 / 8)  # of the fusion layers, one step before the end


def test_fast_dev_run_writes_nothing(tmp_path):
    program(*train_flags(tmp_path / "none", "--fast_dev_run", "true"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("optimizer", [["--optim_type", "sgd"], ["--optim_type", "adam"], ["--reference_adamw"]])
def test_other_optimizers_train(tmp_path, optimizer):
    program(*train_flags(tmp_path, *optimizer, "--max_steps", "3", "--no_validation", "--learning_rate", "1e-4"))
    assert all(torch.isfinite(value).all() for value in read_state_dict(tmp_path / "checkpoint-step3").values())


# ---- stops ----

_TWO_EPOCHS = ["--max_epoch", "2", "--limit_samples", "60", "--num_workers", "1"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Output folder of a run of two epochs and its predictions."""
    folder = tmp_path_factory.mktemp("unbroken")
    program(*train_flags(folder, *_TWO_EPOCHS))
    return folder


_KILLS_ITSELF = """
import os, signal, sys
import run_vle_vqa
from scripts import vle_vqa
from scripts.program import run
number, argv = int(sys.argv[1]), sys.argv[2:]
forward, calls = vle_vqa.forward, []

def killed(*arguments, **options):
    calls.append(1)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*arguments, **options)

vle_vqa.forward = killed
run(lambda: run_vle_vqa.main(argv))
"""


# 12 calls in each epoch's training, 12 in its validation, then 12 for the test split
@pytest.mark.parametrize("call", [8, 53, *(pytest.param(call, marks=pytest.mark.slow) for call in (17, 31))])
def test_a_run_killed_in_a_step_in_validation_or_in_prediction_ends_like_an_unbroken_one(unbroken, tmp_path, call):
    done = run_program("-c", _KILLS_ITSELF, str(call), *train_flags(tmp_path, *_TWO_EPOCHS))
    assert done.returncode == -signal.SIGKILL, done.stderr
    program(*train_flags(tmp_path, *_TWO_EPOCHS))
    for name in ("checkpoint-1", "checkpoint-best"):
        assert differences(read_state_dict(unbroken / name), read_state_dict(tmp_path / name)) == []
    for name in ("submit_vqav2_test.json", "top_answers_vqav2_test.jsonl"):
        assert (unbroken / name).read_bytes() == (tmp_path / name).read_bytes()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.parametrize("how", ["one", "reference_adamw"])
def test_a_run_stopped_inside_an_epoch_ends_with_the_weights_of_an_unbroken_one(tmp_path, how):
    more = [*_TWO_EPOCHS, "--no_validation", *(["--reference_adamw"] if how != "one" else [])]
    program(*train_flags(tmp_path / "whole", *more))
    program(*train_flags(tmp_path / "run", *more, "--stop_after", "4"))
    program(*train_flags(tmp_path / "run", *more))
    whole, run = (read_state_dict(tmp_path / name / "checkpoint-1") for name in ("whole", "run"))
    assert differences(whole, run) == []


# ---- several processes ----


def test_two_processes_train_and_predict_like_one(unbroken, tmp_path):
    run_in_processes(_run, 2, train_flags(tmp_path, *_TWO_EPOCHS, "--per_gpu_batchsize", "5"))
    one, two = (read_state_dict(folder / "checkpoint-1") for folder in (unbroken, tmp_path))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 2e-4  # another order of summation
    assert [entry["question_id"] for entry in submission(tmp_path)] == [e["question_id"] for e in submission(unbroken)]


def test_zero_2_ends_where_ddp_does_and_its_checkpoint_converts_to_the_same_predictions(tmp_path):
    always = [*_TWO_EPOCHS, "--num_workers", "0", "--max_epoch", "1"]
    run_in_processes(_run, 2, train_flags(tmp_path / "ddp", *always))
    run_in_processes(_run, 2, train_flags(tmp_path / "zero", *always, "--use_deepspeed", "true"))
    ddp, zero = (read_state_dict(tmp_path / name / "checkpoint-0") for name in ("ddp", "zero"))
    assert max((ddp[name] - zero[name]).abs().max().item() for name in ddp) < 1e-5
    run = tmp_path / "zero"
    zero_to_fp32.main([str(run), str(tmp_path / "whole.pth"), "checkpoint-0"])
    published = tmp_path / "published"
    convert_checkpoint_after_ft.main(
        [str(tmp_path / "whole.pth"), str(published), "--model_dir", str(run / "checkpoint-0")]
    )
    program(*eval_flags(run / "checkpoint-0", tmp_path / "before"))
    program(*eval_flags(published, tmp_path / "after"))
    assert submission(tmp_path / "before") == submission(tmp_path / "after")


# ---- conversion ----


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_of_every_route_convert_to_the_right_names(tmp_path, prefix, wrapped):
    state = read_state_dict(trained_run() / "checkpoint-best")
    named = {prefix + name: value for name, value in state.items()}
    torch.save({"state_dict": named, "epoch": 3} if wrapped else named, tmp_path / "step=0.ckpt")
    convert_checkpoint_after_ft.main([str(tmp_path / "step=0.ckpt"), str(tmp_path / "pytorch_model.bin")])
    found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert differences(found, state) == []


def test_a_published_folder_predicts_what_its_checkpoint_does_and_has_the_originals_files(tmp_path):
    best = trained_run() / "checkpoint-best"
    convert_checkpoint_after_ft.main([str(best), str(tmp_path / "vle")])
    files = ["added_tokens.json", "config.json", "label2answer.json", "preprocessor_config.json", "pytorch_model.bin"]
    files += ["special_tokens_map.json", "spm.model", "tokenizer_config.json"]
    assert sorted(os.listdir(tmp_path / "vle")) == files
    names = read_state_dict(tmp_path / "vle").keys() - read_state_dict(best).keys()
    assert sorted(names) == [
        "vle.text_model.embeddings.position_ids",
        "vle.vision_model.vision_model.embeddings.position_ids",
    ]
    program(*eval_flags(tmp_path / "vle", tmp_path / "after", "--limit_samples", "60"))
    assert submission(tmp_path / "after") == submission(trained_run())


def test_a_bare_trunk_starts_a_training_with_a_new_head(tmp_path, capsys):
    folder = tmp_path / "vle"
    convert_checkpoint_after_ft.main([str(trained_run() / "checkpoint-best"), str(folder)])
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    trunk = {name.removeprefix("vle."): value for name, value in state.items() if name.startswith("vle.")}
    torch.save(trunk | {"itm_score.fc.weight": torch.zeros(2, 64)}, folder / "pytorch_model.bin")
    argv = train_flags(tmp_path / "run", "--max_steps", "1", "--no_validation", model=folder)
    argv.remove("--from_scratch")
    program(*argv)
    said = capsys.readouterr().err
    assert "NEWLY INITIALISED, to be trained: vqa_classifier.0.bias" in said
    assert "not used by this task: itm_score.fc.weight" in said


# ---- data ----


def test_arrow_rows_train_and_predict_like_json_lines(tmp_path):
    pytest.importorskip("pyarrow")
    rows = tmp_path / "rows"
    write_vqa.main(
        ["--data_path", str(drawn_data()), "--output_path", str(rows), "--format", "arrow"]
        + ["--num_rest_val_images", "12", "--min_answer_count", "5"]
    )
    program(*train_flags(tmp_path / "arrow", "--limit_samples", "60", "--num_workers", "1", rows=rows))
    arrow, lines = tmp_path / "arrow", trained_run()
    assert differences(read_state_dict(arrow / "checkpoint-0"), read_state_dict(lines / "checkpoint-0")) == []
    assert submission(arrow) == submission(lines)


def test_the_val_split_is_scored_and_with_annotations_officially(tmp_path, capsys):
    annotations = drawn_data() / "vqa" / "v2_mscoco_val2014_annotations.json"
    more = ["--eval_split", "val", "--annotations", annotations]
    program(*eval_flags(trained_run() / "checkpoint-best", tmp_path, *more))
    result = json.loads((tmp_path / "result_vqav2_val.json").read_text())
    assert result["questions"] == len(question_ids("rest_val")) + len(question_ids("rest_val.unlabelled"))
    assert 0 <= result["official"]["overall"] <= 100
    assert "official VQA accuracy" in capsys.readouterr().out


def test_own_questions_train_and_are_answered(tmp_path):
    images = sorted((drawn_data() / "train2014").iterdir())[:12]
    rows = [
        {"image": image.name, "question": "is it red?", "answers": ["yes" if n % 2 else "no"]}
        for n, image in enumerate(images)
    ]
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--train_file", own, "--val_file", own, "--image_root", drawn_data() / "train2014"]
    program(*train_flags(tmp_path / "run", *more, "--batch_size", "4", "--per_gpu_batchsize", "4"))
    best = tmp_path / "run" / "checkpoint-best"
    program(*eval_flags(best, tmp_path / "answers", "--eval_split", own, "--image_root", drawn_data() / "train2014"))
    assert {entry["answer"] for entry in submission(tmp_path / "answers", "own")} <= {"yes", "no"}


def test_a_question_longer_than_the_limit_is_cut_with_both_ends_kept():
    tokenizer = DebertaTokenizer(model_folder() / "spm.model")
    tokens = tokenizer.encode("is there a red circle above the blue star?")
    assert tokenizer.build_segment(tokens, 5) == [tokenizer.bos_id, *tokens[:3], tokenizer.eos_id]


def test_one_picture_is_asked_about_with_the_probabilities_of_the_pipeline(capsys):
    folder = fixture_path("vle_tiny_for_vqa")
    image = sorted((drawn_data() / "test2015").iterdir())[0]
    ask.main(["--checkpoint", str(folder), "--image", str(image), "--question", "what is it?", "--json", "--top", "99"])
    (line,) = capsys.readouterr().out.splitlines()
    top = json.loads(line)["top"]
    assert len(top) == 13
    assert sum(probability for _, probability in top) == pytest.approx(1, abs=1e-4)


def test_the_picture_page_shows_a_run(tmp_path):
    run = trained_run()
    argv = ["--run", str(run), "--data_path", str(drawn_data()), "--split", "test", "--output", str(tmp_path)]
    predictions = tmp_path / "submit_vqav2_test.json"
    program(*eval_flags(run / "checkpoint-best", tmp_path))
    make_report.main([*argv, "--predictions", str(predictions)])
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_tiny_model_learns_to_look_at_drawn_scenes_from_random_weights(tmp_path):
    data, model, run = tmp_path / "data", tmp_path / "tiny", tmp_path / "run"
    draw_scenes.main(["--output", str(data), "--num_train", "1500", "--num_val", "60", "--num_test", "100"])
    write_vqa.main(["--data_path", str(data), "--num_rest_val_images", "60"])
    model.mkdir()
    shutil.copy(TINY_CONFIG, model)
    questions = data / "vqa" / "v2_OpenEnded_mscoco_train2014_questions.json"
    train_sentencepiece.main(["--layout", "deberta", "--input", str(questions), "--output", str(model / "spm.model")])
    config = ["--train_config_file", "drawn_train_config.json", "--model_dir", model, "--from_scratch"]
    program(*config, "--data_root", data / "vqav2_arrow", "--output_dir", run, "--device", "cpu")
    make_report.main(["--run", str(run), "--data_path", str(data), "--split", "test"])
    summary = json.loads((run / "summary.json").read_text())
    overall = dict(zip(summary["columns"], summary["rows"][0]["scores"], strict=True))
    assert overall["Model"] > overall["Question only"] + 0.15, overall
