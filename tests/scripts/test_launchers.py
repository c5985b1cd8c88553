"""The launchers as users start them: what they run, what they pass on, what they say when something is missing."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.beit3_args import build_parser
from tests.paths import ROOT

SHELL_FILES = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/*.sbatch"), ROOT / ".ci" / "run"])
LAUNCHERS = ("finetune_vqav2.sh", "prediction.sh")
DIST_RUN = ("dist_run_single.sh", "dist_run_multi.sh")
PROGRAM = "run_beit3_finetuning.py"


def bash(script: str, *flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Start a launcher with this interpreter's environment and, unless told otherwise, one process."""
    variables = {"CUDA_VISIBLE_DEVICES": "", "PLAINVL_VENV": sys.prefix}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *flags],
        cwd=cwd,
        # as from a terminal, also where the tests themselves run under nohup
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        env=os.environ | variables | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def printed(script: str, *flags: str, cwd: Path = ROOT, **environment: str) -> tuple[list[str], list[str]]:
    """Words of the printed command before the program's name, and the flags after it."""
    done = bash(script, *flags, cwd=cwd, PLAINVL_PRINT="1", **environment)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    place = next(i for i, word in enumerate(words) if Path(word).name == PROGRAM)
    return words[:place], words[place + 1 :]


def parsed(script: str, *flags: str, **environment: str):
    return build_parser().parse_args(printed(script, *flags, **environment)[1])


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_bash_can_read_the_script(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("name", [*LAUNCHERS, *DIST_RUN, "slurm_train.sbatch", "quickstart.sh", "test.sh"])
def test_a_script_opens_with_a_comment_and_stops_at_the_first_error(name):
    lines = (ROOT / "scripts" / name).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert lines[1].startswith("# ")
    first_command = next(line for line in lines if line and not line.startswith("#"))
    assert first_command == "set -euo pipefail"


def test_fine_tuning_leaves_the_recipe_to_the_program():
    args = parsed("finetune_vqav2.sh")
    assert (args.task, args.eval, args.output_dir) == ("vqav2", False, "output/vqav2")
    assert args.log_dir == "output/vqav2/tensorboard"
    recipe = (args.model, args.lr, args.epochs, args.batch_size, args.finetune, args.data_path)
    assert recipe == (None,) * 6  # the program fills these in


def test_prediction_has_the_defaults_of_the_guide():
    args = parsed("prediction.sh")
    assert (args.task, args.eval, args.batch_size, args.output_dir) == ("vqav2", True, 64, "your_prediction")
    assert (args.model, args.finetune, args.data_path, args.sentencepiece_model) == (None,) * 4


@pytest.mark.parametrize("script", LAUNCHERS)
def test_variables_reach_the_program_whatever_characters_they_have(script):
    given = {
        "MODEL": "beit3_large_patch16_480",
        "FINETUNE": "my weights/model's.pth",
        "SENTENCEPIECE_MODEL": "a b.spm",
        "DATA_PATH": "/data/$HOME *",
        "OUTPUT_DIR": "out put",
    }
    args = parsed(script, **given)
    assert {name: getattr(args, name.lower()) for name in given} == given


def test_the_tensorboard_folder_follows_the_output_folder_unless_given():
    assert parsed("finetune_vqav2.sh", OUTPUT_DIR="out").log_dir == "out/tensorboard"
    assert parsed("finetune_vqav2.sh", OUTPUT_DIR="out", LOG_DIR="logs").log_dir == "logs"


def test_an_empty_finetune_means_random_weights():
    assert parsed("finetune_vqav2.sh", FINETUNE="").finetune == ""


@pytest.mark.parametrize("script", LAUNCHERS)
def test_flags_are_passed_on_and_win_over_variables_and_defaults(script):
    args = parsed(script, "--data_path", "mine", "--lr", "1e-4", "--output_dir", "there", DATA_PATH="dataset")
    assert (args.data_path, args.lr, args.output_dir) == ("mine", 1e-4, "there")


@pytest.mark.parametrize("script", LAUNCHERS)
def test_one_process_is_plain_python(script):
    start, _ = printed(script)
    assert start == [f"{sys.prefix}/bin/python"]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"NPROC_PER_NODE": "4"}, ["--nproc_per_node=4", "--standalone"]),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, ["--nproc_per_node=2", "--standalone"]),
        ({"CUDA_VISIBLE_DEVICES": "0,3", "NPROC_PER_NODE": "8"}, ["--nproc_per_node=8", "--standalone"]),
        (
            {"NPROC_PER_NODE": "2", "MASTER_PORT": "29501"},
            ["--nproc_per_node=2", "--master_addr=127.0.0.1", "--master_port=29501"],
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "NPROC_PER_NODE": "8"},
            [
                "--nproc_per_node=8",
                "--nnodes=2",
                "--node_rank=1",
                "--master_addr=first",
                "--master_port=29500",
            ],
        ),
    ],
)
def test_several_processes_start_through_torchrun(variables, wanted):
    start, _ = printed("finetune_vqav2.sh", **variables)
    assert start == [f"{sys.prefix}/bin/python", "-m", "torch.distributed.run", *wanted]


