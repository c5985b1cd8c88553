"""Files that are whole or absent: written under another name, flushed to the disk, then renamed."""

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from engine.errors import EngineError, RunError
from engine.write_failures import could_not_write, why_not_written

TEMPORARY = ".writing-"  # begins the name of whatever is not whole yet
# of a write that failed: the file system's, torch's, safetensors'
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)

_ROOM = 1 << 16  # bytes that a disk must have for a program to begin to write to it


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under another name of the same folder, which then takes its place.

    It gets the mode that new files have here, whatever ``write`` leaves (safetensors: readable by nobody else).

    Args:
        path: of the file; its folder must exist.
        write: gets the path of an empty file to write, or to replace.

    Raises:
        OSError: the disk is full or not writable, or whatever ``write`` raises; an older file stays.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode & 0o777)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """``write_whole`` for a text in UTF-8."""
    write_whole(path, lambda at: at.write_text(text, encoding="utf-8"))


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write a bare state dict, by the name's ending with safetensors or with torch.

    Raises:
        RunError: the disk is full or not writable.
    """
    # pieces of one long tensor would each carry all of it, and shared ones have no place in safetensors
    weights = {name: value.clone().contiguous() for name, value in weights.items()}

    def write(at: Path) -> None:
        if path.suffix == ".safetensors":
            save_file(weights, at, metadata={"format": "pt"})
        else:
            torch.save(weights, at)

    try:
        write_whole(path, write)
    except WRITE_ERRORS as error:
        raise RunError(f"{could_not_write(path, error)}: free some space or check the folder") from None


def require_writable(place: Path) -> None:
    """See before the work starts that a file or folder can be made; nothing is left behind.

    Raises:
        EngineError: the folder for it is read-only, or may not be written, or its disk is full.
    """
    folder = next(parent for parent in Path(os.path.abspath(place)).parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # an empty one would fit on a full disk
            file.write(bytes(_ROOM))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        why = why_not_written(place, error)
        raise EngineError(f"{place} cannot be written ({why}): choose another place") from None


def flush(path: Path) -> None:
    """See that a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
