"""Why a file could not be written, in the same words whoever noticed: the file system, torch or safetensors."""

import errno
import os
import re
from pathlib import Path

_FULL_DISK = re.compile(r"no space left on device", re.IGNORECASE)
# torch says of a write that failed only that it failed
_FAILED_WRITE = re.compile(r"PytorchStreamWriter|iostream error|file write failed|inline_container", re.IGNORECASE)
_NO_ROOM_BYTES = 1 << 20  # what a full disk may have left beside a file that did not fit
# the place is not for us to write (or read): another one helps, more room or another try does not
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def could_not_write(path: Path, error: BaseException) -> str:
    """``could not write PATH (why)``, of a failure of the file system, of torch's or of safetensors'."""
    return f"could not write {path} ({why_not_written(path, error)})"


def why_not_written(path: Path, error: BaseException) -> str:
    """In a few words; a disk that is full has always the same, whoever noticed."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number == errno.ENOSPC or _FULL_DISK.search(text) or (_FAILED_WRITE.search(text) and _has_no_room(path)):
        return "the disk is full"
    if number == errno.EDQUOT:
        return "the disk quota is used up"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (text.splitlines() or [type(error).__name__])[0]


def _has_no_room(path: Path) -> bool:
    folder = next((parent for parent in Path(os.path.abspath(path)).parents if parent.is_dir()), None)
    if folder is None:
        return False
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize < _NO_ROOM_BYTES


def is_full_disk(error: OSError) -> bool:
    """Whether room, or the share of it that the user has, is used up."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_refused(error: OSError) -> bool:
    """Whether it is for the user to give another place: no permission, read-only, a file in place of a folder."""
    return error.errno in _REFUSED
