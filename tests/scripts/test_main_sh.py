"""scripts/main.sh from drawn data to submission.npy, started with bash and with source, and what it passes on."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts import draw_scenes, llava_args, merge_lora_weights, model_vqa_loader
from scripts import format_dataset_for_llava as formatting
from tests.paths import ROOT
from tests.scripts.llava_run import TINY

SCRIPT = ROOT / "scripts" / "main.sh"
NUM_VALID = 5
SMALL = ("--device", "cpu", "--per_device_train_batch_size", "4", "--lora_r", "4", "--dataloader_num_workers", "0")
PARSERS = {
    "format_dataset_for_llava.py": formatting.build_parser,
    "run_llava_lora.py": llava_args.build_parser,
    "merge_lora_weights.py": merge_lora_weights.build_parser,
    "model_vqa_loader.py": model_vqa_loader.build_parser,
}


TRAIN_FILE = "data/train_for_llava.json"


def shell(words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a line of a user's shell, in which nothing of the launchers is set."""
    ours = ("MODEL", "DATA_PATH", "OUTPUT_DIR", "SUBMISSION", "PLAINVL_PRINT", "NPROC_PER_NODE")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        ["bash", "-c", words],
        cwd=cwd,
        env=inherited | {"CUDA_VISIBLE_DEVICES": "", "PLAINVL_VENV": sys.prefix} | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def printed(*flags: str, cwd: Path = ROOT, **variables: str) -> dict[str, tuple[list[str], object]]:
    """What it would run: by program the words before its name, and its flags as its own parser reads them."""
    done = shell(shlex.join(["bash", str(SCRIPT), *flags]), cwd, PLAINVL_PRINT="1", **variables)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        words = shlex.split(line)
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name = Path(words[place]).name
        found[name] = words[: place + 1], PARSERS[name]().parse_args(words[place + 1 :])
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with the course's files and a model with its tower beside it."""
    folder = tmp_path_factory.mktemp("workplace")
    sizes = ("--num_train", "8", "--num_val", str(NUM_VALID), "--num_pretrain", "1")
    draw_scenes.main(["--layout", "vizwiz", "--output", str(folder / "data"), *sizes])
    for name in ("llava", "clip"):
        shutil.copytree(TINY / name, folder / name)
    return folder


def test_source_does_the_whole_and_leaves_the_shell_as_it_was(workplace):
    """Variables need not be exported; a setting, function, folder or trap of the script must not stay behind."""
    state = "(set; shopt; trap; pwd; declare -F) | grep -v -e ^BASH_ -e ^_= -e ^LINENO= -e ^PIPESTATUS= -e ^RANDOM="
    flags = shlex.join(SMALL)
    words = f"""
        MODEL=llava EVAL_FLAGS="--max_new_tokens 4 --device cpu" before= after=
        MERGED_DIR=merged
        before=$({state} -e ^before= -e ^after=)
        source {shlex.quote(str(SCRIPT))} {flags}
        code=$?
        after=$({state} -e ^before= -e ^after= -e ^code=)
        echo "code $code"
        diff <(echo "$before") <(echo "$after") && echo "as it was"
    """
    done = shell(words, workplace)
    assert done.stdout.endswith("code 0\nas it was\n"), done.stdout + done.stderr

    run = workplace / "checkpoints/llava-finetune_lora"
    assert json.loads((run / "adapter_config.json").read_text())["r"] == 4
    assert (workplace / "merged/config.json").exists()
    answers = np.load(workplace / "submission.npy", allow_pickle=False)
    upload = json.loads((workplace / "eval/llava-lora.json").read_text())
    assert answers.tolist() == [entry["answer"] for entry in upload]
    assert [entry["image"] for entry in upload] == [f"valid_{number:05d}.jpg" for number in range(NUM_VALID)]
    assert len((workplace / "eval/llava-lora.jsonl").read_text().splitlines()) == NUM_VALID


