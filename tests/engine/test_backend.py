import copy
import math

import pytest
import torch
from torch import nn

from engine import distributed
from engine.backend import TorchBackend, WeightsFormat, resolve_precision
from engine.ema import ModelEMA
from engine.errors import EngineError
from engine.optim import build_adamw, parameter_groups
from models.beit3.config import BEiT3Config, StartValues
from models.beit3.tasks import BEiT3ForVisualQuestionAnswering
from models.losses import vqa_loss
from tests.helpers import run_in_processes

CPU = torch.device("cpu")


def tiny_beit3():
    torch.manual_seed(0)
    config = BEiT3Config(
        image_size=16, patch_size=8, embed_dim=16, num_layers=2, num_heads=2, mlp_ratio=2, vocab_size=30,
        max_text_positions=16, start=StartValues(image_positions=0.3, text_positions=0.3),
    )  # fmt: skip
    return BEiT3ForVisualQuestionAnswering(config, 5)


def batches(count, size):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randn(size, 3, 16, 16, generator=generator),
            "question": torch.randint(3, 30, (size, 6), generator=generator),
            "targets": torch.rand(size, 5, generator=generator),
        }
        for _ in range(count)
    ]


def backend_for(model, **options):
    groups = parameter_groups(
        [(name, p) for name, p in model.named_parameters() if "mask_token" not in name], weight_decay=0.05
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mask_token" not in name)
    return TorchBackend(model, build_adamw(groups, lr=1e-2), device=CPU, **options)


def train(backend, micro_batches):
    infos = []
    for batch in micro_batches:
        with backend.autocast():
            loss = vqa_loss(backend.model(batch["image"], batch["question"]), batch["targets"])
        backend.backward(loss)
        info = backend.step(1e-3)
        if info is not None:
            infos.append(info)
    return infos


def split(batch, start, stop):
    return {key: value[start:stop] for key, value in batch.items()}


def difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_accumulated_micro_batches_are_one_big_batch():
    big = batches(4, 4)
    whole = backend_for(tiny_beit3(), clip_grad=1.0)
    train(whole, big)
    parts = backend_for(tiny_beit3(), clip_grad=1.0, accumulation_steps=2)
    infos = train(parts, [split(batch, start, start + 2) for batch in big for start in (0, 2)])
    assert len(infos) == 4
    # Adam divides by the gradient's size, so rounding of tiny gradients shows up to a few per mille of lr = 1e-3
    assert difference(whole.model.state_dict(), parts.model.state_dict()) < 2e-5  # measured 2e-6


def _two_processes(rank, expected_file, accumulation):
    backend = backend_for(tiny_beit3(), accumulation_steps=accumulation)
    size = 4 // accumulation
    micro_batches = []
    for batch in batches(4, 8):  # the order of the training sampler: step, micro-batch, rank
        for micro in range(accumulation):
            start = (micro * 2 + rank) * size
            micro_batches.append(split(batch, start, start + size))
    train(backend, micro_batches)
    state = backend.unwrapped().state_dict()
    expected = torch.load(expected_file, weights_only=True)
    assert difference(state, expected) < 2e-5  # measured 4e-6
    everywhere = distributed.gather_objects({name: value.clone() for name, value in state.items()})
    assert all(torch.equal(everywhere[0][name], everywhere[1][name]) for name in state)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_give_the_parameters_of_one(tmp_path, accumulation):
    alone = backend_for(tiny_beit3())
    train(alone, batches(4, 8))
    torch.save(alone.model.state_dict(), tmp_path / "alone.pth")
    run_in_processes(_two_processes, 2, str(tmp_path / "alone.pth"), accumulation)


def test_a_non_finite_loss_leaves_weights_and_moments_alone():
    backend = backend_for(tiny_beit3())
    first, second = batches(2, 4)
    train(backend, [first])
    weights = copy.deepcopy(backend.model.state_dict())
    moments = copy.deepcopy(backend.optimizer.state_dict()["state"])
    broken = {**second, "image": second["image"] * float("nan")}
    (info,) = train(backend, [broken])
    assert bool(info.skipped)
    assert bool(info.failed)
    assert difference(weights, backend.model.state_dict()) == 0
    for index, state in backend.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[index][key]) for key, value in state.items())
    (info,) = train(backend, [second])
    assert not bool(info.skipped)
    assert difference(weights, backend.model.state_dict()) > 0


