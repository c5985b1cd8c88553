"""What every program does around its ``main``: one line instead of a traceback, and the documented exit codes."""

import os
import sys
from collections.abc import Callable

from data.errors import DataError
from engine.errors import EngineError, RunError
from models.errors import ModelError

INPUT_ERRORS = (DataError, EngineError, ModelError)


def run(main: Callable[[], None]) -> None:
    """Call ``main`` and leave with 0; 2 for input that the user can mend; 1 for a run-time failure; 130 for Ctrl-C.

    Anything else is a bug of ours and shows its traceback.
    """
    try:
        main()
    except INPUT_ERRORS as error:
        _leave(2, error)
    except RunError as error:
        _leave(1, error)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone: nothing to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # a full disk, a vanished network share: the file system said no while we worked
        _leave(
            1,
            f"{error.strerror or error}: {error.filename or 'file'} "
            "(free some space or check the path, then run the same command again)",
        )
    except KeyboardInterrupt:
        _leave(130, "stopped by Ctrl-C")


def _leave(code: int, message: object) -> None:
    line = " ".join(str(message).split())
    program = os.path.basename(sys.argv[0]) or "plainvl"
    print(f"{program}: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(code)
