"""DeepSpeed ZeRO 0-3 behind the backend contract; the only file that imports DeepSpeed, and only when asked for.

Source: Rajbhandari et al. 2020, "ZeRO"; written against DeepSpeed 0.19.8, whose files each comment names.

Differences from using DeepSpeed as its guides show: the optimizer is ours with our groups, nothing is compiled, a
non-finite loss or gradient never reaches the weights in any stage, every process learns of a failed write instead of
waiting in a barrier, and nothing in a file is executed when it is read.
"""

import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine import distributed
from engine.backend import EMA_FILE, STATE_FILE, StepInfo, WeightsFormat, trained_names
from engine.ema import ModelEMA
from engine.errors import EngineError
from engine.finite_weights import first_nonfinite
from engine.log import say
from engine.weights import load_torch_file, read_state_dict
from engine.zero_files import RUN_FILE

# 0.18.0 let a NaN destroy the weights in stages 1 to 3 and accumulated wrongly in stage 2 (found by our tests)
_OLDEST = (0, 19, 8)
_DTYPE_NAMES = {None: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class DeepSpeedBackend:
    """A model under ZeRO: stage 0 is data parallel, 1 splits the moments, 2 also the gradients, 3 also the weights.

    With bf16 or fp16 the weights have 16 bits and float32 masters stand beside them (DeepSpeed's native modes).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        config: dict[str, Any],
        dtype: torch.dtype | None = None,
        timeout_s: float = 1800.0,
        ema: ModelEMA | None = None,
        weights: WeightsFormat | None = None,
    ) -> None:
        """Hand a float32 model to DeepSpeed; the process group must exist (``distributed.init(group_of_one=True)``).

        Args:
            model: on ``device``; from now on it belongs to the backend.
            optimizer: torch's AdamW over groups that carry ``lr_scale``.
            device: of this process.
            config: from ``resolve_config``.
            dtype: of the weights, None for float32; the same that ``resolve_config`` was given.
            timeout_s: as in ``distributed.init``, for the process groups that DeepSpeed adds.
            ema: built from the model while it is whole.
            weights: how checkpoints hold them beside DeepSpeed's own files; None: as ``model.pth``.

        Raises:
            EngineError: DeepSpeed is not installed, or refuses the settings.
        """
        self._deepspeed = _import_deepspeed(device)
        self._weights = weights or WeightsFormat()
        self._kept = None if self._weights.with_frozen else trained_names(model)
        self.device = device
        self.accumulation_steps: int = config["gradient_accumulation_steps"]
        self.optimizer = optimizer
        self._dtype = dtype
        self._stage: int = config["zero_optimization"]["stage"]
        self._clip_grad: float = config["gradient_clipping"]
        self._min_scale = max(float(config["fp16"].get("min_loss_scale", 1)), 1.0)
        self._shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._group_facts = [_facts(group, self._names) for group in optimizer.param_groups]
        self._has_ema = ema is not None
        # the weights of stage 3 are gathered one by one anyway, so one process keeps their average
        self.ema = ema if self._stage < 3 or distributed.is_main() else None
        if dtype is not None:  # around 16-bit weights too: it casts the images, and on CUDA keeps norms in float32
            # inside the model, because DeepSpeed switches an outer one off (runtime/torch_autocast.py)
            model.forward = torch.autocast(device.type, dtype)(model.forward)
        self._engine = self._initialize(model, config)
        self.model: nn.Module = self._engine
        _set_timeouts(timeout_s)
        self._files = _CheckpointFiles()
        self._engine.checkpoint_engine = self._files
        # scripts of DeepSpeed's that unpickle without care; scripts/zero_to_fp32.py is ours
        self._engine._copy_recovery_script = lambda _: None
        self._calm_scaler()
        self._bad_loss = torch.zeros((), device=device)

    def _initialize(self, model: nn.Module, config: dict[str, Any]) -> Any:
        from deepspeed import comm

        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # every step sets it; see below
        try:
            comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
            engine, *_ = self._deepspeed.initialize(
                model=model, optimizer=self.optimizer, config=config, dist_init_required=False
            )
        except (ValueError, AssertionError, TypeError) as error:
            raise EngineError(f"DeepSpeed refuses its settings: {_first_complaint(error)}") from None
        if self._stage == 0 and self._dtype is not None:
            # it makes the moments by a step without gradients (runtime/fp16/unfused_optimizer.py), which would stay
            # counted: the first real step would then be a quarter too short
            self.optimizer.state.clear()
        return engine

    # ---- a step ----

    def autocast(self) -> AbstractContextManager:
        """Autocast to the weights' 16-bit type, or nothing in float32."""
        if self._stage < 3:
            return nullcontext() if self._dtype is None else torch.autocast(self.device.type, self._dtype)
        return self._autocast_partitioned()

    @contextmanager
    def _autocast_partitioned(self) -> Iterator[None]:
        """Stage 3 keeps weights that it gathers, and they must not become inference tensors: training needs them."""
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())
            if self._dtype is not None:
                stack.enter_context(torch.autocast(self.device.type, self._dtype))
            yield

    def rehearse(self, compute_loss: Callable[[], Tensor]) -> None:
        """Nothing: DeepSpeed fills its buckets anew in every backward pass, in the order of the gradients."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch's mean loss; DeepSpeed divides by the accumulation.

        A loss that is not finite is turned into NaN gradients everywhere, which every process then sees.
        """
        finite = torch.isfinite(loss.detach())
        self._bad_loss += ~finite
        self._engine.backward(loss * torch.where(finite, 1.0, math.nan))

    def step(self, lr: float, part_lrs: Mapping[str, float] = MappingProxyType({})) -> StepInfo | None:
        """Update the weights with base rate ``lr``, or its part's, when the accumulation window is full."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        bad_loss = distributed.all_reduce_(self._bad_loss, "max") > 0
        self._bad_loss = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = part_lrs.get(group.get("part", ""), lr) * group["lr_scale"]
        scale = float(getattr(self._engine.optimizer, "loss_scale", 1.0))
        skipped, grad_norm = self._step_checked(scale)
        if self._has_ema:
            self._update_ema()
        # a scaler looks for its scale by overflowing now and then; at its minimum it has nowhere left to go
        searching = self._dtype is torch.float16 and scale > self._min_scale
        failed = bad_loss & skipped if searching else torch.tensor(skipped, device=self.device)
        return StepInfo(
            grad_norm=torch.tensor(grad_norm, dtype=torch.float32, device=self.device),
            loss_scale=torch.tensor(scale, dtype=torch.float32, device=self.device),
            skipped=torch.tensor(skipped, device=self.device),
            failed=failed,
        )

    def _step_checked(self, scale: float) -> tuple[bool, float]:
        """Let DeepSpeed step unless a gradient is not finite; returns (skipped, norm before clipping)."""
        if self._stage or self._dtype is not None:  # it checks by itself and skips on all processes
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
            norm = math.inf if norm is None else float(norm)
            # stage 0 reports the norm of the scaled gradients (runtime/fp16/unfused_optimizer.py)
            return bool(self._engine.optimizer.overflow), norm if self._stage else norm / scale
        # stage 0 in float32 is the bare optimizer without any check; its gradients are averaged by now
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients, foreach=True))
        if math.isfinite(norm):
            self._engine.step()
            return False, norm
        self._engine.zero_grad()
        self._engine.micro_steps += 1
        self._engine.global_steps += 1
        self._engine.skipped_steps += 1
        return True, norm

    def _calm_scaler(self) -> None:
        """At its smallest scale a run of failed steps ends by --max_nonfinite, not by an exception of DeepSpeed's."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False

    # ---- the weights, whole ----

    def unwrapped(self) -> nn.Module:
        """The model itself; in stage 3 its weights are gathered while it runs, on all processes together."""
        return self._engine.module

    def _whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every entry to be kept; in stage 3 each is whole only until the next one is asked for."""
        for name, value in self.unwrapped().state_dict(keep_vars=True).items():
            if self._kept is not None and name not in self._kept:
                continue
            with self._gathered(value):
                yield name, value.detach()

    def _gathered(self, value: Tensor) -> AbstractContextManager:
        # small ones stay whole between steps, and gathering would divide them afterwards
        if self._stage == 3 and hasattr(value, "ds_id") and value.numel() != value.ds_numel:
            return self._deepspeed.zero.GatheredParameters([value])
        return nullcontext()

    def _update_ema(self) -> None:
        if self._stage < 3:
            self.ema.update(self.unwrapped())
            return
        for entry in self._whole_weights():
            if self.ema is not None:
                self.ema.update_entries([entry])

    def nonfinite_weight(self) -> str | None:
        """Name of the first trained weight that is not finite on any process, None if all are.

        In stage 3 each process looks at its own parts.
        """
        return first_nonfinite(
            (n, self._own_part(p)) for n, p in self.unwrapped().named_parameters() if p.requires_grad
        )

    def _own_part(self, parameter: Tensor) -> Tensor:
        if self._stage < 3 or not hasattr(parameter, "ds_tensor") or parameter.numel() == parameter.ds_numel:
            return parameter
        part = parameter.ds_tensor
        # the parts are equally long: what the last ones have beyond the weight's end was never set
        start = distributed.rank() * part.ds_numel
        return part.data[: max(parameter.ds_numel - start, 0)]

    # ---- checkpoints ----

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write DeepSpeed's own files flat into ``folder``, and beside them the weights and ``model_ema.pth``.

        After the folder has its final name, its parent, ``latest`` and that name are DeepSpeed's layout.

        Raises:
            OSError, RuntimeError: a file of this process could not be written; the others have gone on.
        """
        self._files.failure = None
        self._engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=self._kept is not None
        )
        whole = {}
        for name, value in self._whole_weights():
            if distributed.is_main():
                whole[name] = value.to("cpu", copy=True)
        if distributed.is_main():
            self._files.attempt(lambda: self._weights.write(whole, folder))
            if self.ema is not None:
                self._files.save({"model": self.ema.state_dict()}, folder / EMA_FILE)
            state = {
                "extra": extra,
                "zero_stage": self._stage,
                "world_size": distributed.world_size(),
                "dtype": _DTYPE_NAMES[self._dtype],
                "shapes": self._shapes,
                "groups": self._group_facts,
            }
            self._files.save(state, folder / RUN_FILE)
        if self._files.failure is not None:
            raise self._files.failure

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore a folder that ``save`` wrote: weights, masters, moments, scaler, counters, moving average.

        Raises:
            EngineError: it is of another model, stage, precision or number of processes, or of the plain backend.
        """

        def read() -> dict[str, Any]:
            state = self._read_run_file(folder)
            self._read_ahead(folder)
            return state

        state = distributed.together(read)  # from here on the processes wait for each other inside DeepSpeed
        own = [
            {key: group[key] for key in group if key not in ("params", "lr")} for group in self.optimizer.param_groups
        ]
        try:
            self._engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=self._kept is None)
        except (RuntimeError, ValueError, KeyError, AssertionError) as complaint:
            raise EngineError(
                f"{folder} does not fit this run ({_first_complaint(complaint)}): give the same flags, "
                "or another --output_dir"
            ) from None
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)  # the moments are the checkpoint's, decay and the like this run's own
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = self._clip_grad
        self._calm_scaler()
        self._divide_small_weights()
        self._say_replaced(state["groups"], folder)
        if self.ema is not None:
            self.ema.load_state_dict(read_state_dict(folder / EMA_FILE))
        return state["extra"]

    def _divide_small_weights(self) -> None:
        """Stage 3: as after a fresh start, where small weights are divided until the first step.

        Only then does the first forward pass note which module reads weights of another one; if it noted that later,
        after a skipped step, it would contradict its record of the first pass and fail ("tracing error").
        """
        small = getattr(self._engine.optimizer, "persistent_parameters", [])
        if small:
            small[0].partition(small)

    def _read_run_file(self, folder: Path) -> dict[str, Any]:
        anew = "or start anew from its weights with another --output_dir"
        if not (folder / RUN_FILE).exists():
            if (folder / STATE_FILE).exists():
                raise EngineError(f"{folder} was written without DeepSpeed: go on without it, {anew}")
            raise EngineError(f"{folder} has no {RUN_FILE}: it is no checkpoint of a run with DeepSpeed")
        state = load_torch_file(folder / RUN_FILE)
        if state["zero_stage"] != self._stage:
            raise EngineError(
                f"{folder} is of ZeRO stage {state['zero_stage']}, this run of stage {self._stage}: "
                f"take stage {state['zero_stage']}, {anew}"
            )
        if state["dtype"] != _DTYPE_NAMES[self._dtype]:
            raise EngineError(
                f"{folder} was trained in {state['dtype']}, this run is in {_DTYPE_NAMES[self._dtype]}: "
                f"take {state['dtype']}, {anew}"
            )
        before, now = state["world_size"], distributed.world_size()
        if before != now and self._stage:
            raise EngineError(
                f"{folder} was written by {before} processes, which share the optimizer's state in ZeRO stage "
                f"{self._stage}; this run has {now}: start with {before} processes, {anew}"
            )
        difference = self._difference(state)
        if difference:
            raise EngineError(
                f"{folder} was written by a run of another model or other parameter groups ({difference}): "
                "give the same flags, or another --output_dir"
            )
        if self._has_ema and not (folder / EMA_FILE).exists():
            raise EngineError(f"{folder} has no moving average: resume without --model_ema or start anew")
        return state

    def _difference(self, state: dict[str, Any]) -> str:
        """How the model or its groups differ from those of a checkpoint; empty if they do not."""
        names, saved_names = ([group["name"] for group in groups] for groups in (self._group_facts, state["groups"]))
        if names != saved_names:
            return f"its parameter groups are {saved_names}, here {names}"
        if state["shapes"] != self._shapes:
            here, there = self._shapes, state["shapes"]
            name = next(name for name in (*here, *there) if here.get(name) != there.get(name))
            return f"{name} has the shape {there.get(name)}, here {here.get(name)}"
        if [group["params"] for group in self._group_facts] != [group["params"] for group in state["groups"]]:
            return "its parameter groups hold other weights"
        return ""

    def _read_ahead(self, folder: Path) -> None:
        """Read this process's files before DeepSpeed does: what cannot be read must be known before anybody waits."""
        paths = [self._engine._get_ckpt_name(str(folder.parent), folder.name)]
        if self._stage:
            paths.append(self._engine._get_zero_ckpt_name(str(folder.parent), folder.name))
        self._files.read_ahead(paths)

    def _say_replaced(self, saved_groups: list[dict[str, Any]], folder: Path) -> None:
        changes: dict[str, str] = {}  # the first group that differs stands for all
        for own, saved in zip(self._group_facts, saved_groups, strict=True):
            for key in ("weight_decay", "lr_scale", "betas", "eps"):
                if own.get(key) != saved.get(key):
                    changes.setdefault(key, f"{key} {own.get(key)} instead of {saved.get(key)}")
        if changes:
            say(f"note: goes on from {folder} with this run's settings: {', '.join(changes.values())}")


