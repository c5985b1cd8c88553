"""Failures of the surroundings (memory, processes, limits of the system) as one line: what happened and what to do."""

import errno
import re

import torch
import torch.distributed as dist

from engine import distributed

_GO_ON = "the same command goes on from the newest checkpoint"
_LESS_MEMORY = (
    "take smaller batches; in training also more micro-batches per step, recompute activations in the backward pass, "
    "or let DeepSpeed's ZeRO divide the training state"
)
# what gloo, the store and the sockets below them say when the other side is gone; NCCL has an exception of its own
_LOST_CONTACT = re.compile(
    r"connection closed by peer|connection reset by peer|broken pipe|timed out waiting|socket ?timeout"
    r"|read error \[|write error \[|connection was likely closed|recvvalue failed|sendbytes failed"
    r"|wait timeout|nccl|gloo",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory|out of memory", re.IGNORECASE)
_SHARED_MEMORY = re.compile(r"shared memory|\bshm\b|/torch_\d+_|bus error", re.IGNORECASE)
_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (\w+)|exited)")
_OPEN_FILES = re.compile(r"too many open files|ancdata", re.IGNORECASE)


def explain(error: BaseException) -> str | None:
    """One line for a failure that is not a bug: lost process, killed loader worker, no memory, limits; else None."""
    text = str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    # one from a loader process comes with that process's traceback, and the reason at its end
    first = lines[-1 if lines[0].startswith("Caught ") else 0]
    worker = _LOST_WORKER.search(text)
    if _OPEN_FILES.search(text) or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
        return f"too many open files ({first}): raise the limit (ulimit -n 65536) or lower --num_workers; {_GO_ON}"
    if isinstance(error, RuntimeError | OSError) and _SHARED_MEMORY.search(text):
        return (
            f"no room in shared memory, through which loader processes pass batches ({first}): give --num_workers 0, "
            f"or more of it (docker: --shm-size 16g or --ipc host); {_GO_ON}"
        )
    # a batch that was on its way through the socket of a process which ended just then
    if worker or isinstance(error, ConnectionResetError):
        which = f" (pid {worker[1]})" if worker else ""
        how = f"was killed by signal {worker[2]}" if worker and worker[2] else "ended unexpectedly"
        return f"a loader process{which} {how}, most often for lack of memory: lower --num_workers; {_GO_ON}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    ):
        return f"out of memory ({first}): {_LESS_MEMORY}; {_GO_ON}"
    if _is_lost_contact(error, text):
        reason = distributed.reported_failure()
        if reason:
            return f"ended because another process did: {reason}"
        return (
            f"lost contact with another process ({first}): it was killed, or hung for longer than --dist_timeout; "
            f"look for its own message above; {_GO_ON}"
        )
    return None


def is_lost_loader_process(error: BaseException) -> bool:
    """Whether torch reports a killed loader process, which it does wherever the main process is just then."""
    return _LOST_WORKER.search(str(error)) is not None


def _is_lost_contact(error: BaseException, text: str) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and distributed.world_size() > 1 and bool(_LOST_CONTACT.search(text))
