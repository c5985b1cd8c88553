"""Sizes of LLaVA from a ``config.json``, in the layout of the original and in that of transformers.

What is not implemented is refused by its key.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.config_values import ConfigTable, is_bool, is_int, is_positive_int, is_positive_number
from models.errors import ModelError

FEATURES = ("patch", "cls_patch")
_LLAMAS = ("llama", "llava", "llava_llama")
_MISTRALS = ("mistral", "llava_mistral")


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder; names as in Llama's ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 1.0  # positions are divided by it (linear scaling)
    tie_word_embeddings: bool = False
    eos_token_id: int = 2
    pad_token_id: int = 0

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> "LlamaConfig":
        """From the keys of a ``config.json``; an absent one of no size has transformers' default.

        Raises:
            ModelError: names the key that is missing, of a wrong kind, or asks for what is not implemented.
        """
        table = ConfigTable(values, where)
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if key not in values:
                raise ModelError(f"{where} has no {key}: give the config.json of the language model")
        if table.need("model_type", (*_LLAMAS, *_MISTRALS), "llama") in _MISTRALS:
            _refuse_a_window(table)
        table.need("hidden_act", ("silu",), "silu")
        table.need("attention_bias", (False,), False)
        table.need("mlp_bias", (False,), False)
        heads = table.read("num_attention_heads", is_positive_int, 0)
        key_heads = table.read("num_key_value_heads", is_positive_int, heads)
        width = table.read("hidden_size", is_positive_int, 0)
        table.need_even_heads(width, heads)
        table.need("head_dim", (None, width // heads), None)
        if heads % key_heads:
            raise ModelError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {key_heads}"
            )
        theta, factor = _rope(table)
        size, padding = table.read("vocab_size", is_positive_int, 0), values.get("pad_token_id")
        return cls(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=table.read("intermediate_size", is_positive_int, 0),
            num_hidden_layers=table.read("num_hidden_layers", is_positive_int, 0),
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            max_position_embeddings=table.read("max_position_embeddings", is_positive_int, 2048),
            rms_norm_eps=table.read("rms_norm_eps", is_positive_number, 1e-6),
            rope_theta=theta,
            rope_factor=factor,
            tie_word_embeddings=table.read("tie_word_embeddings", is_bool, False),
            eos_token_id=table.read("eos_token_id", is_int, 2),
            # published configs have -1, or the id of a token that was added without a row
            pad_token_id=padding if type(padding) is int and 0 <= padding < size else 0,
        )


def _refuse_a_window(table: ConfigTable) -> None:
    """Mistral is Llama but for other defaults, and for the window that a token sees back to."""
    for key in ("num_key_value_heads", "max_position_embeddings", "sliding_window"):
        if key not in table.values:
            raise ModelError(f"{table.where} has no {key}, whose default in Mistral is not implemented here: add it")
    window, positions = table.values["sliding_window"], table.read("max_position_embeddings", is_positive_int, 0)
    if window is not None and table.read("sliding_window", is_positive_int, 0) < positions:
        raise ModelError(
            f"{table.where}: a sliding_window of {window} among {positions} positions (Mistral) is not implemented "
            "here: give a model without one"
        )


def _rope(table: ConfigTable) -> tuple[float, float]:
    """Base and linear factor of the rotary positions, from the older keys or from ``rope_parameters``."""
    newer = table.values.get("rope_parameters")
    rope = ConfigTable(newer, f"{table.where}: rope_parameters") if newer is not None else table
    theta = float(rope.read("rope_theta", is_positive_number, table.read("rope_theta", is_positive_number, 10000.0)))
    scaling = newer if newer is not None else table.values.get("rope_scaling")
    if scaling is None:
        return theta, 1.0
    inner = ConfigTable(scaling, f"{table.where}: rope_scaling")
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    if kind == "default":
        return theta, 1.0
    if kind != "linear":
        raise ModelError(f"{inner.where}: type {kind!r:.40} is not implemented here, only linear")
    return theta, float(inner.read("factor", is_positive_number, 1.0))


@dataclass(frozen=True)
class LlavaConfig:
    """What joins image and text.

    Attributes:
        text: of the decoder.
        mm_hidden_size: width of the image features.
        mm_projector_type: ``linear``, ``mlp<k>x_gelu`` or ``identity``.
        mm_vision_select_layer: hidden state of the tower that is taken, from its end: -1 the last.
        mm_vision_select_feature: ``patch``, or ``cls_patch`` with the class token.
        padding_side: of a batch of joined sequences.
        max_length: rows of a joined sequence; None: any.
    """

    text: LlamaConfig
    mm_hidden_size: int = 1024
    mm_projector_type: str = "mlp2x_gelu"
    mm_vision_select_layer: int = -2
    mm_vision_select_feature: str = "patch"
    padding_side: str = "right"
    max_length: int | None = None

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str = "config.json") -> "LlavaConfig":
        """From a ``config.json`` of transformers' layout, with ``text_config`` and ``vision_config`` inside.

        The image token and what is filled up behind it have no rows here: the vocabulary ends before them.

        Raises:
            ModelError: names the key that is missing, of a wrong kind or asks for what is not implemented.
        """
        table = ConfigTable(values, where)
        table.need("projector_hidden_act", ("gelu",), "gelu")
        strategy = table.need("vision_feature_select_strategy", ("default", "full"), "default")
        text, vision = (
            ConfigTable(values.get(f"{part}_config"), f"{where}: {part}_config") for part in ("text", "vision")
        )
        image_token = values.get("image_token_index", values.get("image_token_id"))
        if not is_positive_int(image_token):
            raise ModelError(f"{where}: image_token_index must be a whole number above 0, got {image_token!r:.40}")
        defaults = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
        sizes = {**defaults, **text.values, "vocab_size": image_token}
        return cls(
            text=LlamaConfig.from_dict(sizes, text.where),
            mm_hidden_size=vision.read("hidden_size", is_positive_int, 768),
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=table.read("vision_feature_layer", is_int, -2),
            mm_vision_select_feature="patch" if strategy == "default" else "cls_patch",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> "LlavaConfig":
        """From a ``config.json`` of LLaVA's own layout.

        Raises:
            ModelError: names the key that is of a wrong kind or asks for what is not implemented.
        """
        table = ConfigTable(values, where)
        for key in ("mm_use_im_start_end", "mm_use_im_patch_token"):
            table.need(key, (False, None), False)
        projector = values.get("mm_projector_type", "linear")
        if not isinstance(projector, str):
            raise ModelError(f"{where}: mm_projector_type must be a text, got {projector!r:.40}")
        longest = values.get("tokenizer_model_max_length")
        if longest is not None and not is_positive_int(longest):
            raise ModelError(f"{where}: tokenizer_model_max_length must be a whole number above 0, got {longest!r:.40}")
        return cls(
            text=LlamaConfig.from_dict(values, where),
            mm_hidden_size=table.read("mm_hidden_size", is_positive_int, 1024),
            mm_projector_type=projector,
            mm_vision_select_layer=table.read("mm_vision_select_layer", is_int, -2),
            mm_vision_select_feature=table.need("mm_vision_select_feature", FEATURES, "patch"),
            padding_side=table.need("tokenizer_padding_side", ("right", "left"), "right"),
            max_length=longest,
        )
