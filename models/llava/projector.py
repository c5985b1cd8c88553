"""Image features to vectors of the decoder: LLaVA's ``mm_projector``, with its key names."""

import re

from torch import nn

from models.errors import ModelError
from models.linear import Linear

_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")


def build_projector(kind: str, features: int, width: int) -> nn.Module:
    """A projector by its name.

    Args:
        kind: ``linear``, ``mlp<k>x_gelu`` (k linear layers with GELU between them) or ``identity``.
        features: width of the image features.
        width: of the decoder.

    Raises:
        ModelError: an unknown name, or ``identity`` between unequal widths.
    """
    if kind == "linear":
        return Linear(features, width)
    if kind == "identity":
        if features != width:
            raise ModelError(f"mm_projector_type identity joins equal widths, not {features} and {width}")
        return nn.Identity()
    found = _MLP.fullmatch(kind)
    if found is None:
        raise ModelError(f"unknown mm_projector_type {kind!r:.40}: choose linear, mlp2x_gelu or identity")
    layers: list[nn.Module] = [Linear(features, width)]
    for _ in range(int(found[1]) - 1):
        layers += [nn.GELU(), Linear(width, width)]
    return nn.Sequential(*layers)
