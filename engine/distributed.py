"""Process start-up and the few collectives that training and evaluation need.

Every function is valid with one process and no process group, so callers never ask whether a group exists.
This is the one file (beside the DeepSpeed backend) that reads environment variables.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import EngineError

_started_here = False  # whether the process group is ours to leave, or belongs to whoever called us


@dataclass(frozen=True)
class Placement:
    """Where this process stands in the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


# (rank, world size, local rank) of each launcher, in order of preference. Slurm sets most of its variables in any
# allocation and batch script; srun alone sets the number of tasks of a step, and one task is not a distributed start.
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "OpenMPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def placement_from_environment() -> Placement | None:
    """Read rank, world size and local rank as the launcher left them; None for a plain ``python script.py``."""
    for launcher, names in _LAUNCHERS.items():
        values = [os.environ.get(name) for name in names]
        if launcher == "Slurm" and values[1] in (None, "1"):
            continue
        if values[0] is None and values[1] is None:
            continue
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
        return Placement(rank, world_size, local_rank)
    return None


def init(device: str = "auto", *, timeout_s: float = 1800.0) -> torch.device:
    """Choose this process's device and join the process group when a launcher started several.

    A process group that exists already is used as it is.

    Args:
        device: ``auto`` (CUDA when there is one, else CPU), ``cuda``, ``cuda:N`` or ``cpu``.
        timeout_s: seconds after which a collective that a lost or hung rank blocks ends the job.

    Returns:
        The device of this process (the local rank's one under a launcher).

    Raises:
        EngineError: CUDA asked for and absent, more local processes than devices, incomplete environment.
    """
    global _started_here
    placement = placement_from_environment()
    chosen = _choose_device(device, placement.local_rank if placement else None)
    if placement is not None and placement.world_size > 1 and not dist.is_initialized():
        if "MASTER_PORT" not in os.environ:
            raise EngineError("MASTER_PORT is not set: start with torchrun, or export MASTER_ADDR and MASTER_PORT")
        if "MASTER_ADDR" not in os.environ:
            if not _all_here(placement.world_size):
                raise EngineError(
                    "MASTER_ADDR is not set, and not all processes are known to run on this machine: "
                    "export MASTER_ADDR (the machine of rank 0), or start with torchrun"
                )
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        # objects and flags travel over gloo also beside NCCL, so that no collective needs the accelerator
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        try:
            dist.init_process_group(
                backend,
                init_method="env://",
                rank=placement.rank,
                world_size=placement.world_size,
                timeout=timedelta(seconds=timeout_s),
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            first = str(error).splitlines()[0]
            raise EngineError(
                f"cannot meet the other processes at {address} ({first}): choose a free MASTER_PORT"
            ) from None
        _started_here = True
    return chosen


def _all_here(world_size: int) -> bool:
    """Whether the launcher says that all processes are on this machine."""
    if "SLURM_STEP_NUM_TASKS" in os.environ and "RANK" not in os.environ:
        return os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES")) == "1"
    return str(world_size) in (os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"))


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


def rank() -> int:
    """Index of this process, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def cores_per_process() -> int:
    """Processor cores of this machine that each local process may take for itself, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)


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

    A process with an error of its own raises that; the others raise ``EngineError`` with the first message.
    """
    messages = gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    for index, message in enumerate(messages):
        if message is not None:
            raise EngineError(f"rank {index}: {message}")
