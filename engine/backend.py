"""The contract between the loop and whatever runs a step, and its plain-torch implementation (one process or DDP)."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine import distributed
from engine.ema import ModelEMA
from engine.errors import EngineError
from engine.finite_weights import first_nonfinite
from engine.log import say
from engine.random_state import get_random_state, set_random_state
from engine.weights import load_torch_file, read_state_dict
from engine.zero_files import RUN_FILE

WEIGHTS_FILE = "model.pth"
EMA_FILE = "model_ema.pth"
STATE_FILE = "training_state.pth"


_NO_PARTS: Mapping[str, float] = MappingProxyType({})


def _write_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    torch.save({"model": dict(state)}, folder / WEIGHTS_FILE)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    return read_state_dict(folder / WEIGHTS_FILE)


@dataclass(frozen=True)
class WeightsFormat:
    """How the weights lie in a checkpoint's folder, so that others can read it as it is.

    Attributes:
        write: ``(state dict, folder)``; the tensors may be of any device. Raises OSError or RuntimeError.
        read: folder → state dict with the same names; raises an EngineError where it cannot.
        with_frozen: False: trained weights only; a resumed run brings the frozen ones itself.
    """

    write: Callable[[Mapping[str, Tensor], Path], None] = _write_weights
    read: Callable[[Path], dict[str, Tensor]] = _read_weights
    with_frozen: bool = True


@dataclass(frozen=True)
class StepInfo:
    """What an optimizer step did; tensors stay on the device so that nobody waits for it at every step."""

    grad_norm: Tensor  # total L2 norm before clipping, scalar
    loss_scale: Tensor  # float32 scalar; 1 without a scaler
    skipped: Tensor  # bool scalar: the weights were left alone because something was not finite, on any process
    failed: Tensor  # bool scalar: skipped, and not merely by the loss scaler searching for its scale


class Backend(Protocol):
    """One training step, however it is parallelised; the loop knows nothing else about it."""

    model: nn.Module  # the object to call; may be a wrapper
    optimizer: torch.optim.Optimizer  # its groups carry lr_scale
    device: torch.device
    accumulation_steps: int

    def autocast(self) -> AbstractContextManager:
        """Context for the forward pass."""
        ...

    def rehearse(self, compute_loss: Callable[[], Tensor]) -> None:
        """Called once before the first step of a resumed run, with that step's loss; must leave no trace.

        For what the first backward pass of a run settles for all later ones.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's mean loss; the backend divides by the accumulation, nobody else."""
        ...

    def step(self, lr: float, part_lrs: Mapping[str, float] = _NO_PARTS) -> StepInfo | None:
        """Call after every micro-batch; None inside an accumulation window, else the optimizer step's report.

        Groups that carry a ``part`` named in ``part_lrs`` have that base rate, the others ``lr``.
        """
        ...

    def unwrapped(self) -> nn.Module:
        """The model itself, without wrappers."""
        ...

    def nonfinite_weight(self) -> str | None:
        """Name of the first trained weight that is not finite, None if all are; called on every process."""
        ...

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write weights and training state into an existing folder; called on every process."""
        ...

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what ``save`` wrote and return ``extra``; called on every process."""
        ...


