"""Give a network its first weights, and say what came of it."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from engine.log import say
from models.errors import ModelError
from models.loading import LoadRule, load_weights


def load_pretrained(model: nn.Module, state: Mapping[str, Tensor], rule: LoadRule, source: str | Path) -> None:
    """Load a state dict and say how much there was, what starts anew and what has no use; ``source`` names the file.

    Raises:
        ModelError: weights that do not fit.
    """
    try:
        report = load_weights(model, state, **vars(rule))
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from None
    say(f"loaded {len(report.loaded)} weights from {source}")
    if report.newly_initialised:
        say(f"NEWLY INITIALISED, to be trained: {', '.join(report.newly_initialised)}")
    if report.ignored:
        say(f"not used by this task: {', '.join(report.ignored)}")
