"""CLIP's image transformer with its original key names; the image tower of VLE and of LLaVA.

Source: Radford et al. 2021; key names and arithmetic of transformers' CLIPVisionModel.

Letters: B batch, S image side, P patch side, G = S // P patches per side, N = G * G + 1 tokens, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config_values import ConfigTable, is_fraction, is_positive_int
from models.errors import ModelError
from models.layers import attention, join_heads, split_heads
from models.linear import Linear
from models.recompute import NOTHING

_EPS = 1e-5  # the published configs say the same; transformers 4.26 reads no other


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of the tower; names as in ``vision_config`` of a ``config.json``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3
    hidden_act: str = "quick_gelu"
    attention_dropout: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "vision_config") -> "CLIPVisionConfig":
        """From a ``config.json``; a whole CLIP config with a ``vision_config`` inside is taken too.

        Raises:
            ModelError: names the key that is missing, of a wrong kind, or asks for what is not implemented.
        """
        table = ConfigTable(values, where)
        if values.get("model_type") == "clip" and isinstance(values.get("vision_config"), Mapping):
            table = ConfigTable(values["vision_config"], f"{where}.vision_config")
        table.need("model_type", ("clip_vision_model", "clip"), "clip_vision_model")
        table.need("layer_norm_eps", (_EPS,), _EPS)
        config = cls(
            hidden_size=table.read("hidden_size", is_positive_int, 768),
            num_hidden_layers=table.read("num_hidden_layers", is_positive_int, 12),
            num_attention_heads=table.read("num_attention_heads", is_positive_int, 12),
            intermediate_size=table.read("intermediate_size", is_positive_int, 3072),
            image_size=table.read("image_size", is_positive_int, 224),
            patch_size=table.read("patch_size", is_positive_int, 32),
            num_channels=table.read("num_channels", is_positive_int, 3),
            hidden_act=table.need("hidden_act", tuple(_ACTIVATIONS), "quick_gelu"),
            attention_dropout=table.read("attention_dropout", is_fraction, 0.0),
        )
        table.need_even_heads(config.hidden_size, config.num_attention_heads)
        if config.image_size < config.patch_size:
            raise ModelError(f"{where}: image_size {config.image_size} is smaller than patch_size {config.patch_size}")
        return config

    @property
    def grid(self) -> int:
        """Patches per side; what does not fill a patch at the right and at the bottom is not looked at."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Class token and patches."""
        return self.grid**2 + 1


class CLIPVisionTransformer(nn.Module):
    """Patches and a class token through pre-norm layers."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        """Build it with random weights."""
        super().__init__()
        self.config = config
        self.recompute = NOTHING
        self.embeddings = _Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=_EPS)  # spelt so in every checkpoint
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=_EPS)

    def hidden_states(self, pixels: Tensor) -> list[Tensor]:
        """(B, 3, S, S) -> the (B, N, D) tokens before the first layer and after each one, none with the last norm."""
        states = [self.pre_layrnorm(self.embeddings(pixels))]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S), normalised -> (B, N, D), tokens after the last layer, without the last norm."""
        tokens = self.pre_layrnorm(self.embeddings(pixels))
        recompute = self.recompute if tokens.requires_grad else NOTHING  # a frozen tower keeps nothing anyway
        for number, layer in enumerate(self.encoder.layers):
            tokens = recompute.run(number, layer, tokens, draws=self.training)
        return tokens


class _Embeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self._config = config
        side, width = config.patch_size, config.hidden_size
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=side, stride=side, bias=False)
        self.position_embedding = nn.Embedding(config.num_tokens, width)

    def forward(self, pixels: Tensor) -> Tensor:
        side = self._config.image_size
        if pixels.shape[1:] != (self._config.num_channels, side, side):
            raise ModelError(
                f"images of shape {tuple(pixels.shape[1:])}, the model takes {self._config.num_channels, side, side}"
            )
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class _Layer(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=_EPS)
        self.mlp = _MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(self.layer_norm1(tokens))
        return tokens + self.mlp(self.layer_norm2(tokens))


class _Attention(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self._num_heads, self._dropout = config.num_attention_heads, config.attention_dropout
        width = config.hidden_size
        self.k_proj, self.v_proj = Linear(width, width), Linear(width, width)
        self.q_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (split_heads(layer(tokens), self._num_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(join_heads(attention(q, k, v, dropout=self._dropout if self.training else 0.0)))


class _MLP(nn.Module):
    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self._activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self._activation(self.fc1(x)))
