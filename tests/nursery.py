"""Processes forked from one that has imported everything already: a start costs milliseconds instead of seconds.

Each gets the environment that a launcher would give it, so that the program under test starts as it does for a user.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers import free_port


@dataclass(frozen=True)
class Job:
    """``function(*arguments)`` in ``world_size`` processes."""

    function: Callable[..., None]
    arguments: tuple[Any, ...]
    stderr: Path  # <stderr>-<rank>.txt
    world_size: int = 1
    signals: tuple[tuple[float, int, int], ...] = ()  # (seconds after the start, rank, number) to send
    environment: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 240.0
    grace_s: float = 150.0  # a process that lost the others ends by itself; what is left after this long counts as hung


class Ended(NamedTuple):
    """How a job ended."""

    codes: list[int]  # exit code by rank, minus the signal's number for a killed one
    stderr: list[str]  # by rank
    seconds: float
    hung: list[int]  # ranks that had to be killed by the nursery

    def describe(self) -> str:
        """For assertion messages."""
        lines = [f"rank {rank}: {code}\n{text}" for rank, (code, text) in enumerate(zip(*self[:2], strict=True))]
        return "\n".join([f"hung: {self.hung}", *lines])


class Nursery:
    """Starts jobs; close it at the end."""

    def __init__(self, *modules: str, environment: dict[str, str] | None = None) -> None:
        """``modules`` are imported once, before the first job, with ``environment`` set."""
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, modules, environment or {}))
        self._process.start()
        other.close()

    def run(self, job: Job) -> Ended:
        """Run a job to its end."""
        self._connection.send(job)
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the nursery."""
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection, modules: tuple[str, ...], environment: dict[str, str]) -> None:
    import torch

    os.environ |= environment
    torch.set_num_threads(1)
    for module in modules:
        __import__(module)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_run(job))
        except Exception:
            connection.send(traceback.format_exc())


def _run(job: Job) -> Ended:
    started = time.monotonic()
    port = str(free_port())
    children = {}
    for rank in range(job.world_size):
        pid = os.fork()
        if pid == 0:
            _be_a_child(job, rank, port)
        children[pid] = rank
    codes: dict[int, int] = {}
    pending = sorted(job.signals)
    failed_at = None
    hung: list[int] = []
    while len(codes) < job.world_size:
        now = time.monotonic()
        while pending and now - started >= pending[0][0]:
            _, rank, number = pending.pop(0)
            for pid in (pid for pid, owner in children.items() if owner == rank and rank not in codes):
                os.kill(pid, number)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            codes[children[pid]] = os.waitstatus_to_exitcode(status)
            if codes[children[pid]] != 0 and failed_at is None:
                failed_at = now
        elif pid == 0:
            time.sleep(0.01)
        if now - started > job.timeout_s or (failed_at is not None and now - failed_at > job.grace_s):
            for pid, rank in children.items():
                if rank not in codes and rank not in hung:
                    hung.append(rank)
                    os.kill(pid, signal.SIGKILL)
    texts = [_stderr(job, rank).read_text(errors="replace") for rank in range(job.world_size)]
    return Ended([codes[rank] for rank in range(job.world_size)], texts, time.monotonic() - started, hung)


def _stderr(job: Job, rank: int) -> Path:
    return job.stderr.with_name(f"{job.stderr.name}-{rank}.txt")


def _be_a_child(job: Job, rank: int, port: str) -> None:
    code = 1
    try:
        with _stderr(job, rank).open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        if job.world_size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.world_size)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(job.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= job.environment
        job.function(*job.arguments)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
