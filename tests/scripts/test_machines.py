"""Starts over several processes and machines as users make them: every launcher, signals, Slurm's batch script.

Two launch groups on this machine stand for two machines; with two network namespaces (a slow test) they even have
addresses of their own. Slurm is acted by two small programs, so that the batch script itself is what runs.
"""

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.weights import read_state_dict
from tests.helpers import free_port
from tests.paths import ROOT
from tests.scripts.vqa_run import train_flags

MEETING = str(ROOT / "tests" / "scripts" / "meeting.py")
WAIT_S = 120.0

Started = subprocess.Popen
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def start(*command: str, log: Path, cwd: Path = ROOT, **variables: str) -> Started:
    """Start a command in a session of its own, with one thread a process; what it says goes to ``log``."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "PLAINVL_VENV": sys.prefix,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    with open(log, "w", encoding="utf-8") as stream:
        return subprocess.Popen(
            command,
            cwd=cwd,
            env=os.environ | environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end(process: Started, log: Path) -> tuple[int, str]:
    """Exit code and output; a process that does not end is killed with its session, and the test fails."""
    try:
        code = process.wait(WAIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        pytest.fail(f"did not end within {WAIT_S:.0f} s:\n{log.read_text(encoding='utf-8')}")
    return code, log.read_text(encoding="utf-8", errors="replace")


def wait_for(path: Path, process: Started, log: Path) -> None:
    limit = time.monotonic() + WAIT_S
    while not path.exists():
        if process.poll() is not None or time.monotonic() > limit:
            end(process, log)
            pytest.fail(f"no {path.name}:\n{log.read_text(encoding='utf-8')}")
        time.sleep(0.05)


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


# --- launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher",
    [
        "c10d",
        pytest.param("launch with --use_env", marks=pytest.mark.slow),
        pytest.param("DeepSpeed", marks=needs_deepspeed),
    ],
)
def test_processes_of_a_launcher_meet_and_know_their_places(tmp_path, launcher):
    port, log, output = str(free_port()), tmp_path / "log", tmp_path / "met.json"
    start_with = {
        "c10d": ["torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--nproc_per_node=2"],
        "launch with --use_env": ["torch.distributed.launch", "--use_env", "--nproc_per_node=2", "--master_port", port],
        "DeepSpeed": ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port],
    }
    process = start(sys.executable, "-m", *start_with[launcher], MEETING, str(output), log=log)
    code, said = end(process, log)
    assert code == 0, said
    rows = rows_of(output)
    assert [(row["rank"], row["local_rank"], row["world_size"]) for row in rows] == [(0, 0, 2), (1, 1, 2)]
    cores = len(os.sched_getaffinity(0))
    assert {row["cores"] for row in rows} == {max(cores // 2, 1)}
    if launcher == "DeepSpeed":  # hands over a flag, which our programs accept
        assert [row["words"][0] for row in rows] == ["--local_rank=0", "--local_rank=1"]


@needs_deepspeed
def test_two_jobs_on_one_machine_find_ports_of_their_own(tmp_path):
    names = ("one", "other")
    jobs = [torchrun(tmp_path / name, MEETING, str(tmp_path / f"{name}.json")) for name in names]
    for name, (job, log) in zip(names, jobs, strict=True):
        code, text = end(job, log)
        assert code == 0, text
        assert [row["rank"] for row in rows_of(tmp_path / f"{name}.json")] == [0, 1]


def test_a_killed_process_ends_torchrun_s_job(tmp_path):
    output = tmp_path / "run"
    job, log = torchrun(
        tmp_path / "log", "run_beit3_finetuning.py", *train_flags(output, "--epochs", "500", "--save_ckpt_steps", "2")
    )
    wait_for(output / "latest", job, log)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    started = time.monotonic()
    os.kill(int(children[1]), signal.SIGKILL)
    code, text = end(job, log)
    assert code == 1, text
    assert "lost contact with another process" in text or "SIGTERM" in text, text
    assert time.monotonic() - started < 100  # it would train for many minutes; an idle machine needs 3 s


def torchrun(folder: Path, *program: str) -> tuple[Started, Path]:
    """Two processes, as the launchers of ``scripts/`` start them on one machine."""
    log = folder.with_suffix(".txt")
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program)
    return start(*command, log=log), log


@pytest.mark.slow
def test_deepspeed_s_launcher_joins_two_machines_of_a_host_file_without_ssh(tmp_path):
    (tmp_path / "hosts").write_text("# two machines\nfirst slots=1\nsecond slots=1\n")
    port, groups = str(free_port()), []
    for node in ("0", "1"):
        log = tmp_path / f"log{node}"
        more = ["--no_ssh", "--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port]
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hosts"), *more]
        groups.append((start(*command, MEETING, str(tmp_path / "met.json"), log=log), log))
    for process, log in groups:
        code, said = end(process, log)
        assert code == 0, said
    assert [(row["rank"], row["local_rank"]) for row in rows_of(tmp_path / "met.json")] == [(0, 0), (1, 0)]


def test_openmpi_s_and_slurm_s_variables_are_enough_on_one_machine(tmp_path):
    openmpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_PORT": str(free_port())}
    job = str(100000 + os.getpid())  # the port follows from it
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": job}
    slurm |= {"SLURM_CPUS_PER_TASK": "1"}
    started = []
    for rank in ("0", "1"):
        own = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank}
        for name, variables in (
            ("openmpi", openmpi | own),
            ("slurm", slurm | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}),
        ):
            log = tmp_path / f"{name}{rank}"
            output = str(tmp_path / f"{name}.json")
            started.append((start(sys.executable, MEETING, output, log=log, **variables), log))
    for process, log in started:
        code, said = end(process, log)
        assert code == 0, said
    for name in ("openmpi", "slurm"):
        assert [(row["rank"], row["local_rank"]) for row in rows_of(tmp_path / f"{name}.json")] == [(0, 0), (1, 1)]
    assert [row["cores"] for row in rows_of(tmp_path / "slurm.json")] == [1, 1]


# --- several machines -------------------------------------------------------------------------------------------------


def launch_groups(tmp_path: Path, *program: str) -> list[tuple[Started, Path]]:
    """dist_run_multi.sh twice, with one process each, as two machines would."""
    port, groups = str(free_port()), []
    for node in ("0", "1"):
        log = tmp_path / f"machine{node}.log"
        command = ["bash", str(ROOT / "scripts" / "dist_run_multi.sh"), "2", node, "127.0.0.1", "1", *program]
        groups.append((start(*command, log=log, MASTER_PORT=port), log))
    return groups


def test_training_over_two_launch_groups_equals_torchrun_s_bitwise(tmp_path):
    more = ["--batch_size", "2", "--limit_samples", "16", "--max_steps", "3", "--dist_timeout", "120"]
    for process, log in launch_groups(tmp_path, "run_beit3_finetuning.py", *train_flags(tmp_path / "multi", *more)):
        code, said = end(process, log)
        assert code == 0, said
        assert said.count("done after 3 steps") == (log.name == "machine0.log")  # the first machine alone speaks
    log = tmp_path / "single.log"
    single = ["bash", str(ROOT / "scripts" / "dist_run_single.sh"), "2", "run_beit3_finetuning.py"]
    code, said = end(start(*single, *train_flags(tmp_path / "single", *more), log=log), log)
    assert code == 0, said
    multi, single = (read_state_dict(tmp_path / name / "checkpoint-step3") for name in ("multi", "single"))
    assert multi.keys() == single.keys()
    assert all(torch.equal(multi[name], single[name]) for name in multi)


def test_a_signal_to_one_machine_s_launcher_stops_all_of_them(tmp_path):
    groups = launch_groups(tmp_path, MEETING, str(tmp_path / "met.json"), "--wait")
    wait_for(tmp_path / "met.json", *groups[0])
    assert [row["group_rank"] for row in rows_of(tmp_path / "met.json")] == ["0", "1"]
    groups[1][0].send_signal(signal.SIGUSR1)  # dist_run_multi.sh has become torchrun, and passes it on
    ended = [end(*group) for group in groups]
    assert [code for code, _ in ended] == [1, 1]  # torchrun's, whatever the program's was
    assert "meeting.py: stopped by SIGUSR1: left the meeting" in ended[0][1]
    assert "exitcode  : 138" in ended[0][1]  # torchrun's report of the machine that got no signal


def test_under_nohup_a_closed_terminal_does_not_end_the_run(tmp_path):
    log, output = tmp_path / "log", tmp_path / "met.json"
    script = str(ROOT / "scripts" / "dist_run_single.sh")
    process = start("nohup", "bash", script, "2", MEETING, str(output), "--wait", log=log)
    wait_for(output, process, log)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)  # this one is heard
    _, said = end(process, log)
    assert "SIGTERM: stops after this step" in said
    assert "Received 1 death signal" not in said


NAMESPACES = """
set -e
ip netns add {0}a; ip netns add {0}b
trap 'ip netns del {0}a; ip netns del {0}b' EXIT
ip link add {0}a netns {0}a type veth peer name {0}b netns {0}b
ip -n {0}a addr add 10.213.0.1/24 dev {0}a; ip -n {0}b addr add 10.213.0.2/24 dev {0}b
for x in a b; do ip -n {0}$x link set {0}$x up; ip -n {0}$x link set lo up; done
GLOO_SOCKET_IFNAME={0}b ip netns exec {0}b bash scripts/dist_run_multi.sh 2 1 10.213.0.1 1 "$@" & second=$!
code=0
GLOO_SOCKET_IFNAME={0}a ip netns exec {0}a bash scripts/dist_run_multi.sh 2 0 10.213.0.1 1 "$@" || code=$?
wait $second
exit $code
"""


@functools.cache
def why_no_namespaces() -> str | None:
    if shutil.which("ip") is None:
        return "no ip command here"
    name = f"pv{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@pytest.mark.slow
def test_two_machines_with_addresses_of_their_own_meet_over_their_network(tmp_path):
    if why_no_namespaces():
        pytest.skip(why_no_namespaces())
    log, output = tmp_path / "log", tmp_path / "met.json"
    script = NAMESPACES.format(f"pv{os.getpid() % 10000}")
    code, said = end(start("bash", "-c", script, "machines", MEETING, str(output), log=log), log)
    assert code == 0, said
    assert [(row["rank"], row["group_rank"]) for row in rows_of(output)] == [(0, "0"), (1, "1")]


# --- Slurm ------------------------------------------------------------------------------------------------------------

SCONTROL = """#!/bin/sh
echo "$*" >> "$ACTED/scontrol"
[ "$1" != show ] || printf 'localhost\\nother\\n'
"""
# starts the tasks with the variables that srun 22.05 sets, passes SIGUSR1 on, ends all by SIGTERM when one has failed,
# as --kill-on-bad-exit=1 asks, and leaves with the highest exit code, 128 + number for a task that a signal ended
SRUN = f"""#!{sys.executable}
import json, os, signal, subprocess, sys, time
flags, command = [], sys.argv[1:]
while command[0].startswith("--"):
    flags.append(command.pop(0))
