"""Files of a zip archive that holds one folder of its own name, read by name; nothing is unpacked to the disk."""

import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

from data.errors import DataError

MAX_FILE_BYTES = 1 << 28  # of one file; more is taken for a bomb
# RuntimeError also where zipfile does not know how an entry is packed
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError)


class ZipFolder:
    """``<folder>.zip`` with files ``<folder>/<name>``: what VL-BERT's ``ZIP_MODE`` calls ``<folder>.zip@/<name>``."""

    def __init__(self, path: str | Path) -> None:
        """Read the archive's list of files.

        Raises:
            DataError: it is missing or broken, or has no such folder.
        """
        self.path = Path(path)
        self._owner, self._opened = -1, None
        prefix = f"{self.path.stem}/"
        files = {name: size for name, size in self._list().items() if not name.endswith("/")}
        self._sizes = {name.removeprefix(prefix): size for name, size in files.items() if name.startswith(prefix)}
        if not self._sizes:
            raise DataError(f"{self.path} has no files in a folder {prefix}: zip the folder {prefix} as a whole")

    def names(self) -> list[str]:
        """Names of the files, without the folder."""
        return list(self._sizes)

    def read(self, name: str, *, advice: str = "") -> bytes:
        """Content of one file.

        Raises:
            DataError: there is none, it is broken, or larger than any that belongs there; ``advice`` ends the message.
        """
        if name not in self._sizes:
            raise DataError(f"{self.path} has no {name}" + (f": {advice}" if advice else ""))
        if self._sizes[name] > MAX_FILE_BYTES:
            raise DataError(f"{self.path}: {name} has {self._sizes[name]} bytes, more than a file here may have")
        try:
            with self._archive().open(f"{self.path.stem}/{name}") as file:
                return file.read(MAX_FILE_BYTES)  # never more than the list says
        except _BROKEN as error:
            raise DataError(f"{self.path}: {name} cannot be read ({error}): copy or download it again") from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the archive itself."""
        return ZipFolder, (self.path,)

    def _list(self) -> dict[str, int]:
        try:
            return {info.filename: info.file_size for info in self._archive().infolist()}
        except FileNotFoundError:
            raise DataError(f"no archive at {self.path}") from None
        except _BROKEN as error:
            raise DataError(f"{self.path} is no sound zip archive ({error}): copy or download it again") from None

    def _archive(self) -> zipfile.ZipFile:
        """The open archive, each process with one of its own: a forked one would share the place in the file."""
        if self._owner != os.getpid():
            self._owner, self._opened = os.getpid(), zipfile.ZipFile(self.path)
        return self._opened
