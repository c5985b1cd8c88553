"""JSON and JSON-lines files, read with errors that name the line, written whole or not at all; safe relative paths.

Reading is strict where leniency hides damage: UTF-8 only (a byte-order mark and CRLF line ends are accepted), no NaN or
Infinity (not JSON), every line of a JSONL file an object, no empty file. Blank lines are skipped.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_NAME_BYTES = 255  # of one part of a path, on every common file system


def read_json(path: str | Path, *, advice: str = "") -> Any:
    """Content of a JSON file.

    Args:
        path: UTF-8 file.
        advice: how to get the file; ends the message when it is missing or empty.

    Raises:
        DataError: missing, unreadable, empty, not UTF-8, or not JSON (file and line are named).
    """
    return parse_json(_read_bytes(Path(path), advice), path, advice=advice)


def read_object(path: str | Path, *, advice: str = "") -> dict[str, Any]:
    """The object of settings that a JSON file holds; arguments and errors as ``read_json``."""
    values = read_json(path, advice=advice)
    if not isinstance(values, dict):
        raise DataError(f"{path} must hold an object of settings, got {values!r:.40}")
    return values


def parse_json(content: bytes, path: str | Path, *, advice: str = "") -> Any:
    """The value of a JSON file whose bytes are at hand; ``path`` names it, errors as ``read_json``."""
    content = content.removeprefix(BYTE_ORDER_MARK)
    if not content.strip():
        raise DataError(_sentence(f"{path} is empty", advice))
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(f"{path}:{content[: error.start].count(10) + 1}", content)) from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        hint = "the file is cut off, copy or download it again" if cut else "mend the file or download it again"
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}): {hint}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None


def iterate_jsonl(path: str | Path, *, advice: str = "", allow_empty: bool = False) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) for each line of a JSON-lines file; holds one line at a time.

    Args:
        path: UTF-8 file with one JSON object a line.
        advice: how to make the file; ends the message when it is missing or empty.
        allow_empty: a file without lines is an error unless this is set.

    Raises:
        DataError: as ``read_json``, and for a line that is not an object; file and line number are named.
    """
    decode = _DECODER.decode
    found_a_line = False
    try:
        with open(path, "rb") as handle:
            for number, raw in enumerate(handle, start=1):
                if number == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if raw.isspace() or not raw:
                    continue
                try:
                    row = decode(raw.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    raise DataError(_bad_line(f"{path}:{number}", raw, error)) from None
                if type(row) is not dict:
                    raise DataError(f'{path}:{number}: a line must be a JSON object {{"key": value}}, got {_kind(row)}')
                found_a_line = True
                yield number, row
    except OSError as error:
        raise DataError(_sentence(_unreadable(path, error), advice)) from None
    if not found_a_line and not allow_empty:
        raise DataError(_sentence(f"{path} is empty", advice))


def read_jsonl(path: str | Path, *, advice: str = "", allow_empty: bool = False) -> list[dict]:
    """All objects of a JSON-lines file; arguments and errors as ``iterate_jsonl``."""
    return [row for _, row in iterate_jsonl(path, advice=advice, allow_empty=allow_empty)]


@contextmanager
def open_atomic(path: str | Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """File for writing that takes its name only when the block ends well; else the old file stays as it was.

    The content goes to a temporary name in the same folder, reaches the disk, and is renamed over ``path``. The folder
    is made if needed. A link stays one: what it points to is replaced.

    Args:
        path: of the file.
        binary: it takes bytes; else text, which becomes UTF-8.

    Raises:
        DataError: there is something else than a file, such as a device.
        OSError: the disk is full, or the place cannot be written; names ``path``.
    """
    path = Path(os.path.realpath(path) if os.path.islink(path) else path)
    if path.exists() and not path.is_file():
        raise DataError(f"cannot write {path}: it is a folder or a device, not a file; give another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") if binary else open(temporary, "w", encoding="utf-8", newline="\n") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):  # a full disk: None
            error.filename = str(path)
        raise
    _sync_folder(path.parent)


def write_json_atomic(path: str | Path, value: Any, *, indent: int | None = None) -> None:
    """Write one JSON value (ASCII escapes, no NaN), whole or not at all."""
    with open_atomic(path) as handle:
        json.dump(value, handle, indent=indent, allow_nan=False)
        handle.write("\n")


def write_jsonl_atomic(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one JSON object a line (ASCII escapes, no NaN), whole or not at all; returns the number of lines."""
    count = 0
    with open_atomic(path) as handle:
        for count, row in enumerate(rows, start=1):  # noqa: B007 (the last value is the result)
            handle.write(json.dumps(row, allow_nan=False) + "\n")
    return count


def check_relative(relative: object, where: str = "path") -> str:
    """Return ``relative`` if it is a path that stays below whatever folder it is joined to.

    Absolute paths and every ``..`` are refused, the harmless "a/../b" too: behind a symbolic link ".." leads elsewhere.

    Raises:
        DataError: not a non-empty string, absolute, with a ".." part or a name that no file can have; ``where`` opens
            the message.
    """
    if type(relative) is not str or not relative or "\0" in relative:
        raise DataError(f"{where}: an image path must be a non-empty string, got {relative!r:.80}")
    if relative.startswith(("/", "\\")) or relative[1:3] in (":/", ":\\"):
        raise DataError(f"{where}: {relative!r:.200} is absolute; paths in data files are relative to the data folder")
    if ".." in relative and ".." in relative.replace("\\", "/").split("/"):
        raise DataError(
            f"{where}: {relative!r:.200} contains '..'; paths in data files must stay inside the data folder"
        )
    if len(relative) > MAX_NAME_BYTES or not relative.isascii():
        try:
            parts = relative.encode().split(b"/")
        except UnicodeEncodeError:
            raise DataError(f"{where}: {relative!r:.200} is no proper text, an image path must be") from None
        if max(map(len, parts)) > MAX_NAME_BYTES:
            raise DataError(f"{where}: {relative!r:.80} has a name longer than {MAX_NAME_BYTES} bytes: no file has")
    return relative


def resolve_inside(root: str | Path, relative: str) -> Path:
    """Join a path from a data file to the data folder, refusing what leads out of it.

    The rule is lexical: a data file, which may come from anybody, cannot name anything outside ``root``. Symbolic links
    are followed, since only the user can have put them there: ``root`` itself or ``train2014`` in it may be a link.

    Raises:
        DataError: see ``check_relative``. Whether the file exists is not looked at.
    """
    return Path(root) / check_relative(relative)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant
)  # built once: json.loads with an option builds one per call


def _read_bytes(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(_sentence(_unreadable(path, error), advice)) from None


def _unreadable(path: str | Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no such file: {path}"
    return f"cannot read {path} ({error.strerror})"


def _bad_line(where: str, raw: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(where, raw)
    reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
    if not raw.endswith(b"\n"):
        return f"{where}: the last line is cut off ({reason}): make the file again"
    return f"{where}: not JSON ({reason}): mend or remove the line"


def _not_utf8(where: str, content: bytes) -> str:
    looks = " (it looks like UTF-16)" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
    return f"{where}: not UTF-8 text{looks}: save the file as UTF-8"


def _kind(value: object) -> str:
    names = {
        list: "a list",
        str: "a string",
        type(None): "null",
        bool: "true/false",
        int: "a number",
        float: "a number",
    }
    return names[type(value)]


def _sentence(fact: str, advice: str) -> str:
    return f"{fact}: {advice}" if advice else fact


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; folders cannot be opened for this on Windows."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
