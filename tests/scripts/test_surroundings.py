"""What the machine refuses: room, permissions, shared memory, open files, ports, devices; real processes mostly.

A small or read-only disk is a file system of the test's own, mounted where nobody else sees it; where the machine
forbids that, the test is skipped. As root every permission is given, so these processes give that right away first.
"""

import ctypes
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoint import check_manifest
from tests.helpers import run_program
from tests.paths import ROOT
from tests.scripts.bad_inputs import the_error_line
from tests.scripts.vqa_run import failure, flags, program, train_flags, trained_checkpoint

PR_CAPBSET_DROP = 24  # <linux/prctl.h>
RIGHTS_OF_ROOT = (1, 2, 3)  # to write, read and own what belongs to others: <linux/capability.h>


def with_own_disk(folder: Path, options: str, *commands: str) -> subprocess.CompletedProcess:
    """Run shell commands that see an empty file system of their own at ``folder``; skip where that is not allowed."""
    mount = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(folder))}"
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode
    ):
        pytest.skip("this machine does not let a process mount a file system of its own")
    script = "\n".join([mount, *commands])
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def command(argv: list[str]) -> str:
    return f"OMP_NUM_THREADS=1 {shlex.join([sys.executable, 'run_beit3_finetuning.py', *argv])}"


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20


def test_a_full_disk_leaves_the_checkpoint_before_and_the_same_command_goes_on_when_there_is_room(tmp_path):
    size = megabytes(trained_checkpoint())
    disk, run, kept = tmp_path / "disk", tmp_path / "disk" / "run", tmp_path / "kept"
    disk.mkdir()
    train = command(train_flags(run, "--limit_samples", "16", "--save_ckpt_steps", "2", "--keep_ckpts", "1"))
    done = with_own_disk(
        disk,
        f"size={int(1.5 * size * 1024)}k",
        train,
        f"echo code $? newest $(cat {shlex.quote(str(run / 'latest'))})",
        f"cp -r {shlex.quote(str(run))} {shlex.quote(str(kept))}",
        f"mount -o remount,size=1g {shlex.quote(str(disk))}",
        train,
        "echo code $?",
    )
    assert "code 1 newest checkpoint-step2" in done.stdout, done.stderr
    assert done.stdout.endswith("code 0\n"), done.stderr
    first = done.stderr[: done.stderr.index("older checkpoints are untouched")].splitlines()[-1]
    assert re.fullmatch(
        r"run_beit3_finetuning.py: error: could not write .*/checkpoint-0 \(the disk is full\): ", first
    )
    assert check_manifest(kept / "checkpoint-step2") is None
    assert not list(kept.glob(".writing-*"))
    assert "Traceback" not in done.stderr


def test_a_read_only_output_folder_is_refused_before_the_model_is_built(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = with_own_disk(disk, "ro", command(train_flags(disk, "--max_steps", "1")))
    assert done.returncode == 2, done.stderr
    line = the_error_line(done.stderr)
    assert line.endswith(f"--output_dir {disk} cannot be written (Read-only file system): choose another folder")


def give_up_the_rights_of_root() -> None:
    """In a child before it becomes the program: permissions hold again, also for root."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        for right in RIGHTS_OF_ROOT:
            libc.prctl(PR_CAPBSET_DROP, right, 0, 0, 0)


def test_an_output_folder_without_the_permission_to_write_is_refused_before_the_model_is_built(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o555)
    probe = ["sh", "-c", f"touch {shlex.quote(str(folder / 'x'))}"]
    if subprocess.run(probe, preexec_fn=give_up_the_rights_of_root, capture_output=True).returncode == 0:
        pytest.skip("this machine does not let root give up its rights")
    argv = [sys.executable, "run_beit3_finetuning.py", *train_flags(folder, "--max_steps", "1")]
    done = subprocess.run(
        argv, cwd=ROOT, preexec_fn=give_up_the_rights_of_root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    line = the_error_line(done.stderr)
    assert line.endswith(f"--output_dir {folder} cannot be written (Permission denied): choose another folder")
    assert list(folder.iterdir()) == []


# ---- limits of loader processes ----


def test_too_little_shared_memory_is_one_line_not_a_wait_for_ever(tmp_path):
    argv = train_flags(tmp_path / "run", "--num_workers", "2", "--batch_size", "32")
    done = with_own_disk(Path("/dev/shm"), "size=100k", command(argv))
    assert done.returncode == 1, done.stderr
    assert "no room in shared memory" in done.stderr.splitlines()[-1]
    assert "--num_workers 0" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


FEW_FILES = """
import os, resource, sys
import run_beit3_finetuning
from scripts.program import run
limit = len(os.listdir("/proc/self/fd")) + 20
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
run(lambda: run_beit3_finetuning.main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts its open files in /proc")
def test_too_few_open_files_are_named_without_a_traceback(tmp_path):
    done = run_program("-c", FEW_FILES, *train_flags(tmp_path / "run", "--num_workers", "2", "--batch_size", "32"))
    assert done.returncode == 1, done.stderr
    assert "open files" in done.stderr  # of the main process, or in a line of the loader process that it misses
    assert len(re.findall("^.*error: .*lower --num_workers.*$", done.stderr, re.MULTILINE)) == 1, done.stderr
    assert "Traceback" not in done.stderr


# ---- starts that cannot work ----


def test_a_port_that_another_program_holds_is_named_at_once(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        done = run_program(
            *("run_beit3_finetuning.py", *train_flags(tmp_path / "run", "--dist_timeout", "60")),
            **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
    line = the_error_line(done.stderr)
    assert done.returncode == 2, line
    assert re.search(rf"cannot meet the other processes at 127.0.0.1:{port} .*: choose a free MASTER_PORT", line)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_devices_are_refused_before_they_meet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    code, line = failure(capsys, train_flags(tmp_path / "run", "--device", "cuda"))
    assert code == 2
    assert "wants CUDA device 3 but 2 are visible: start at most one process per device" in line


def test_a_start_epoch_beyond_the_epochs_is_said_to_have_no_effect(tmp_path, capsys):
    program(*train_flags(tmp_path / "run", "--start_epoch", "5", "--max_steps", "1"))
    said = capsys.readouterr().err
    assert "note: --start_epoch has no effect: the checkpoint knows its epoch" in said
    assert "done after 1 steps" in said


def test_fewer_epochs_than_a_run_has_behind_it_end_at_once_and_change_nothing(tmp_path, capsys):
    data = ("--limit_samples", "8")
    program(*flags("--output_dir", tmp_path / "run", "--batch_size", "4", "--epochs", "2", *data))
    weights = (tmp_path / "run" / "checkpoint-1" / "model.pth").read_bytes()
    capsys.readouterr()
    program(*flags("--output_dir", tmp_path / "run", "--batch_size", "4", "--epochs", "1", *data))
    assert "done after 4 steps" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-1" / "model.pth").read_bytes() == weights