def _nan_on_one_rank(rank):
    backend = backend_for(tiny_beit3())
    batch = batches(1, 4)[0]
    train(backend, [batch])
    weights = copy.deepcopy(backend.unwrapped().state_dict())
    (info,) = train(backend, [{**batch, "image": batch["image"] * float("inf")} if rank == 1 else batch])
    assert bool(info.failed)
    assert difference(weights, backend.unwrapped().state_dict()) == 0


def test_a_non_finite_loss_on_one_rank_is_skipped_on_all():
    run_in_processes(_nan_on_one_rank, 2)


def test_an_infinite_loss_with_finite_gradients_is_skipped_too():
    model = nn.Linear(2, 1)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0)
    backend = TorchBackend(model, build_adamw(groups, lr=0.1), device=CPU)
    before = model.weight.detach().clone()
    backend.backward(model(torch.ones(1, 2)).sum() + float("inf"))
    info = backend.step(0.1)
    assert bool(info.failed)
    assert torch.equal(before, model.weight)


def test_each_group_gets_the_base_rate_times_its_scale():
    model = nn.Linear(2, 1)
    groups = [
        {"name": "a", "params": [model.weight], "weight_decay": 0.0, "lr_scale": 0.5},
        {"name": "b", "params": [model.bias], "weight_decay": 0.0, "lr_scale": 20.0},
    ]
    backend = TorchBackend(model, build_adamw(groups, lr=1.0), device=CPU)
    backend.backward(model(torch.ones(1, 2)).sum())
    backend.step(0.1)
    assert [group["lr"] for group in backend.optimizer.param_groups] == pytest.approx([0.05, 2.0])


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_reported():
    model = nn.Linear(3, 1, bias=False)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0)
    backend = TorchBackend(model, torch.optim.SGD(groups, lr=1.0), device=CPU, clip_grad=0.5)
    before = model.weight.detach().clone()
    backend.backward(model(torch.full((1, 3), 2.0)).sum())
    info = backend.step(1.0)
    assert info.grad_norm.item() == pytest.approx(2 * 3**0.5)
    assert (before - model.weight).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_bf16_autocast_trains_and_keeps_float32_weights():
    backend = backend_for(tiny_beit3(), autocast_dtype=resolve_precision("bf16", CPU))
    (info,) = train(backend, batches(1, 4))
    assert not bool(info.skipped)
    assert all(value.dtype == torch.float32 for value in backend.model.state_dict().values())


def test_fp16_on_the_cpu_is_refused_with_the_way_out():
    with pytest.raises(EngineError, match="on the CPU take bfloat16 or float32"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_takes_bfloat16_only_where_the_device_has_it_and_need_not_emulate_it(monkeypatch, native, expected):
    def is_supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert resolve_precision("auto", torch.device("cuda")) is expected
    assert resolve_precision("auto", CPU) is None


def test_the_loss_scale_is_reported_without_reading_it(monkeypatch):
    model = nn.Linear(2, 1)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0)
    backend = TorchBackend(
        model, build_adamw(groups, lr=0.1), device=CPU, autocast_dtype=torch.float16, initial_loss_scale=4.0
    )
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda _: pytest.fail("waited for the device"))
    backend.backward(model(torch.ones(1, 2)).sum() * math.inf)
    first = backend.step(0.1)
    backend.backward(model(torch.ones(1, 2)).sum())
    second = backend.step(0.1)
    assert (first.loss_scale.item(), second.loss_scale.item()) == (4.0, 2.0)
    assert (bool(first.skipped), bool(second.skipped)) == (True, False)


@pytest.mark.parametrize(("scale", "failed"), [(1.0, False), (0.5, True)])
def test_an_overflow_is_a_failure_only_when_the_scale_has_nowhere_left_to_go(scale, failed):
    model = nn.Linear(2, 1)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.0)
    backend = TorchBackend(
        model, build_adamw(groups, lr=0.1), device=CPU, autocast_dtype=torch.float16, initial_loss_scale=scale
    )
    output = model(torch.ones(1, 2)).sum()
    output.register_hook(lambda gradient: gradient * math.inf)  # the loss itself is finite
    backend.backward(output)
    info = backend.step(0.1)
    assert bool(info.skipped)
    assert bool(info.failed) == failed


@pytest.mark.gpu
def test_a_moving_average_on_the_cpu_waits_for_the_weights_of_the_device():
    model = nn.Linear(4096, 4096, bias=False, device="cuda")
    ema = ModelEMA(model, 0.0, device="cpu")
    for _ in range(5):
        with torch.no_grad():
            model.weight += 1.0
        ema.update(model)
        assert torch.equal(ema.state_dict()["weight"], model.weight.detach().cpu())