def resolve_precision(name: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype for ``auto``, ``bf16``, ``fp16`` or ``no``; None means float32 throughout.

    ``auto`` is bfloat16 where a CUDA device has it, else float16 with a loss scaler; on the CPU it is ``no``.
    """
    if name == "auto":
        if device.type != "cuda":
            return None
        # older devices emulate bfloat16, slower than float32
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise EngineError("float16 needs a CUDA device: on the CPU take bfloat16 or float32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[name]


class TorchBackend:
    """Plain torch: one process, or DistributedDataParallel when there are several.

    Non-finite losses and gradients never reach the weights: a flag is agreed across the processes and handed to the
    fused optimizer, which leaves weights and moments alone on the device, without waiting for the host.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        autocast_dtype: torch.dtype | None = None,
        accumulation_steps: int = 1,
        clip_grad: float | None = None,
        clip_parts: Mapping[str, float | None] = MappingProxyType({}),
        ema: ModelEMA | None = None,
        initial_loss_scale: float = 65536.0,
        weights: WeightsFormat | None = None,
    ) -> None:
        """Wrap a model that is already on ``device``; the optimizer's groups carry ``lr_scale``.

        Groups that carry a ``part`` named in ``clip_parts`` are clipped by their own norm to that value, the others
        together to ``clip_grad``. ``weights`` says how checkpoints hold them, else ``model.pth`` does (key ``model``).
        """
        if accumulation_steps < 1:
            raise EngineError(f"accumulation needs at least 1 step, got {accumulation_steps}")
        if clip_grad is not None and clip_grad <= 0:
            raise EngineError(f"the norm to clip gradients to must be positive, got {clip_grad}")
        self.device = device
        self.accumulation_steps = accumulation_steps
        self.optimizer = optimizer
        self.ema = ema
        self._dtype = autocast_dtype
        self._weights = weights or WeightsFormat()
        self._scaler = torch.amp.GradScaler(
            device.type, enabled=autocast_dtype is torch.float16, init_scale=initial_loss_scale
        )
        limits = {"": clip_grad, **clip_parts}
        clipped: dict[str, list[nn.Parameter]] = {}
        for group in optimizer.param_groups:
            part = group.get("part", "")
            clipped.setdefault(part if part in limits else "", []).extend(group["params"])
        self._clipped = [(parameters, limits[part]) for part, parameters in clipped.items()]
        self._micro_batches = 0
        self._bad_loss = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self.model: nn.Module = model
        if distributed.world_size() > 1:
            self.model = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            self._set_gradient_exchange()

    def autocast(self) -> AbstractContextManager:
        """Autocast to the chosen dtype, or nothing in float32."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._dtype)

    def rehearse(self, compute_loss: Callable[[], Tensor]) -> None:
        """Let DDP arrange its buckets by the order in which gradients come, as it does in the first step of a run.

        Where a gradient lies in its bucket decides the order in which more than two processes are added up, and with
        it the last bit of the sum.
        """
        if not isinstance(self.model, DistributedDataParallel) or distributed.world_size() <= 2:
            return
        random_state = get_random_state()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.model.require_backward_grad_sync = True
        with self.autocast():
            loss = compute_loss()
        loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        self._set_gradient_exchange()
        for name, buffer in self.model.named_buffers():  # running statistics, counters
            buffer.copy_(buffers[name])
        set_random_state(random_state)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss, divided by the number of accumulation steps."""
        self._bad_loss += ~torch.isfinite(loss.detach())
        self._scaler.scale(loss / self.accumulation_steps).backward()

    def step(self, lr: float, part_lrs: Mapping[str, float] = _NO_PARTS) -> StepInfo | None:
        """Update the weights with base rate ``lr``, or its part's, when the accumulation window is full."""
        self._micro_batches += 1
        if self._micro_batches % self.accumulation_steps:
            self._set_gradient_exchange()
            return None
        self._scaler.unscale_(self.optimizer)
        grad_norm = self._clip()
        bad_loss = distributed.all_reduce_(self._bad_loss, "max") > 0
        skipped = bad_loss | ~torch.isfinite(grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = part_lrs.get(group.get("part", ""), lr) * group["lr_scale"]
        self._update(skipped)
        scale = self._scaler.scale(self._one)  # get_scale() would wait for the device at every step
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._bad_loss = torch.zeros((), device=self.device)
        self._set_gradient_exchange()
        if self.ema is not None:
            self.ema.update(self.unwrapped())
        # a scaler looks for its scale by overflowing now and then; only below 1 has it nowhere left to go
        failed = torch.where(scale >= 1, bad_loss, skipped) if self._scaler.is_enabled() else skipped
        return StepInfo(grad_norm=grad_norm, loss_scale=scale, skipped=skipped, failed=failed)

    def _clip(self) -> Tensor:
        """Clip each part by its own norm; returns the norm of all gradients before it."""
        norms = []
        for parameters, limit in self._clipped:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(gradients, foreach=True))
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norms[-1], foreach=True)
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

    def _update(self, skipped: Tensor) -> None:
        """Step the optimizer unless ``skipped``; fused optimizers decide on the device, others on the host."""
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped.float()
            self.optimizer.step()
            del self.optimizer.grad_scale, self.optimizer.found_inf
        elif not skipped.item():
            self.optimizer.step()

    def _set_gradient_exchange(self) -> None:
        # what DDP's no_sync() does, decided here so that the loop needs no second context
        if isinstance(self.model, DistributedDataParallel):
            last = self._micro_batches % self.accumulation_steps == self.accumulation_steps - 1
            self.model.require_backward_grad_sync = last

    def unwrapped(self) -> nn.Module:
        """The model without DDP."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def nonfinite_weight(self) -> str | None:
        """Name of the first trained weight that is not finite on any process, None if all are."""
        return first_nonfinite((name, p) for name, p in self.unwrapped().named_parameters() if p.requires_grad)

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write the weights (original names), ``training_state.pth`` and ``model_ema.pth``."""
        if not distributed.is_main():
            return
        self._weights.write(self._kept(self.unwrapped().state_dict()), folder)
        if self.ema is not None:
            torch.save({"model": self.ema.state_dict()}, folder / EMA_FILE)
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict(), "extra": extra}
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore a folder that ``save`` wrote; every process reads it."""
        if (folder / RUN_FILE).exists():
            raise EngineError(
                f"{folder} was written with DeepSpeed: go on with DeepSpeed in the same ZeRO stage, or start "
                "anew from its weights with another --output_dir"
            )
        _load_matching(self._load_weights, self._weights.read(folder), folder)
        state = load_torch_file(folder / STATE_FILE)
        _load_matching(self._load_optimizer, state["optimizer"], folder)
        self._say_replaced(state["optimizer"], folder)
        if self._scaler.is_enabled() and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            if not (folder / EMA_FILE).exists():
                raise EngineError(f"{folder} has no moving average: resume without --model_ema or start anew")
            self.ema.load_state_dict(read_state_dict(folder / EMA_FILE))
        return state["extra"]

    def _kept(self, state: dict[str, Any]) -> dict[str, Any]:
        """The entries of a state dict that checkpoints hold."""
        if self._weights.with_frozen:
            return state
        trained = trained_names(self.unwrapped())
        return {name: value for name, value in state.items() if name in trained}

    def _load_weights(self, state: dict[str, Tensor]) -> None:
        model = self.unwrapped()
        expected = self._kept(model.state_dict()).keys()
        if not self._weights.with_frozen and state.keys() != expected:
            other = min(state.keys() ^ expected)
            raise ValueError(f"{other} is trained in one of the two only")
        model.load_state_dict(state, strict=self._weights.with_frozen)

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take the moments of the same groups; decay, rates' scales, betas and the like stay this run's own."""
        names, saved_names = ([group.get("name") for group in groups] for groups in self._both_groups(state))
        if names != saved_names:
            raise ValueError(f"its parameter groups are {saved_names}, here {names}")
        # not the rate: the schedule sets it at every step, and a run without steps left keeps what it had
        settings = [
            {key: group[key] for key in group if key not in ("params", "lr")} for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)

    def _say_replaced(self, state: dict[str, Any], folder: Path) -> None:
        changes: dict[str, str] = {}  # the first group that differs stands for all
        for own, saved in zip(*self._both_groups(state), strict=True):
            for key in ("weight_decay", "lr_scale", "betas", "eps"):
                if key in own and own[key] != saved.get(key):
                    changes.setdefault(key, f"{key} {own[key]} instead of {saved.get(key)}")
        if changes:
            say(f"note: goes on from {folder} with this run's settings: {', '.join(changes.values())}")

    def _both_groups(self, state: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return self.optimizer.param_groups, state["param_groups"]


def trained_names(model: nn.Module) -> frozenset[str]:
    """Names of the weights that are not frozen."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def _load_matching(load: Callable[[Any], Any], state: Any, folder: Path) -> None:
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        raise EngineError(
            f"{folder} was written by a run of another model or other parameter groups "
            f"({str(error).splitlines()[0].rstrip(' :')}): give the same flags, or another --output_dir"
        ) from None
