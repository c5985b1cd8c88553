"""Exponential moving average of the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.errors import EngineError


class ModelEMA:
    """Shadow weights e = d e + (1 - d) p over every floating entry of the state dict (BEiT-3 ``--model_ema``).

    Entries that are not floating point (counters, masks) are copied. A skipped step, which leaves the weights as they
    were, still moves the shadow towards them, as in the original.
    """

    def __init__(self, model: nn.Module, decay: float, *, device: torch.device | str | None = None) -> None:
        """Start from the model's present weights, on ``device`` (default: where each weight is)."""
        if not 0 <= decay < 1:
            raise EngineError(f"--model_ema_decay must be in [0, 1), got {decay}")
        self.decay = decay
        self._shadow = {
            name: value.detach().clone().to(device or value.device) for name, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the shadow towards the model's weights; call after each optimizer step."""
        self.update_entries(model.state_dict().items())

    @torch.no_grad()
    def update_entries(self, entries: Iterable[tuple[str, Tensor]]) -> None:
        """Move the shadow towards some named weights, in whatever precision: for models that are never whole."""
        averaged, current = [], []
        for name, value in entries:
            shadow = self._shadow[name]
            if shadow.is_floating_point():
                averaged.append(shadow)
                # to the CPU the copy must be waited for, or the host would read what has not arrived yet
                copy = value.detach().to(shadow.device, non_blocking=shadow.device.type != "cpu")
                current.append(copy if copy.dtype == shadow.dtype else copy.to(shadow.dtype))
            else:
                shadow.copy_(value)
        if averaged:
            torch._foreach_lerp_(averaged, current, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow weights under the model's key names."""
        return self._shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore shadow weights saved earlier; keys and shapes must be the model's."""
        if state.keys() != self._shadow.keys():
            raise EngineError("the saved moving average belongs to another model: its keys differ")
        with torch.no_grad():
            for name, value in state.items():
                self._shadow[name].copy_(value)
