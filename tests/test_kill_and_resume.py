"""Killed with SIGKILL anywhere, started again with the same command: the same weights, bit for bit, and no leftovers.

Every case is a real run of the fine-tuning program in its own processes, killed at a place of tests/fault_points.py or
at a random time.
"""

import itertools
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines import ENGINES, assert_same_result, assert_sound, open_nursery, spread, start, training, unbroken
from tests.nursery import Ended, Nursery
from tests.scripts.vqa_run import eval_flags, trained_checkpoint, tree

# at which passage each place is fatal: in the second epoch, after a checkpoint inside it
OCCASIONS = {
    "mid forward": 13,
    "after backward": 15,
    "after optimizer step": 7,
    "after first file": 13,
    "mid file": 14,
    "before flush": 4,
    "before pointer": 2,
    "during prune": 2,
    "during evaluation": 3,
}
WRITING = ("after first file", "mid file", "before flush", "before pointer", "during prune")  # the main process writes


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = open_nursery()
    yield nursery
    nursery.close()


def assert_all_ended(ended: Ended, rank: int) -> None:
    """The killed process is gone, the others noticed and say so in one line."""
    assert ended.codes[rank] == -signal.SIGKILL, ended.describe()
    assert not ended.hung, ended.describe()
    for code, stderr in (pair for other, pair in enumerate(zip(*ended[:2], strict=True)) if other != rank):
        assert code == 1, ended.describe()
        assert "Traceback" not in stderr, ended.describe()
        assert "lost contact with another process" in stderr.splitlines()[-1], ended.describe()


def kill_and_resume(nursery: Nursery, name: str, place: str, folder: Path, *more: str) -> None:
    engine, output = ENGINES[name], folder / "run"
    argv = training(engine, output, *more)
    expected, _ = unbroken(nursery, name, *more)
    rank = 0 if place in WRITING else engine.world_size - 1
    killed = start(nursery, engine, argv, folder / "killed", place, rank, OCCASIONS[place])
    assert_all_ended(killed, rank)
    assert_sound(output)
    resumed = start(nursery, engine, argv, folder / "resumed")
    assert resumed.codes == [0] * engine.world_size, resumed.describe()
    assert "resumed from" in resumed.stderr[0], resumed.describe()
    assert_same_result(output, expected)


@pytest.mark.parametrize(
    ("name", "place"),
    spread(
        list(itertools.product(["one", "ddp", "zero1", "zero2"], OCCASIONS)),
        # all places with DDP, the writing of files also with one process, both ZeRO stages at a few
        lambda name, place: (
            name == "ddp" or (name == "one" and place in WRITING) or place in ("mid forward", "mid file")
        ),
    ),
)
def test_a_run_killed_anywhere_ends_with_the_same_weights_when_started_again(nursery, tmp_path, name, place):
    kill_and_resume(nursery, name, place, tmp_path)


@pytest.mark.parametrize(
    "place",
    spread(
        [("mid forward",), ("after optimizer step",), ("mid file",), ("before pointer",)],
        lambda place: place == "mid file",
    ),
)
def test_zero_3_killed_and_started_again_ends_with_the_same_weights(nursery, tmp_path, place):
    kill_and_resume(nursery, "zero3", place, tmp_path)


@pytest.mark.parametrize("name", ["one", "ddp", "zero1", "zero2"])
def test_an_evaluation_killed_while_it_writes_its_file_is_complete_when_started_again(nursery, tmp_path, name):
    engine = ENGINES[name]
    expected, output = tmp_path / "expected", tmp_path / "killed"
    for folder in (expected, output):
        folder.mkdir()
    argv = [eval_flags(trained_checkpoint(), folder, "--eval_batch_size", "8") for folder in (expected, output)]
    assert start(nursery, engine, [*argv[0], *engine.flags], tmp_path / "unbroken").codes == [0] * engine.world_size
    killed = start(nursery, engine, [*argv[1], *engine.flags], tmp_path / "stderr", "during dump", 0)
    assert killed.codes[0] == -signal.SIGKILL, killed.describe()
    assert not (output / "submit_vqav2_test.json").exists()
    again = start(nursery, engine, [*argv[1], *engine.flags], tmp_path / "again")
    assert again.codes == [0] * engine.world_size, again.describe()
    assert relative_tree(output) == relative_tree(expected)


def relative_tree(folder: Path) -> dict[str, str]:
    return {str(Path(path).relative_to(folder)): checksum for path, checksum in tree(folder).items()}


@pytest.mark.parametrize("seed", spread([(seed,) for seed in range(10)], lambda seed: seed in (0, 3)))
def test_a_run_killed_at_a_random_time_ends_with_the_same_weights_when_started_again(nursery, tmp_path, seed):
    draw = random.Random(seed)
    name = ["one", "ddp", "zero1", "zero2"][seed % 4]
    engine, output = ENGINES[name], tmp_path / "run"
    workers = ("--num_workers", str(seed % 3))
    expected, seconds = unbroken(nursery, name)  # made without loader processes: their number changes nothing
    argv = training(engine, output, *workers)
    death = (draw.uniform(0.05, 0.95) * seconds, draw.randrange(engine.world_size), int(signal.SIGKILL))
    killed = start(nursery, engine, argv, tmp_path / "killed", signals=(death,))
    assert not killed.hung, killed.describe()
    assert_sound(output)
    resumed = start(nursery, engine, argv, tmp_path / "resumed")
    assert resumed.codes == [0] * engine.world_size, resumed.describe()
    assert_same_result(output, expected)
