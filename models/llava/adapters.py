"""Adapters of LLaVA in peft's files, under the names of LLaVA's own code or of transformers' model.

peft names an adapted layer by its place in the model that it was given. Over LLaVA's code that is our own name. Over
transformers' ``LlavaForConditionalGeneration`` the file says ``language_model`` or ``multi_modal_projector`` instead,
the tower may be adapted too, and whole weights (``modules_to_save``) lie in the same file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from models.errors import ModelError
from models.llava.llava import LlavaForCausalLM
from models.llava.loading import LAYERS, PROJECTOR, TOWER, TRANSFORMERS_NAMES, behind_the_tower, own_name
from models.lora import PEFT_PREFIX, LoRAConfig, add_adapters, load_adapters, plain_names

_LOW_RANK = re.compile(r"(.+)\.(lora_[AB])\.weight")
# what tells transformers' names from LLaVA's own, whose tower is ``model.vision_tower.vision_tower``
_OF_TRANSFORMERS = re.compile(
    r".*(language_model|multi_modal_projector)\..*|(model\.)?vision_tower\.(?!vision_tower\.).*"
)
_PARTS_OF_PROJECTOR = {f"{PROJECTOR}{number}.{part}" for number in "02" for part in ("weight", "bias")}


@dataclass(frozen=True)
class AdapterWeights:
    """Content of an adapter's file.

    Attributes:
        low_rank: our name -> matrix, such as ``model.layers.0.mlp.up_proj.lora_A.weight``.
        whole: name as given -> weight that replaces the base's.
        of_transformers: whether peft wrote it over transformers' model.
        is_new: whether that was of version 4.52 or newer.
    """

    low_rank: dict[str, Tensor]
    whole: dict[str, Tensor]
    of_transformers: bool
    is_new: bool

    @classmethod
    def parse(cls, state: Mapping[str, Tensor]) -> "AdapterWeights":
        """Tell the names of a file apart.

        Raises:
            ModelError: whole weights in a file of LLaVA's own names, which has them beside it. What has no place in a
                model is refused when it is placed.
        """
        plain = plain_names(state)
        of_transformers = any(_OF_TRANSFORMERS.match(name) for name in plain)
        low_rank, whole = {}, {}
        for name, value in plain.items():
            if found := _LOW_RANK.fullmatch(name):
                layer = own_name(f"{found[1]}.weight").removesuffix(".weight")
                low_rank[f"{layer}.{found[2]}.weight"] = value
            else:
                whole[name] = value
        if not of_transformers:
            # the original puts adapters on the tower of some bases, where they never trained
            low_rank = {name: value for name, value in low_rank.items() if "vision_tower." not in name}
            if whole:
                raise ModelError(f"the adapter has {next(iter(whole))}, for which there is no place: give it as it was")
        return cls(low_rank, whole, of_transformers, any(name.startswith("model.") for name in plain))

    @property
    def replaced(self) -> tuple[str, ...]:
        """Our names of the weights that the file brings whole."""
        return tuple(own_name(name) for name in self.whole)

    @property
    def has_tower(self) -> bool:
        """Whether it changes the image tower."""
        return any(name.startswith(TOWER) for name in (*self.low_rank, *self.replaced))

    def means(self, name: str, config: LoRAConfig) -> bool:
        """Whether the targets mean a layer of our name, as it was called where they were given."""
        if not self.of_transformers:
            return name.startswith(LAYERS) and config.adapts(name)
        spellings = _spellings(name, is_new=self.is_new)
        return bool(spellings) and all(map(config.adapts, spellings))


def place_adapters(model: LlavaForCausalLM, config: LoRAConfig, weights: AdapterWeights) -> None:
    """Put adapters where their file has them; its whole weights must be in the model already.

    Raises:
        ModelError: a name without a place, another rank, or something is missing that the config speaks of.
    """
    for part in config.modules_to_save:
        if not any(f".{part}." in f".{name}" for name in weights.whole):
            raise ModelError(f"the adapter lacks {part}, which is among its modules_to_save: copy it whole")
    layers = len(model.tower.encoder.layers)
    kept = {name: value for name, value in weights.low_rank.items() if not behind_the_tower(name, layers)}
    names = list(dict.fromkeys(name.rpartition(".lora_")[0] for name in kept))
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name not in names and weights.means(name, config):
            raise ModelError(f"the adapter lacks {name}.lora_A.weight: its target_modules or its base model differ")
    add_adapters(model, config, names)
    load_adapters(model, kept)


def to_transformers(
    config: LoRAConfig, weights: AdapterWeights, rest: Mapping[str, Tensor]
) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """An adapter of LLaVA's own names as peft reads it over transformers' ``LlavaForConditionalGeneration``.

    Args:
        config: of the adapter.
        weights: of its file.
        rest: what trained beside it, by our names: the projector, or nothing.

    Returns:
        What its ``adapter_config.json`` says, and the content of its ``adapter_model.safetensors``.

    Raises:
        ModelError: it has transformers' names already, or adapts or brings what transformers' model has not.
    """
    if weights.of_transformers:
        raise ModelError("the adapter has the names of transformers' model already: use it as it is")
    kept = weights.low_rank
    strange = [name for name in kept if not name.startswith(LAYERS)]
    strange += sorted(rest.keys() ^ _PARTS_OF_PROJECTOR) if rest else []
    if strange or not kept or isinstance(config.target_modules, str) or config.exclude_modules:
        raise ModelError(
            f"the adapter ({strange[0] if strange else 'its target_modules'}) does not fit transformers' LLaVA, which "
            "takes layers of the decoder by their last names and a projector mlp2x_gelu: merge it instead "
            "(scripts/merge_lora_weights.py)"
        )
    ends = "|".join(sorted(map(re.escape, config.target_modules)))
    new = replace(
        config,
        # the tower has layers of the same last names
        target_modules=rf"model\.language_model\.layers\.\d+\.(?:.*\.)?(?:{ends})",
        modules_to_save=("multi_modal_projector",) if rest else (),
    )
    state = {PEFT_PREFIX + _spellings(name, is_new=True)[0]: value for name, value in (kept | dict(rest)).items()}
    return new, state


def _spellings(name: str, *, is_new: bool) -> list[str]:
    """Names that versions of transformers give to what has our name; none for parts that are never adapted."""
    for own, new, old in TRANSFORMERS_NAMES:
        if name.startswith(own):
            return [theirs + name.removeprefix(own) for theirs in (new if is_new else old)]
    return []
