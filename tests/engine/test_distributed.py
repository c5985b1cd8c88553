import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from engine import distributed
from engine.distributed import Placement, placement_from_environment
from engine.errors import EngineError, RunError
from tests.helpers import free_port, run_in_processes

VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"]
OPENMPI = ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"]
VARIABLES += [*OPENMPI, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"]
VARIABLES += ["SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "OMPI_COMM_WORLD_LOCAL_SIZE"]
VARIABLES += ["SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"]
VARIABLES += ["SLURM_GPUS_PER_TASK", "SLURM_CPUS_PER_TASK", "GROUP_WORLD_SIZE", "LOCAL_SIZE"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "placement"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, Placement(3, 4, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Placement(0, 1, 0)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Placement(1, 2, 1),
        ),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, Placement(5, 8, 1)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, None),  # an interactive allocation
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),  # python in a batch script, no srun
        ({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "8"}, Placement(0, 2, 0)),
        (  # torchrun once a machine, by srun
            {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2"},
            Placement(9, 16, 1),
        ),
        (  # each task sees its own GPU alone
            {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_GPUS_PER_TASK": "1"},
            Placement(5, 8, 0),
        ),
    ],
)
def test_the_launcher_s_variables_say_where_a_process_stands(monkeypatch, variables, placement):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert placement_from_environment() == placement


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "torchrun start is incomplete: RANK is not set"),
        ({"RANK": "0"}, "torchrun start is incomplete: WORLD_SIZE is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK=2 must lie in \[0, WORLD_SIZE=2\)"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, r"RANK=-1 must lie in"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "must be integers"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set: start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "MASTER_PORT": "1"},
            "MASTER_ADDR is not set",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"},
            "Slurm started torchrun 2 times, each for one machine alone: let it start python directly",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "OpenMPI started torchrun 2 times",
        ),
    ],
)
def test_an_incomplete_start_is_refused_with_the_variable_named(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EngineError, match=message):
        distributed.init("cpu")


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", ""])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(EngineError, match="--device must be auto, cuda, cuda:N or cpu"):
        distributed.init(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_where_there_is_none_is_refused_and_auto_takes_the_cpu():
    with pytest.raises(EngineError, match="no CUDA device is visible here; give --device cpu"):
        distributed.init("cuda")
    assert distributed.init("auto") == torch.device("cpu")


def test_everything_works_alone():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_objects("x") == ["x"]
    assert distributed.broadcast_object("x") == "x"
    assert distributed.all_reduce_(torch.ones(2)).tolist() == [1, 1]
    distributed.barrier()
    distributed.raise_together(None)
    assert distributed.on_main(lambda: distributed.together(lambda: "x")) == "x"
    with pytest.raises(KeyError):
        distributed.raise_together(KeyError("own"))
    distributed.shutdown()


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch):
    alone = distributed.cores_per_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * alone))
    assert alone >= 1
    assert distributed.cores_per_process() == 1


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_SIZE": "4"}, 4),  # DeepSpeed's launcher
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, 2),
        ({"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}, 4),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "6"}, 2),  # 12 cores for two of 6
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "many"}, 1),
        ({}, 1),
    ],
)
def test_every_launcher_says_how_many_processes_share_the_cores_of_a_machine(monkeypatch, variables, processes):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.cores_per_process() == 12 // processes