class _CheckpointFiles:
    """Stands in for DeepSpeed's checkpoint engine (runtime/checkpoint_engine/checkpoint_engine.py).

    A failed write is remembered instead of raised, since the other processes wait in DeepSpeed's barriers; reading
    goes through the one safe loader.
    """

    def __init__(self) -> None:
        from deepspeed.runtime.fp16 import loss_scaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        self._also_safe = [ZeroStageEnum, loss_scaler.LossScaler, loss_scaler.DynamicLossScaler, fragment_address]
        self._read: dict[str, Any] = {}
        self.failure: OSError | RuntimeError | None = None
        self.name = "plainvl"

    def save(self, state_dict: Any, path: str | Path) -> None:
        self.attempt(lambda: torch.save(state_dict, path))

    def attempt(self, write: Callable[[], None]) -> None:
        """Write something, unless the checkpoint is lost already."""
        if self.failure is None:
            try:
                write()
            except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
                self.failure = error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.failure = self.failure or error

    def read_ahead(self, paths: list[str]) -> None:
        self._read = {path: load_torch_file(Path(path), also_safe=self._also_safe) for path in paths}

    def load(self, path: str, map_location: Any = None) -> Any:
        if path in self._read:
            return self._read.pop(path)
        return load_torch_file(Path(path), also_safe=self._also_safe)

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info: Any) -> None:
        pass

    def get_commit_info(self) -> None:
        return None

    def cleanup(self) -> None:
        pass

    def preserves_storage_sharing(self) -> bool:
        return True


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed and make it quiet; what it reads from the environment is set where it is missing."""
    os.environ["DS_ACCELERATOR"] = device.type
    # ninja, which CUDA extensions look for, lies beside an interpreter that was called without activating
    folder = os.path.dirname(sys.executable)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PATH"))))
    # without these it would look for MPI, though a process group exists
    placement = distributed.placement_from_environment()
    local_rank = device.index if device.type == "cuda" else placement.local_rank if placement else 0
    for name, value in {
        "RANK": distributed.rank(),
        "WORLD_SIZE": distributed.world_size(),
        "LOCAL_RANK": local_rank or 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",  # looked at, never opened
    }.items():
        os.environ.setdefault(name, str(value))
    # it and torch warn of each other's deprecated functions, at every step
    warnings.filterwarnings("ignore", module=r"deepspeed\.")
    try:
        import deepspeed
    except ImportError as error:
        raise EngineError(
            f"DeepSpeed cannot be imported ({error}): pip install deepspeed, or go on without it"
        ) from None
    version = tuple(int(part) for part in re.findall(r"\d+", deepspeed.__version__)[:3])
    if version < _OLDEST:
        raise EngineError(
            f"DeepSpeed {deepspeed.__version__} is too old, {'.'.join(map(str, _OLDEST))} is needed: "
            "pip install --upgrade deepspeed, or go on without it"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # ours are one line an event
    # asked for one extension only, for inference on the CPU, which would be compiled for a minute (comm/torch.py)
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed


def _set_timeouts(timeout_s: float) -> None:
    """Groups that DeepSpeed adds have torch's default timeout of 10 or 30 minutes (comm/torch.py: new_group)."""
    # public since torch 2.15
    set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            set_timeout(timedelta(seconds=timeout_s), group)


def _facts(group: dict[str, Any], names: dict[nn.Parameter, str]) -> dict[str, Any]:
    """A parameter group as plain values."""
    facts = {key: group.get(key) for key in ("name", "weight_decay", "lr_scale", "eps")}
    facts["betas"] = list(group.get("betas", ()))
    return facts | {"params": [names[parameter] for parameter in group["params"]]}


def _first_complaint(error: Exception) -> str:
    """The line of an exception that says what is wrong, also of pydantic's, whose first one is a count."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 2 and "validation error" in lines[0]:
        return f"{lines[1]}: {lines[2].partition(' [type=')[0]}"
    return lines[0] if lines else type(error).__name__
