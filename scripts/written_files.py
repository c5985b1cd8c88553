"""Results under names that other people's files may have as well: a program replaces only what it wrote itself.

A hidden file beside them holds a checksum of each.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data.errors import DataError
from data.files import read_json, write_json_atomic

RECORD = ".plainvl_written.json"


def refuse_others(*paths: Path | None, overwrite: bool) -> None:
    """Refuse to replace what is not ours; to be called before anything is computed.

    Args:
        paths: files to be written; None stands for one that is not wanted.
        overwrite: replace whatever is there.

    Raises:
        DataError: there is a file that no program of ours wrote, or that was changed since.
    """
    for path in paths:
        if overwrite or path is None or not path.is_file():
            continue
        known = _read(path.parent)
        if path.name not in known or known[path.name] not in (None, _checksum(path)):
            raise DataError(
                f"{path} is there and was not written by this program, or was changed since: move it away, or give "
                "--overwrite to replace it"
            )


@contextmanager
def written(*paths: Path | None) -> Iterator[None]:
    """Write these files inside: from then on they are known as ours, also if the program is stopped half way."""
    wanted = [path for path in paths if path is not None]
    _note(wanted, done=False)
    yield
    _note(wanted, done=True)


def _note(paths: list[Path], *, done: bool) -> None:
    for folder in dict.fromkeys(path.parent for path in paths):
        names = {path.name: _checksum(path) if done else None for path in paths if path.parent == folder}
        write_json_atomic(folder / RECORD, _read(folder) | names, indent=1)


def _read(folder: Path) -> dict[str, str | None]:
    """Checksums by name; None for a file that was being written. A record that is broken says nothing."""
    with suppress(DataError):
        content = read_json(folder / RECORD)
        return content if isinstance(content, dict) else {}
    return {}


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()
