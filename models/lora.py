"""Low-rank adapters (Hu et al. 2021) for linear layers of any model, with peft's file names on disk.

An adapted layer keeps the name of its weight; beside it stand ``lora_A.weight`` and ``lora_B.weight``, which peft's
files have behind ``base_model.model.``. The frozen weight takes no gradient.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config_values import ConfigTable, is_fraction, is_positive_int, is_positive_number
from models.errors import ModelError
from models.linear import Linear
from models.quantized import QuantizedLinear, QuantizedWeight

PEFT_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight")
# Starts of peft's that leave the base's weight alone. The others (pissa, corda, olora, loftq, lora_ga) take their start
# out of it, which the adapter's file does not say: over the whole weight such an adapter counts it twice.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoRAConfig:
    """Rank and scale.

    Attributes:
        r: rank.
        lora_alpha: the adapter counts alpha / r times.
        lora_dropout: of the adapter's input.
        target_modules: last names of the adapted layers.
        base_model_name_or_path: what the adapter belongs to.
    """

    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    base_model_name_or_path: str = ""

    @property
    def scale(self) -> float:
        """Factor of the adapter."""
        return self.lora_alpha / self.r

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "adapter_config.json") -> "LoRAConfig":
        """From peft's ``adapter_config.json``.

        Raises:
            ModelError: another kind of adapter, or an option that changes the arithmetic and is not implemented.
        """
        table = ConfigTable(values, where)
        table.need("peft_type", ("LORA",), "LORA")
        table.need("bias", ("none",), "none")
        table.need("init_lora_weights", _STARTS, True)
        for key in ("use_dora", "use_rslora", "use_qalora", "fan_in_fan_out", "lora_bias"):
            table.need(key, (False, None), False)
        for key in ("rank_pattern", "alpha_pattern"):
            table.need(key, ({}, None), None)
        for key in ("modules_to_save", "layers_to_transform", "layers_pattern", "layer_replication"):
            table.need(key, (None, []), None)
        for key in ("target_parameters", "trainable_token_indices", "alora_invocation_tokens"):
            table.need(key, (None, [], {}), None)
        for key in ("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"):
            table.need(key, (None, False, {}), None)
        targets = values.get("target_modules")
        if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
            raise ModelError(f"{where}: target_modules must be a list of names, got {targets!r:.80}")
        return cls(
            r=table.read("r", is_positive_int, 8),
            lora_alpha=table.read("lora_alpha", is_positive_number, 8),
            lora_dropout=table.read("lora_dropout", is_fraction, 0.0),
            target_modules=tuple(targets),
            base_model_name_or_path=str(values.get("base_model_name_or_path") or ""),
        )

    def as_dict(self) -> dict[str, Any]:
        """Content of ``adapter_config.json``, as peft reads it."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "bias": "none",
            "target_modules": sorted(self.target_modules),
            "inference_mode": True,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": False,
            "auto_mapping": None,
            "revision": None,
        }


class LoRALinear(Linear):
    """A frozen linear layer with a low-rank change: y = W x + b + scale B A dropout(x)."""

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoRAConfig) -> None:
        """Take over the weight of ``base``, dense or quantized; the change starts as nothing."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.lora_A = Linear(base.in_features, config.r, bias=False, device=base.weight.device)
        self.lora_B = Linear(config.r, base.out_features, bias=False, device=base.weight.device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self._dropout, self._scale = config.lora_dropout, config.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        low = F.dropout(x, self._dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):  # which casts by itself, and would undo it
            low = low.to(self.lora_A.weight.dtype)
        change = self.lora_B(self._scale * self.lora_A(low))  # scaled where it is narrow
        frozen = self.weight(x, self.bias) if isinstance(self.weight, QuantizedWeight) else super().forward(x)
        return frozen + change.to(frozen.dtype)

    @torch.no_grad()
    def change(self) -> Tensor:
        """(out, in) float32: what the adapter adds to the weight."""
        return self._scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None, *, like_original: bool = False) -> Linear:
        """A plain layer with the adapter in its weight, added in float32 and rounded once.

        Of a quantized weight it keeps the error; better merge into the dense weights that were quantized.

        Args:
            dtype: of its weight; None: that of before.
            like_original: round the adapter, the change and the sum to float16, each.
        """
        dtype = dtype or self.weight.dtype
        is_quantized = isinstance(self.weight, QuantizedWeight)
        weight = self.weight.dequantized(torch.float32) if is_quantized else self.weight
        if like_original:
            halves = (part.weight.half().float() for part in (self.lora_B, self.lora_A))
            total = weight.half() + (self._scale * torch.matmul(*halves)).half()
        else:
            total = weight.float() + self.change()
        layer = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(total.to(dtype), requires_grad=False)
        layer.bias = self.bias
        return layer


def add_adapters(module: nn.Module, config: LoRAConfig) -> list[str]:
    """Replace the linear layers whose last name is among the targets; returns their names.

    Raises:
        ModelError: a target that no layer has.
    """
    found = [
        name for name, part in module.named_modules()
        if isinstance(part, nn.Linear | QuantizedLinear) and not isinstance(part, LoRALinear)
        and _last(name) in config.target_modules
    ]  # fmt: skip
    missing = sorted(set(config.target_modules) - {_last(name) for name in found})
    if missing:
        raise ModelError(f"no linear layer is called {missing[0]}: the adapter belongs to another kind of model")
    for name in found:
        _replace(module, name, LoRALinear(module.get_submodule(name), config))
    return found


def merge_adapters(module: nn.Module, dtype: torch.dtype | None = None, *, like_original: bool = False) -> int:
    """Put every adapter into its weight, layer by layer, and leave plain layers; returns how many there were.

    Arguments as ``LoRALinear.merged``.
    """
    adapted = [(name, part) for name, part in module.named_modules() if isinstance(part, LoRALinear)]
    for name, part in adapted:
        _replace(module, name, part.merged(dtype, like_original=like_original))
    return len(adapted)


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of a model's state, under the names of ``adapter_model.safetensors``."""
    return {PEFT_PREFIX + name: value for name, value in state.items() if name.endswith(_PARTS)}


def load_adapters(module: nn.Module, state: Mapping[str, Tensor], *, ignore: Iterable[str] = ()) -> None:
    """Take the adapters of a peft file.

    Args:
        module: after ``add_adapters``.
        state: content of ``adapter_model.safetensors`` or ``.bin``.
        ignore: parts of names that are left out, such as those of an image tower, whose adapters never trained.

    Raises:
        ModelError: adapters for other layers or of another rank, or some are missing.
    """
    own = {name: value for name, value in module.state_dict().items() if name.endswith(_PARTS)}
    given = {}
    for name, value in state.items():
        plain = name.removeprefix(PEFT_PREFIX).replace(".default.weight", ".weight")
        if not any(part in plain for part in ignore):
            given[plain] = value
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, for which there is no place"
        raise ModelError(f"the adapter {what}: its target_modules or its base model differ")
    for name, value in given.items():
        if own[name].shape != value.shape:
            raise ModelError(
                f"the adapter's {name} is {tuple(value.shape)}, here {tuple(own[name].shape)}: another rank or base"
            )
        own[name].copy_(value)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, part)
