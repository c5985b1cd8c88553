"""Results under names that other people's files may have as well: a program replaces only what it wrote itself.

A hidden file beside them holds a checksum of each, a line for every time that one is written: programs that write into
one folder at the same time, such as the parts of an evaluation, lose none of each other's.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.errors import DataError

RECORD = ".plainvl_written.jsonl"


def refuse_others(*paths: Path | None, overwrite: bool) -> None:
    """Refuse to replace what is not ours; to be called before anything is computed.

    Args:
        paths: files to be written; None stands for one that is not wanted.
        overwrite: replace whatever is there.

    Raises:
        DataError: there is a file that no program of ours wrote, or that was changed since.
    """
    for path in paths:
        if not overwrite and path is not None and path.is_file() and not is_ours(path):
            raise DataError(
                f"{path} is there and was not written by this program, or was changed since: move it away, or give "
                "--overwrite to replace it"
            )


def is_ours(path: Path) -> bool:
    """Whether a program of ours wrote a file and nobody changed it since."""
    known = _read(path.parent)
    return path.is_file() and path.name in known and known[path.name] in (None, _checksum(path))


@contextmanager
def written(*paths: Path | None) -> Iterator[None]:
    """Write these files inside: from then on they are known as ours, also if the program is killed half way."""
    wanted = [path for path in paths if path is not None]
    _note(wanted, done=False)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # what is there now is ours, what is not was never written
            _note(wanted, done=True)
        raise
    _note(wanted, done=True)


def _note(paths: list[Path], *, done: bool) -> None:
    for folder in dict.fromkeys(path.parent for path in paths):
        names = {path.name: _checksum(path) if done else None for path in paths if path.parent == folder}
        folder.mkdir(parents=True, exist_ok=True)
        line = f"\n{json.dumps(names)}\n".encode()  # the first line end closes a line that was cut off
        handle = os.open(folder / RECORD, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.write(handle, line) < len(line):  # at once, so that no other program's line gets between
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        except OSError as error:
            error.filename = error.filename or str(folder / RECORD)  # a full disk tells no name
            raise
        finally:
            os.close(handle)


def _read(folder: Path) -> dict[str, str | None]:
    """Checksums by name, empty for none; None: it was being written. A line that is broken says nothing."""
    known: dict[str, str | None] = {}
    try:
        lines = (folder / RECORD).read_bytes().splitlines()
    except OSError:
        return known
    for line in filter(None, lines):
        try:
            known |= json.loads(line)
        except (ValueError, TypeError):
            continue
    return known


def _checksum(path: Path) -> str:
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()
