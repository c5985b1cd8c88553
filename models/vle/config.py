"""Every size of a VLE model, read from its ``config.json``; what is not implemented is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.clip_vision import CLIPVisionConfig
from models.config_values import ConfigTable, is_fraction, is_int, is_positive_int, is_positive_number
from models.errors import ModelError


@dataclass(frozen=True)
class VLETextConfig:
    """Sizes of the DeBERTa-v2 tower with the options of DeBERTa-v3; names as in ``text_config``."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    max_positions: int  # distances beyond it fall into the last bucket
    position_buckets: int
    layer_norm_eps: float = 1e-7
    pad_token_id: int = 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> "VLETextConfig":
        """From the object of a ``config.json``; absent keys mean what the class DebertaV2Config says.

        Raises:
            ModelError: names the key.
        """
        table = ConfigTable(values, where)
        table.need("model_type", ("deberta-v2",), "deberta-v2")
        table.need("hidden_act", ("gelu",), "gelu")
        table.need("relative_attention", (True,), False)
        table.need("share_att_key", (True,), False)
        table.need("norm_rel_ebd", ("layer_norm",), "none")
        table.need("position_biased_input", (False,), True)
        table.need("type_vocab_size", (0,), 0)
        table.need("conv_kernel_size", (0, None), 0)
        table.need("embedding_size", (None, values.get("hidden_size")), None)
        terms = values.get("pos_att_type") or []
        terms = terms.lower().split("|") if isinstance(terms, str) else terms
        if not isinstance(terms, list | tuple) or sorted(map(str, terms)) != ["c2p", "p2c"]:
            raise ModelError(f"{where}: pos_att_type {terms!r:.80} is not implemented here, only ['p2c', 'c2p']")
        positions = table.read("max_position_embeddings", is_positive_int, 512)
        relative = table.read("max_relative_positions", is_int, -1)
        config = cls(
            vocab_size=table.read("vocab_size", is_positive_int, 128100),
            hidden_size=table.read("hidden_size", is_positive_int, 1536),
            num_hidden_layers=table.read("num_hidden_layers", is_positive_int, 24),
            num_attention_heads=table.read("num_attention_heads", is_positive_int, 24),
            intermediate_size=table.read("intermediate_size", is_positive_int, 6144),
            max_position_embeddings=positions,
            max_positions=relative if relative >= 1 else positions,
            position_buckets=table.read("position_buckets", is_positive_int, -1),
            layer_norm_eps=table.read("layer_norm_eps", is_positive_number, 1e-7),
            pad_token_id=table.read("pad_token_id", is_int, 0),
            hidden_dropout_prob=table.read("hidden_dropout_prob", is_fraction, 0.1),
            attention_probs_dropout_prob=table.read("attention_probs_dropout_prob", is_fraction, 0.1),
            initializer_range=table.read("initializer_range", is_positive_number, 0.02),
        )
        table.need_even_heads(config.hidden_size, config.num_attention_heads)
        if not 0 <= config.pad_token_id < config.vocab_size:
            raise ModelError(
                f"{where}: pad_token_id {config.pad_token_id} is outside of vocab_size {config.vocab_size}"
            )
        if config.position_buckets // 2 >= config.max_positions - 1:
            raise ModelError(
                f"{where}: position_buckets {config.position_buckets} leave no room below max_position_embeddings "
                f"{config.max_positions}"
            )
        return config


@dataclass(frozen=True)
class VLEConfig:
    """Sizes of the whole; the keys at the top of ``config.json`` describe the fusion layers."""

    text: VLETextConfig
    vision: CLIPVisionConfig
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    layer_norm_eps: float = 1e-12
    num_token_types: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    labels: tuple[str, ...] | None = None  # answers by class, from ``id2label``; None without that key

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> "VLEConfig":
        """From the content of a ``config.json``.

        ``id2label`` may be an object with the keys "0", "1", ... or a list.

        Raises:
            ModelError: names the key that is missing, of a wrong kind, or asks for what is not implemented.
        """
        table = ConfigTable(values, where)
        table.need("model_type", ("vle",), "vle")
        table.need("hidden_act", ("gelu",), "gelu")
        for key in ("text_config", "vision_config"):
            if key not in values:
                raise ModelError(f"{where} has no {key}: give the config.json of a VLE model")
        config = cls(
            text=VLETextConfig.from_dict(values["text_config"], f"{where}: text_config"),
            vision=CLIPVisionConfig.from_dict(values["vision_config"], f"{where}: vision_config"),
            hidden_size=table.read("hidden_size", is_positive_int, 768),
            num_hidden_layers=table.read("num_hidden_layers", is_positive_int, 6),
            num_attention_heads=table.read("num_attention_heads", is_positive_int, 12),
            intermediate_size=table.read("intermediate_size", is_positive_int, 3072),
            layer_norm_eps=table.read("layer_norm_eps", is_positive_number, 1e-12),
            num_token_types=table.read("num_token_types", is_positive_int, 2),
            hidden_dropout_prob=table.read("hidden_dropout_prob", is_fraction, 0.1),
            attention_probs_dropout_prob=table.read("attention_probs_dropout_prob", is_fraction, 0.1),
            initializer_range=table.read("initializer_range", is_positive_number, 0.02),
            labels=_labels(values.get("id2label"), where),
        )
        table.need_even_heads(config.hidden_size, config.num_attention_heads)
        return config


def _labels(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        try:
            numbered = {int(key): label for key, label in value.items()}
        except ValueError:
            raise ModelError(f"{where}: the keys of id2label must be whole numbers, got {list(value)[:3]}") from None
        gap = next((place for place in range(len(numbered)) if place not in numbered), None)
        if gap is not None:
            raise ModelError(f"{where}: id2label has {len(value)} entries but none for {gap}: number them from 0 on")
        value = [numbered[place] for place in range(len(numbered))]
    if not isinstance(value, list) or not value or not all(isinstance(label, str) for label in value):
        raise ModelError(f"{where}: id2label must name an answer for each class, got {value!r:.80}")
    return tuple(value)
