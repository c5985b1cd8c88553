"""Results of an evaluation while it runs, kept batch by batch, so that one that was killed goes on where it stood.

Each process appends to a hidden file of its own, ``.partial-<name>-rank<r>.jsonl``: a first line with the key of the
evaluation (everything that its results depend on), then a line a batch. Whoever starts the same evaluation again, with
any number of processes, takes over what all files hold. JSON gives back every float exactly.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engine import distributed
from engine.checkpoint import MANIFEST
from engine.errors import EngineError, RunError
from engine.evaluation import gather_by_id
from engine.folder_lock import hold, release
from engine.log import say
from engine.whole_files import write_text
from engine.write_failures import why_not_written

_WEIGHTS = (".pth", ".pt", ".bin", ".model", ".safetensors", ".index.json")


class PartialResults:
    """Collects id → value over all processes; also without a folder, then nothing is kept on the disk.

    A value is what JSON can hold: numbers, texts, lists, dicts with texts as keys. ``gather`` and ``remove`` are called
    by all processes together, as is the constructor.
    """

    def __init__(
        self,
        folder: Path | None,
        name: str,
        key: Mapping[str, Any],
        expected_ids: Collection[int],
        *,
        resume: bool = True,
    ) -> None:
        """Take over what an evaluation that was stopped has left, then be ready for more.

        Args:
            folder: of the files to come; None keeps nothing.
            name: of the evaluation within the folder, such as ``vqav2_val``; others of the folder are left alone.
            key: all that results depend on; files with another key are discarded. The main process's key counts.
            expected_ids: ids that are to be evaluated, over all processes.
            resume: False discards what there is.

        Raises:
            EngineError: another process is at the same evaluation into the same folder.
            RunError: the folder cannot be written.
        """
        self._folder, self._name = folder, name
        self._expected = frozenset(expected_ids)
        self._results: dict[int, Any] = {}  # of this process; the main one holds what was found too
        self._file: Any = None
        self.found: frozenset[int] = frozenset()
        if folder is None:
            return
        self._path = folder / f".partial-{name}-rank{distributed.rank()}.jsonl"
        self._lock = folder / f".lock-{name}"  # not the run's: a checkpoint may be evaluated beside a training
        distributed.on_main(lambda: self._start(json.loads(json.dumps(key)), resume))
        ids, key = distributed.broadcast_object((list(self._results), dict(key)))
        self.found = frozenset(ids)
        distributed.together(lambda: self._open(key))

    def add(self, results: Mapping[int, Any], *, keep: bool = True) -> None:
        """Take the results of one batch; those that were found already stay as they were found.

        Args:
            results: id → value.
            keep: False for results that are to be computed again after a stop.

        Raises:
            RunError: no room; what was kept before stays.
        """
        fresh = {index: value for index, value in results.items() if index not in self.found}
        self._results.update(fresh)
        if keep and fresh and self._file is not None:
            self._write({"results": list(fresh.items())})

    def gather(self) -> dict[int, Any]:
        """Every id with its value, on every process, sorted by id.

        Raises:
            EngineError: an id came from two processes, or one is missing.
        """
        return gather_by_id(self._results, expected=len(self._expected))

    def remove(self) -> None:
        """Remove the files, once the main process has written what is made of the results."""
        if self._folder is None:
            return
        distributed.barrier()
        self._file.close()
        self._path.unlink(missing_ok=True)
        if distributed.is_main():
            for path in self._files():
                path.unlink(missing_ok=True)
            release(self._lock)

    def _start(self, key: dict[str, Any], resume: bool) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            hold(self._lock, self._folder, what="evaluation of the same", way_out="choose another output folder")
            self._take_over(key, resume)
        except OSError as raised:
            raise self._not_kept(raised) from None

    def _open(self, key: dict[str, Any]) -> None:
        """Each process its own file; that of the main one holds what was found."""
        try:
            if not distributed.is_main():
                self._folder.mkdir(parents=True, exist_ok=True)  # on a machine of its own
                self._path.unlink(missing_ok=True)
            # unbuffered: a batch is with the operating system when add returns, and nothing is left to write at the end
            self._file = self._path.open("ab", buffering=0)
            if not distributed.is_main():
                self._write({"key": key})
        except OSError as raised:
            raise self._not_kept(raised) from None

    def _take_over(self, key: dict[str, Any], resume: bool) -> None:
        """Read all files of this name into one; the main process's own from now on."""
        paths = self._files()
        for path in paths if resume else ():
            try:
                self._results = _read(path, key, self._expected) | self._results
            except _UnusableError as unusable:
                say(f"{path} holds results of an evaluation that was stopped, discarded: {unusable}")
        if paths and not resume:
            say(f"discarded the results of an evaluation that was stopped ({self._name}): it starts anew")
        lines = [{"key": key}]
        if self._results:
            lines.append({"results": list(self._results.items())})
            say(
                f"goes on with an evaluation that was stopped: {len(self._results)} of {len(self._expected)} results "
                f"of {self._name} are there already"
            )
        # on the disk before the others are removed, which may be there already
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        for path in self._files():
            if path != self._path:
                path.unlink()

    def _files(self) -> list[Path]:
        """Every file of this evaluation, of all ranks that there ever were."""
        pattern = re.compile(re.escape(f".partial-{self._name}-rank") + r"\d+\.jsonl")
        return sorted(path for path in self._folder.iterdir() if pattern.fullmatch(path.name))

    def _write(self, line: dict[str, Any]) -> None:
        content = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as raised:
            raise self._not_kept(raised) from None

    def _not_kept(self, error: OSError) -> RunError:
        return RunError(
            f"cannot keep results in {self._path} ({why_not_written(self._path, error)}): what was evaluated so far "
            "stays; free some space or make the folder writable, then run the same command again to go on"
        )


