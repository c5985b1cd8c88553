"""The first of several ways to train whose memory fits, told before the first step without doing it."""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine import distributed
from engine.errors import EngineError
from engine.forecast import StepMemory
from engine.random_state import get_random_state, set_random_state
from engine.without_values import SHAPES_ONLY

_SHARE = 0.95  # of what is free: the allocator's slack, and batches of longer texts


@dataclass(frozen=True)
class Fit:
    """What was chosen: the number of the way, bytes of a process's tensors at most, and what there is for them.

    Numbers and bytes are those of the process that has it hardest. ``choice`` is None where nothing fits.
    """

    choice: int | None
    peaks: list[int]  # of the ways that were tried, the last one's being that of ``choice``
    limit: int


def first_that_fits(
    ways: Sequence[Callable[[nn.Module], None]],
    model: nn.Module,
    compute_loss: Callable[[nn.Module], Tensor],
    *,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    keeps_gradients: bool,
    limit: int | None,
    later: int = 0,
) -> Fit:
    """Take each way in turn and count a training step, until one fits; all processes choose the same.

    What a step draws is the same for each way.

    Args:
        ways: put a model into the state to be tried; the first one is preferred.
        model: from ``copy_without_values``, in training mode.
        compute_loss: of a model on a batch of values.
        device: whose tensors count.
        autocast: context of the forward pass.
        keeps_gradients: whether gradients are there during the forward pass: with accumulation and with DDP.
        limit: bytes that the tensors of a process may take; None: 95 % of what is free on the device.
        later: bytes that the run will put on the device before its first step, beside the optimizer's state.

    Raises:
        EngineError: nobody can tell what is free.
    """

    def try_all() -> tuple[int, list[int], int]:
        peaks: list[int] = []
        for number, way in enumerate(ways):
            way(model)
            set_random_state(state)
            before, peak = _count_step(model, compute_loss, device, autocast, times=1 + keeps_gradients)
            peak += later
            peaks.append(peak)
            room = before + int(_SHARE * free_bytes(device)) if limit is None else limit
            if peak <= room:
                return number, peaks, room
        return len(ways), peaks, room

    state = get_random_state()
    try:
        mine = distributed.together(try_all)
    finally:
        set_random_state(state)
    choice, peaks, room = max(distributed.gather_objects(mine))
    return Fit(choice if choice < len(ways) else None, peaks, room)


def _count_step(
    model: nn.Module,
    compute_loss: Callable[[nn.Module], Tensor],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    *,
    times: int,
) -> tuple[int, int]:
    """Bytes of tensors before a step and at most in it, the model itself counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in tensors}
    copied = sum(storage.nbytes() for storage in storages.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    memory = StepMemory(optimizer, device)
    gc.collect()  # what the way before has left in circles
    with memory:
        before = memory.now_bytes
        for _ in range(times):
            with autocast():
                loss = compute_loss(model)
            loss.backward()
            del loss
        with SHAPES_ONLY:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return before - copied, memory.peak_bytes - copied


def free_bytes(device: torch.device) -> int:
    """What a process may still take of a device's memory; of the host's each local process has an equal part.

    Raises:
        EngineError: the system does not say.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        raise EngineError("this system does not say how much memory is free: give --memory_gb") from None
    return 1024 * int(kilobytes) // (distributed.local_processes() or 1)
