"""BEiT-3 checkpoints as they are published or saved -> a state dict that ``load_weights`` takes.

Original: ``load_model_and_may_interpolate``.

Difference: the original prints what does not fit and goes on with random values there; here only what a task may lack
is allowed.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.beit3.config import TASK_SUFFIXES, BEiT3Config
from models.errors import ModelError
from models.loading import LoadRule
from models.pos_embed import resize_pos_embed

_IMAGE_POSITIONS = "beit3.encoder.embed_positions.A.weight"
_NUM_PREFIX = 3  # two rows that no token uses, and the class token
_VOCABULARY_KEYS = ("beit3.text_embed.weight", "mlm_head.weight", "mlm_head.bias")

# names after the encoder layers, by task; pre-training files hold some of them and a masked-image head
_HEADS = {
    "vqav2": ("pooler.*", "head.*"),
    "captioning": ("mlm_head.*",),
    "nlvr2": ("head.*",),
    "imageclassification": ("fc_norm.*", "head.*"),
    "retrieval": ("logit_scale", "language_head.*", "vision_head.*"),
}
_FINAL_NORM = "beit3.encoder.layer_norm.*"
_PRETRAINING_HEADS = ("mim_head.*",)

# how the keys of other families begin
_OTHER_FAMILIES = {
    "VLE": ("vision_model.", "text_model.", "vle."),
    "VL-BERT": ("vlbert.", "image_feature_extractor.", "object_linguistic_embeddings."),
    "LLaVA": ("model.layers.", "model.embed_tokens.", "model.mm_projector.", "lm_head.", "base_model."),
    "a plain vision transformer": ("blocks.", "patch_embed.", "visual."),
}


def load_rule(task: str, *, for_training: bool) -> LoadRule:
    """What a checkpoint may lack for ``task``: the heads when training starts from it, nothing for an evaluation."""
    own = _HEADS[TASK_SUFFIXES[task]]
    others = {pattern for patterns in _HEADS.values() for pattern in patterns}
    extra = tuple(sorted(others | {_FINAL_NORM, *_PRETRAINING_HEADS}))
    if for_training:
        return LoadRule((*own, _FINAL_NORM), own, extra)
    return LoadRule((), (), extra)


def prepare_beit3_state_dict(
    state: Mapping[str, Tensor], config: BEiT3Config, *, model_prefix: str = ""
) -> dict[str, Tensor]:
    """Take the prefix off a checkpoint's names and fit its image positions to the model's size.

    Args:
        state: name -> tensor, as read from the file.
        config: of the model to be loaded.
        model_prefix: the names in the file begin with this, the model's do not.

    Raises:
        ModelError: if the file is of another family, its position table is not of a square image, or its vocabulary
            is another one.
    """
    if model_prefix:
        prefix = model_prefix if model_prefix.endswith(".") else f"{model_prefix}."
        if not any(name.startswith(prefix) for name in state):
            raise ModelError(
                f"no name in the checkpoint begins with --model_prefix {model_prefix!r}; it has {_examples(state)}"
            )
        state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not any(name.startswith("beit3.") for name in state):
        _refuse_other_family(state)
    state = dict(state)
    for name in _VOCABULARY_KEYS:
        if name in state and state[name].shape[0] != config.vocab_size:
            raise ModelError(
                f"the checkpoint's {name} has {state[name].shape[0]} vocabulary rows, the model {config.vocab_size}: "
                f"use --vocab_size {state[name].shape[0]} and the sentencepiece model of this checkpoint"
            )
    if _IMAGE_POSITIONS in state:
        state[_IMAGE_POSITIONS] = resize_pos_embed(state[_IMAGE_POSITIONS], config.grid, _NUM_PREFIX)
    return state


def _refuse_other_family(state: Mapping[str, Any]) -> None:
    """Say that this is no BEiT-3 checkpoint, and what it is instead as far as its names tell."""
    wrapped = next((name for name in state if ".beit3." in name), None)
    if wrapped is not None:
        prefix = wrapped[: wrapped.index(".beit3.")]
        raise ModelError(
            f"the names in the checkpoint begin with {prefix!r}, such as {wrapped}: give --model_prefix {prefix}"
        )
    counts = {family: sum(name.startswith(begins) for name in state) for family, begins in _OTHER_FAMILIES.items()}
    family = max(counts, key=counts.get)
    guess = f"it looks like {family}" if counts[family] else "it is of no family known here"
    raise ModelError(
        f"not a BEiT-3 checkpoint: no name in it begins with 'beit3.', {guess} ({_examples(state)}): give a BEiT-3 file"
    )


def _examples(state: Mapping[str, Any]) -> str:
    names = sorted(map(str, state))
    return f"{len(names)} names such as {', '.join(names[:3])}" if names else "no names at all"
