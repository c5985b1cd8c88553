"""The random state of the model's draws (dropout, stochastic depth) in this process; data draws have none to keep."""

from typing import Any

import torch


def get_random_state() -> dict[str, Any]:
    """State of torch's generators: ``cpu``, and ``cuda`` (of the current device) once CUDA is in use."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Go on drawing from a state that ``get_random_state`` gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
