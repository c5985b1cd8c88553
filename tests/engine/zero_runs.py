"""Runs under DeepSpeed in two processes, made once for many tests: DeepSpeed takes seconds to import."""

import copy
import errno
import importlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import distributed
from engine.backend import StepInfo, TorchBackend
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.deepspeed_config import resolve_config
from engine.ema import ModelEMA
from engine.errors import EngineError, RunError
from engine.optim import build_adamw, parameter_groups
from models.beit3.config import BEiT3Config, StartValues
from models.beit3.tasks import BEiT3ForVisualQuestionAnswering
from models.losses import vqa_loss
from models.recompute import NOTHING, Recompute, set_recompute

CPU = torch.device("cpu")
DTYPES = {"float32": None, "bf16": torch.bfloat16}
STAGES = (0, 1, 2, 3)
RUNS = [(stage, name) for name in DTYPES for stage in STAGES]
# with 0 every weight is partitioned, however small; by default small ones stay whole in stage 3
USER_CONFIG = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
USER_CONFIGS = {"float32": USER_CONFIG, "bf16": {}}


def tiny_beit3(*, drop_path: float = 0.0, recompute: Recompute = NOTHING) -> BEiT3ForVisualQuestionAnswering:
    """Two layers with the same random weights at every call."""
    torch.manual_seed(0)
    config = BEiT3Config(
        image_size=16, patch_size=8, embed_dim=16, num_layers=2, num_heads=2, mlp_ratio=2, vocab_size=30,
        max_text_positions=16, drop_path=drop_path, start=StartValues(image_positions=0.3, text_positions=0.3),
    )  # fmt: skip
    model = BEiT3ForVisualQuestionAnswering(config, 5)
    set_recompute(model, recompute)
    return model


def groups_of(model: torch.nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Its parameter groups, without the token that fine-tuning never reads."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mask_token" not in name)
    return parameter_groups(model.named_parameters(), weight_decay=weight_decay)


def micro_batches(steps: int, rank: int, accumulation: int = 2, world_size: int = 2) -> list[dict[str, Tensor]]:
    """Two samples each, of one process, in the order of the training sampler."""
    generator = torch.Generator().manual_seed(1)
    mine = []
    for _ in range(steps):
        size = 2 * accumulation * world_size
        batch = {
            "image": torch.randn(size, 3, 16, 16, generator=generator),
            "question": torch.randint(3, 30, (size, 6), generator=generator),
            "targets": torch.rand(size, 5, generator=generator),
        }
        for micro in range(accumulation):
            start = 2 * (micro * world_size + rank)
            mine.append({key: value[start : start + 2] for key, value in batch.items()})
    return mine


def deepspeed_backend(
    stage: int,
    dtype_name: str = "float32",
    *,
    model: torch.nn.Module | None = None,
    ema: bool = False,
    weight_decay: float = 0.05,
    user: dict[str, Any] | None = None,
    clip_grad: float | None = 1.0,
    timeout_s: float = 100.0,
) -> Any:
    """A backend over a tiny model, two micro-batches a step."""
    from engine.deepspeed_backend import DeepSpeedBackend

    dtype = DTYPES[dtype_name]
    model = tiny_beit3() if model is None else model
    config, _ = resolve_config(
        user or USER_CONFIGS[dtype_name],
        zero_stage=stage,
        batch_size=2,
        accumulation_steps=2,
        world_size=distributed.world_size(),
        dtype=dtype,
        clip_grad=clip_grad,
        initial_scale_power=16,
    )
    return DeepSpeedBackend(
        model,
        build_adamw(groups_of(model, weight_decay), lr=1e-2),
        device=CPU,
        config=config,
        dtype=dtype,
        timeout_s=timeout_s,
        ema=ModelEMA(model, 0.9) if ema else None,
    )


def train(backend: Any, batches: list[dict[str, Tensor]], lr: float = 1e-3) -> list[StepInfo]:
    """Take the steps of some micro-batches."""
    infos = []
    for batch in batches:
        with backend.autocast():
            loss = vqa_loss(backend.model(batch["image"], batch["question"]), batch["targets"])
        backend.backward(loss)
        info = backend.step(lr)
        if info is not None:
            infos.append(info)
    return infos


