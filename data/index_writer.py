"""What every index builder shares: the files of one build, written whole or not at all, and the account of it."""

import errno
import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from data.errors import DataError
from data.files import open_atomic


@dataclass
class IndexSummary:
    """What a build found, wrote and left out.

    Attributes:
        found: (what, where) of each input.
        num_lines: lines of each file written, by name.
        notes: what was left out and why, a sentence each.
        warnings: what looks wrong and was written all the same, a sentence each.
    """

    found: list[tuple[str, str]] = field(default_factory=list)
    num_lines: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class IndexWriter:
    """The files of one build, opened by ``open`` or their first line, renamed together when the stack closes."""

    def __init__(self, stack: ExitStack, folder: Path, num_lines: dict[str, int]) -> None:
        """Write below ``folder``, as part of ``stack``; ``num_lines`` counts the lines of each file by name."""
        self._stack, self._folder, self._num_lines = stack, folder, num_lines
        self._files: dict[str, TextIO] = {}

    def open(self, *names: str) -> None:
        """Begin files, which may stay without lines.

        Raises:
            DataError: the folder cannot be written to.
        """
        for name in names:
            try:
                self._files[name] = self._stack.enter_context(open_atomic(self._folder / name))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                raise DataError(
                    f"cannot write {self._folder / name} ({error.strerror}): make a folder of your own with links to "
                    "the image folders and give it as --data_path"
                ) from None
            self._num_lines[name] = 0

    def write(self, name: str, row: dict[str, Any]) -> None:
        """Add one line to a file."""
        if name not in self._files:
            self.open(name)
        self._files[name].write(json.dumps(row) + "\n")
        self._num_lines[name] += 1