@pytest.mark.parametrize(
    ("nodes", "address"),
    [
        ("n1", "n1"),
        ("gpu[03-05,9]", "gpu03"),
        ("a-b.c,d[1-2]", "a-b.c"),
        ("n[7],x", "n7"),
        ("n[1-2]-ib", None),
        ("", None),
    ],
)
def test_slurm_s_node_list_names_the_first_machine_and_the_job_the_port(monkeypatch, nodes, address):
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
    slurm |= {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "2"}
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # set by the function; put back by monkeypatch
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    for name in ("_started_here", "_has_had_group"):  # nothing is joined here
        monkeypatch.setattr(distributed, name, False)
    joined = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **given: joined.append(given))
    if address is None:
        with pytest.raises(EngineError, match="MASTER_ADDR is not set, and not all processes are known"):
            distributed.init("cpu")
        return
    distributed.init("cpu")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == (address, str(20000 + 345 + 194))
    assert (joined[0]["rank"], joined[0]["world_size"]) == (0, 4)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (dist.DistNetworkError("The server socket has failed to listen on any address"), "choose a free MASTER_PORT"),
        (dist.DistNetworkError("The client socket has timed out"), "have all been started, is MASTER_ADDR right"),
        (dist.DistStoreError("Timed out waiting for clients"), "have all been started, is MASTER_ADDR right"),
        (
            RuntimeError("Gloo connectFullMesh failed with [x]"),
            "set GLOO_SOCKET_IFNAME, and with GPUs NCCL_SOCKET_IFNAME",
        ),
    ],
)
def test_processes_that_cannot_meet_are_told_what_to_look_at(monkeypatch, error, message):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(EngineError, match="at first:29500") as raised:
        distributed.init("cpu")
    assert message in str(raised.value)


def _use_a_group(rank: int, folder: str) -> None:
    assert distributed.init("cpu") == torch.device("cpu")  # the group of the caller is used as it is
    assert (distributed.rank(), distributed.world_size()) == (rank, 2)
    reduced = distributed.all_reduce_(torch.tensor([rank + 1.0]))
    largest = distributed.all_reduce_(torch.tensor([rank + 1.0]), "max")
    result = [
        distributed.gather_objects(rank),
        distributed.broadcast_object(f"of {rank}"),
        reduced.item(),
        largest.item(),
    ]
    try:
        distributed.raise_together(EngineError("rank 1 has no data") if rank == 1 else None)
    except EngineError as error:
        result.append(str(error))
    result.append(distributed.on_main(lambda: f"only rank {rank} works"))
    for failure in FAILURES:
        fail = partial(_fail_alone, failure)
        for work in (fail, partial(distributed.on_main, fail)):
            try:
                distributed.together(work)
            except (ValueError, OSError, KeyError, RunError) as error:
                result.append([type(error).__name__, str(error), error.agreed])
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    distributed.shutdown()
    assert dist.is_initialized()  # and it stays theirs


# error of one process → what the others end with, in the same exit code
FAILURES = {
    ValueError("no such file"): EngineError,
    EngineError("no such stage"): EngineError,
    PermissionError(errno.EACCES, "not yours"): EngineError,
    RunError("no room"): RunError,
    OSError(errno.ENOSPC, "no room"): RunError,
    KeyError("a bug"): RunError,
}


def _fail_alone(failure: Exception) -> None:
    if distributed.is_main():
        raise failure


def test_two_processes_agree_and_fail_together(tmp_path):
    run_in_processes(_use_a_group, 2, str(tmp_path))
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    common = [[0, 1], "of 0", 3.0, 2.0]
    assert zero == [
        *(*common, "rank 1: rank 1 has no data", "only rank 0 works"),
        *([type(failure).__name__, str(failure), True] for failure in FAILURES for _ in range(2)),
    ]
    assert one == [
        *(*common, "rank 1 has no data", "only rank 0 works"),
        *([kind.__name__, f"rank 0: {failure}", True] for failure, kind in FAILURES.items() for _ in range(2)),
    ]


def _join_by_environment(rank: int, variables: dict[str, str], rank_names: tuple[str, str]) -> None:
    dist.barrier()  # who leaves while the other one still connects breaks its start
    dist.destroy_process_group()
    import os

    os.environ |= variables | dict.fromkeys(rank_names, str(rank))
    distributed.init("cpu", timeout_s=60)
    assert distributed.gather_objects(rank) == [0, 1]
    distributed.barrier()
    distributed.shutdown()
    assert not dist.is_initialized()
    os._exit(0)  # the helper would look for its own group


@pytest.mark.parametrize(
    ("variables", "rank_names"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ("RANK", "LOCAL_RANK")),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NNODES": "1"}, ("SLURM_PROCID", "SLURM_LOCALID")),
    ],
)
def test_processes_of_one_machine_join_by_the_launcher_s_variables_and_leave(variables, rank_names):
    run_in_processes(_join_by_environment, 2, variables | {"MASTER_PORT": str(free_port())}, rank_names)
