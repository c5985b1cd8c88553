"""What several tests need: processes with a process group, and tiny models."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.paths import ROOT


def _enter(rank: int, function: Callable[..., None], world_size: int, store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )
    try:
        function(rank, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # everything has succeeded: leave before the interpreter's shutdown, in which a thread of gloo now and then aborts
    # the process ("terminate called without an active exception", torch 2.15); an exception above still arrives
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_in_processes(function: Callable[..., None], world_size: int, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` in gloo processes that meet through a file; its errors are raised here."""
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        mp.start_processes(_enter, (function, world_size, store, arguments), nprocs=world_size, start_method="spawn")


def sent_to_a_process(value: Any) -> Any:
    """What a process gets that ``value`` is sent to, in the way in which multiprocessing sends."""
    here, there = multiprocessing.Pipe()
    with here, there, ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(there.recv)
        try:
            here.send(value)
        finally:
            here.close()  # the receiver ends also where nothing could be sent
        return receiving.result()


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_program(
    *command: str, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Run one of our programs as a user would, with this interpreter and one thread."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
