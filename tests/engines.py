"""One small training run under each engine, what it leaves when nobody disturbs it, and a comparison with that."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import check_manifest
from engine.weights import load_torch_file
from tests.fault_points import run_with_fault
from tests.nursery import Ended, Job, Nursery
from tests.scripts.vqa_run import differences, drawn_data, train_flags


@dataclass(frozen=True)
class Engine:
    """How a run is parallelised."""

    world_size: int
    flags: tuple[str, ...] = ()


ENGINES = {
    "one": Engine(1),
    "ddp": Engine(2),
    "ddp3": Engine(3),
}
for stage in range(4):
    zero = ("--enable_deepspeed", "--zero_stage", str(stage))
    ENGINES |= {f"zero{stage}": Engine(2, zero), f"one-zero{stage}": Engine(1, zero)}
_unbroken: dict[tuple[str, ...], tuple[Path, float]] = {}


def spread(cases: list[tuple[Any, ...]], in_ci: Callable[..., bool]) -> list[Any]:
    """Cases for ``parametrize`` with their values as id; those that CI leaves to ``scripts/test.sh --all`` are slow."""
    return [
        pytest.param(*case, id="-".join(map(str, case)), marks=() if in_ci(*case) else pytest.mark.slow)
        for case in cases
    ]


def open_nursery() -> Nursery:
    """A nursery that has imported the program, and DeepSpeed as on a machine without a GPU."""
    return Nursery("run_beit3_finetuning", "tests.fault_points", "deepspeed", environment={"DS_ACCELERATOR": "cpu"})


def training(engine: Engine, output: Path, *more: str) -> list[str]:
    """Two epochs of four steps of two micro-batches: with a moving average, dropped paths, checkpoints on the way."""
    return train_flags(
        output,
        *("--batch_size", "2", "--update_freq", "2", "--epochs", "2", "--limit_samples", str(16 * engine.world_size)),
        *("--drop_path", "0.2", "--model_ema", "--clip_grad", "1", "--lr", "1e-3", "--eval_batch_size", "8"),
        *("--save_ckpt_freq", "1", "--save_ckpt_steps", "3", "--keep_ckpts", "1", "--dist_timeout", "60"),
        *engine.flags,
        *more,
    )


def start(nursery: Nursery, engine: Engine, argv: list[str], stderr: Path, *fault: Any, **job: Any) -> Ended:
    """Run the program; ``fault`` as in ``run_with_fault``, ``job`` as in ``Job``."""
    return nursery.run(Job(run_with_fault, (argv, *fault), stderr, engine.world_size, **job))


def unbroken(nursery: Nursery, name: str, *more: str) -> tuple[Path, float]:
    """Output of a run that nobody disturbs, and its duration in seconds; made once a session."""
    key = (name, *more)
    if key not in _unbroken:
        output = drawn_data().parent / f"unbroken_{len(_unbroken)}"
        shutil.rmtree(output, ignore_errors=True)
        argv = training(ENGINES[name], output, *more)
        ended = start(nursery, ENGINES[name], argv, output.with_name(f"{output.name}_stderr"))
        assert ended.codes == [0] * ENGINES[name].world_size, ended.describe()
        _unbroken[key] = output, ended.seconds
    return _unbroken[key]


def assert_sound(output: Path) -> None:
    """Every checkpoint folder of a run is whole."""
    assert not [(path, problem) for path in output.glob("checkpoint-*") if (problem := check_manifest(path))]


def assert_same_result(output: Path, expected: Path) -> None:
    """Same checkpoints with the same content, same log of epochs, and nothing half-written."""
    leftovers = [path for path in output.rglob("*") if "writing" in path.name or ".tmp" in path.name]
    assert not leftovers
    assert_sound(output)
    names = sorted(path.name for path in expected.glob("checkpoint-*"))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == names
    for name in names:
        files = sorted(path.name for path in (expected / name).glob("*.p*t*"))
        assert sorted(path.name for path in (output / name).glob("*.p*t*")) == files
        for file in files:
            one, other = (read_file(folder / name / file) for folder in (output, expected))
            assert not differences(one, other, f"{name}/{file}")
    assert (output / "latest").read_text() == (expected / "latest").read_text()
    logs = [(folder / "log.txt").read_text().splitlines() for folder in (output, expected)]
    assert [json.loads(line) for line in logs[0]] == [json.loads(line) for line in logs[1]]


class _Values:
    """An object of DeepSpeed's as the values that it holds."""

    def __init__(self, *values: Any) -> None:
        self.state: Any = values

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Values) and not differences(self.state, other.state)

    __hash__ = None


_DEEPSPEED_CLASSES = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Values, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Values, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Values, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def read_file(path: Path) -> Any:
    """Content of a checkpoint's file, with DeepSpeed's objects as values."""
    return load_torch_file(path, also_safe=_DEEPSPEED_CLASSES)
