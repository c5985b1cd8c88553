"""What every program does around its ``main``: one line instead of a traceback, and the documented exit codes."""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from data.errors import DataError
from engine.errors import EngineError, RunError, Stopped
from engine.write_failures import is_full_disk, is_refused, why_not_written
from models.errors import ModelError

INPUT_ERRORS = (DataError, EngineError, ModelError)


@dataclass(frozen=True)
class _Outcome:
    """How a program ends: its exit code and last line."""

    code: int
    message: str = ""
    agreed: bool = False  # all processes end so, and one of them need say it
    is_known: bool = False  # what other processes may find too, each in its own data: one of them need say it


def run(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and leave with 0; 2 for input that the user can mend; 1 for a run-time failure; 130 for Ctrl-C.

    After SIGTERM and SIGUSR1, upon which training saves, the code is 143 and 138 (128 + the signal's number). Anything
    else is a bug of ours and shows its traceback.
    """
    outcome = _call(main)
    gc.collect()  # the exception and the frames of main are gone, so data loaders end their processes in order
    _kill_loader_processes()
    if outcome.message:
        _say(outcome)
    _end(outcome.code)


def hide_interrupts() -> None:
    """Let Ctrl-C end the program with one line also while it is still importing; ``run`` sees to it afterwards."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _say(_Outcome(130, "stopped by Ctrl-C"))
            os._exit(130)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def _call(main: Callable[[], None]) -> _Outcome:
    try:
        _leave_children_alone(main)
    except INPUT_ERRORS as error:
        return _Outcome(2, f"error: {error}", getattr(error, "agreed", False), is_known=True)
    except RunError as error:
        return _Outcome(1, f"error: {error}", error.agreed, is_known=True)
    except Stopped as stopped:
        return _Outcome(stopped.exit_code, str(stopped), agreed=True)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _Outcome(1)
    except KeyboardInterrupt:
        return _Outcome(130, "stopped by Ctrl-C")
    except Exception as error:
        return _of_the_surroundings(error)
    return _Outcome(0)


def _leave_children_alone(main: Callable[[], None]) -> None:
    """Call ``main``; once it fails, torch's watch over loader processes is over.

    It raises from a signal handler, so also while the loaders are taken down, where Python prints it as a traceback.
    """
    try:
        main()
    except BaseException:
        if "torch" in sys.modules:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise


def _of_the_file_system(error: OSError) -> _Outcome:
    """A full disk, a vanished network share are run-time failures; a place that is not for us to use is input."""
    name = str(error.filename or "a file")
    why = why_not_written(Path(name), error)
    if is_refused(error):
        return _Outcome(2, f"error: cannot use {name} ({why}): choose another place, or make it accessible")
    if is_full_disk(error):
        return _Outcome(1, f"error: could not write {name} ({why}): free some space, then run the same command again")
    return _Outcome(1, f"error: cannot use {name} ({why}): check the path, then run the same command again")


def _of_the_surroundings(error: Exception) -> _Outcome:
    """Known failures of the surroundings get one line, the rest a traceback."""
    from engine.failures import explain  # imports torch, which a program may do without until here

    line = explain(error)
    if line is not None:
        return _Outcome(1, f"error: {line}")
    if isinstance(error, OSError):
        return _of_the_file_system(error)
    traceback.print_exception(error)
    return _Outcome(1, f"{type(error).__name__}: {error}; this is a bug, please report it with the lines above")


def _say(outcome: _Outcome) -> None:
    """Print the last line; where several processes end alike, the main one or the first says it."""
    line = " ".join(outcome.message.split())
    program = os.path.basename(sys.argv[0]) or "plainvl"
    distributed = sys.modules.get("engine.distributed")  # a program that never imported it has one process
    if distributed is not None and distributed.world_size() > 1:
        if outcome.agreed and not distributed.is_main():
            return
        if not outcome.agreed:
            if not distributed.report_failure(line) and outcome.is_known:
                return
            line = f"rank {distributed.rank()}: {line}"
    print(f"{program}: {line}", file=sys.stderr, flush=True)


def _kill_loader_processes() -> None:
    """End those that are left: they ignore SIGTERM, so that the shutdown of the interpreter would wait for them."""
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if not children:
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error for each
    for child in children:
        child.kill()
    for child in children:
        child.join()
    signal.signal(signal.SIGCHLD, before)


def _end(code: int) -> NoReturn:
    """Leave the interpreter; with a process group, or after one, without the shutdown in which gloo may abort."""
    distributed = sys.modules.get("engine.distributed")
    if distributed is None or not distributed.has_had_group():
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # a thread of gloo now and then aborts the process while the interpreter shuts down, and torchrun would report a
    # failure; a group whose other members are gone cannot be left in order either
    os._exit(code)
