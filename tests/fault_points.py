"""Places of a training or evaluation run at which a test lets something happen, and what can happen there.

The patches are made in a process of its own (tests/nursery.py) before the program starts.
"""

import io
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import engine.checkpoint
import run_beit3_finetuning
from scripts import beit3_vqa, vqa_evaluation
from scripts.program import run

TEMPORARY = engine.checkpoint.TEMPORARY
Happening = Callable[[], None]


def run_with_fault(
    argv: list[str],
    place: str = "",
    rank: int = 0,
    occasion: int = 1,
    happening: str = "kill",
    main: Callable[[list[str]], None] = run_beit3_finetuning.main,
) -> None:
    """A training program; on process ``rank`` something happens at the ``occasion``-th passage of ``place``."""
    if place and int(os.environ.get("RANK", "0")) == rank:
        PLACES[place](occasion, HAPPENINGS[happening])
    run(lambda: main(argv))


def _send(number: int) -> Happening:
    return lambda: os.kill(os.getpid(), number)


def _raise_a_bug() -> None:
    raise KeyError("a bug on one process")


def _kill_a_loader_process() -> None:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def _fill_the_disk() -> None:
    """From now on no file can grow beyond 200 kB, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))


def _run_out_of_memory() -> None:
    torch.empty(2**60, dtype=torch.uint8)


HAPPENINGS: dict[str, Happening] = {
    "kill": _send(signal.SIGKILL),
    "SIGTERM": _send(signal.SIGTERM),
    "SIGINT": _send(signal.SIGINT),
    "SIGUSR1": _send(signal.SIGUSR1),
    "hang": _send(signal.SIGSTOP),
    "bug": _raise_a_bug,
    "killed loader process": _kill_a_loader_process,
    "full disk": _fill_the_disk,
    "out of memory": _run_out_of_memory,
}


class _Countdown:
    """Lets something happen when it is called for the n-th time."""

    def __init__(self, occasion: int, happening: Happening) -> None:
        self.left, self.happening = occasion, happening

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.happening()


def _wrap(
    owner: Any, name: str, *, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None
):
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if after is not None:
            after(*args, **kwargs)
        return result

    setattr(owner, name, wrapped)


def _mid_forward(occasion: int, happening: Happening) -> None:
    """Inside the model, after some of its layers, in the ``occasion``-th forward pass of training."""
    passes, layers = [0], [0]

    def count(module: torch.nn.Module, _: Any) -> None:
        if module.training and hasattr(type(module), "unused_in_finetuning"):  # the whole model
            passes[0] += 1
        elif isinstance(module, torch.nn.LayerNorm) and module.training and passes[0] == occasion:
            layers[0] += 1
            if layers[0] == 4:
                happening()

    torch.nn.modules.module.register_module_forward_pre_hook(count)


def _after_backward(occasion: int, happening: Happening) -> None:
    countdown = _Countdown(occasion, happening)
    _wrap(torch.Tensor, "backward", after=lambda *_, **__: countdown())


def _after_optimizer_step(occasion: int, happening: Happening) -> None:
    countdown = _Countdown(occasion, happening)
    _wrap(torch.optim.AdamW, "step", after=lambda *_, **__: countdown())


def _after_first_file(occasion: int, happening: Happening) -> None:
    countdown = _Countdown(occasion, happening)
    _wrap(torch, "save", after=lambda value, path, *_, **__: countdown() if TEMPORARY in str(path) else None)


def _mid_file(occasion: int, happening: Happening) -> None:
    left = [occasion]

    def write_half(value: Any, path: Any, *_: Any, **__: Any) -> None:
        if TEMPORARY in str(path):
            left[0] -= 1
            if left[0] == 0:
                content = io.BytesIO()
                save(value, content)
                Path(path).write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
                happening()

    save = torch.save
    _wrap(torch, "save", before=write_half)


def _before_flush(occasion: int, happening: Happening) -> None:
    countdown = _Countdown(occasion, happening)
    _wrap(engine.checkpoint, "_commit", before=lambda *_, **__: countdown())


def _before_pointer(occasion: int, happening: Happening) -> None:
    countdown = _Countdown(occasion, happening)

    def renamed(path: Path, target: Path) -> None:
        if path.name.startswith(TEMPORARY) and Path(target).name.startswith("checkpoint-"):
            countdown()

    _wrap(Path, "rename", after=renamed)


def _during_prune(occasion: int, happening: Happening) -> None:
    countdown = _Countdown(occasion, happening)

    def remove_some(path: Any, **_: Any) -> None:
        if f"{TEMPORARY}old-" in str(path) and Path(path).is_dir():
            first = sorted(Path(path).iterdir())[0]
            first.unlink()
            countdown()

    _wrap(shutil, "rmtree", before=remove_some)


def _during_evaluation(occasion: int, happening: Happening) -> None:
    countdown = _Countdown(occasion, happening)
    _wrap(vqa_evaluation, "target_scores", after=lambda *_, **__: countdown())


def _during_dump(occasion: int, happening: Happening) -> None:
    countdown = _Countdown(occasion, happening)
    _wrap(os, "replace", before=lambda source, target: countdown() if "submit_" in str(target) else None)
    _wrap(Path, "replace", before=lambda source, target: countdown() if "submit_" in str(target) else None)


def _spoil(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[int, Happening], None]:
    """The loss of the ``occasion``-th micro-batch is another one; nothing else happens."""

    def prepare(occasion: int, _: Happening) -> None:
        original, calls = beit3_vqa.loss_fn, [0]

        def spoiled(*args: Any) -> dict[str, Any]:
            losses = original(*args)
            calls[0] += 1
            return losses | {"loss": change(losses["loss"])} if calls[0] == occasion else losses

        beit3_vqa.loss_fn = spoiled

    return prepare


def _with_infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


PLACES: dict[str, Callable[[int, Happening], None]] = {
    "mid forward": _mid_forward,
    "after backward": _after_backward,
    "after optimizer step": _after_optimizer_step,
    "after first file": _after_first_file,
    "mid file": _mid_file,
    "before flush": _before_flush,
    "before pointer": _before_pointer,
    "during prune": _during_prune,
    "during evaluation": _during_evaluation,
    "during dump": _during_dump,
    "NaN loss": _spoil(lambda loss: loss * float("nan")),
    "infinite gradient": _spoil(_with_infinite_gradient),
    "loss spike": _spoil(lambda loss: loss * 1e4),
}
