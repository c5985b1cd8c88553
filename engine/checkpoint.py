"""Checkpoints: written whole or not at all, found again after any stop, checked before they are trusted.

A checkpoint is a folder. It is written under a temporary name, flushed to the disk, described by ``manifest.json``
(size and CRC-32 of every file), renamed, and only then named by the file ``latest``. A stop at any point leaves the
older checkpoints as they were.
"""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch

from engine import distributed
from engine.backend import Backend
from engine.errors import EngineError, RunError
from engine.log import say
from engine.weights import load_torch_file

MANIFEST = "manifest.json"
POINTER = "latest"
_TEMPORARY = ".writing-"


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
    final, temporary = output_dir / name, output_dir / f"{_TEMPORARY}{name}"
    error: OSError | RuntimeError | None = None
    try:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        distributed.barrier()
        backend.save(temporary, extra)
        torch.save(_random_state(), temporary / f"rng-rank{distributed.rank()}.pth")
        for file_name, content in (copy_files or {}).items() if distributed.is_main() else ():
            (temporary / file_name).write_bytes(content)
    except (OSError, RuntimeError) as raised:  # torch reports a full disk as RuntimeError
        error = raised
    failures = [text for text in distributed.gather_objects(None if error is None else str(error)) if text]
    if failures:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"could not write {final} ({failures[0].splitlines()[0]}): older checkpoints are untouched; "
            "free some space or choose another --output_dir, then run the same command again to go on"
        )
    if distributed.is_main():
        try:
            _commit(temporary, final, extra)
        except OSError as raised:
            shutil.rmtree(temporary, ignore_errors=True)
            error = raised
    failure = distributed.broadcast_object(None if error is None else str(error))
    if failure:
        raise RunError(f"could not write {final} ({failure}): older checkpoints are untouched; free some space")
    return final


def _commit(temporary: Path, final: Path, extra: dict[str, Any]) -> None:
    """Flush, describe and rename a written folder, then move the pointer."""
    files = {}
    for path in sorted(temporary.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc32(path)}
        _flush(path)
    manifest = {"files": files, "world_size": distributed.world_size(), "global_step": extra.get("global_step", 0)}
    _write_text(temporary / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    _flush(temporary)
    if final.exists():  # a folder cannot be replaced in one step: set the old one aside, never be without both
        old = final.with_name(f"{_TEMPORARY}old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)
    _flush(final.parent)
    if not final.name.endswith("-best"):
        pointer = final.parent / f"{_TEMPORARY}{POINTER}"
        _write_text(pointer, final.name + "\n")
        pointer.replace(final.parent / POINTER)
        _flush(final.parent)


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


def find_newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint of a run, and one line for each unsound one that was passed over."""
    candidates, skipped = [], []
    for folder in sorted(output_dir.glob("checkpoint-*")):
        if not folder.is_dir() or folder.name.endswith("-best"):
            continue
        try:
            step = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["global_step"]
            candidates.append((step, folder.name, folder))
        except (OSError, ValueError, KeyError, TypeError):
            skipped.append(f"{folder} is passed over: {check_manifest(folder)}")
    for _, _, folder in sorted(candidates, reverse=True):
        problem = check_manifest(folder)
        if problem is None:
            return folder, skipped
        skipped.append(f"{folder} is passed over: {problem}")
    return None, skipped


def load_checkpoint(backend: Backend, folder: Path) -> dict[str, Any]:
    """Restore model, optimizer, scaler and this process's random state; returns the ``extra`` that was saved.

    Raises:
        EngineError: the folder is torn, or belongs to another number of processes.
    """
    problem = check_manifest(folder) if folder.is_dir() else "there is no such folder"
    if problem:
        raise EngineError(f"cannot resume from {folder}: {problem}; give another checkpoint by --resume")
    extra = backend.load(folder)
    saved_world = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["world_size"]
    extra["saved_world_size"] = saved_world
    random_file = folder / f"rng-rank{distributed.rank()}.pth"
    if saved_world == distributed.world_size() and random_file.exists():
        _restore_random_state(load_torch_file(random_file))
    return extra


def prune(output_dir: Path, keep: int) -> None:
    """Remove the oldest epoch checkpoints beyond ``keep`` (0 keeps all) and mid-epoch ones that are not the newest."""
    if not distributed.is_main():
        return
    newest, _ = find_newest(output_dir)
    if newest is None:
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
        if folder != newest:
            hidden = folder.with_name(f"{_TEMPORARY}old-{folder.name}")  # a stop in between leaves no torn folder
            folder.rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)


def clear_leftovers(output_dir: Path) -> None:
    """Remove what an interrupted write left behind; call on the main process before a run starts."""
    for path in output_dir.glob(f"{_TEMPORARY}*"):
        old_name = path.name.removeprefix(f"{_TEMPORARY}old-")
        if path.name != old_name and path.is_dir() and not (output_dir / old_name).exists():
            if check_manifest(path) is None:  # stopped between the two renames of a replacement
                path.rename(output_dir / old_name)
                continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def prepare_run_folder(output_dir: Path, *, resume: str, auto_resume: bool, training: bool) -> Path | None:
    """Make the output folder, tidy up after an interrupted run, and decide which checkpoint to go on from.

    Args:
        output_dir: folder of the run.
        resume: ``--resume``: a checkpoint folder, ``latest`` for the newest sound one in ``output_dir``, or empty.
        auto_resume: go on from the newest sound checkpoint when there is one.
        training: False only makes the folder.

    Returns:
        Checkpoint folder, or None to start anew; the same on all processes.

    Raises:
        EngineError: the folder cannot be written, nothing to resume from, or a new run would mix with an old one.
    """
    error: EngineError | None = None
    chosen: Path | None = None
    if distributed.is_main():
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            probe = output_dir / f"{_TEMPORARY}probe"
            probe.touch()
            probe.unlink()
            if training:
                clear_leftovers(output_dir)
                chosen = _choose_resume(output_dir, resume, auto_resume)
        except OSError as raised:
            error = EngineError(
                f"--output_dir {output_dir} cannot be written ({raised.strerror}): choose another folder"
            )
        except EngineError as raised:
            error = raised
    distributed.raise_together(error)
    return distributed.broadcast_object(chosen)


def _choose_resume(output_dir: Path, resume: str, auto_resume: bool) -> Path | None:
    if resume and resume != "latest":
        if not (Path(resume) / MANIFEST).is_file():
            raise EngineError(
                f"--resume {resume}: no checkpoint folder of a run there (it would have a {MANIFEST}); "
                "give one, or 'latest' for the newest of --output_dir"
            )
        return Path(resume)
    newest, skipped = find_newest(output_dir)
    for line in skipped:
        say(line)
    if resume == "latest" or auto_resume:
        if newest is None and resume == "latest":
            raise EngineError(
                f"--resume latest: {output_dir} holds no sound checkpoint; leave --resume out to start anew"
            )
        return newest
    if newest is not None:
        raise EngineError(
            f"--no_auto_resume: {output_dir} holds {newest.name} of another run; "
            "choose another --output_dir, or remove it"
        )
    return None
