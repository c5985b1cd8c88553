"""The one training loop: epochs, accumulation windows, the schedule, checkpoints, validation, logging."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from engine import distributed, stop
from engine.backend import Backend
from engine.checkpoint import BEST, amend_checkpoint, load_checkpoint, newest_name, prune, save_checkpoint
from engine.errors import RunError, Stopped
from engine.evaluation import to_device
from engine.forecast import StepMemory, describe_forecast
from engine.log import RunLog, peak_mib, say
from engine.schedule import Schedule
from engine.step_window import StepRecord, StepWindow, add_finite, means_of

LossFunction = Callable[[nn.Module, dict[str, Any], int], dict[str, Any]]
EvaluateFunction = Callable[[nn.Module, Any, int], dict[str, float]]


class TrainLoader(Protocol):
    """Where micro-batches come from; can start anywhere, so that a run can resume inside an epoch."""

    steps_per_epoch: int
    samples_per_step: int  # over all processes

    def batches(self, epoch: int, first_step: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of this process from optimizer step ``first_step`` of an epoch to its end."""
        ...


@dataclass
class Position:
    """How far a run has come; plain values, saved with every checkpoint."""

    epoch: int = 0  # the epoch under way
    step_in_epoch: int = 0  # optimizer steps done in it
    global_step: int = 0
    validated: bool = True  # False: the previous epoch ended but its validation is still to be done
    best: float | None = None
    samples_seen: int = 0  # of the epoch under way, over all processes
    failed_in_a_row: int = 0
    means: dict[str, list[float]] = field(default_factory=dict)  # of this epoch's meters: mean and number of steps


@dataclass(frozen=True)
class RunPlan:
    """What ``fit`` does beside taking steps."""

    epochs: int
    output_dir: Path | None  # None writes nothing
    save_every_epochs: int = 1  # 0 never saves
    save_every_steps: int = 0  # mid-epoch checkpoints; 0 for none
    keep_checkpoints: int = 0  # 0 keeps all
    max_steps: int | None = None  # ends the run early; the schedule does not change
    best_metric: str = "score"
    log_every: int = 10
    max_nonfinite: int = 10
    checkpoint_files: dict[str, bytes] = field(default_factory=dict)
    dry_run: bool = False  # two steps, nothing written or validated, and word of what the whole run would take


def fit(
    backend: Backend,
    loader: TrainLoader,
    loss_fn: LossFunction,
    schedule: Schedule,
    plan: RunPlan,
    log: RunLog,
    *,
    part_schedules: Mapping[str, Schedule] | None = None,
    evaluate: EvaluateFunction | None = None,
    val_loader: Any = None,
    position: Position | None = None,
) -> Position:
    """Train to the end of the plan, from the start or from a checkpoint.

    Args:
        backend: model, optimizer and how a step is taken.
        loader: micro-batches by epoch and step.
        loss_fn: ``(model, batch, global_step) -> {"loss": mean over the micro-batch, further scalars to log}``.
        schedule: optimizer step of the run → base learning rate.
        plan: epochs, saving, limits.
        log: where lines and files go.
        part_schedules: base rates of the parameter groups that carry such a ``part``; the others follow ``schedule``.
        evaluate: ``(model, val_loader, epoch) -> {metric: value}``; the best ``plan.best_metric`` keeps its checkpoint.
        val_loader: handed to ``evaluate``.
        position: what ``resume_position`` gave, to go on from there; None starts anew.

    Returns:
        The final position.

    Raises:
        RunError: too many non-finite steps in a row, weights that are no longer finite, or a checkpoint could not be
            written.
        Stopped: SIGTERM, SIGINT or SIGUSR1 reached any process; what there was to save is saved.
    """
    if plan.dry_run:
        return _try_two_steps(_Run(backend, loader, loss_fn, schedule, part_schedules or {}, plan, log, None, None))
    if position is None:
        position = Position()
        log.set_aside()
    else:
        unfinished = position.epoch - (not position.validated and position.step_in_epoch == 0)
        log.rewind(epoch=unfinished, global_step=position.global_step)
    run = _Run(backend, loader, loss_fn, schedule, part_schedules or {}, plan, log, evaluate, val_loader)
    try:
        with stop.listening():
            run.find_checkpoint(position)
            # one that max_steps cut short and that has more to do now is validated at its epoch's end
            if not position.validated and (position.step_in_epoch == 0 or run.at_limit(position)):
                run.finish_epoch(position)
            while position.epoch < plan.epochs and not run.at_limit(position):
                run.train_epoch(position)
                run.end_epoch(position)
    finally:
        log.close()
    return position


