"""Process start-up and the few collectives that training and evaluation need.

Every function is valid with one process and no process group, so callers never ask whether a group exists.
This is the one file (beside the DeepSpeed backend) that reads environment variables.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import EngineError, RunError
from engine.write_failures import is_refused

T = TypeVar("T")
_FAILURE_KEY = "plainvl/first_failure"
_started_here = False  # whether the process group is ours to leave, or belongs to whoever called us
_has_had_group = False


@dataclass(frozen=True)
class Placement:
    """Where this process stands in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


# (rank, world size, local rank) of each launcher, in order of preference; DeepSpeed's launcher sets torchrun's. Slurm
# sets most of its variables in any allocation and batch script; srun alone sets the number of tasks of a step, and one
# task is not a distributed start.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "OpenMPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def placement_from_environment() -> Placement | None:
    """Read rank, world size and local rank as the launcher left them; None for a plain ``python script.py``."""
    launcher = _launcher()
    if launcher is None:
        return None
    names = _LAUNCHERS[launcher]
    values = [os.environ.get(name) for name in names]
    if values[0] is None or values[1] is None:
        missing = names[0] if values[0] is None else names[1]
        raise EngineError(
            f"{launcher} start is incomplete: {missing} is not set; start with torchrun, "
            f"or unset {names[0]} and {names[1]}"
        )
    try:
        rank, world_size, local_rank = int(values[0]), int(values[1]), int(values[2] or 0)
    except ValueError:
        raise EngineError(f"{', '.join(names)} must be integers, got {values}: start with torchrun") from None
    if not 0 <= rank < world_size:
        raise EngineError(f"{names[0]}={rank} must lie in [0, {names[1]}={world_size}): start with torchrun")
    if launcher == "torchrun" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        _refuse_torchrun_many_times()
    if launcher == "Slurm" and os.environ.get("SLURM_GPUS_PER_TASK") == "1":
        local_rank = 0  # srun shows each task its own GPU and no other
    return Placement(rank, world_size, local_rank)


def _launcher() -> str | None:
    for launcher, names in _LAUNCHERS.items():
        if launcher == "Slurm" and os.environ.get(names[1], "1") == "1":
            continue
        if names[0] in os.environ or names[1] in os.environ:
            return launcher
    return None


def _refuse_torchrun_many_times() -> None:
    """One torchrun for one machine, but several of it: each would believe to be alone and write the same files."""
    for launcher in ("OpenMPI", "Slurm"):
        count = _LAUNCHERS[launcher][1]
        if os.environ.get(count, "1") != "1":
            raise EngineError(
                f"{launcher} started torchrun {os.environ[count]} times, each for one machine alone: let it start "
                f"python directly, or torchrun once a machine with --nnodes (for independent runs unset {count})"
            )


