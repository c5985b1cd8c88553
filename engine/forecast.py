"""What a run will take, told from its first steps: memory counted tensor by tensor, and time."""

import gc
import weakref
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.log import peak_mib


class StepMemory(TorchDispatchMode):
    """Counts the bytes of all tensors of a device while it is entered; enter it for the first step of a run.

    The first step ends with the optimizer making its state, which later steps find there, so their peak is that of the
    forward and backward pass plus this state. Tensors without values (``FakeTensorMode``) count as others do, which
    tells the peak of a model that does not fit here. Not counted: what kernels take inside themselves, the process and
    its libraries, and what the allocator keeps in reserve.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """``optimizer`` is the one whose ``step`` ends the step; ``device`` the one whose tensors count."""
        super().__init__()
        self._optimizer = optimizer
        self._device = device.type
        self._live: dict[int, tuple[weakref.ref, int]] = {}  # by the identity of a storage
        self._now = self._peak = 0
        self._before = self._state_before = self._state_after = 0
        self._before_update: int | None = None  # peak of forward and backward pass

    def __enter__(self) -> "StepMemory":
        """Begin, with all tensors that there are."""
        self._see(found for found in gc.get_objects() if issubclass(type(found), Tensor))
        self._before = self._peak = self._now
        self._state_before = self._state_bytes()
        self._hook = self._optimizer.register_step_pre_hook(self._begin_update)
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        """End, behind the optimizer's step."""
        self._hook.remove()
        super().__exit__(*raised)
        self._state_after = self._state_bytes()
        self._live.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and look at what it took and gave."""
        result = func(*args, **(kwargs or {}))
        self._see(value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor))
        return result

    @property
    def now_bytes(self) -> int:
        """What there is at this moment, while it is entered."""
        return self._now

    @property
    def held_bytes(self) -> int:
        """What stays from step to step: weights, whatever else was there before, and the optimizer's state."""
        return self._before + self._state_after - self._state_before

    @property
    def peak_bytes(self) -> int:
        """The most that is there at a time in any step but the first."""
        if self._before_update is None:
            return self._peak
        return max(self._peak, self._before_update + self._state_after - self._state_before)

    @property
    def is_whole(self) -> bool:
        """Whether the optimizer took the step, and did not skip it, as with the first loss scales of float16."""
        return self._before_update is not None

    def _begin_update(self, *_: object) -> None:
        if self._before_update is None:  # DeepSpeed may step once for each group
            self._before_update = self._peak

    def _state_bytes(self) -> int:
        values = tree_leaves([list(state.values()) for state in self._optimizer.state.values()])
        tensors = (value for value in values if isinstance(value, Tensor) and value.device.type == self._device)
        return sum({id(t.untyped_storage()): t.untyped_storage().nbytes() for t in tensors}.values())

    def _see(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device.type != self._device or tensor.layout is not torch.strided:
                continue
            try:
                storage = tensor.untyped_storage()
                num_bytes = storage.nbytes()
            except RuntimeError:  # without storage: a wrapper of other tensors, which are seen themselves
                continue
            key = id(storage)
            known = self._live.get(key)
            if known is None:
                known = (weakref.ref(storage, lambda _, key=key: self._forget(key)), 0)
            if num_bytes != known[1]:  # new, or resized
                self._live[key] = (known[0], num_bytes)
                self._now += num_bytes - known[1]
                self._peak = max(self._peak, self._now)

    def _forget(self, key: int) -> None:
        known = self._live.pop(key, None)
        if known is not None:
            self._now -= known[1]


def describe_forecast(
    *,
    seconds_per_step: float,
    steps_per_epoch: int,
    total_steps: int,
    memory: StepMemory | None,
    device: torch.device,
) -> str:
    """What a dry run says: time per epoch and run (validation comes on top), and the memory of a process's tensors."""
    epoch, run = (timedelta(seconds=round(steps * seconds_per_step)) for steps in (steps_per_epoch, total_steps))
    text = f"predicted: {seconds_per_step:.3g} s a step; {epoch} per epoch of {steps_per_epoch} steps, {run} per run"
    if memory is not None and not memory.is_whole:
        text += "; no memory, since the first step was skipped before the optimizer had made its state"
    elif memory is not None:
        peak, held = memory.peak_bytes / 2**20, memory.held_bytes / 2**20
        text += (
            f"; peak {peak:.0f} MiB of tensors: weights and optimizer {held:.0f}, "
            f"gradients and activations {peak - held:.0f}"
        )
    where = "allocated on the device" if device.type == "cuda" else "the whole process"
    return f"{text}; measured so far {peak_mib(device):.0f} MiB ({where})"