def _try_two_steps(run: "_Run") -> Position:
    """A dry run: the first step is looked at for its memory, which slows it, the second one for its time."""
    plan, loader = run.plan, run.loader
    total_steps = min(plan.epochs * loader.steps_per_epoch, plan.max_steps or sys.maxsize)
    run.plan = replace(plan, output_dir=None, max_steps=min(2, total_steps), log_every=1)
    modules = run.backend.unwrapped().modules()
    if not any(module._compiled_call_impl for module in modules):  # operators of compiled code are not to be seen
        run.memory = StepMemory(run.backend.optimizer, run.backend.device)
    position = Position()
    try:
        with stop.listening():
            while not run.at_limit(position):
                run.train_epoch(position)
                if position.step_in_epoch == loader.steps_per_epoch:
                    position.epoch, position.step_in_epoch = position.epoch + 1, 0
    finally:
        run.log.close()
    say(
        describe_forecast(
            seconds_per_step=run.log.seconds_per_step,
            steps_per_epoch=loader.steps_per_epoch,
            total_steps=total_steps,
            memory=run.memory,
            device=run.backend.device,
        )
    )
    say(f"dry run: {'two steps' if position.global_step == 2 else 'one step'} taken, nothing written")
    return position


def resume_position(backend: Backend, loader: TrainLoader, folder: Path) -> Position:
    """Restore a checkpoint and say where the run stands; call it before anything of the run is written.

    Args:
        backend: gets the weights and the training state.
        loader: of the run that goes on; another batch size or data set moves the position to the same sample.
        folder: the checkpoint.

    Returns:
        The position to give to ``fit``.

    Raises:
        EngineError: the checkpoint is torn, or was written by a run of another model.
    """
    extra = load_checkpoint(backend, folder)
    position = Position(**extra["position"])
    now = (distributed.world_size(), loader.samples_per_step, loader.steps_per_epoch)
    before = (extra["saved_world_size"], extra["samples_per_step"], extra["steps_per_epoch"])
    if now != before:
        say(
            f"warning: resuming with {now[0]} processes, {now[1]} samples per step and {now[2]} steps per epoch "
            f"instead of {before[0]}, {before[1]} and {before[2]}: goes on at the same sample, not bitwise equal"
        )
        position.step_in_epoch = min(position.samples_seen // loader.samples_per_step, loader.steps_per_epoch)
        position.samples_seen = position.step_in_epoch * loader.samples_per_step
        position.global_step = position.epoch * loader.steps_per_epoch + position.step_in_epoch
    say(f"resumed from {folder}: epoch {position.epoch}, step {position.global_step}")
    return position


class _Run:
    """The parts of ``fit``, which share their arguments."""

    def __init__(
        self,
        backend: Backend,
        loader: TrainLoader,
        loss_fn: LossFunction,
        schedule: Schedule,
        part_schedules: Mapping[str, Schedule],
        plan: RunPlan,
        log: RunLog,
        evaluate: EvaluateFunction | None,
        val_loader: Any,
    ) -> None:
        self.backend, self.loader, self.loss_fn, self.schedule = backend, loader, loss_fn, schedule
        self.part_schedules = part_schedules
        self.plan, self.log, self.evaluate, self.val_loader = plan, log, evaluate, val_loader
        # ds_numel: of a weight that is divided over the processes just now
        weights = [p for p in backend.unwrapped().parameters() if p.requires_grad]
        self._num_trainable = sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)
        self._newest: Path | None = None  # the checkpoint of this very position, once it is written
        self._resumed = False  # until the first step
        self.memory: StepMemory | None = None  # counts the first step of a dry run
        self._signal = 0  # the one by which the run was asked to stop

    def find_checkpoint(self, position: Position) -> None:
        """Remember the checkpoint of the position from which the run goes on, if it is one of this output folder."""
        self._resumed = position.global_step > 0
        if self.plan.output_dir is None:
            return
        folder = self.plan.output_dir / _checkpoint_name(position)
        self._newest = distributed.broadcast_object(folder if folder.is_dir() else None)
        # the run before may have been stopped while it removed older ones; --resume may have chosen an older one
        if self._newest is not None and newest_name(self.plan.output_dir) == self._newest.name:
            prune(self.plan.output_dir, self.plan.keep_checkpoints, newest=self._newest.name)

    def at_limit(self, position: Position) -> bool:
        return self.plan.max_steps is not None and position.global_step >= self.plan.max_steps

    def train_epoch(self, position: Position) -> None:
        """Take the remaining steps of the epoch under way."""
        self.backend.model.train()
        self.log.start_epoch(position.epoch, first_step=position.step_in_epoch, steps=self.loader.steps_per_epoch)
        window = StepWindow()
        batches = self.loader.batches(position.epoch, position.step_in_epoch)
        while position.step_in_epoch < self.loader.steps_per_epoch and not self.at_limit(position):
            with self.memory if self.memory and position.global_step == 0 else nullcontext():
                self._take_step(position, batches, window)
            self._newest = None
            position.step_in_epoch += 1
            position.global_step += 1
            position.samples_seen += self.loader.samples_per_step
            self.log.advance()
            due = self.plan.save_every_steps and position.global_step % self.plan.save_every_steps == 0
            ended = position.step_in_epoch == self.loader.steps_per_epoch or self.at_limit(position)
            self._signal = stop.asked()
            if position.global_step % self.plan.log_every == 0 or due or ended or self._signal:
                self._flush(position, window)
            if ended:
                break
            if self._signal:
                self._leave(position)
            if due:
                self._save(position)
                window.reset()  # the time of writing is no time of training
        self.log.end_epoch_bar()

    def _leave(self, position: Position) -> None:
        """Save what is not saved yet, then leave with word of it."""
        if self._newest is None and self.plan.save_every_epochs:
            self._save(position)
        where = f"after step {position.global_step}"
        if self._newest is None:
            raise Stopped(self._signal, f"{where}, nothing saved, as no checkpoints are wanted")
        raise Stopped(self._signal, f"{where}; saved {self._newest}, the same command goes on from it")

    def _take_step(self, position: Position, batches: Iterator[dict[str, Any]], window: StepWindow) -> None:
        """One accumulation window: forward and backward of each micro-batch, then the optimizer."""
        lr = self.schedule(position.global_step)
        part_lrs = {part: schedule(position.global_step) for part, schedule in self.part_schedules.items()}
        while True:
            waited = time.perf_counter()
            batch = to_device(next(batches), self.backend.device)
            window.data_wait_s += time.perf_counter() - waited
            compute = partial(self.loss_fn, self.backend.model, batch, position.global_step)
            if self._resumed:
                self.backend.rehearse(lambda compute=compute: compute()["loss"])
                self._resumed = False
            with self.backend.autocast():
                losses = compute()
            self.backend.backward(losses["loss"])
            window.add(losses, batch.get("sample_id"))
            info = self.backend.step(lr, part_lrs)
            if info is not None:
                window.close_step(position.global_step, lr, info)
                return

    def _flush(self, position: Position, window: StepWindow) -> None:
        """Read the window's tensors (the only wait for the device), log them, and judge non-finite steps."""
        steps = window.read()
        fatal = [message for step in steps if (message := self._judge(position, step))]
        groups = self.backend.optimizer.param_groups
        scales = [group["lr_scale"] for group in groups if group.get("part", "") not in self.part_schedules]
        weight_decay = max(group["weight_decay"] for group in groups)
        means: dict[str, list[float]] = {}
        for step in steps:
            values = step.values | {
                "lr": step.lr * max(scales),
                "min_lr": step.lr * min(scales),
                "weight_decay": weight_decay,
                **{f"lr_{part}": schedule(step.index) for part, schedule in self.part_schedules.items()},
            }
            # step by step, so that the epoch's means do not depend on where the intervals end
            add_finite(means, values)
            add_finite(position.means, values)
        elapsed_s = max(window.elapsed_s(), 1e-9)
        row = {
            "epoch": position.epoch,
            "step": position.global_step,
            **means_of(means),
            "samples_per_s": len(steps) * self.loader.samples_per_step / elapsed_s,
            "data_wait": min(window.data_wait_s / elapsed_s, 1.0),
            "peak_mib": peak_mib(self.backend.device),
        }
        self.log.interval(
            row,
            steps_left=self._steps_left(position),
            seconds_per_step=elapsed_s / len(steps),
            position=f"epoch {position.epoch} [{position.step_in_epoch}/{self.loader.steps_per_epoch}]",
        )
        window.reset()
        if fatal:
            position.failed_in_a_row = 0  # whoever goes on from here has changed something
            saved = self._save(position) if self.plan.save_every_epochs else None
            way = f"; saved {saved}, the same command goes on from it" if saved else ""
            error = RunError(f"{fatal[0]}: lower the learning rate, clip the gradients, or look at these samples{way}")
            error.agreed = True
            raise error

    def _judge(self, position: Position, step: StepRecord) -> str | None:
        """Name a step that failed; returns what to end the run with, after too many in a row."""
        position.failed_in_a_row = position.failed_in_a_row + 1 if step.failed else 0
        if not step.failed:
            return None
        # the flag is the same on all processes, so all of them take part in gathering the ids
        ids = [index for part in distributed.gather_objects(step.sample_ids) for index in part]
        say(
            f"warning: step {step.index}: loss or gradients are not finite, the weights were left as they were; "
            f"samples {ids}"
        )
        if position.failed_in_a_row < self.plan.max_nonfinite:
            return None
        return (
            f"the loss or gradients of {position.failed_in_a_row} steps in a row were not finite, "
            f"the last one step {step.index} with samples {ids}"
        )

    def _steps_left(self, position: Position) -> int:
        end = self.plan.epochs * self.loader.steps_per_epoch
        return max(min(end, self.plan.max_steps or end) - position.global_step, 0)

    def end_epoch(self, position: Position) -> None:
        """Turn to the next epoch, save when due, validate, log."""
        whole = position.step_in_epoch == self.loader.steps_per_epoch
        last = (whole and position.epoch + 1 == self.plan.epochs) or self.at_limit(position)
        finished = position.epoch
        if whole:
            position.epoch, position.step_in_epoch, position.samples_seen = finished + 1, 0, 0
        position.validated = False
        every = self.plan.save_every_epochs
        if every and (last or (finished + 1) % every == 0):
            self._save(position)
        if self._signal:
            self._leave(position)
        self.finish_epoch(position)

    def finish_epoch(self, position: Position) -> None:
        """Validate the epoch that has just ended or was cut short by max_steps, keep the best, write its log line."""
        whole = position.step_in_epoch == 0
        finished = position.epoch - 1 if whole else position.epoch
        metrics: dict[str, float] = {}
        if self.evaluate is not None:
            try:
                metrics = self.evaluate(self.backend.unwrapped(), self.val_loader, finished)
            except Stopped as stopped:
                self._signal = stopped.number
                self._leave(position)
        position.validated = True
        # before the best is kept: whoever goes on from that checkpoint finds the line of the epoch it ended
        self.log.epoch(self._epoch_row(position, metrics, finished))
        if whole:
            position.means = {}
        score = metrics.get(self.plan.best_metric)
        if score is not None and (position.best is None or score > position.best):
            position.best = score
            if self.plan.save_every_epochs:
                self._save(position, best=True)
        if self._newest is not None:  # the best one is whole by now: who goes on from here need not validate again
            amend_checkpoint(self._newest, {"position": asdict(position)})

    def _epoch_row(self, position: Position, metrics: dict[str, float], finished: int) -> dict[str, Any]:
        means = means_of(position.means)
        keys = ["lr", "min_lr", "loss", "loss_scale", "weight_decay", "grad_norm", *(["acc"] if "acc" in means else [])]
        row: dict[str, Any] = {f"train_{key}": means.get(key, math.nan) for key in keys}
        row |= {f"val_{key}": value for key, value in metrics.items()}
        row["epoch"] = finished
        row["n_parameters"] = self._num_trainable
        return row

    def _save(self, position: Position, *, best: bool = False) -> Path | None:
        if self.plan.output_dir is None:
            return None
        self._require_finite_weights(position)
        name = BEST if best else _checkpoint_name(position)
        extra = {
            "position": asdict(position),
            "samples_per_step": self.loader.samples_per_step,
            "steps_per_epoch": self.loader.steps_per_epoch,
            "global_step": position.global_step,
        }
        folder = save_checkpoint(self.backend, self.plan.output_dir, name, extra, copy_files=self.plan.checkpoint_files)
        say(f"saved {folder}")
        if not best:
            self._newest = folder
            prune(self.plan.output_dir, self.plan.keep_checkpoints, newest=name)
        return folder

    def _require_finite_weights(self, position: Position) -> None:
        """A step may be too long though loss and gradients are finite: the weights are none to go on from."""
        name = self.backend.nonfinite_weight()
        if name is None:
            return
        newest = newest_name(self.plan.output_dir)
        way = "start again" if newest is None else f"older checkpoints stand ({newest} is the newest): go on from there"
        error = RunError(
            f"after step {position.global_step} the weights are not finite (the first: {name}) and were not saved; "
            f"{way} with a lower learning rate"
        )
        error.agreed = True
        raise error


def _checkpoint_name(position: Position) -> str:
    """By the number of the epoch that has ended (from 0 on), or by the step inside an epoch."""
    if position.step_in_epoch == 0 and position.epoch > 0:
        return f"checkpoint-{position.epoch - 1}"
    return f"checkpoint-step{position.global_step}"
