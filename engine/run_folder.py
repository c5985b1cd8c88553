"""The folder of a run before the run starts: made, locked, tidied up, and asked which checkpoint to go on from."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from engine import distributed
from engine.checkpoint import BEST, MANIFEST, clear_leftovers, find_newest, point_to, put_back, require_sound
from engine.errors import EngineError
from engine.folder_lock import hold, release
from engine.log import say
from engine.write_failures import why_not_written

LOCK = ".run.lock"


def prepare_run_folder(output_dir: Path, *, resume: str, auto_resume: bool, training: bool) -> Path | None:
    """Make the output folder, tidy up after an interrupted run, and decide which checkpoint to go on from.

    A training run keeps others from the folder until ``folder_lock.released_at_the_end``.

    Args:
        output_dir: folder of the run.
        resume: ``--resume``: a checkpoint folder, ``latest`` for the newest sound one in ``output_dir``, or empty.
        auto_resume: go on from the newest sound checkpoint when there is one.
        training: False only makes the folder.

    Returns:
        Checkpoint folder, or None to start anew; the same on all processes.

    Raises:
        EngineError: the folder cannot be written, is not shared by the processes or written by another run, nothing to
            resume from, or a new run would mix with an old one. Nothing in the folder was changed.
    """

    def prepare() -> tuple[Path | None, Path]:
        chosen = None
        # of this run alone: others may evaluate in this folder
        probe = output_dir / f".probe-{socket.gethostname()}-{os.getpid()}"
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            if training:
                hold(output_dir / LOCK, output_dir)
                put_back(output_dir)
                chosen = _choose_resume(output_dir, resume, auto_resume)
                clear_leftovers(output_dir)
            probe.touch()
        except OSError as raised:
            why = why_not_written(output_dir, raised)
            raise EngineError(f"--output_dir {output_dir} cannot be written ({why}): choose another folder") from None
        return chosen, probe

    def look() -> None:
        if not probe.exists():  # every process writes into it: the first checkpoint would fail, perhaps hours later
            raise EngineError(
                f"--output_dir {output_dir} is not the same folder for all processes: put it on a file system that all "
                "machines share"
            )

    probe = None
    try:
        chosen, probe = distributed.on_main(prepare)
        distributed.together(look)
    except EngineError:
        release(output_dir / LOCK)
        raise
    finally:
        if probe is not None and distributed.is_main():
            with suppress(OSError):
                probe.unlink()
    return chosen


def _choose_resume(output_dir: Path, resume: str, auto_resume: bool) -> Path | None:
    if resume and resume != "latest":
        if not (Path(resume) / MANIFEST).is_file():
            raise EngineError(
                f"--resume {resume}: no checkpoint folder of a run there (it would have a {MANIFEST}); "
                "give one, or 'latest' for the newest of --output_dir"
            )
        require_sound(Path(resume))
        return Path(resume)
    newest, damaged = find_newest(output_dir)
    if newest is None and damaged:
        raise EngineError(
            f"{output_dir} holds no sound checkpoint to go on from, only damaged ones or another program's "
            f"({'; '.join(damaged)}): move them away to start anew, or choose another --output_dir"
        )
    if resume == "latest" or auto_resume:
        if newest is None and resume == "latest":
            raise EngineError(
                f"--resume latest: {output_dir} holds no sound checkpoint; leave --resume out to start anew"
            )
        for line in damaged:
            say(f"warning: passed over a damaged checkpoint, {line}")
        if newest is not None and newest.name != BEST:  # a stop between the checkpoint and the pointer to it
            point_to(newest)
        return newest
    if newest is not None:
        raise EngineError(
            f"--no_auto_resume: {output_dir} holds {newest.name} of another run; "
            "choose another --output_dir, or remove it"
        )
    return None