def test_torchrun_takes_the_flags_that_the_launchers_give_it():
    from torch.distributed.run import get_args_parser

    start, flags = printed("prediction.sh", NNODES="2", NODE_RANK="1", MASTER_ADDR="first", NPROC_PER_NODE="8")
    args = get_args_parser().parse_args([*start[3:], PROGRAM, *flags])
    assert (args.nproc_per_node, args.nnodes, args.node_rank, args.master_addr) == ("8", "2", 1, "first")
    assert args.training_script_args == flags


def test_the_program_is_found_from_another_folder(tmp_path):
    done = bash("prediction.sh", cwd=tmp_path, PLAINVL_PRINT="1")
    assert shlex.split(done.stdout)[1] == str(ROOT / PROGRAM)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE must be a number of processes, got 'two'"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE must be a number of processes, got '0'"),
        ({"NNODES": "x"}, "NNODES must be a number of machines, got 'x'"),
        ({"NNODES": "2"}, "NNODES=2 also needs MASTER_ADDR (the first machine) and NODE_RANK (0 to 1)"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"}, "NODE_RANK must be a number from 0 to 1, got '2'"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "x"}, "NODE_RANK must be a number from 0 to 1, got 'x'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT must be a port from 1 to 65535, got '65536'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT must be a port from 1 to 65535, got 'http'"),
        ({"PLAINVL_VENV": "/no/such"}, "PLAINVL_VENV=/no/such has no bin/python"),
    ],
)
def test_a_bad_variable_is_one_line_and_exit_code_2(variables, message):
    done = bash("finetune_vqav2.sh", **variables)
    assert done.returncode == 2
    assert done.stderr.startswith("finetune_vqav2.sh: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


# --- dist_run_single.sh and dist_run_multi.sh: any program, on one machine and on several -----------------------------


@pytest.mark.parametrize(
    ("words", "variables", "wanted"),
    [
        (["dist_run_multi.sh", "2", "1", "first", "8"], {}, "--nnodes=2 --node_rank=1 --master_addr=first 29500"),
        (
            ["dist_run_multi.sh", "2", "0", "10.0.0.1", "8"],
            {"MASTER_PORT": "1234"},
            "--nnodes=2 --node_rank=0 --master_addr=10.0.0.1 1234",
        ),
        (
            ["dist_run_multi.sh", "2", "0", "fe80::1", "8"],
            {"NNODES": "4", "NPROC_PER_NODE": "1"},
            "--nnodes=2 --node_rank=0 --master_addr=fe80::1 29500",
        ),
        (["dist_run_single.sh", "8"], {"NNODES": "4", "NODE_RANK": "0", "MASTER_ADDR": "a"}, "--standalone"),
        (["dist_run_single.sh", "8"], {"MASTER_PORT": "1234"}, "--master_addr=127.0.0.1 1234"),
    ],
)
def test_the_positions_of_a_dist_run_command_become_torchrun_s_flags(words, variables, wanted):
    start, flags = printed(*words, PROGRAM, "--task", "vqav2", "--lr", "1", **variables)
    wanted = [f"--master_port={word}" if word.isdigit() else word for word in wanted.split()]
    assert start == [f"{sys.prefix}/bin/python", "-m", "torch.distributed.run", "--nproc_per_node=8", *wanted]
    assert flags == ["--task", "vqav2", "--lr", "1"]


@pytest.mark.parametrize("words", [["dist_run_single.sh", "1"], ["dist_run_multi.sh", "1", "0", "first", "1"]])
def test_a_dist_run_command_for_one_process_is_plain_python(words):
    assert printed(*words, PROGRAM)[0] == [f"{sys.prefix}/bin/python"]


def dist_run_words(tmp_path: Path, *words: str) -> list[str]:
    done = bash("dist_run_single.sh", "1", *words, cwd=tmp_path, PLAINVL_PRINT="1")
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)[1:]


