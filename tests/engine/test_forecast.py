import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import distributed
from engine.backend import TorchBackend
from engine.forecast import StepMemory, describe_forecast
from engine.optim import build_adamw
from models.beit3.config import BEiT3Config
from models.beit3.tasks import BEiT3ForVisualQuestionAnswering
from models.losses import vqa_loss
from tests.engine.test_loop import Numbers, train
from tests.engine.zero_runs import STAGES, deepspeed_backend, groups_of
from tests.helpers import run_in_processes

CPU = torch.device("cpu")
WIDTH, BATCH = 256, 512
WEIGHTS = 2 * 4 * (WIDTH * WIDTH + WIDTH)  # bytes of two layers


def layers():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def counted_step(model, optimizer, inputs, within=None):
    memory = StepMemory(optimizer, CPU)
    with memory:
        model(inputs).square().sum().backward()
        if within is None:
            optimizer.step()
        else:
            with within:
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return memory


def test_the_first_step_tells_the_bytes_of_all_later_ones():
    model, inputs = layers(), torch.ones(BATCH, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    first, second = (counted_step(model, optimizer, inputs) for _ in range(2))
    assert first.peak_bytes == second.peak_bytes
    steps = 4 * len(list(model.parameters()))  # AdamW's step counters
    assert second.held_bytes - first.held_bytes == 0
    # the weights, their two moments; then at least the gradients, and activations of one layer
    assert first.held_bytes >= 3 * WEIGHTS + steps + inputs.nbytes
    assert first.peak_bytes >= first.held_bytes + max(WEIGHTS, 2 * inputs.nbytes)
    assert first.peak_bytes <= first.held_bytes + WEIGHTS + 6 * inputs.nbytes


def test_gradients_and_activations_grow_with_the_batch_and_the_state_does_not():
    found = []
    for batch in (BATCH, 2 * BATCH):
        model = layers()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        inputs = torch.ones(batch, WIDTH)
        memory = counted_step(model, optimizer, inputs)
        found.append((memory.peak_bytes, memory.held_bytes - inputs.nbytes))
        del model, optimizer, inputs, memory
    (peak, held), (peak_of_two, held_of_two) = found
    assert held_of_two == held
    rows = BATCH * WIDTH * 4
    # input, first layer's output (the ReLU's stays beside it) and what the backward pass makes of them
    assert 3 * rows <= peak_of_two - peak <= 7 * rows


def test_tensors_without_values_count_as_those_with_values_do():
    found = []
    for mode in (None, FakeTensorMode()):
        with mode or torch.device("cpu"):
            model, inputs = layers(), torch.ones(BATCH, WIDTH)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        before = StepMemory(optimizer, CPU)
        with before:
            pass
        memory = counted_step(model, optimizer, inputs, mode)
        found.append((memory.held_bytes - before.held_bytes, memory.peak_bytes - before.held_bytes))
        del model, inputs, optimizer, before, memory
    assert found[0] == found[1]


def test_a_dry_run_takes_two_steps_and_says_what_the_run_takes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = Numbers(steps_per_epoch=50)
    _, position, _ = train(None, loader=loader, epochs=10, save_every_steps=1, dry_run=True)
    said = capsys.readouterr().err
    assert position.global_step == 2
    assert loader.asked == [(0, 0)]
    assert "dry run: two steps taken, nothing written" in said
    assert "per epoch of 50 steps" in said
    assert "MiB of tensors: weights and optimizer" in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_ends_where_the_run_would(capsys):
    _, position, _ = train(None, loader=Numbers(steps_per_epoch=1), epochs=1, dry_run=True)
    assert position.global_step == 1
    assert "dry run: one step taken" in capsys.readouterr().err
    _, position, loader = train(None, loader=Numbers(steps_per_epoch=1), epochs=5, dry_run=True)
    assert position.global_step == 2
    assert loader.asked == [(0, 0), (1, 0)]


def test_a_first_step_that_is_skipped_predicts_no_memory():
    model, inputs = layers(), torch.ones(BATCH, WIDTH)
    memory = StepMemory(torch.optim.AdamW(model.parameters()), CPU)
    with memory:
        model(inputs).sum().backward()
    assert not memory.is_whole
    said = describe_forecast(seconds_per_step=1.0, steps_per_epoch=60, total_steps=600, memory=memory, device=CPU)
    assert said.startswith("predicted: 1 s a step; 0:01:00 per epoch of 60 steps, 0:10:00 per run; no memory, since")
    assert "of tensors" not in said


# ---- backends: what the first step foretells beside what the second one takes ----


def _model():
    config = BEiT3Config(
        image_size=32, patch_size=8, embed_dim=128, num_layers=3, num_heads=4, vocab_size=500, max_text_positions=16
    )
    return BEiT3ForVisualQuestionAnswering(config, 5)


def _predict_and_count(rank: int, folder: str) -> None:
    batch = {
        "image": torch.ones(2, 3, 32, 32),
        "question": torch.full((2, 6), 7),
        "targets": torch.ones(2, 5),
    }
    found = {}
    for name in ("ddp", *STAGES):
        model = _model()
        if name == "ddp":
            optimizer = build_adamw(groups_of(model), lr=1e-2)
            backend = TorchBackend(model, optimizer, device=CPU, accumulation_steps=2, clip_grad=1.0)
        else:
            backend = deepspeed_backend(name, model=model)
        memories = []
        for _ in range(2):
            memories.append(StepMemory(backend.optimizer, CPU))
            with memories[-1]:
                for _ in range(2):
                    with backend.autocast():
                        loss = vqa_loss(backend.model(batch["image"], batch["question"]), batch["targets"])
                    backend.backward(loss)
                    backend.step(1e-3)
        found[name] = [memory.peak_bytes for memory in memories]
        del backend, model, memories
    found = distributed.gather_objects(found)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def predicted_and_counted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    run_in_processes(_predict_and_count, 2, str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", ["ddp", *map(str, STAGES)])
def test_the_first_step_foretells_the_second_ones_peak_in_every_backend(predicted_and_counted, name):
    for of_rank in predicted_and_counted:
        predicted, counted = of_rank[name]
        assert predicted == pytest.approx(counted, rel=0.15)
