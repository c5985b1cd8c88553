"""Clocks, memory and processes of their own: what every benchmark measures with."""

import contextlib
import importlib.util
import multiprocessing
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """Mixed precision with float32 weights; nothing for float32."""
    return contextlib.nullcontext() if dtype == "float32" else torch.autocast(device, DTYPES[dtype])


def is_installed(*packages: str) -> bool:
    """Whether a peer's packages can be imported."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


# ------------------------------------------------------------------------------------------------------------- time
def timed(function: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """Wall seconds and CPU seconds (over all threads) of one call, the device's queue emptied before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, time.process_time() - cpu_start


def in_turns(
    sides: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", *, settled: bool = False
) -> dict[str, float]:
    """Median wall seconds of each side, one call of each in every round; a round before them warms up.

    ``settled`` calls a side twice in its turn and times the second call: it finds memory and caches as it left them
    itself, as in a run of its own, and not as the side before it did. For steps, which repeat themselves in use.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            if settled and number:
                side()
            seconds, _ = timed(side, device)
            if number:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


# ----------------------------------------------------------------------------------------------------------- memory
class PeakMemory:
    """MiB of this process, or of the GPU, at most since it was made, beyond what there was then.

    Make it in a process of its own (``in_own_process``): the system remembers one peak for a process's whole life.
    """

    def __init__(self, device: str = "cpu") -> None:
        """Note what is there now."""
        self._device = device
        self._before = self._now()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def _now(self) -> float:
        return torch.cuda.memory_allocated() / 2**20 if self._device == "cuda" else _resident_mib("VmRSS")

    def mib(self) -> float:
        """The peak so far."""
        peak = torch.cuda.max_memory_allocated() / 2**20 if self._device == "cuda" else _resident_mib("VmHWM")
        return peak - self._before


def _resident_mib(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (highest so far) of this process; ``getrusage`` would also count the parent's."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        raise SystemExit("error: this system does not tell a process's memory: use --no_memory") from None
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


# -------------------------------------------------------------------------------------------------------- processes
class OwnProcess:
    """A function's call in a process of its own, running from now on."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, device: str = "cpu") -> None:
        """Start it.

        On the CPU the process is a copy of this one, so call this before anything is computed: threads do not survive a
        copy. A GPU in use does not survive it either, so there the process starts anew.
        """
        context = multiprocessing.get_context("spawn" if device == "cuda" else "fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(target=_call, args=(sender, function, arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads, here idle ones
            self._process.start()
        sender.close()

    def result(self) -> Any:
        """Wait for it; what the function returned.

        Raises:
            RuntimeError: the function failed, or its process was killed.
        """
        try:
            is_well, value = self._receiver.recv()
        except EOFError:
            is_well, value = False, None
        self._process.join()
        if not is_well:
            code = self._process.exitcode
            raise RuntimeError(value or f"its process ended with code {code}: killed, or out of memory")
        return value


def in_own_process(function: Callable[..., Any], *arguments: Any, device: str = "cpu") -> Any:
    """What ``function(*arguments)`` returns when a fresh process calls it (``OwnProcess``)."""
    return OwnProcess(function, *arguments, device=device).result()


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = (True, function(*arguments))
    except SystemExit as stop:  # a benchmark's word for "nothing to report"
        answer = (False, f"{stop.code}")
    except Exception as error:
        traceback.print_exc()
        answer = (False, f"{type(error).__name__}: {error}")
    sender.send(answer)
