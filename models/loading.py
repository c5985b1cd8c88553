"""Give a model its weights, strictly: whatever does not fit is named, and only what the caller listed is skipped."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from models.errors import ModelError

_NUM_SHOWN = 6  # names listed per kind of problem, so that the message stays one readable line


@dataclass(frozen=True)
class LoadReport:
    """Names loaded, names that keep their start values, names of the file that have no place in the model."""

    loaded: tuple[str, ...]
    newly_initialised: tuple[str, ...]
    ignored: tuple[str, ...]


@dataclass(frozen=True)
class LoadRule:
    """Patterns for ``load_weights``: what may be absent from a file, of another shape in it, or in it without use."""

    may_miss: tuple[str, ...]
    may_mismatch: tuple[str, ...]
    may_be_extra: tuple[str, ...]


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    may_miss: Iterable[str] = (),
    may_mismatch: Iterable[str] = (),
    may_be_extra: Iterable[str] = (),
) -> LoadReport:
    """Copy ``state_dict`` into ``model`` by name, converting to the model's dtype and device.

    Args:
        model: its state-dict names are looked up.
        state_dict: name -> tensor.
        may_miss: shell patterns (``head.*``) of model names that the file need not have.
        may_mismatch: patterns of names that may have another shape in the file; the model's start value stays.
        may_be_extra: patterns of names in the file that the model may lack.

    Raises:
        ModelError: one message with everything missing, unexpected or of another shape beyond what the patterns
            allow; or a value that is no tensor, NaN, infinite, or whole numbers where the model has fractions. The
            model is unchanged then.
    """
    own = model.state_dict()
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the checkpoint's entry {name!r} is a {type(value).__name__}, not a tensor: give a file of weights"
            )
    missing = sorted(own.keys() - state_dict.keys())
    extra = sorted(state_dict.keys() - own.keys())
    common = [name for name in own if name in state_dict]
    mismatched = sorted(name for name in common if own[name].shape != state_dict[name].shape)
    _refuse_misfits(
        [name for name in missing if not _matches(name, may_miss)],
        [name for name in extra if not _matches(name, may_be_extra)],
        [
            f"{name} {tuple(state_dict[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            for name in mismatched
            if not _matches(name, may_mismatch)
        ],
    )
    loaded = [name for name in common if own[name].shape == state_dict[name].shape]
    for name in loaded:
        value = state_dict[name]
        if value.is_floating_point() != own[name].is_floating_point():
            raise ModelError(
                f"the checkpoint's weight {name!r} holds {_kind(value)} where the model has {_kind(own[name])}: "
                f"give the weights as they were before they were quantised or packed"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ModelError(
                f"the checkpoint's weight {name!r} holds NaN or infinite values: the file is damaged or its training "
                f"diverged, give another one"
            )
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(state_dict[name])
    return LoadReport(tuple(loaded), tuple(sorted(missing + mismatched)), tuple(extra))


def _refuse_misfits(missing: list[str], extra: list[str], mismatched: list[str]) -> None:
    """Raise one ModelError for all of them, or return."""
    kinds = ((missing, "missing from the file"), (extra, "unexpected in the file"), (mismatched, "of another shape"))
    problems = [f"{len(names)} {what}: {_shorten(names)}" for names, what in kinds if names]
    if problems:
        raise ModelError(
            f"the checkpoint does not fit the model ({'; '.join(problems)}): give a checkpoint of this model and task, "
            f"or the model and task of this checkpoint"
        )


def _kind(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:_NUM_SHOWN])
    return shown if len(names) <= _NUM_SHOWN else f"{shown}, and {len(names) - _NUM_SHOWN} more"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
