"""Checkpoints: written whole or not at all, found again after any stop, checked before they are trusted.

A checkpoint is a folder. It is written under a temporary name, flushed to the disk, described by ``manifest.json``
(size and CRC-32 of every file), renamed, and only then named by the file ``latest``. A stop at any point leaves the
older checkpoints as they were.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import distributed
from engine.backend import Backend
from engine.errors import EngineError, RunError
from engine.failures import is_lost_loader_process
from engine.random_state import get_random_state, set_random_state
from engine.weights import load_torch_file
from engine.whole_files import TEMPORARY, flush, write_text
from engine.write_failures import why_not_written

MANIFEST = "manifest.json"
POINTER = "latest"
BEST = "checkpoint-best"
AMENDMENT = "amendment.json"  # values that replace some of ``extra``; beside the manifest, which stays as it is


def save_checkpoint(
    backend: Backend, output_dir: Path, name: str, extra: dict[str, Any], *, copy_files: dict[str, bytes] | None = None
) -> Path:
    """Write ``output_dir/name`` from all processes and make it the newest one.

    Args:
        backend: holds model, optimizer and scaler.
        output_dir: folder of the run; must exist.
        name: such as ``checkpoint-4`` or ``checkpoint-best``; an older folder of that name is replaced at the end.
        extra: plain values to give back on resume (position in the run, best score, …).
        copy_files: small files to store beside the weights (file name → content), such as the answer list.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: the disk is full or not writable; what was there before is untouched.
    """
    final, temporary = output_dir / name, output_dir / f"{TEMPORARY}{name}"

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def commit() -> None:
        try:
            _commit(temporary, final, extra)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    _write_on_main(final, begin)  # also tells the others that the folder is there
    error: OSError | RuntimeError | None = None
    try:
        backend.save(temporary, extra)
        torch.save(get_random_state(), temporary / f"rng-rank{distributed.rank()}.pth")
        for file_name, content in (copy_files or {}).items() if distributed.is_main() else ():
            (temporary / file_name).write_bytes(content)
    except (OSError, RuntimeError) as raised:  # torch reports a full disk as RuntimeError
        if is_lost_loader_process(raised):
            raise
        error = raised
    reason = None if error is None else why_not_written(temporary, error)
    failures = [text for text in distributed.gather_objects(reason) if text]
    if failures:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise _not_written(final, failures[0])
    _write_on_main(final, commit)
    return final


def _write_on_main(final: Path, write: Callable[[], None]) -> None:
    """Let the main process write; what keeps it from that is raised on all processes."""

    def attempt() -> None:
        try:
            write()
        except OSError as error:
            raise _not_written(final, why_not_written(final, error)) from None

    distributed.on_main(attempt)


def _not_written(final: Path, failure: str) -> RunError:
    error = RunError(
        f"could not write {final} ({failure}): older checkpoints are untouched; "
        "free some space or choose another --output_dir, then run the same command again to go on"
    )
    error.agreed = True
    return error


def _commit(temporary: Path, final: Path, extra: dict[str, Any]) -> None:
    """Flush, describe and rename a written folder, then move the pointer."""
    files = {}
    for path in sorted(temporary.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        flush(path)
    manifest = {"files": files, "world_size": distributed.world_size(), "global_step": extra.get("global_step", 0)}
    write_text(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    if final.exists():  # a folder cannot be replaced in one step: set the old one aside, never be without both
        old = final.with_name(f"{TEMPORARY}old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)
    flush(final.parent)
    if final.name != BEST:
        point_to(final)


def point_to(folder: Path) -> None:
    """Let ``latest`` name a checkpoint, unless it does already; call on the main process."""
    if newest_name(folder.parent) == folder.name:
        return
    write_text(folder.parent / POINTER, folder.name + "\n")


def newest_name(output_dir: Path) -> str | None:
    """Name of the checkpoint that was written last, as ``latest`` says; None without one."""
    pointer = output_dir / POINTER
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def amend_checkpoint(folder: Path, extra: dict[str, Any]) -> None:
    """Replace values of the ``extra`` of a checkpoint that is already written (plain values), such as a new score.

    Raises:
        RunError: the disk is full or not writable; the checkpoint is as it was.
    """
    path = folder / AMENDMENT
    _write_on_main(path, lambda: write_text(path, json.dumps(extra) + "\n"))


def check_manifest(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every file has its recorded size and checksum."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if _crc32(path) != facts["crc32"]:
                return f"{name} does not have its recorded checksum"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} is unreadable ({type(error).__name__})"
    return None


def require_sound(folder: Path) -> None:
    """Refuse a checkpoint folder that is absent or torn.

    Raises:
        EngineError: what is wrong with it.
    """
    problem = check_manifest(folder) if folder.is_dir() else "there is no such folder"
    if problem:
        raise EngineError(f"cannot resume from {folder}: {problem}; give another checkpoint by --resume")


def find_newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint of a run, and what is wrong with each newer or unreadable one (``PATH: …``).

    The best one counts too, since it may be the newest of a run that seldom saves; of two of the same step the ordinary
    one wins.
    """
    candidates, skipped = [], []
    for folder in sorted(output_dir.glob("checkpoint-*")):
        if not folder.is_dir():
            continue
        try:
            step = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["global_step"]
            candidates.append((step, folder.name != BEST, folder.name, folder))
        except (OSError, ValueError, KeyError, TypeError):
            skipped.append(f"{folder}: {check_manifest(folder)}")
    for *_, folder in sorted(candidates, reverse=True):
        problem = check_manifest(folder)
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder}: {problem}")
    return None, skipped


