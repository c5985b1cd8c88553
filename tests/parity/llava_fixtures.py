"""Build our LLaVA from the sizes and weights of a recording."""

from typing import Any

from torch import Tensor

from models.clip_vision import CLIPVisionConfig
from models.llava.config import LlavaConfig
from models.llava.llava import LlavaForCausalLM
from models.loading import load_weights

LAST_OF_TOWER = ("*.post_layernorm.*", "*.vision_model.encoder.layers.*")  # what LLaVA never looks at


def llava_config(values: dict[str, Any]) -> LlavaConfig:
    """Of a recorded ``config``."""
    return LlavaConfig.from_dict(values)


def llava_model(values: dict[str, Any], state: dict[str, Tensor]) -> LlavaForCausalLM:
    """With the recorded weights."""
    vision = CLIPVisionConfig.from_dict(values["mm_vision_tower_config"])
    model = LlavaForCausalLM(llava_config(values), vision)
    load_weights(model, state, may_be_extra=LAST_OF_TOWER)
    return model
