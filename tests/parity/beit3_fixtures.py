"""Build our BEiT-3 models from the sizes and weights of a recording."""

from typing import Any

import pytest
from torch import Tensor, nn

from models.beit3.config import BEiT3Config
from models.loading import load_weights


def config_of(recorded: dict[str, Any], *, normalize_output: bool | None = None) -> BEiT3Config:
    """Our configuration from a recording's ``config``, which may leave ``normalize_output`` to the task."""
    return BEiT3Config(
        image_size=recorded["img_size"],
        patch_size=recorded["patch_size"],
        embed_dim=recorded["embed_dim"],
        num_layers=recorded["num_layers"],
        num_heads=recorded["num_heads"],
        mlp_ratio=_mlp_ratio(recorded),
        vocab_size=recorded["vocab_size"],
        max_text_positions=recorded["max_source_positions"],
        normalize_output=recorded["normalize_output"] if normalize_output is None else normalize_output,
        layernorm_eps=recorded["layernorm_eps"],
        in_chans=recorded["in_chans"],
    )


def _mlp_ratio(recorded: dict[str, Any]) -> int:
    """Whole ratio of the widths; the recorded ratio may be a float."""
    ratio, rest = divmod(recorded["ffn_dim"], recorded["embed_dim"])
    if rest:
        pytest.fail(f"ffn_dim {recorded['ffn_dim']} is no multiple of embed_dim {recorded['embed_dim']}")
    return ratio


def with_weights(model: nn.Module, state_dict: dict[str, Tensor]) -> nn.Module:
    """The model with exactly these weights, no name more or less, in evaluation mode."""
    load_weights(model, state_dict)
    return model.eval()


def assert_grads_match(model: nn.Module, recording: dict[str, Any], *, rtol: float) -> None:
    """Compare gradients, relative to each tensor's largest entry, and which of them are none and exactly zero."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, expected in recording["grads"].items():
        error = (grads[name] - expected).abs().max().item()
        largest = expected.abs().max().item()
        assert error <= rtol * largest, f"gradient of {name} is off by {error:.2e}, its largest entry is {largest:.2e}"
    assert {name for name, grad in grads.items() if grad is None} == set(recording["grad_none"])
    zero = {name for name, grad in grads.items() if grad is not None and not grad.any()}
    assert zero == set(recording["grad_zero"])