def load_checkpoint(backend: Backend, folder: Path) -> dict[str, Any]:
    """Restore model, optimizer, scaler and this process's random state; returns the ``extra`` that was saved.

    The main process alone verifies the checksums. Whatever fails on one process is raised on all.

    Raises:
        EngineError: the folder is torn, or was written by a run of another model.
    """
    distributed.on_main(lambda: require_sound(folder))
    extra = distributed.together(lambda: backend.load(folder))
    extra |= _read_amendment(folder)
    saved_world = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["world_size"]
    extra["saved_world_size"] = saved_world
    if saved_world == distributed.world_size():  # with another number of processes there is no draw to go on from
        set_random_state(load_torch_file(folder / f"rng-rank{distributed.rank()}.pth"))
    return extra


def _read_amendment(folder: Path) -> dict[str, Any]:
    path = folder / AMENDMENT
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise EngineError(
            f"cannot resume from {folder}: {AMENDMENT} is cut off; remove the folder, or give another one"
        )
    return values


def prune(output_dir: Path, keep: int, *, newest: str) -> None:
    """Remove the oldest epoch checkpoints beyond ``keep`` (0 keeps all) and the mid-epoch ones.

    Args:
        output_dir: folder of the run.
        keep: number of epoch checkpoints that stay.
        newest: name of the checkpoint that has just been written; it stays in any case.

    Raises:
        RunError: a checkpoint cannot be removed.
    """
    if not distributed.is_main():
        return
    epochs, steps = [], []
    for folder in output_dir.glob("checkpoint-*"):
        tail = folder.name.removeprefix("checkpoint-")
        if tail.isdigit():
            epochs.append((int(tail), folder))
        elif tail.startswith("step") and tail.removeprefix("step").isdigit():
            steps.append((int(tail.removeprefix("step")), folder))
    doomed = [folder for _, folder in sorted(steps)]
    if keep > 0:
        doomed += [folder for _, folder in sorted(epochs)[:-keep]]
    for folder in doomed:
        if folder.name != newest:
            hidden = folder.with_name(f"{TEMPORARY}old-{folder.name}")  # a stop in between leaves no torn folder
            try:
                folder.rename(hidden)
            except OSError as error:
                raise RunError(f"could not remove the old checkpoint {folder} ({error.strerror})") from None
            shutil.rmtree(hidden, ignore_errors=True)


def put_back(output_dir: Path) -> None:
    """Give a checkpoint its name again that a replacement had set aside when it was stopped between its two renames."""
    for path in output_dir.glob(f"{TEMPORARY}old-*"):
        final = output_dir / path.name.removeprefix(f"{TEMPORARY}old-")
        if path.is_dir() and not final.exists() and check_manifest(path) is None:
            path.rename(final)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what an interrupted write left behind; call on the main process before a run starts."""
    put_back(output_dir)
    for path in [*output_dir.glob(f"{TEMPORARY}*"), *output_dir.glob(f"checkpoint-*/{TEMPORARY}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
