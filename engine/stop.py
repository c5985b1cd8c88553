"""Stop signals: noted when they arrive, acted upon by all processes together at the next step or batch."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from engine import distributed
from engine.errors import Stopped

# SLURM warns of a coming time limit by SIGUSR1 (--signal=USR1@180)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# a launcher may pass on what its processes have got from the terminal or from SLURM already: two are one request
_SIGNALS_TO_LEAVE_AT_ONCE = 3

_listening = 0  # the process that listens: a loader process inherits the handlers, and must not mind them
_received: list[int] = []


@contextmanager
def listening() -> Iterator[None]:
    """Meanwhile SIGTERM, SIGINT and SIGUSR1 only note the wish to stop; the third one ends the process at once.

    What was there before is put back at the end; after ``Stopped``, with which the program leaves, signals are ignored.
    Only the main thread can listen; from another one nothing changes.
    """
    global _listening
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    _listening = os.getpid()
    try:
        yield
    except Stopped:
        # srun and torchrun end the others by SIGTERM once the first has left; that must not change how they leave
        before = dict.fromkeys(SIGNALS, signal.SIG_IGN)
        raise
    finally:
        _listening = 0
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _listening:
        return
    _received.append(number)
    if len(_received) >= _SIGNALS_TO_LEAVE_AT_ONCE:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif len(_received) == 1 and distributed.is_main():
        # not print: the signal may have come in the middle of one
        os.write(2, f"{signal.Signals(number).name}: stops after this step\n".encode())


def asked() -> int:
    """Number of the signal by which any process was asked to stop, 0 for none; every process must call it together."""
    if not _listening:
        return 0
    return int(distributed.all_reduce_(torch.tensor(_received[0] if _received else 0), "max"))


def raise_if_asked() -> None:
    """Leave by ``Stopped`` on all processes when any was asked to stop; every process must call it together.

    Raises:
        Stopped: nothing was saved by this function.
    """
    number = asked()
    if number:
        raise Stopped(number, "the same command goes on from here")
