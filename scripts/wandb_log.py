"""Weights & Biases beside the other logs of a run, with the names that the adaptive fork of VL-BERT logs under."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine import distributed
from engine.errors import EngineError
from engine.log import RunLog

PROJECT = "adaptive-finetuning"
# of metrics.jsonl → theirs; other numbers keep our names
_NAMES = {
    "loss": "Training Loss",
    "acc": "Train SoftAcc",
    "answer_loss": "Train AnsLoss",
    "constrain_k_loss": "Train ConstrainKLoss",
    "deterministic_policy_loss": "Train DeterministicPolicyLoss",
}


class WandbLog(RunLog):
    """A ``RunLog`` that also sends its numbers and pictures; one run for all processes, not one each."""

    def __init__(
        self, output_dir: Path | None, tensorboard_dir: Path | None = None, *, name: str, settings: Mapping[str, Any]
    ) -> None:
        """Start, or go on with, the run that belongs to the output folder.

        Args:
            output_dir: folder of the run.
            tensorboard_dir: see ``RunLog``.
            name: of the run.
            settings: its config.

        Raises:
            EngineError: the package is not installed, or refuses.
        """
        super().__init__(output_dir, tensorboard_dir)
        self._run = None
        if not distributed.is_main() or output_dir is None:
            return
        try:
            import wandb
        except ImportError:
            raise EngineError("--wandb needs a package that is not installed: pip install wandb") from None
        self._wandb = wandb
        try:
            self._run = wandb.init(project=PROJECT, name=name, config=dict(settings), dir=str(output_dir))
        except Exception as error:  # whatever its many kinds are: no network, no key, a full disk
            raise EngineError(f"Weights & Biases refuses to start ({error}): leave --wandb out") from None

    def interval(self, row: dict[str, float], *, steps_left: int, seconds_per_step: float, position: str) -> None:
        """Log one interval."""
        super().interval(row, steps_left=steps_left, seconds_per_step=seconds_per_step, position=position)
        if self._run is not None:
            values = {_NAMES.get(key, key): value for key, value in row.items() if key != "step"}
            self._run.log(values, step=int(row["step"]))

    def epoch(self, row: dict[str, Any]) -> None:
        """Log one epoch."""
        super().epoch(row)
        if self._run is not None and "val_score" in row:
            self._run.log({"Val SoftAcc": row["val_score"] / 100, "epoch": row["epoch"]})

    def picture(self, name: str, path: Path) -> None:
        """Log a picture that has been written."""
        if self._run is not None:
            self._run.log({name: self._wandb.Image(str(path))})

    def close(self) -> None:
        """Finish."""
        super().close()
        if self._run is not None:
            self._run.finish()
            self._run = None
