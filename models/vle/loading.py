"""VLE checkpoints as they are published or saved -> a state dict that ``load_weights`` takes, and back.

Difference from the original: names are brought to the model's by taking off or adding whole prefixes once; a head of
another size is an error unless training may start with a new one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.errors import ModelError
from models.loading import LoadRule
from models.pos_embed import resize_pos_embed
from models.vle.config import VLEConfig

_TRUNK = "vle."
_HEAD = "vqa_classifier."
_WRAPPERS = ("module.model.", "module.", "model.")  # of DeepSpeed, Lightning and DDP, outermost first
_OTHER_HEADS = ("itm_score.*", "pbc_classifier.*", "mlm_score.*", "vcr_q2a_logit.*", "vcr_qa2r_logit.*")
_IMAGE_POSITIONS = "vle.vision_model.vision_model.embeddings.position_embedding.weight"
# numbers 0, 1, ... that the original keeps among its weights
_POSITION_IDS = ("vle.vision_model.vision_model.embeddings.position_ids", "vle.text_model.embeddings.position_ids")
_TRUNK_NAMES = ("vision_model.", "text_model.", "cross_modal_", "token_type_embeddings.", "text_projection_layer.")


def load_rule(*, for_training: bool) -> LoadRule:
    """Training may start with a new head; an evaluation may lack nothing."""
    head = (f"{_HEAD}*",) if for_training else ()
    return LoadRule(head, (), _OTHER_HEADS)


def unwrap_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Take off what training programs put in front of the model's names, once.

    Returns:
        Name -> tensor, and the names that have no place in the model (they are left out).

    Raises:
        ModelError: no name is of a VLE model.
    """
    prefix = next(
        (p for p in (*_WRAPPERS, "") if any(_is_known(n.removeprefix(p)) for n in state if n.startswith(p))), None
    )
    if prefix is None:
        examples = ", ".join(sorted(state)[:3])
        raise ModelError(
            f"not a VLE checkpoint: none of its {len(state)} names, such as {examples}, is one of VLE's "
            "(vle.vision_model..., vqa_classifier...): give a VLE file"
        )
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    known = {name: value for name, value in found.items() if _is_known(name)}
    strangers = [name for name in state if not name.startswith(prefix)] + [name for name in found if name not in known]
    return known, strangers


def _is_known(name: str) -> bool:
    heads = (_HEAD, *(pattern.removesuffix("*") for pattern in _OTHER_HEADS))
    return name.startswith((_TRUNK, *heads)) or _is_bare_trunk(name)


def _is_bare_trunk(name: str) -> bool:
    return name.startswith((*_TRUNK_NAMES, "image_projection_layer."))


def prepare_vle_state_dict(state: Mapping[str, Tensor], config: VLEConfig) -> dict[str, Tensor]:
    """Bring a checkpoint to the names and the image size of a ``VLEForVQA``.

    Args:
        state: name -> tensor; of a question-answering model or of a bare trunk, wrapped or not.
        config: of the model to be loaded.

    Raises:
        ModelError: not a VLE checkpoint, strange names, or a position table that is not of a square image.
    """
    state, strangers = unwrap_names(state)
    if strangers:
        raise ModelError(
            f"the checkpoint has {len(strangers)} names that are not VLE's, such as {', '.join(strangers[:3])}: "
            "give a file of the weights alone"
        )
    state = {(_TRUNK + name if _is_bare_trunk(name) else name): value for name, value in state.items()}
    for name in _POSITION_IDS:
        state.pop(name, None)
    if _IMAGE_POSITIONS in state:
        state[_IMAGE_POSITIONS] = resize_pos_embed(state[_IMAGE_POSITIONS], config.vision.grid, num_prefix=1)
    return state


def published_state_dict(state: Mapping[str, Tensor], config: VLEConfig) -> dict[str, Tensor]:
    """The weights of a ``VLEForVQA`` as the original saves them, with its two tables of place numbers."""
    sizes = (config.vision.num_tokens, config.text.max_position_embeddings)
    numbers = {name: torch.arange(size)[None] for name, size in zip(_POSITION_IDS, sizes, strict=True)}
    return {**state, **numbers}
