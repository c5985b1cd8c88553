"""Signals, lost and hung processes, bugs, killed loader processes, full disks: real runs in their own processes."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import ENGINES, assert_same_result, assert_sound, open_nursery, read_file, start, training, unbroken
from tests.nursery import Nursery
from tests.scripts.vqa_run import differences


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = open_nursery()
    yield nursery
    nursery.close()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
@pytest.mark.parametrize("engine", ["one", "ddp"])
def test_a_signal_to_any_process_saves_at_the_next_step_and_the_run_goes_on_bitwise(nursery, tmp_path, engine, name):
    output, kind = tmp_path / "run", ENGINES[engine]
    argv = training(kind, output, "--save_ckpt_steps", "0")
    stopped = start(nursery, kind, argv, tmp_path / "stopped", "after backward", kind.world_size - 1, 11, name)
    assert stopped.codes == [128 + signal.Signals[name]] * kind.world_size, stopped.describe()
    last = stopped.stderr[0].splitlines()[-1]
    assert f"stopped by {name}: after step 6; saved" in last, stopped.describe()
    assert "checkpoint-step6, the same command goes on from it" in last, stopped.describe()
    resumed = start(nursery, kind, argv, tmp_path / "resumed")
    assert resumed.codes == [0] * kind.world_size, resumed.describe()
    assert_same_result(output, unbroken(nursery, engine)[0])


@pytest.mark.parametrize("engine", ["one", "ddp"])
def test_a_signal_during_validation_saves_the_epoch_and_validates_it_again(nursery, tmp_path, engine):
    output, kind = tmp_path / "run", ENGINES[engine]
    argv = training(kind, output, "--save_ckpt_freq", "2")  # the first epoch's end is not saved otherwise
    stopped = start(nursery, kind, argv, tmp_path / "stopped", "during evaluation", 0, 1, "SIGTERM")
    assert stopped.codes == [128 + signal.SIGTERM] * kind.world_size, stopped.describe()
    assert "after step 4; saved" in stopped.stderr[0].splitlines()[-1], stopped.describe()
    resumed = start(nursery, kind, argv, tmp_path / "resumed")
    assert resumed.codes == [0] * kind.world_size, resumed.describe()
    assert_same_result(output, unbroken(nursery, engine)[0])


def test_a_finished_run_given_again_neither_trains_nor_validates(nursery, tmp_path):
    output = tmp_path / "run"
    argv = training(ENGINES["one"], output)
    assert start(nursery, ENGINES["one"], argv, tmp_path / "first").codes == [0]
    # a validation would be killed
    again = start(nursery, ENGINES["one"], argv, tmp_path / "again", "during evaluation")
    assert again.codes == [0], again.describe()
    assert_same_result(output, unbroken(nursery, "one")[0])


def test_a_hung_process_ends_the_job_after_dist_timeout(nursery, tmp_path):
    argv = training(ENGINES["ddp"], tmp_path / "run", "--dist_timeout", "4")
    ended = start(nursery, ENGINES["ddp"], argv, tmp_path / "stderr", "after backward", 1, 11, "hang", grace_s=1.0)
    assert ended.codes[0] == 1, ended.describe()
    assert ended.hung == [1]  # it is stopped for good: a launcher kills it once another process has failed
    assert "hung for longer than --dist_timeout" in ended.stderr[0].splitlines()[-1], ended.describe()
    assert "Traceback" not in ended.stderr[0]
    assert_sound(tmp_path / "run")


def test_a_bug_on_one_process_shows_its_traceback_there_and_its_message_on_the_others(nursery, tmp_path):
    argv = training(ENGINES["ddp"], tmp_path / "run")
    ended = start(nursery, ENGINES["ddp"], argv, tmp_path / "stderr", "after backward", 1, 11, "bug")
    assert ended.codes == [1, 1], ended.describe()
    assert "Traceback" in ended.stderr[1]
    assert "rank 1: KeyError: 'a bug on one process'" in ended.stderr[1].splitlines()[-1], ended.describe()
    assert "Traceback" not in ended.stderr[0]
    last = ended.stderr[0].splitlines()[-1]
    assert "ended because another process did: rank 1: KeyError: 'a bug on one process'" in last, ended.describe()


EVERY_ENGINE = ["one", "ddp", "zero0", "zero1", "zero2", "zero3"]
SPOILT = 5  # the first micro-batch of the third step, which is not the last of its epoch


def steps(count: int, amp: str) -> tuple[str, ...]:
    return ("--max_steps", str(count), "--save_ckpt_steps", "0", "--amp", amp)


def trained_state(output: Path, step: int) -> dict[str, Any]:
    """Weights and the state of the optimizer, by file, without what counts steps."""
    folder = output / f"checkpoint-step{step}"
    state = {path.name: read_file(path) for path in folder.glob("*.p*t*") if path.name.startswith(("model.", "train"))}
    for path in folder.glob("*zero_pp_rank_*_optim_states.pt"):
        state[path.name] = read_file(path)["optimizer_state_dict"]
    for path in folder.glob("mp_rank_00_model_states.pt"):  # stage 0 keeps the optimizer's state beside the weights
        state[path.name] = read_file(path)["optimizer"]
    state.get("training_state.pth", {}).pop("extra", None)
    return without_rates(state)


def without_rates(value: Any) -> Any:
    """Without what the schedule and a skipped step may change: rates, and the loss scaler's counters."""
    if isinstance(value, dict):
        changing = ("lr", "loss_scaler", "overflow", "dynamic_loss_scale", "cur_iter")
        return {key: without_rates(entry) for key, entry in value.items() if key not in changing}
    if isinstance(value, list | tuple):
        return [without_rates(entry) for entry in value]
    return value