def test_a_failure_ends_the_script_but_not_the_shell_that_sourced_it(workplace, tmp_path):
    """The first program that fails ends it, with its exit code and one line."""
    words = f"MODEL=nowhere; source {shlex.quote(str(SCRIPT))}; echo code $?; false; echo still here"
    shutil.copytree(workplace / "data", tmp_path / "data")
    done = shell(words, tmp_path)
    assert done.stdout.endswith("code 2\nstill here\n"), done.stdout
    assert done.stderr.count("error:") == 1
    assert "no model folder at nowhere" in done.stderr
    assert not (tmp_path / "submission.npy").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("set -- --learning_rate fast", "run_llava_lora.py: error: argument --learning_rate: 'fast' is no number"),
        ("set -- --bits 4 --lora_enable False", "run_llava_lora.py: error: --bits 4 is for frozen weights"),
        ("set -- --val_annotations data/none.json --deepspeed none.json", "no such file: none.json"),
        (
            "set -- --val_annotations data/train.json --deepspeed zero3.json",
            "run_llava_lora.py: error: --deepspeed zero3.json is of stage 3",
        ),
        (
            "set -- --deepspeed zero9.json",
            "run_llava_lora.py: error: DeepSpeed's settings: zero_optimization.stage must be 0, 1, 2 or 3, got 9",
        ),
        ("rm -r data/train", "run_llava_lora.py: error: no folder data/train: give --image_folder"),
        ("rm -r data/valid", "main.sh: error: no folder data/valid with the images to ask about: give IMAGE_FOLDER"),
        ("rm data/train.json", "train.json"),
        ("export EVAL_FLAGS=--no_such_flag", "model_vqa_loader.py: error: unrecognized arguments: --no_such_flag"),
        (
            "echo mine >submission.npy",
            "model_vqa_loader.py: error: submission.npy is there and was not written by this",
        ),
        ("export FORMAT_FLAGS='--hold_out 2'", "--hold_out"),
        ("export NPROC_PER_NODE=x", "NPROC_PER_NODE must be a number of processes, got 'x'"),
        ("export PLAINVL_VENV=none", "has no bin/python"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(workplace, tmp_path, spoil, message):
    for name in ("data", "llava", "clip"):
        shutil.copytree(workplace / name, tmp_path / name)
    (tmp_path / TRAIN_FILE).unlink(missing_ok=True)  # of another test
    for stage in (3, 9):
        (tmp_path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    source = f'MODEL=llava source {shlex.quote(str(SCRIPT))} {shlex.join(SMALL)} "$@"'
    done = shell(f"{spoil}; {source}", tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / TRAIN_FILE).exists()


def test_a_dry_run_answers_nothing(workplace, tmp_path):
    for name in ("data", "llava", "clip"):
        shutil.copytree(workplace / name, tmp_path / name)
    done = shell(f"MODEL=llava source {shlex.quote(str(SCRIPT))} {shlex.join(SMALL)} --dry_run; echo code $?", tmp_path)
    assert done.stdout.endswith("dry run: nothing was trained, so nothing is answered\ncode 0\n"), done.stderr
    assert "two steps taken, nothing written" in done.stderr
    assert not [name for name in ("checkpoints", "eval", "submission.npy") if (tmp_path / name).exists()]


def test_help_is_its_head_and_nothing_runs(tmp_path):
    done = shell(f"source {shlex.quote(str(SCRIPT))} --help", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "MODEL            checkpoints/llava-v1.5-7b" in done.stdout
    assert "PLAINVL_MAIN" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_bare_command_takes_the_defaults_of_the_programs():
    found = printed()
    assert list(found) == ["format_dataset_for_llava.py", "run_llava_lora.py", "model_vqa_loader.py"]
    bare = llava_args.build_parser().parse_args([])
    train = found["run_llava_lora.py"][1]
    assert {name: value for name, value in vars(train).items() if value != getattr(bare, name)} == {
        "output_dir": "checkpoints/llava-v1.5-7b-finetune_lora"
    }
    answer = found["model_vqa_loader.py"][1]
    assert str(answer.model_path) == train.output_dir
    assert str(answer.question_file) == "data/valid_for_llava.jsonl"
    assert (str(answer.upload_file), str(answer.submission_file)) == ("eval/llava-v1.5-7b-lora.json", "submission.npy")


def test_variables_and_flags_reach_their_programs(tmp_path):
    (tmp_path / "my data/test").mkdir(parents=True)
    found = printed(
        "--learning_rate",
        "1e-3",
        cwd=tmp_path,
        MODEL="models/a b",
        DATA_PATH="my data",
        FORMAT_FLAGS="--vizwiz_prompt --hold_out 0.1",
        OUTPUT_DIR="out put",
        MERGED_DIR="one model",
        EVAL_DIR="answers",
        SUBMISSION="s.npy",
        EVAL_FLAGS="--num_beams 3",
        NPROC_PER_NODE="2",
    )
    assert found["format_dataset_for_llava.py"][1].vizwiz_prompt
    start, train = found["run_llava_lora.py"]
    assert start[0] == f"{sys.prefix}/bin/python"
    assert start[-1] == str(ROOT / "run_llava_lora.py")
    assert "--nproc_per_node=2" in start
    assert (train.model_name_or_path, train.output_dir, train.learning_rate) == ("models/a b", "out put", 1e-3)
    assert (train.data_path, train.image_folder) == ("my data/train_for_llava.json", "my data/train")
    merged = found["merge_lora_weights.py"][1]
    assert [str(path) for path in (merged.model_path, merged.save_model_path)] == ["out put", "one model"]
    start, answer = found["model_vqa_loader.py"]
    assert "--nproc_per_node=2" in start
    assert (str(answer.question_file), str(answer.image_folder)) == ("my data/test_for_llava.jsonl", "my data/test")
    assert (str(answer.answers_file), answer.num_beams) == ("answers/out put.jsonl", 3)  # as OUTPUT_DIR is called