def predict(backend: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits as the evaluation computes them, between training steps."""
    model = backend.unwrapped().eval()
    with torch.inference_mode(), backend.autocast():
        logits = model(batch["image"], batch["question"])
    model.train()
    return logits.float().clone()


def weights(backend: Any) -> dict[str, Tensor]:
    """Whole weights of any backend."""
    if isinstance(backend, TorchBackend):
        entries = backend.unwrapped().state_dict().items()
    else:
        entries = backend._whole_weights()
    return {name: value.float().clone() for name, value in entries}


def moments(backend: Any) -> list[dict[str, Tensor]]:
    """This process's share of the optimizer's state."""
    return copy.deepcopy(list(backend.optimizer.state.values()))


def same(one: Any, other: Any) -> bool:
    """Whether nested tensors are equal bit by bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of weights."""
    return max((one[name] - other[name]).abs().max().item() for name in one)


# ---- the launches; each function runs in every process and rank 0 writes what it found ----


def compare_and_poison(rank: int, folder: str) -> None:
    """Twenty steps of DDP and of every stage and precision; then a NaN on one rank in each place of a window."""
    batches = micro_batches(20, rank)
    ddp_model = tiny_beit3()
    ddp = TorchBackend(
        ddp_model, build_adamw(groups_of(ddp_model), lr=1e-2), device=CPU, accumulation_steps=2, clip_grad=1.0
    )
    ddp_infos = train(ddp, batches)
    found: dict[str, Any] = {"moved": largest(weights(ddp), dict(tiny_beit3().state_dict()))}
    for stage, name in RUNS:
        backend = deepspeed_backend(stage, name)
        infos = train(backend, batches)
        norms = [(float(a.grad_norm), float(b.grad_norm)) for a, b in zip(infos, ddp_infos, strict=True)]
        run = {
            "error": largest(weights(backend), weights(ddp)),
            "norm_error": max(abs(a - b) / b for a, b in norms),
            "skipped": any(bool(info.skipped) for info in infos),
            "rates": [group["lr"] / group["lr_scale"] for group in backend.optimizer.param_groups],
            "dtypes": {value.dtype for _, value in backend._whole_weights()},
            "prediction": predict(backend, batches[0]),
        }
        run["poisoned"] = [_poison(backend, batches, rank, place, kind) for place, kind in enumerate(("nan", "inf"))]
        run["nonfinite"] = _spoil_weights(backend, rank)
        train(backend, batches[:2], lr=1e39)
        run["blown_up"] = backend.nonfinite_weight()
        run = distributed.gather_objects(run)
        found[f"{stage}-{name}"] = run
    if rank == 0:
        torch.save(found, Path(folder) / "found.pth")


def _spoil_weights(backend: Any, rank: int) -> dict[str, str | None]:
    """What is found with sound weights, with one number of a weight spoilt on one rank, with spoilt padding."""
    answers = {"sound": backend.nonfinite_weight()}
    parameters = dict(backend.unwrapped().named_parameters())
    for name in ("beit3.encoder.layers.1.ffn.B.fc2.bias", "head.3.weight"):
        parameter = parameters[name]
        held = parameter if parameter.numel() else parameter.ds_tensor  # the first: whole between steps
        number = held.data.view(-1)[0].clone()
        if rank == 1:
            held.data.view(-1)[0] = math.inf
        answers[name] = backend.nonfinite_weight()
        held.data.view(-1)[0] = number
    for parameter in parameters.values():  # what is beyond the end of a divided weight belongs to nobody
        if hasattr(parameter, "ds_tensor") and rank == 1:
            parameter.ds_tensor.data[max(parameter.ds_numel - parameter.ds_tensor.ds_numel, 0) :] = math.nan
    answers["padding"] = backend.nonfinite_weight()
    return answers


def _poison(backend: Any, batches: list[dict[str, Tensor]], rank: int, place: int, kind: str) -> dict[str, Any]:
    before, moments_before = weights(backend), moments(backend)
    window = [dict(batch) for batch in batches[:2]]
    if rank == 1:
        if kind == "nan":
            window[place]["image"] = window[place]["image"] * math.nan
        else:  # an infinite loss whose gradients are finite
            window[place]["targets"] = torch.full_like(window[place]["targets"], math.inf)
    (info,) = train(backend, window)
    kept = same(before, weights(backend)) and same(moments_before, moments(backend))
    later = train(backend, batches[2:6])
    after = weights(backend)
    return {
        "flags": (bool(info.skipped), bool(info.failed)),
        "kept": kept,
        "later_flags": [(bool(info.skipped), bool(info.failed)) for info in later],
        "later_norms": [float(info.grad_norm) for info in later],
        "goes_on": largest(before, after) > 0 and all(bool(torch.isfinite(value).all()) for value in after.values()),
    }


def save_and_resume(rank: int, folder: str) -> None:
    """Three steps, a checkpoint, three more; the same from the checkpoint; then a disk that is full on one rank."""
    batches, found = micro_batches(6, rank), {}
    real_save = torch.save
    for stage, name in RUNS:
        output = Path(folder) / f"{stage}-{name}"
        if rank == 0:
            output.mkdir()
        distributed.barrier()
        torch.manual_seed(rank + 3)
        model = tiny_beit3(drop_path=0.2)
        torch.manual_seed(rank + 3)  # each process has its own draws
        backend = deepspeed_backend(stage, name, model=model, ema=True)
        train(backend, batches[:6])
        saved_weights, saved_prediction = weights(backend), predict(backend, batches[0])
        saved = save_checkpoint(backend, output, "checkpoint-0", {"global_step": 3}, copy_files={"a.json": b"{}"})
        norms = [float(info.grad_norm) for info in train(backend, batches[6:])]
        run: dict[str, Any] = {"files": sorted(path.name for path in saved.iterdir()), "prediction": saved_prediction}

        model = tiny_beit3(drop_path=0.2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        other = deepspeed_backend(stage, name, model=model, ema=True, weight_decay=0.07)
        with _recorded_loads() as loads:
            run["extra"] = load_checkpoint(other, saved)
        run["loads"] = loads
        run["loaded"] = same(weights(other), saved_weights)
        run["decays"] = [group["weight_decay"] for group in other.optimizer.param_groups]
        for group in other.optimizer.param_groups:
            group["weight_decay"] = min(group["weight_decay"], 0.05)
        other_norms = [float(info.grad_norm) for info in train(other, batches[6:])]
        run["resumed"] = {
            "weights": same(weights(backend), weights(other)),
            "moments": same(moments(backend), moments(other)),
            "norms": norms == other_norms,
            "average": other.ema is None or same(backend.ema.state_dict(), other.ema.state_dict()),
        }
        if rank == 0:
            run["average_dtypes"] = {value.dtype for value in backend.ema.state_dict().values()}
            run["shadow_moved"] = largest(backend.ema.state_dict(), weights(backend)) if stage < 3 else 1.0
            if stage:
                theirs = importlib.import_module("deepspeed.utils.zero_to_fp32")

                theirs = theirs.get_fp32_state_dict_from_zero_checkpoint(str(output), tag="checkpoint-0")
                real_save(dict(theirs), output / "theirs.pth")
        run["poisoned"] = _poison(other, batches, rank, 0, "nan")
        distributed.barrier()
        run["full_disk"] = _full_disk(backend, output, rank, real_save)
        run["messages"] = _refusals(saved, stage, name)
        found[f"{stage}-{name}"] = distributed.gather_objects(run)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pth")


@contextmanager
def _recorded_loads() -> Iterator[list[Any]]:
    """Collects ``weights_only`` of every call of torch.load, whoever calls it."""
    calls, real_load = [], torch.load

    def load(*args: Any, **options: Any) -> Any:
        calls.append(options.get("weights_only"))
        return real_load(*args, **options)

    torch.load = load
    try:
        yield calls
    finally:
        torch.load = real_load


def wait_in_vain(rank: int) -> None:
    """Rank 1 stays away from a gather of stage 3; the other must not wait longer than it was told."""
    backend = deepspeed_backend(3, timeout_s=5)
    batches = micro_batches(2, rank)
    train(backend, batches[:2])
    started = time.monotonic()
    if rank == 0:
        with pytest.raises(RuntimeError, match="Timed out"):
            train(backend, batches[2:])
        assert time.monotonic() - started < 14  # before the other one is back
    else:
        time.sleep(15)
    os._exit(0)  # the group is broken


def _full_disk(backend: Any, output: Path, rank: int, real_save: Any) -> str:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        torch.save = full
    try:
        save_checkpoint(backend, output, "checkpoint-1", {"global_step": 6})
    except RunError as error:
        return str(error)
    finally:
        torch.save = real_save
    return ""


def _refusals(saved: Path, stage: int, name: str) -> dict[str, str]:
    """What a run with other settings says to this checkpoint; only for one stage, for the time it takes."""
    if (stage, name) != (2, "float32"):
        return {}
    wider = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    others = {
        "stage": lambda: deepspeed_backend(1),
        "precision": lambda: deepspeed_backend(2, "bf16"),
        "average": lambda: deepspeed_backend(2, ema=True),
        "model": lambda: deepspeed_backend(2, model=wider),
        "none": lambda: deepspeed_backend(2),
    }
    messages = {}
    hidden = saved / "model_ema.pth"
    for key, build in others.items():
        backend = build()
        if key == "average":
            distributed.barrier()
            if distributed.is_main():
                hidden.rename(hidden.with_suffix(".away"))
            distributed.barrier()
        try:
            backend.load(saved)
            messages[key] = ""
        except EngineError as error:
            messages[key] = str(error)
        if key == "average":
            distributed.barrier()
            if distributed.is_main():
                hidden.with_suffix(".away").rename(hidden)
            distributed.barrier()
    return messages


def resume_alone(rank: int, folder: str) -> None:
    """One process takes the checkpoints of two, and one of the plain backend."""
    found = {}
    for stage in STAGES:
        backend = deepspeed_backend(stage, model=tiny_beit3(drop_path=0.2))
        try:
            backend.load(Path(folder) / f"{stage}-float32" / "checkpoint-0")
            found[stage] = train(backend, micro_batches(1, 0, world_size=1)) and ""
        except EngineError as error:
            found[stage] = str(error)
    model = tiny_beit3()
    plain = TorchBackend(model, build_adamw(groups_of(model), lr=1e-2), device=CPU)
    (Path(folder) / "plain").mkdir()
    saved = save_checkpoint(plain, Path(folder) / "plain", "checkpoint-0", {"global_step": 0})
    try:
        deepspeed_backend(1).load(saved)
    except EngineError as error:
        found["plain"] = str(error)
    found["evil"] = _load_evil(Path(folder))
    offload = USER_CONFIG["zero_optimization"] | {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
    for stage in (1, 2, 3):
        if stage == 3:
            offload = offload | {"offload_param": {"device": "cpu", "pin_memory": False}}
        backend = deepspeed_backend(stage, user={"zero_optimization": offload})
        infos = train(backend, micro_batches(3, 0, world_size=1))
        found[f"offload-{stage}"] = [float(info.grad_norm) for info in infos]
        found[f"offload-poison-{stage}"] = _poison(backend, micro_batches(3, 0, world_size=1), 1, 0, "nan")
    reference = deepspeed_backend(1)
    found["no-offload"] = [float(info.grad_norm) for info in train(reference, micro_batches(3, 0, world_size=1))]
    found["checkpointed"] = {}
    for stage in STAGES:
        backend = deepspeed_backend(stage, model=tiny_beit3(recompute=Recompute(1)))
        infos = train(backend, micro_batches(3, 0, world_size=1))
        found["checkpointed"][stage] = [float(info.grad_norm) for info in infos]
    found["refused"] = _refused_settings()
    torch.save(found, Path(folder) / "alone.pth")


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def _load_evil(folder: Path) -> tuple[str, bool]:
    """What is said of a DeepSpeed file that wants to run something, and whether it did."""
    shutil.copytree(folder / "0-float32" / "checkpoint-0", folder / "evil")
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": _Evil(folder / "executed")}, folder / "evil" / name)
    backend = deepspeed_backend(0, model=tiny_beit3(drop_path=0.2))
    try:
        backend.load(folder / "evil")
    except EngineError as error:
        return str(error), (folder / "executed").exists()
    return "", (folder / "executed").exists()


def _refused_settings() -> str:
    """What is said of a setting that only DeepSpeed itself can judge."""
    try:
        deepspeed_backend(1, user={"zero_optimization": {"contigous_gradients": True}})
    except EngineError as error:
        return str(error)
    return ""
