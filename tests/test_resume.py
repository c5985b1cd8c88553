"""A run that is stopped and goes on ends like one that was never stopped, bit for bit, under every engine.

Stopped by a signal inside the first micro-batch of a step (rounded to the step), in the middle of an epoch, or at its
end; for any number of loader processes.
"""

import itertools
import signal
from collections.abc import Iterator

import pytest

from tests.engines import ENGINES, assert_same_result, open_nursery, spread, start, training, unbroken
from tests.nursery import Nursery

BACKWARD_PASSES = {"epoch end": 8, "mid epoch": 12, "mid accumulation": 11}  # eight in an epoch, two in a step


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = open_nursery()
    yield nursery
    nursery.close()


@pytest.mark.parametrize(
    ("name", "moment", "num_workers"),
    spread(
        list(itertools.product(["one", "ddp", "zero1", "zero2", "zero3"], BACKWARD_PASSES, [0, 2])),
        lambda name, moment, num_workers: (
            (num_workers == 0 and moment != "mid epoch")
            or (name == "one" and num_workers == 2 and moment == "mid epoch")
        ),
    ),
)
def test_a_stopped_run_goes_on_bitwise(nursery, tmp_path, name, moment, num_workers):
    engine, output = ENGINES[name], tmp_path / "run"
    argv = training(engine, output, "--save_ckpt_steps", "0", "--num_workers", str(num_workers))
    occasion = BACKWARD_PASSES[moment]
    stopped = start(nursery, engine, argv, tmp_path / "stopped", "after backward", 0, occasion, "SIGUSR1")
    assert stopped.codes == [128 + signal.SIGUSR1] * engine.world_size, stopped.describe()
    resumed = start(nursery, engine, argv, tmp_path / "resumed")
    assert resumed.codes == [0] * engine.world_size, resumed.describe()
    assert f"step {(occasion + 1) // 2}" in next(line for line in resumed.stderr[0].splitlines() if "resumed" in line)
    assert_same_result(output, unbroken(nursery, name)[0])


@pytest.mark.parametrize("moment", BACKWARD_PASSES)
def test_three_processes_add_up_their_gradients_in_the_same_order_after_a_resume(nursery, tmp_path, moment):
    engine, output = ENGINES["ddp3"], tmp_path / "run"
    argv = training(engine, output, "--save_ckpt_steps", "0")
    stopped = start(
        nursery, engine, argv, tmp_path / "stopped", "after backward", 2, BACKWARD_PASSES[moment], "SIGTERM"
    )
    assert stopped.codes == [128 + signal.SIGTERM] * 3, stopped.describe()
    resumed = start(nursery, engine, argv, tmp_path / "resumed")
    assert resumed.codes == [0] * 3, resumed.describe()
    assert_same_result(output, unbroken(nursery, "ddp3")[0])


@pytest.mark.parametrize("name", ["one", "ddp", "zero0", "zero1", "zero2", "zero3"])
def test_a_stopped_run_in_bfloat16_goes_on_bitwise(nursery, tmp_path, name):
    engine, output = ENGINES[name], tmp_path / "run"
    argv = training(engine, output, "--save_ckpt_steps", "0", "--amp", "bf16")
    stopped = start(nursery, engine, argv, tmp_path / "stopped", "after backward", 0, 11, "SIGINT")
    assert stopped.codes == [128 + signal.SIGINT] * engine.world_size, stopped.describe()
    resumed = start(nursery, engine, argv, tmp_path / "resumed")
    assert resumed.codes == [0] * engine.world_size, resumed.describe()
    assert_same_result(output, unbroken(nursery, name, "--amp", "bf16")[0])


@pytest.mark.parametrize(("name", "other"), [("ddp", "one"), ("one", "ddp"), ("zero0", "one-zero0")])
def test_another_number_of_processes_goes_on_at_the_same_sample(nursery, tmp_path, name, other):
    output, first, then = tmp_path / "run", ENGINES[name], ENGINES[other]
    same_data = ("--limit_samples", "32", "--save_ckpt_steps", "0")
    argv = training(first, output, *same_data)
    stopped = start(nursery, first, argv, tmp_path / "stopped", "after backward", 0, 3, "SIGTERM")
    assert stopped.codes == [128 + signal.SIGTERM] * first.world_size, stopped.describe()
    resumed = start(nursery, then, training(then, output, *same_data), tmp_path / "resumed")
    assert resumed.codes == [0] * then.world_size, resumed.describe()
    samples = 2 * 2 * 2 * first.world_size  # two steps of two micro-batches of two on each process
    step = samples // (4 * then.world_size)
    assert "goes on at the same sample, not bitwise equal" in resumed.stderr[0]
    assert f"epoch 0, step {step}" in resumed.stderr[0], resumed.describe()


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_another_number_of_processes_is_refused_with_the_way_out_where_the_state_is_divided(nursery, tmp_path, name):
    output, engine = tmp_path / "run", ENGINES[name]
    argv = training(engine, output, "--save_ckpt_steps", "0")
    stopped = start(nursery, engine, argv, tmp_path / "stopped", "after backward", 0, 3, "SIGTERM")
    assert stopped.codes == [128 + signal.SIGTERM] * 2, stopped.describe()
    alone = start(nursery, ENGINES[f"one-{name}"], argv, tmp_path / "alone")
    assert alone.codes == [2], alone.describe()
    last = alone.stderr[0].splitlines()[-1]
    assert "was written by 2 processes" in last
    assert "this run has 1" in last
    assert "start with 2 processes, or start anew from its weights with another --output_dir" in last
    resumed = start(nursery, engine, argv, tmp_path / "resumed")
    assert resumed.codes == [0] * 2, resumed.describe()
    assert_same_result(output, unbroken(nursery, name)[0])
