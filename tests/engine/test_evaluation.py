import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from data.samplers import EvalBatchSampler
from engine.errors import EngineError
from engine.evaluation import forward_batches, gather_by_id, sum_over_processes, to_device
from tests.helpers import run_in_processes

CPU = torch.device("cpu")
SIZES = (1, 2, 3, 5, 7, 100)
BATCH_SIZE = 2


def test_tensors_move_and_other_entries_stay():
    batch = to_device({"x": torch.ones(2), "ids": [1, 2]}, torch.device("meta"))
    assert batch["x"].device.type == "meta"
    assert batch["ids"] == [1, 2]


def test_the_model_is_in_evaluation_mode_without_gradients_and_gets_its_mode_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    modes = []

    def forward(model, batch):
        modes.append(model.training)
        return model(batch["x"])

    batches = [{"x": torch.ones(1, 2)} for _ in range(2)]
    outputs = [out for _, out in forward_batches(model, batches, forward, device=torch.device("cpu"))]
    assert modes == [False, False]
    assert torch.equal(outputs[0], outputs[1])
    assert not outputs[0].requires_grad
    assert model.training
    assert next(model.parameters()).grad is None


def test_the_mode_comes_back_even_if_the_consumer_stops_early():
    model = nn.Linear(2, 2).train()
    stream = forward_batches(model, [{"x": torch.ones(1, 2)}] * 3, lambda m, b: m(b["x"]), device=torch.device("cpu"))
    next(stream)
    stream.close()
    assert model.training


def test_alone_results_come_back_sorted_and_counted():
    assert list(gather_by_id({5: "a", 2: "b"}, expected=2)) == [2, 5]
    with pytest.raises(EngineError, match="2 ids were evaluated instead of 3"):
        gather_by_id({5: "a", 2: "b"}, expected=3)


def _gather(rank: int, folder: str) -> None:
    for size in (1, 2, 3, 5, 7):
        mine = {10 * index: [rank, index] for index in range(rank, size, 3)}
        merged = gather_by_id(mine, expected=size)
        sums = sum_over_processes({"score": 0.1 * len(mine), "count": float(len(mine))})
        Path(folder, f"{size}-{rank}.json").write_text(json.dumps([list(merged.items()), sums]))
    with pytest.raises(EngineError, match="1 ids were evaluated twice, such as 4: ids must be unique"):
        gather_by_id({4: "the same on all"})


def test_three_processes_merge_uneven_shares_alike_and_refuse_repeats(tmp_path):
    run_in_processes(_gather, 3, str(tmp_path))
    for size in (1, 2, 3, 5, 7):
        results = [json.loads((tmp_path / f"{size}-{rank}.json").read_text()) for rank in range(3)]
        assert results[0] == results[1] == results[2]
        merged, sums = results[0]
        assert merged == [[10 * index, [index % 3, index]] for index in range(size)]
        assert sums["count"] == size
        assert sums["score"] == pytest.approx(0.1 * size, rel=1e-12)


# ---- lock-step ----


class Spread(nn.Module):
    """A forward pass with a collective in it, as of weights spread over the processes; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3) → (B,), each row by itself; the collective checks that all processes are in the same call."""
        self.calls += 1
        if dist.is_initialized():
            calls = torch.tensor([self.calls, -self.calls])
            dist.all_reduce(calls, op=dist.ReduceOp.MAX)
            assert calls.tolist() == [self.calls, -self.calls]
        return (x * 0.1).sin().sum(dim=1)


def samples(indices):
    return {"id": [10 * i for i in indices], "x": torch.tensor([[i, i + 0.5, i * i] for i in indices]).double()}


def share(size, rank, world_size):
    sampler = EvalBatchSampler(size, BATCH_SIZE, rank=rank, world_size=world_size)
    return [samples([key.index for key in keys]) for keys in sampler]


def evaluated(batches, **options):
    """Id → value of this process's batches, and the number of forward passes."""
    model, local = Spread(), {}
    for batch, values in forward_batches(model, batches, lambda m, b: m(b["x"]), device=CPU, **options):
        local.update(zip(batch["id"], values.tolist(), strict=True))
    return local, model.calls


def _in_lock_step(rank: int, folder: str) -> None:
    world_size = dist.get_world_size()
    report = {}
    for size in SIZES:
        checks = []
        batches = share(size, rank, world_size)
        local, calls = evaluated(batches, check=lambda checks=checks: checks.append(1))
        assert sorted(local) == sorted(index for batch in batches for index in batch["id"])  # nothing discarded
        report[size] = [list(gather_by_id(local, expected=size).items()), calls, len(checks)]
    Path(folder, f"{rank}.json").write_text(json.dumps(report))


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_call_the_model_equally_often_and_find_what_one_process_finds(tmp_path, world_size):
    run_in_processes(_in_lock_step, world_size, str(tmp_path))
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(report == reports[0] for report in reports)
    for size in SIZES:
        found, calls, checks = reports[0][str(size)]
        alone, _ = evaluated(share(size, 0, 1))
        assert dict(found) == alone  # every id once, every value to the last bit
        assert len(alone) == size
        assert calls == checks == len(share(size, 0, world_size))


def _uneven(rank: int) -> None:
    _without_batches(rank)
    _checked(rank)


def _without_batches(rank: int) -> None:
    stream = iter([samples([1]), samples([2])])
    # as after a stop: only the last process has something left to do, and its batches come from a stream
    local, calls = evaluated(stream if rank == 2 else [], total=2 if rank == 2 else 0)
    assert sorted(local) == ([10, 20] if rank == 2 else [])
    assert calls == 2
    local, calls = evaluated([])  # nothing left on any process
    assert (local, calls) == ({}, 0)


def _checked(rank: int) -> None:
    calls = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("stop")

    model = Spread()
    stream = forward_batches(model, share(2 + rank * 4, 0, 1), lambda m, b: m(b["x"]), device=CPU, check=check)
    with pytest.raises(KeyError, match="stop"):
        list(stream)
    assert model.calls == 2
    assert model.training


def test_a_process_without_batches_takes_part_with_another_s_and_a_check_ends_all_before_the_same_batch():
    run_in_processes(_uneven, 3)


def test_alone_the_check_is_called_before_each_batch_and_no_batch_is_repeated():
    checks = []
    local, calls = evaluated(iter(share(5, 0, 1)), check=lambda: checks.append(1))
    assert (len(local), calls, len(checks)) == (5, 3, 3)