def local_processes() -> int | None:
    """How many of the job's processes run on this machine, where the launcher says it."""
    launcher = _launcher()
    if launcher == "OpenMPI":
        value = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    elif launcher == "Slurm":
        counts = _spelt_out(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = os.environ.get("SLURM_NODEID", "")
        value = counts[int(node)] if node.isdigit() and int(node) < len(counts) else None
        if value is None and os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES")) == "1":
            value = os.environ["SLURM_STEP_NUM_TASKS"]
    else:  # DeepSpeed's launcher has a name of its own
        value = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return int(value) if value and value.isdigit() and value != "0" else None


def _spelt_out(counts: str) -> list[str]:
    """``2(x3),1`` as Slurm writes it → 2, 2, 2, 1; empty for anything else."""
    if not re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", counts):
        return []
    return [number for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]


def init(device: str = "auto", *, timeout_s: float = 1800.0, group_of_one: bool = False) -> torch.device:
    """Choose this process's device and join the process group when a launcher started several.

    A process group that exists already is used as it is.

    Args:
        device: ``auto`` (CUDA when there is one, else CPU), ``cuda``, ``cuda:N`` or ``cpu``.
        timeout_s: seconds after which a collective that a lost or hung rank blocks ends the job.
        group_of_one: make a process group for a single process too, which DeepSpeed needs.

    Returns:
        The device of this process (the local rank's one under a launcher).

    Raises:
        EngineError: CUDA asked for and absent, more local processes than devices, incomplete environment.
    """
    global _started_here, _has_had_group
    placement = placement_from_environment()
    chosen = _choose_device(device, placement.local_rank if placement else None)
    if placement is not None and placement.world_size > 1 and not dist.is_initialized():
        _find_meeting_place(placement.world_size)
        try:
            dist.init_process_group(
                _collectives(chosen),
                init_method="env://",
                rank=placement.rank,
                world_size=placement.world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        except RuntimeError as error:  # torch's own network errors are of this kind, gloo's are just this
            raise EngineError(_why_no_meeting(error)) from None
        _started_here = True
    elif group_of_one and not dist.is_initialized():
        dist.init_process_group(_collectives(chosen), store=dist.HashStore(), rank=0, world_size=1)
        _started_here = True
    _has_had_group = _has_had_group or _started_here
    return chosen


def _collectives(device: torch.device) -> str:
    # objects and flags travel over gloo also beside NCCL, so that no collective needs the accelerator
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _find_meeting_place(world_size: int) -> None:
    """Have MASTER_ADDR and MASTER_PORT in the environment, from Slurm's variables where nobody gave them.

    Raises:
        EngineError: they are not set and cannot be known.
    """
    given = os.environ
    in_slurm = _launcher() == "Slurm"
    if "MASTER_PORT" not in given and in_slurm and given.get("SLURM_JOB_ID", "").isdigit():
        # the same in all tasks, as a rule another one in other jobs and steps, below the ports handed out at random
        step = given.get("SLURM_STEP_ID", "")
        given["MASTER_PORT"] = str(
            20000 + (int(given["SLURM_JOB_ID"]) + 97 * int(step if step.isdigit() else 0)) % 12000
        )
    if "MASTER_PORT" not in given:
        raise EngineError("MASTER_PORT is not set: start with torchrun, or export MASTER_ADDR and MASTER_PORT")
    if "MASTER_ADDR" not in given and local_processes() == world_size:
        given["MASTER_ADDR"] = "127.0.0.1"
    if "MASTER_ADDR" not in given and in_slurm:
        given.update(_first_machine(given.get("SLURM_STEP_NODELIST", "")))
    if "MASTER_ADDR" not in given:
        raise EngineError(
            "MASTER_ADDR is not set, and not all processes are known to run on this machine: "
            "export MASTER_ADDR (the machine of rank 0), or start with torchrun"
        )


def _why_no_meeting(error: RuntimeError) -> str:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "connectFullMesh" in first:
        return (
            f"met at {address}, but the processes cannot reach each other ({first}): set GLOO_SOCKET_IFNAME, and with "
            "GPUs NCCL_SOCKET_IFNAME, to the network interface that joins the machines (docs/several_machines.md)"
        )
    way = "choose a free MASTER_PORT"
    if "listen" not in first:
        way = "have all been started, is MASTER_ADDR right, and does a firewall let the port through?"
    return f"cannot meet the other processes at {address} ({first}): {way}"


def _first_machine(nodes: str) -> dict[str, str]:
    """MASTER_ADDR from Slurm's node list, such as ``gpu[03-05,9]`` or ``a,b``; nothing for a rarer spelling."""
    found = re.match(r"([\w.-]+)(?:\[(\d+)[\d,-]*\])?(,|$)", nodes)
    return {"MASTER_ADDR": found[1] + (found[2] or "")} if found else {}


def _choose_device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineError(f"--device must be auto, cuda, cuda:N or cpu, got {name!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise EngineError(f"--device must be auto, cuda, cuda:N or cpu, got {name!r}")
    if not torch.cuda.is_available():
        raise EngineError("--device cuda: no CUDA device is visible here; give --device cpu or check the driver")
    index = device.index if device.index is not None else (local_rank or 0)
    if local_rank is not None:
        index = local_rank
    if index >= torch.cuda.device_count():
        raise EngineError(
            f"this process wants CUDA device {index} but {torch.cuda.device_count()} are visible: "
            "start at most one process per device (--nproc_per_node)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def shutdown() -> None:
    """Leave the process group, if ``init`` joined one; a caller's own group stays."""
    global _started_here
    if _started_here and dist.is_initialized():
        dist.destroy_process_group()
    _started_here = False


def has_had_group() -> bool:
    """Whether ``init`` has joined a process group in this process, even if it was left since."""
    return _has_had_group


def rank() -> int:
    """Index of this process, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores_per_process() -> int:
    """Processor cores of this machine that each local process may take for itself, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if _launcher() == "Slurm" and own.isdigit():
        return max(min(cores, int(own)), 1)  # srun may have bound this process to them: then they are all it sees
    return max(cores // (local_processes() or 1), 1)


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """Values of all processes in rank order, on every process (pickled between our own processes only)."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """The value that the main process holds, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_(tensor: Tensor, op: str = "sum") -> Tensor:
    """Reduce a tensor over the processes in place (``sum`` or ``max``); the same tensor when alone."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return tensor


def raise_together(error: Exception | None) -> None:
    """Raise on every process when any process failed, so that none waits for one that has left.

    A process with an error of its own raises that; the others raise the first one's message as ``EngineError`` where it
    is for the user to mend, else as ``RunError``, so that all end with the same exit code. It bears ``agreed = True``.
    """
    failures = gather_objects(None if error is None else (_is_mended_by_users(error), str(error)))
    if error is None:
        first = next((index for index, failure in enumerate(failures) if failure is not None), None)
        if first is None:
            return
        is_mended, message = failures[first]
        error = (EngineError if is_mended else RunError)(f"rank {first}: {message}")
    error.agreed = True
    raise error


def _is_mended_by_users(error: Exception) -> bool:
    # the errors for what a user gives, of whichever room, are ValueErrors
    return isinstance(error, ValueError) or (isinstance(error, OSError) and is_refused(error))


def together(work: Callable[[], T]) -> T:
    """Work on every process; when it fails on one, all raise (see ``raise_together``). All call it together."""
    found: list[T] = []
    error: Exception | None = None
    try:
        found.append(work())
    except Exception as raised:
        error = raised
    raise_together(error)
    return found[0]


def on_main(work: Callable[[], T]) -> T:
    """Work on the main process alone: what it returns, or its failure, is that of all. All call it together."""
    return broadcast_object(together(lambda: work() if is_main() else None))


def report_failure(message: str) -> bool:
    """Leave word for the other processes, which will notice only that contact is lost; whether it is the first word."""
    if dist.is_initialized():
        with suppress(Exception):  # the process that keeps the store may be gone: then there is nobody to tell
            store = _store()
            if store.add(f"{_FAILURE_KEY}/count", 1) > 1:
                return False
            store.set(_FAILURE_KEY, f"rank {rank()}: {message}")
    return True


def reported_failure() -> str | None:
    """What the first process that failed has left word of, if anything; does not wait."""
    if not dist.is_initialized():
        return None
    with suppress(Exception):
        store = _store()
        if store.check([_FAILURE_KEY]):
            return store.get(_FAILURE_KEY).decode()
    return None


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
