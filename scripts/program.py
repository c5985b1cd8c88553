"""What every program does around its ``main``: one line instead of a traceback, and the documented exit codes."""

import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

from data.errors import DataError
from engine.errors import EngineError, RunError, Stopped
from models.errors import ModelError

INPUT_ERRORS = (DataError, EngineError, ModelError)


def run(main: Callable[[], None]) -> NoReturn:
    """Call ``main`` and leave with 0; 2 for input that the user can mend; 1 for a run-time failure; 130 for Ctrl-C.

    After SIGTERM and SIGUSR1, upon which training saves, the code is 143 and 138 (128 + the signal's number). Anything
    else is a bug of ours and shows its traceback.
    """
    try:
        main()
    except INPUT_ERRORS as error:
        _leave(2, f"error: {error}", agreed=getattr(error, "agreed", False))
    except RunError as error:
        _leave(1, f"error: {error}", agreed=error.agreed)
    except Stopped as stopped:
        _leave(stopped.exit_code, str(stopped), agreed=True)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(1)
    except KeyboardInterrupt:
        _leave(130, "stopped by Ctrl-C")
    except Exception as error:
        _leave_unexpectedly(error)
    _end(0)


def hide_interrupts() -> None:
    """Let Ctrl-C end the program with one line also while it is still importing; ``run`` sees to it afterwards."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _leave(130, "stopped by Ctrl-C")
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def _leave_unexpectedly(error: Exception) -> NoReturn:
    """Known failures of the surroundings get one line, the rest a traceback."""
    from engine.failures import explain  # imports torch, which a program may do without until here

    line = explain(error)
    if line is None and isinstance(error, OSError):
        # a full disk, a vanished network share: the file system said no while we worked
        line = (
            f"{error.strerror or error}: {error.filename or 'file'} "
            "(free some space or check the path, then run the same command again)"
        )
    if line is not None:
        _leave(1, f"error: {line}")
    traceback.print_exception(error)
    _leave(1, f"{type(error).__name__}: {error}; this is a bug, please report it with the lines above")


def _leave(code: int, message: str, *, agreed: bool = False) -> NoReturn:
    """Print one line and end; what all processes know (``agreed``) is said by the main one only."""
    line = " ".join(message.split())
    program = os.path.basename(sys.argv[0]) or "plainvl"
    distributed = sys.modules.get("engine.distributed")  # a program that never imported it has one process
    several = distributed is not None and distributed.world_size() > 1
    if several and not agreed:
        distributed.report_failure(line)
        line = f"rank {distributed.rank()}: {line}"
    if not (several and agreed) or distributed.is_main():
        print(f"{program}: {line}", file=sys.stderr, flush=True)
    _end(code)


def _end(code: int) -> NoReturn:
    """Leave the interpreter; with a process group, or after one, without the shutdown in which gloo may abort."""
    gc.collect()  # data loaders end their processes in order when they are collected
    for child in multiprocessing.active_children():
        child.kill()
    distributed = sys.modules.get("engine.distributed")
    if distributed is None or not distributed.has_had_group():
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # a thread of gloo now and then aborts the process while the interpreter shuts down, and torchrun would report a
    # failure; a group whose other members are gone cannot be left in order either
    os._exit(code)