def test_a_program_is_looked_up_as_given_then_in_scripts_then_at_the_root(tmp_path):
    assert dist_run_words(tmp_path, PROGRAM) == [str(ROOT / PROGRAM)]
    assert dist_run_words(tmp_path, "report/curves.py") == [str(ROOT / "scripts/report/curves.py")]
    assert dist_run_words(ROOT, "make_index.py") == ["scripts/make_index.py"]
    assert dist_run_words(ROOT, "scripts/make_index.py") == ["scripts/make_index.py"]
    (tmp_path / "make_index.py").touch()
    assert dist_run_words(tmp_path, "make_index.py") == ["make_index.py"]


def test_file_arguments_are_looked_up_as_given_then_in_scripts(tmp_path):
    words = ["report/curves.py", "output", "no/such.yaml", "--flag.py", str(tmp_path)]
    wanted = [str(ROOT / "scripts/report/curves.py"), "output", "no/such.yaml", "--flag.py", str(tmp_path)]
    assert dist_run_words(tmp_path, PROGRAM, *words)[1:] == wanted
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "curves.py").touch()
    assert dist_run_words(tmp_path, PROGRAM, *words)[1:] == words
    assert dist_run_words(ROOT, PROGRAM, "report/curves.py")[1:] == ["scripts/report/curves.py"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dist_run_multi.sh", "2", "0", "first", "8"], "dist_run_multi.sh <num_nodes> <node_rank> <master_addr>"),
        (["dist_run_multi.sh"], "dist_run_multi.sh <num_nodes> <node_rank> <master_addr>"),
        (["dist_run_multi.sh", "two", "0", "first", "8", PROGRAM], "num_nodes must be a number of machines, got 'two'"),
        (["dist_run_multi.sh", "2", "2", "first", "8", PROGRAM], "node_rank must be a number from 0 to 1, got '2'"),
        (["dist_run_multi.sh", "2", "-1", "first", "8", PROGRAM], "node_rank must be a number from 0 to 1, got '-1'"),
        (["dist_run_multi.sh", "2", "0", "8", PROGRAM, "--x"], "gpus_per_node must be a number of processes, got"),
        (["dist_run_multi.sh", "2", "0", PROGRAM, "8", "--x"], "master_addr must be the name or address of the first"),
        (
            ["dist_run_multi.sh", "2", "0", "first", "0", PROGRAM],
            "gpus_per_node must be a number of processes, got '0'",
        ),
        (["dist_run_multi.sh", "2", "0", "first", "8", "no.py"], "no program no.py: looked for it as given, in "),
        (["dist_run_single.sh", "8"], "dist_run_single.sh <num_gpus> <program.py>"),
        (["dist_run_single.sh", PROGRAM, "--x"], f"num_gpus must be a number of processes, got '{PROGRAM}'"),
    ],
)
def test_a_wrong_dist_run_command_is_one_line_and_exit_code_2(words, message):
    done = bash(*words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"{words[0]}: error: ")
    assert message in done.stderr


