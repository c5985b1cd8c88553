import json
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.errors import EngineError
from engine.evaluation import forward_batches, gather_by_id, sum_over_processes, to_device
from tests.helpers import run_in_processes


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
