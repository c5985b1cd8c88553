"""The folder of a run before the run starts: made, tidied up, and asked which checkpoint to go on from."""

from pathlib import Path

from engine import distributed
from engine.checkpoint import BEST, MANIFEST, TEMPORARY, clear_leftovers, find_newest, point_to, require_sound
from engine.errors import EngineError
from engine.log import say


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
        EngineError: the folder cannot be written or is not shared by the processes, nothing to resume from, or a new
            run would mix with an old one.
    """
    probe = output_dir / f"{TEMPORARY}probe"

    def prepare() -> Path | None:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            probe.touch()
            if training:
                clear_leftovers(output_dir)
            chosen = _choose_resume(output_dir, resume, auto_resume) if training else None
            probe.touch()
        except OSError as raised:
            raise EngineError(
                f"--output_dir {output_dir} cannot be written ({raised.strerror}): choose another folder"
            ) from None
        return chosen

    error: EngineError | None = None
    chosen = distributed.on_main(prepare)
    if not probe.exists():  # every process writes into it: the first checkpoint would fail, perhaps hours later
        error = EngineError(
            f"--output_dir {output_dir} is not the same folder for all processes: put it on a file system that all "
            "machines share"
        )
    try:
        distributed.raise_together(error)
    finally:
        if distributed.is_main():
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
    newest, skipped = find_newest(output_dir)
    for line in skipped:
        say(line)
    if resume == "latest" or auto_resume:
        if newest is None and resume == "latest":
            raise EngineError(
                f"--resume latest: {output_dir} holds no sound checkpoint; leave --resume out to start anew"
            )
        if newest is not None and newest.name != BEST:  # a stop between the checkpoint and the pointer to it
            point_to(newest)
        return newest
    if newest is not None:
        raise EngineError(
            f"--no_auto_resume: {output_dir} holds {newest.name} of another run; "
            "choose another --output_dir, or remove it"
        )
    return None