@pytest.mark.parametrize("words", [["dist_run_single.sh", "2"], ["dist_run_multi.sh", "2", "0", "127.0.0.1", "1"]])
def test_a_mistyped_flag_of_a_dist_run_command_is_found_before_anything_starts(words):
    done = bash(*words, PROGRAM, "--task", "vqav2", "--epoch", "3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--epoch" in done.stderr


def test_torchrun_is_told_to_pass_sigusr1_on_and_to_leave_time_for_saving(tmp_path):
    from torch.distributed.run import get_args_parser

    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\ncase "$*" in *torch.distributed.run*) env;; esac\n')
    fake.chmod(0o755)
    said = bash("dist_run_single.sh", "2", "make_index.py", PLAINVL_VENV=str(tmp_path)).stdout.splitlines()
    variables = dict(line.split("=", 1) for line in said if "=" in line)
    assert variables["PET_SIGNALS_TO_HANDLE"] == "SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGHUP"
    assert variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "300"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PET_SIGNALS_TO_HANDLE", variables["PET_SIGNALS_TO_HANDLE"])
        assert get_args_parser().parse_args(["x.py"]).signals_to_handle == variables["PET_SIGNALS_TO_HANDLE"]
    own = {"PET_SIGNALS_TO_HANDLE": "SIGTERM", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"}
    said = bash("dist_run_single.sh", "2", "make_index.py", PLAINVL_VENV=str(tmp_path), **own).stdout
    assert all(f"{name}={value}\n" in said for name, value in own.items())


# --- what a launcher finds and what it misses -------------------------------------------------------------------------


def make_default_places(folder: Path, data: str = "data/vqav2") -> None:
    (folder / data).mkdir(parents=True)
    (folder / "beit3.spm").touch()


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("script", LAUNCHERS)
def test_missing_data_is_one_line_and_exit_code_2_before_anything_starts(tmp_path, script, processes):
    done = bash(script, cwd=tmp_path, NPROC_PER_NODE=processes)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no data at data/vqav2 or dataset: give --data_path" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [("dist_run_single.sh", "2"), ("dist_run_multi.sh", "2", "0", "127.0.0.1", "1"), ("nondist_run.sh",)]
)
@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "train_end2end.py",
            "no such file: data/coco/vqa/v2_OpenEnded_mscoco_train2014_questions.json: give",
        ),
        ("test.py", "no checkpoint at output/vl-bert/vqa/base_4X16G_fp32/train2014_train/checkpoint-best: give one"),
    ],
)
def test_missing_files_of_vlbert_are_found_before_anything_starts(tmp_path, words, program, message):
    done = bash(*words, f"vqa/{program}", "cfgs/vqa/base_4X16G_fp32.yaml", "output", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("finetune_vqav2.sh", "no weights at beit3_base_patch16_224.pth: give --finetune"),
        ("prediction.sh", "no weights at beit3_base_patch16_480_vqa.pth: give --finetune"),
    ],
)
@pytest.mark.parametrize("data", ["data/vqav2", "dataset"])
def test_the_bare_command_finds_the_default_places_and_names_the_weights_that_lack(tmp_path, script, message, data):
    make_default_places(tmp_path, data)
    done = bash(script, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_a_dry_run_needs_its_weights_where_a_run_would_go_on_from_a_checkpoint(tmp_path):
    make_default_places(tmp_path, "data/vqav2")
    (tmp_path / "output/vqav2/checkpoint-0").mkdir(parents=True)
    (tmp_path / "output/vqav2/checkpoint-0/manifest.json").write_text("{}")
    done = bash("finetune_vqav2.sh", "--dry_run", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no weights at beit3_base_patch16_224.pth: give --finetune" in done.stderr


def test_a_missing_sentencepiece_model_is_named(tmp_path):
    (tmp_path / "dataset").mkdir()
    done = bash("prediction.sh", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no sentencepiece model at beit3.spm or dataset/beit3.spm: give --sentencepiece_model" in done.stderr


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("DATA_PATH", "--data_path absent is no folder"),
        ("FINETUNE", "--finetune absent: no such file or folder"),
    ],
)
def test_a_variable_that_names_nothing_is_reported_under_its_flag(tmp_path, variable, message):
    make_default_places(tmp_path)
    done = bash("prediction.sh", cwd=tmp_path, **{variable: "absent"})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_a_mistyped_flag_is_one_line_and_exit_code_2(tmp_path):
    make_default_places(tmp_path)
    done = bash("finetune_vqav2.sh", "--epoch", "3", cwd=tmp_path, NPROC_PER_NODE="2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--epoch" in done.stderr


def test_the_exit_code_of_the_program_comes_back_from_one_process(tmp_path):
    make_default_places(tmp_path)  # an empty sentencepiece model: found by the program after its flags are read
    (tmp_path / "beit3_base_patch16_480_vqa.pth").touch()
    done = bash("prediction.sh", cwd=tmp_path)
    assert done.returncode == 2
    assert "beit3.spm" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_environment_without_torch_is_named(tmp_path):
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    done = bash("prediction.sh", PLAINVL_VENV=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "has no torch: activate your environment" in done.stderr


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear to somebody")
    done = bash("test.sh", PLAINVL_VENV=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is not a virtual environment and not empty: set PLAINVL_VENV to another folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_without_python_3_10_the_reason_is_said(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename", "ls"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = bash("test.sh", PLAINVL_VENV=str(tmp_path / "new"), PATH=str(tools))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no Python 3.10 or newer on PATH" in done.stderr


def test_ci_runs_the_test_script_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."', "bash scripts/test.sh"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