record = {{"flags": flags, "command": command}}
record |= {{name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")}}
with open(os.environ["ACTED"] + "/srun", "w") as file:
    json.dump(record, file)
if "ACTED_CODE" in os.environ:
    sys.exit(int(os.environ["ACTED_CODE"]))
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
for rank in ("0", "1"):
    own = {{"SLURM_PROCID": rank, "SLURM_LOCALID": "0", "SLURM_NODEID": rank, "SLURM_STEP_NUM_TASKS": "2"}}
    own |= {{"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}}
    tasks.append(subprocess.Popen(command, env=os.environ | own))
with open(os.environ["ACTED"] + "/pid", "w") as file:
    file.write(str(os.getpid()))
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        for task in tasks:
            task.terminate()
        break
    time.sleep(0.001)
sys.exit(max(128 - code if code < 0 else code for code in [task.wait() for task in tasks]))
"""


def act_slurm(folder: Path) -> dict[str, str]:
    """srun and scontrol first on PATH, and what Slurm sets for a batch script."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    job = str(4711 + 10000 * os.getpid())
    variables = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "ACTED": str(folder), "SLURM_JOB_ID": job}
    variables |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "3"}
    return variables | {"SLURM_SUBMIT_DIR": str(ROOT), "MASTER_PORT": "", "OMP_NUM_THREADS": ""}


def batch(folder: Path, *arguments: str, **variables: str) -> Started:
    copy = folder / "slurm_script"  # Slurm runs a copy in a folder of its own
    shutil.copy(ROOT / "scripts" / "slurm_train.sbatch", copy)
    return start("bash", str(copy), *arguments, log=folder / "log", **(act_slurm(folder) | variables))


def acted(folder: Path, name: str) -> str:
    return (folder / name).read_text() if (folder / name).exists() else ""


def test_the_batch_script_starts_one_task_a_process_and_queues_a_stopped_job_again(tmp_path):
    process = batch(tmp_path, "tests/scripts/meeting.py", str(tmp_path / "met.json"), "--wait")
    wait_for(tmp_path / "met.json", process, tmp_path / "log")
    wait_for(tmp_path / "pid", process, tmp_path / "log")
    os.kill(int(acted(tmp_path, "pid")), signal.SIGUSR1)
    code, said = end(process, tmp_path / "log")
    assert code == 138, said
    job = act_slurm(tmp_path)["SLURM_JOB_ID"]
    assert acted(tmp_path, "scontrol").splitlines() == ["show hostnames n[1-2]", f"requeue {job}"]
    record = json.loads(acted(tmp_path, "srun"))
    assert record["flags"] == ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    assert record["command"][:2] == [f"{sys.prefix}/bin/python", "tests/scripts/meeting.py"]
    assert record["MASTER_ADDR"] == "localhost"
    assert record["MASTER_PORT"] == str(20000 + int(job) % 12000)
    assert record["OMP_NUM_THREADS"] == "3"
    assert [(row["rank"], row["local_rank"], row["world_size"]) for row in rows_of(tmp_path / "met.json")] == [
        (0, 0, 2),
        (1, 0, 2),
    ]


@pytest.mark.parametrize(
    ("variables", "code", "message"),
    [
        ({"ACTED_CODE": "0"}, 0, "job "),
        ({"ACTED_CODE": "1"}, 1, "job "),
        ({"ACTED_CODE": "2"}, 2, "job "),
        ({"ACTED_CODE": "143"}, 143, "job "),
        ({"ACTED_CODE": "138", "SLURM_RESTART_COUNT": "100"}, 138, "queued again 100 times already"),
        ({"SLURM_JOB_ID": ""}, 2, "error: this is no Slurm job: start it with sbatch"),
        ({"SLURM_SUBMIT_DIR": "/"}, 2, "error: / is not the root of plainvl: submit from there, or set PLAINVL_ROOT"),
    ],
)
def test_the_batch_script_queues_nothing_again_for_other_reasons(tmp_path, variables, code, message):
    left, said = end(batch(tmp_path, MEETING, str(tmp_path / "met.json"), **variables), tmp_path / "log")
    assert (left, "requeue" in acted(tmp_path, "scontrol")) == (code, False), said
    assert message in said


def test_the_batch_script_finds_mistakes_before_any_task_starts(tmp_path):
    left, said = end(batch(tmp_path, "run_beit3_finetuning.py", "--task", "vqav2", "--epoch", "3"), tmp_path / "log")
    assert (left, said.count("\n")) == (2, 1), said
    assert "--epoch" in said
    left, said = end(batch(tmp_path), tmp_path / "log")
    assert (left, said.count("\n")) == (2, 1), said
    assert "no program given" in said
    assert acted(tmp_path, "srun") == ""
