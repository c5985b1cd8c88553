"""One writer per folder: a lock on a file in it, which the operating system gives back however its process ends.

A record lock (``fcntl.lockf``) belongs to the process: loader processes do not inherit it, so that those that outlive a
killed run for a moment keep nobody out, and shared file systems pass it on to other machines.
"""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.errors import EngineError

_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
_MAX_HOLDER_BYTES = 300  # of the line that says who holds a lock

_held: dict[Path, tuple[int, int]] = {}  # lock file → its descriptor, and the process that took it


def hold(path: Path, folder: Path, *, what: str = "run", way_out: str = "choose another --output_dir") -> None:
    """Keep other processes from the same until ``release`` or ``released_at_the_end``; taking it twice is once.

    Args:
        path: the file to lock; made here, and removed when the lock is given back.
        folder: what the lock stands for, for the message.
        what: holds it, for the message: a run, an evaluation.
        way_out: end of the message.

    Raises:
        EngineError: another process holds it; says which.
        OSError: the file cannot be made.
    """
    path = path.resolve()
    if path in _held:
        return
    import fcntl  # Unix only, and only wanted here

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_current = _names(path, handle)  # else whoever held it removed it just now
        except OSError as error:
            holder = os.pread(handle, _MAX_HOLDER_BYTES, 0).decode(errors="replace")
            os.close(handle)
            if error.errno not in _HELD_BY_ANOTHER:
                from engine.log import say  # imports torch, without which a program may hold a lock

                why = f"cannot be locked here ({error.strerror})"
                say(f"warning: {folder} {why}: let no other {what} write into it meanwhile")
                if not holder:  # else somebody could lock it, on another machine perhaps
                    path.unlink(missing_ok=True)
                return
            who = f" ({' '.join(holder.split())})" if holder.strip() else ""
            raise EngineError(f"another {what}{who} writes into {folder}: wait for it, stop it, or {way_out}") from None
        if is_current:
            break
        os.close(handle)
    _held[path] = handle, os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)


def release(path: Path) -> None:
    """Give a lock back and remove its file; nothing where this process does not hold it."""
    handle, owner = _held.pop(path.resolve(), (None, None))
    if owner != os.getpid():  # a copy of the process that took it
        return
    with suppress(OSError):
        if _names(path, handle):  # not another run's, in a folder that was made anew; it is locked, so nobody uses it
            path.unlink()
    os.close(handle)


@contextmanager
def released_at_the_end() -> Iterator[None]:
    """Give back every lock at the end of a block or, as a decorator, of a program's ``main``, however it ends."""
    try:
        yield
    finally:
        for path in list(_held):
            release(path)


def _names(path: Path, handle: int) -> bool:
    """Whether a name still belongs to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