def test_copies_to_a_moving_average_on_the_cpu_are_waited_for(monkeypatch):
    model = nn.Linear(2, 1)
    ema = ModelEMA(model, 0.9, device="cpu")
    waits = []
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, _, non_blocking=False: waits.append(not non_blocking) or self.clone()
    )
    ema.update(model)
    assert waits == [True, True]


def test_the_moving_average_follows_the_weights_by_its_decay():
    model = nn.Linear(2, 1)
    ema = ModelEMA(model, 0.9)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.weight += 1.0
    ema.update(model)
    torch.testing.assert_close(ema.state_dict()["weight"], start["weight"] + 0.1)
    assert torch.equal(ema.state_dict()["bias"], start["bias"])


# ---- parts of the parameters with a rate and a clipping of their own ----


def two_parts(**options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"main": nn.Linear(3, 2), "own": nn.Linear(3, 2)})
    groups = [
        {"name": name, "part": part, "params": list(model[name].parameters()), "weight_decay": 0.0, "lr_scale": 1.0}
        for name, part in (("main", ""), ("own", "policy"))
    ]
    backend = TorchBackend(model, torch.optim.SGD(groups, lr=1.0), device=CPU, **options)
    loss = 5 * model["main"](torch.ones(1, 3)).sum() + 7 * model["own"](torch.ones(1, 3)).sum()
    backend.backward(loss)
    return model, backend


def test_each_part_has_its_base_rate_and_is_clipped_by_its_own_norm():
    model, backend = two_parts(clip_grad=1.0, clip_parts={"policy": 3.0})
    before = copy.deepcopy(model)
    info = backend.step(0.5, {"policy": 0.25})
    pairs = {name: zip(model[name].parameters(), before[name].parameters(), strict=True) for name in model}
    moved = {name: torch.cat([(a - b).flatten() for a, b in pair]).norm().item() for name, pair in pairs.items()}
    assert moved["main"] == pytest.approx(0.5 * 1.0, rel=1e-4)
    assert moved["own"] == pytest.approx(0.25 * 3.0, rel=1e-4)
    assert info.grad_norm.item() == pytest.approx(math.sqrt(8 * 25 + 8 * 49), rel=1e-5)  # of both, before the clipping


def test_a_part_without_settings_of_its_own_follows_the_others():
    model, backend = two_parts(clip_grad=1.0)
    before = copy.deepcopy(model)
    backend.step(0.5)
    difference = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert difference.norm().item() == pytest.approx(0.5, rel=1e-4)


def _rehearse(rank, world_size):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 1)
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.seen += len(x)
            return self.inner(x).sum()

    torch.manual_seed(0)
    model = Counting()
    groups = [{"name": "all", "params": list(model.parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
    backend = TorchBackend(model, torch.optim.SGD(groups, lr=1.0), device=CPU)
    backend.rehearse(lambda: backend.model(torch.ones(4, 2)))
    assert int(model.seen) == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_rehearsal_leaves_no_trace_in_buffers():
    run_in_processes(_rehearse, 3, 3)


# ---- checkpoints without the frozen weights ----


def half_frozen(save_frozen=False):
    torch.manual_seed(0)
    model = nn.ModuleDict({"frozen": nn.Linear(3, 3).requires_grad_(False), "trained": nn.Linear(3, 2)})
    groups = [{"name": "all", "params": list(model["trained"].parameters()), "weight_decay": 0.0, "lr_scale": 1.0}]
    backend = TorchBackend(
        model, torch.optim.AdamW(groups, lr=0.1), device=CPU, weights=WeightsFormat(with_frozen=save_frozen)
    )
    backend.backward(model["trained"](model["frozen"](torch.ones(1, 3))).sum())
    backend.step(0.1)
    return model, backend


def test_a_checkpoint_without_the_frozen_weights_holds_the_trained_ones_and_goes_on_from_them(tmp_path):
    model, backend = half_frozen()
    backend.save(tmp_path, {"position": 3})
    saved = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert set(saved) == {"trained.weight", "trained.bias"}
    other, resumed = half_frozen()
    with torch.no_grad():
        for parameter in other["trained"].parameters():
            parameter.zero_()
    assert resumed.load(tmp_path) == {"position": 3}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_of_another_choice_of_trained_weights_is_refused(tmp_path):
    _, whole = half_frozen(save_frozen=True)
    whole.save(tmp_path, {})
    _, backend = half_frozen()
    with pytest.raises(EngineError, match="frozen.bias is trained in one of the two only"):
        backend.load(tmp_path)
