"""What a run says about itself: lines, a progress bar on a terminal, JSON files, TensorBoard; main process only."""

import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from engine import distributed
from engine.errors import EngineError, RunError
from engine.whole_files import write_text
from engine.write_failures import could_not_write


def say(text: str) -> None:
    """Print one line to stderr, without tearing a progress bar; nothing on other processes."""
    if distributed.is_main():
        tqdm.write(text, file=sys.stderr)


def peak_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, resident set of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # Unix only, and only wanted here

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class RunLog:
    """Writes ``run.json``, ``log.txt`` (one object per epoch), ``metrics.jsonl`` (one per interval), TensorBoard.

    Without an output folder (dry run) it only prints. Other processes than the main one do nothing.
    """

    def __init__(self, output_dir: Path | None, tensorboard_dir: Path | None = None) -> None:
        """Open the log of a run; the folders are made."""
        self._main = distributed.is_main()
        self._folder = output_dir if self._main else None
        self._tensorboard = None
        self._bar: tqdm | None = None
        self.seconds_per_step: float | None = None  # of the latest interval
        if self._main and tensorboard_dir is not None and output_dir is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only wanted here

            try:
                self._tensorboard = SummaryWriter(str(tensorboard_dir))
            except OSError as error:
                raise EngineError(
                    f"--log_dir {tensorboard_dir} is not writable ({error.strerror}): choose another folder"
                ) from None

    def write_run(self, arguments: dict[str, Any], extra: dict[str, Any]) -> None:
        """Record arguments, command, versions and place in ``run.json``."""
        if self._folder is None:
            return
        record = {
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "arguments": arguments,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "world_size": distributed.world_size(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cpu_threads": torch.get_num_threads(),
            **extra,
        }
        path = self._folder / "run.json"
        with _writing(path):
            write_text(path, json.dumps(record, indent=2, default=str) + "\n")

    def rewind(self, *, epoch: int, global_step: int) -> None:
        """Drop what a run that is now resumed had logged beyond the checkpoint: its epochs from ``epoch`` on."""
        if self._folder is None:
            return
        _keep_lines(self._folder / "log.txt", lambda row: row.get("epoch", -1) < epoch)
        _keep_lines(self._folder / "metrics.jsonl", lambda row: row.get("step", 0) <= global_step)

    def set_aside(self) -> None:
        """Keep the lines of an earlier run without a checkpoint as ``*.old``: this one starts from the first step."""
        for name in ("log.txt", "metrics.jsonl") if self._folder is not None else ():
            path = self._folder / name
            if path.exists():
                with _writing(path):
                    path.replace(path.with_name(f"{name}.old"))

    def start_epoch(self, epoch: int, *, first_step: int, steps: int) -> None:
        """Show a progress bar for an epoch when stderr is a terminal."""
        if self._main and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, desc=f"epoch {epoch}", unit="step", file=sys.stderr)

    def advance(self) -> None:
        """One optimizer step has been done."""
        if self._bar is not None:
            self._bar.update()

    def end_epoch_bar(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def interval(self, row: dict[str, float], *, steps_left: int, seconds_per_step: float, position: str) -> None:
        """Log one interval: ``row`` goes to ``metrics.jsonl`` and TensorBoard, its gist to the terminal."""
        self.seconds_per_step = seconds_per_step  # a later interval replaces the first, which warms up
        if not self._main:
            return
        eta = timedelta(seconds=int(steps_left * seconds_per_step))
        shown = (
            f"{position}  loss {row['loss']:.4f}  lr {row['lr']:.3e}  grad_norm {row['grad_norm']:.3f}  "
            f"{row['samples_per_s']:.1f} samples/s  data {100 * row['data_wait']:.0f} %  "
            f"peak {row['peak_mib']:.0f} MiB  eta {eta}"
        )
        say(shown)
        _append(self._folder, "metrics.jsonl", row)
        group_of = {"loss": "train", "acc": "train"}
        numbers = {key: value for key, value in row.items() if key not in ("step", "epoch")}
        self._draw({f"{group_of.get(key, 'opt')}/{key}": value for key, value in numbers.items()}, int(row["step"]))

    def epoch(self, row: dict[str, Any]) -> None:
        """Append the epoch's object to ``log.txt`` (keys in the original's order) and say it."""
        if not self._main:
            return
        say("epoch done: " + _json(row))
        _append(self._folder, "log.txt", row)
        scores = {key.removeprefix("val_"): value for key, value in row.items() if key.startswith("val_")}
        self._draw({f"perf/{key}": value for key, value in scores.items()}, row["epoch"])

    def _draw(self, values: dict[str, float], step: int) -> None:
        """Values for TensorBoard."""
        if self._tensorboard is None:
            return
        with _writing(Path(self._tensorboard.log_dir)):
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        """Finish the progress bar and TensorBoard."""
        self.end_epoch_bar()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _append(folder: Path | None, name: str, row: dict[str, Any]) -> None:
    if folder is None:
        return
    with _writing(folder / name), (folder / name).open("a", encoding="utf-8") as file:
        file.write(_json(row) + "\n")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the file system's refusal into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{could_not_write(path, error)}: free some space or check the folder, "
            "then run the same command again to go on"
        ) from None


def _json(row: dict[str, Any]) -> str:
    """One line of JSON, which has no NaN: a value without a finite step is null."""
    absent = {key: None for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return json.dumps(row | absent, allow_nan=False)


def _keep_lines(path: Path, keep: Any) -> None:
    if not path.exists():
        return
    kept = []
    with _writing(path):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # the line that a kill cut off
                continue
            if isinstance(row, dict) and keep(row):
                kept.append(line + "\n")
        write_text(path, "".join(kept))
