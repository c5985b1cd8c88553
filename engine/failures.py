"""Failures of the surroundings (memory, processes, limits of the system) as one line: what happened and what to do."""

import errno
import os
import re
from pathlib import Path

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
_FULL_DISK = re.compile(r"no space left on device", re.IGNORECASE)
# torch says of a write that failed only that it failed
_FAILED_WRITE = re.compile(r"PytorchStreamWriter|iostream error|file write failed|inline_container", re.IGNORECASE)
_NO_ROOM_BYTES = 1 << 20  # what a full disk may have left beside a file that did not fit
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


def could_not_write(path: Path, error: BaseException) -> str:
    """``could not write PATH (why)``, of a failure of the file system, of torch's or of safetensors'."""
    return f"could not write {path} ({why_not_written(path, error)})"


def why_not_written(path: Path, error: BaseException) -> str:
    """In a few words; a disk that is full has always the same, whoever noticed."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number == errno.ENOSPC or _FULL_DISK.search(text) or (_FAILED_WRITE.search(text) and _has_no_room(path)):
        return "the disk is full"
    if number == errno.EDQUOT:
        return "the disk quota is used up"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (text.splitlines() or [type(error).__name__])[0]


def _has_no_room(path: Path) -> bool:
    folder = next((parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir()), None)
    if folder is None:
        return False
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize < _NO_ROOM_BYTES


def is_lost_loader_process(error: BaseException) -> bool:
    """Whether torch reports a killed loader process, which it does wherever the main process is just then."""
    return _LOST_WORKER.search(str(error)) is not None


def _is_lost_contact(error: BaseException, text: str) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and distributed.world_size() > 1 and bool(_LOST_CONTACT.search(text))