class _UnusableError(Exception):
    """Why a file is discarded."""


def _read(path: Path, key: dict[str, Any], expected_ids: frozenset[int]) -> dict[int, Any]:
    """Results in a file; the last line is passed over if it was cut off by the stop."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    if not whole:
        return {}
    try:
        first, *lines = [json.loads(line) for line in whole.split(b"\n")]
        theirs = dict(first["key"])
        results = {index: value for line in lines for index, value in line["results"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _UnusableError("the file is damaged") from None
    if theirs != key:
        different = [name for name in theirs.keys() | key.keys() if theirs.get(name) != key.get(name)]
        raise _UnusableError(f"it was another evaluation (other {', '.join(sorted(different))})")
    if not expected_ids.issuperset(results):
        raise _UnusableError("the file is damaged")
    return results


def weights_identity(path: str | Path) -> list[dict[str, Any]]:
    """What tells weights from others without reading them: name, size, time and, in a run's folder, checksum.

    Args:
        path: file or folder as given by the user; for a sharded index all weights beside it count.

    Raises:
        EngineError: there is no such file.
    """
    path = Path(path).resolve()
    folder = path if path.is_dir() else path.parent
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        checksums = {name: facts["crc32"] for name, facts in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        checksums = {}
    whole_folder = path.is_dir() or path.name.endswith(".index.json")
    try:
        paths = [path]
        if whole_folder:
            paths = sorted(file for file in folder.iterdir() if file.name.endswith(_WEIGHTS) and file.is_file())
        return [_facts(file, checksums.get(file.name)) for file in paths]
    except OSError as error:
        raise EngineError(f"cannot read {path} ({error.strerror}): check the path of the weights") from None


def _facts(file: Path, checksum: int | None) -> dict[str, Any]:
    known = file.stat()
    facts = {"file": str(file), "bytes": known.st_size, "mtime_ns": known.st_mtime_ns}
    return facts if checksum is None else facts | {"crc32": checksum}