@pytest.mark.parametrize("what", ["NaN loss", "infinite gradient"])
@pytest.mark.parametrize("amp", ["no", "bf16"])
@pytest.mark.parametrize("name", EVERY_ENGINE)
def test_a_step_that_is_not_finite_on_one_process_changes_nothing_on_any(nursery, tmp_path, name, amp, what):
    engine = ENGINES[name]
    before, _ = unbroken(nursery, name, *steps(2, amp))
    argv = training(engine, tmp_path / "run", *steps(3, amp))
    ended = start(nursery, engine, argv, tmp_path / "stderr", what, engine.world_size - 1, SPOILT)
    assert ended.codes == [0] * engine.world_size, ended.describe()
    warnings = [line for line in ended.stderr[0].splitlines() if line.startswith("warning: step 2")]
    assert len(warnings) == 1, ended.describe()
    assert "the weights were left as they were; samples [" in warnings[0]
    expected, found = trained_state(before, 2), trained_state(tmp_path / "run", 3)
    assert {"model.pth"} < set(found)
    assert not differences(found, expected)
    assert all(torch.isfinite(value).all() for value in found["model.pth"]["model"].values())


@pytest.mark.parametrize("name", ["one", "zero0"])
def test_a_loss_that_jumps_but_is_finite_is_trained_on(nursery, tmp_path, name):
    engine = ENGINES[name]
    before, _ = unbroken(nursery, name, *steps(2, "no"))
    argv = training(engine, tmp_path / "run", *steps(3, "no"))
    ended = start(nursery, engine, argv, tmp_path / "stderr", "loss spike", 0, SPOILT)
    assert ended.codes == [0] * engine.world_size, ended.describe()
    assert "warning" not in ended.stderr[0], ended.describe()
    assert differences(trained_state(tmp_path / "run", 3), trained_state(before, 2))


def test_a_killed_loader_process_is_one_line(nursery, tmp_path):
    argv = training(ENGINES["one"], tmp_path / "run", "--num_workers", "2")
    ended = start(nursery, ENGINES["one"], argv, tmp_path / "stderr", "after backward", 0, 11, "killed loader process")
    assert ended.codes == [1], ended.describe()
    assert "Traceback" not in ended.stderr[0], ended.describe()
    assert "a loader process" in ended.stderr[0].splitlines()[-1], ended.describe()
    assert "lower --num_workers" in ended.stderr[0].splitlines()[-1]


def test_no_memory_in_a_step_is_one_line_with_advice(nursery, tmp_path):
    argv = training(ENGINES["one"], tmp_path / "run")
    ended = start(nursery, ENGINES["one"], argv, tmp_path / "stderr", "mid forward", 0, 11, "out of memory")
    assert ended.codes == [1], ended.describe()
    assert "Traceback" not in ended.stderr[0], ended.describe()
    last = ended.stderr[0].splitlines()[-1]
    assert "out of memory" in last
    assert "take smaller batches" in last


@pytest.mark.parametrize("engine", ["one", "ddp"])
def test_a_disk_that_fills_up_leaves_the_older_checkpoint_and_the_run_goes_on_from_it(nursery, tmp_path, engine):
    output, kind = tmp_path / "run", ENGINES[engine]
    argv = training(kind, output)
    ended = start(nursery, kind, argv, tmp_path / "stderr", "after optimizer step", 0, 5, "full disk")
    assert ended.codes == [1] * kind.world_size, ended.describe()
    assert "Traceback" not in "".join(ended.stderr), ended.describe()
    last = ended.stderr[0].splitlines()[-1]
    assert "could not write" in last
    assert "older checkpoints are untouched" in last
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == ["checkpoint-0", "checkpoint-best"]
    assert_sound(output)
    resumed = start(nursery, kind, argv, tmp_path / "resumed")
    assert resumed.codes == [0] * kind.world_size, resumed.describe()
    assert_same_result(output, unbroken(nursery, engine)[0])
