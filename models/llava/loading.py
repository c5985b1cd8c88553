"""LLaVA's weights under any of their published names, one after the other into a model that has no memory yet.

Sources of names: LLaVA's own layout, that of transformers' ``llava-hf`` files in three generations, plain Llama, CLIP.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import ModelError
from models.llava.llava import LlavaForCausalLM

TOWER = "model.vision_tower.vision_tower.vision_model."
LAYERS, PROJECTOR = "model.layers.", "model.mm_projector."
# of parts that adapters may change: our beginnings of names, those of transformers 4.52 and newer, of older versions
TRANSFORMERS_NAMES = (
    (LAYERS, ("model.language_model.layers.",), ("language_model.model.layers.",)),
    (f"{PROJECTOR}0", ("model.multi_modal_projector.linear_1",), ("multi_modal_projector.linear_1",)),
    (f"{PROJECTOR}2", ("model.multi_modal_projector.linear_2",), ("multi_modal_projector.linear_2",)),
    (TOWER, ("model.vision_tower.", "model.vision_tower.vision_model."), ("vision_tower.vision_model.",)),
)
# begins with → becomes; the longest that fits counts
_PREFIXES = {
    **{theirs: own for own, *versions in TRANSFORMERS_NAMES for version in versions for theirs in version},
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    TOWER: TOWER,
    "vision_tower.": TOWER,
    "vision_model.": TOWER,
    # CLIP's tower alone, as transformers 5 saves it
    **{f"{part}.": f"{TOWER}{part}." for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")},
}
_TABLES = ("model.embed_tokens.weight", "lm_head.weight")
# nothing that this model has: old buffers, CLIP's text side, what newer versions of LLaVA add
_IGNORED = re.compile(
    r".*rotary_emb\.inv_freq|.*embeddings\.position_ids|text_model\..*|visual_projection\..*|text_projection\..*"
    r"|logit_scale|model\.image_newline"
)


@dataclass(frozen=True)
class StreamReport:
    """Names that got values, and names of the files that have no place."""

    loaded: tuple[str, ...]
    ignored: tuple[str, ...]


def own_name(name: str) -> str:
    """Our name of a published one."""
    prefix = max(filter(name.startswith, _PREFIXES), key=len, default="")
    return _PREFIXES.get(prefix, "") + name.removeprefix(prefix)


@torch.no_grad()
def load_stream(
    model: LlavaForCausalLM,
    weights: Iterable[tuple[str, Tensor]],
    *,
    dtype: torch.dtype | Callable[[str], torch.dtype | None] | None = None,
    skip: tuple[str, ...] = (),
    padded_tables: bool = False,
) -> StreamReport:
    """Give a model its weights as they come; parameters on the meta device get their memory then.

    Args:
        model: perhaps on the meta device (``with torch.device("meta")``).
        weights: published name and tensor, such as of ``engine.weights.stream_weights``.
        dtype: of the parameters, or what says it of our name of each; None: that of the file.
        skip: beginnings of our names that are left alone, such as ``TOWER``.
        padded_tables: take only the first rows of longer word tables: in transformers' files of LLaVA there follow the
            image and the padding token, and filling up.

    Raises:
        ModelError: another shape, or a name that has no place and is no known remnant.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    tower_layers = len(model.tower.encoder.layers)
    loaded, ignored = [], []
    for given, value in weights:
        name = own_name(given)
        if name not in own or name.startswith(skip):
            if not (name.startswith(skip) or _IGNORED.fullmatch(given) or behind_the_tower(name, tower_layers)):
                raise ModelError(
                    f"{given} has no place in this model: give the weights of a LLaVA, Llama or CLIP of its size"
                )
            ignored.append(given)
            continue
        parameter = own[name]
        if value.shape != parameter.shape:
            longer = value.shape[0] > parameter.shape[0] and value.shape[1:] == parameter.shape[1:]
            if not (padded_tables and longer and name in _TABLES):
                raise ModelError(f"{given} is {tuple(value.shape)}, the model's {tuple(parameter.shape)}: other sizes")
            value = value[: parameter.shape[0]]
        _assign(model, name, parameter, value, dtype(name) if callable(dtype) else dtype)
        loaded.append(name)
    return StreamReport(tuple(loaded), tuple(ignored))


def behind_the_tower(name: str, layers: int) -> bool:
    """Whether our name is that of a part of the tower, of so many layers, that nobody looks at."""
    found = re.match(re.escape(TOWER) + r"encoder\.layers\.(\d+)\.", name)
    return name.startswith(f"{TOWER}post_layernorm.") or (found is not None and int(found[1]) >= layers)


def _assign(model: nn.Module, name: str, parameter: nn.Parameter, value: Tensor, dtype: torch.dtype | None) -> None:
    if not parameter.is_meta:
        parameter.copy_(value if dtype is None else value.to(dtype))  # rounded as the other weights are
        return
    parent, _, last = name.rpartition(".")
    # a copy of its own: what comes from a file may be mapped, or share a shard's memory; converted in one go, because
    # a second block beside each weight may leave holes (of two fifths of a model of 1 GB)
    value = value.to(dtype or value.dtype, copy=True)
    setattr(model.get_submodule(parent), last, nn.Parameter(value, requires_grad=parameter.requires_grad))


def missing_weights(model: nn.Module) -> list[str]:
    """Names of the parameters that are still without memory."""
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


@torch.no_grad()
def start_projector(model: LlavaForCausalLM, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Random start values for a projector that no file has brought, as torch's linear layers have them."""
    projector = model.model.mm_projector
    projector.to_empty(device=device).to(dtype)
    for layer in projector.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
