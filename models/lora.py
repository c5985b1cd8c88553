"""Low-rank adapters (Hu et al. 2021) for linear layers of any model, with peft's file names on disk.

An adapted layer keeps the name of its weight; beside it stand ``lora_A.weight`` and ``lora_B.weight``, which peft's
files have behind ``base_model.model.``. The frozen weight takes no gradient.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.config_values import ConfigTable, is_fraction, is_positive_int, is_positive_number
from models.errors import ModelError
from models.linear import Linear, linear
from models.quantized import QuantizedLinear, QuantizedWeight

PEFT_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight")
_OF_DEFAULT = re.compile(r"(\.lora_[AB])\.default\.weight$")  # so some files call the only adapter
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
        target_modules: the adapted layers by their names or the ends of them, or one pattern of whole names.
        base_model_name_or_path: what the adapter belongs to.
        exclude_modules: layers that are left alone all the same; given in the same way.
        modules_to_save: parts of the model that the adapter's file brings whole, by the ends of their names.
    """

    r: int = 64
    lora_alpha: float = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] | str = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    base_model_name_or_path: str = ""
    exclude_modules: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Factor of the adapter."""
        return self.lora_alpha / self.r

    def adapts(self, name: str) -> bool:
        """Whether peft adapts a linear layer of this name: exclusions and whole parts win over targets."""
        if any(f".{part}." in f".{name}." for part in self.modules_to_save):
            return False
        return _fits(self.target_modules, name) and not _fits(self.exclude_modules, name)

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
        for key in ("layers_to_transform", "layers_pattern", "layer_replication"):
            table.need(key, (None, []), None)
        for key in ("target_parameters", "trainable_token_indices", "alora_invocation_tokens"):
            table.need(key, (None, [], {}), None)
        for key in ("use_bdlora", "arrow_config", "kasa_config", "monteclora_config"):
            table.need(key, (None, False, {}), None)
        targets = _names(table, "target_modules")
        if not targets or targets == "all-linear":
            raise ModelError(f"{where}: target_modules must be names or a pattern of names, got {targets!r:.80}")
        saved = _names(table, "modules_to_save")
        if isinstance(saved, str):
            raise ModelError(f"{where}: modules_to_save must be a list of names, got {saved!r:.80}")
        return cls(
            r=table.read("r", is_positive_int, 8),
            lora_alpha=table.read("lora_alpha", is_positive_number, 8),
            lora_dropout=table.read("lora_dropout", is_fraction, 0.0),
            target_modules=targets,
            base_model_name_or_path=str(values.get("base_model_name_or_path") or ""),
            exclude_modules=_names(table, "exclude_modules"),
            modules_to_save=saved,
        )

    def as_dict(self) -> dict[str, Any]:
        """Content of ``adapter_config.json``, as peft reads it."""
        targets, excluded = self.target_modules, self.exclude_modules
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model_name_or_path,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "bias": "none",
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "inference_mode": True,
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": list(self.modules_to_save) or None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "rank_pattern": {},
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": False,
            "auto_mapping": None,
            "revision": None,
            # a key that older versions of peft do not know
            **({"exclude_modules": excluded if isinstance(excluded, str) else list(excluded)} if excluded else {}),
        }


def _names(table: ConfigTable, key: str) -> tuple[str, ...] | str:
    """A list of names, none of them too, or a pattern of names."""
    value = table.values.get(key) or []
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    try:
        re.compile(value)
    except (re.error, TypeError):
        raise ModelError(f"{table.where}: {key} must be names or a pattern of names, got {value!r:.80}") from None
    return value


def _fits(rule: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in rule)


class _DroppedProduct(torch.autograd.Function):
    """dropout(x) A^T, which keeps x, that others keep as well, and a mask of a byte a value; no dropped copy of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dropout: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, dropout, True)  # noqa: FBT003 (no keyword)
        ctx.save_for_backward(x, mask, weight)
        ctx.scale = 1 / (1 - dropout)
        return linear(dropped if torch.is_autocast_enabled(x.device.type) else dropped.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, mask, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            product = linear(grad, weight.to(grad.dtype).t())
            grad_x = torch.ops.aten.native_dropout_backward(product, mask, ctx.scale).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dropped = torch.ops.aten.native_dropout_backward(x, mask, ctx.scale).to(grad.dtype)
            rows = grad.flatten(0, -2).t().contiguous()
            grad_weight = linear(rows, dropped.flatten(0, -2).t()).to(weight.dtype)
        return grad_x, grad_weight, None


class _Down(Linear):
    """A, behind dropout in training."""

    def __init__(self, *sizes: int, dropout: float, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self._dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self._dropout:
            return _DroppedProduct.apply(x, self.weight, self._dropout)
        if not torch.is_autocast_enabled(x.device.type):  # which casts by itself, and would undo it
            x = x.to(self.weight.dtype)
        return super().forward(x)


class LoRALinear(Linear):
    """A frozen linear layer with a low-rank change: y = W x + b + scale B A dropout(x)."""

    def __init__(self, base: nn.Linear | QuantizedLinear, config: LoRAConfig) -> None:
        """Take over the weight of ``base``, dense or quantized; the change starts as nothing."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        device, dropout = base.weight.device, config.lora_dropout
        self.lora_A = _Down(base.in_features, config.r, bias=False, device=device, dropout=dropout)
        self.lora_B = Linear(config.r, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self._scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        change = self.lora_B(self._scale * self.lora_A(x))  # scaled where it is narrow
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


def add_adapters(module: nn.Module, config: LoRAConfig, names: Iterable[str] | None = None) -> list[str]:
    """Replace linear layers by adapted ones; returns their names.

    Args:
        module: whose layers they are.
        config: rank, scale and, where no names are given, targets.
        names: of the layers; None: those that the targets mean.

    Raises:
        ModelError: a target or a name that no linear layer has.
    """
    layers = [
        name for name, part in module.named_modules()
        if isinstance(part, nn.Linear | QuantizedLinear) and not isinstance(part, LoRALinear)
    ]  # fmt: skip
    if names is None:
        found, targets = [name for name in layers if config.adapts(name)], config.target_modules
        rules = {targets: targets} if isinstance(targets, str) else {name: (name,) for name in sorted(targets)}
        missing = [target for target, rule in rules.items() if not any(_fits(rule, name) for name in found)]
    else:
        found = list(names)
        missing = sorted(set(found) - set(layers))
    if missing:
        raise ModelError(f"no linear layer is called {missing[0]}: the adapter belongs to another kind of model")
    for name in found:
        module.set_submodule(name, LoRALinear(module.get_submodule(name), config))
    return found


def merge_adapters(module: nn.Module, dtype: torch.dtype | None = None, *, like_original: bool = False) -> int:
    """Put every adapter into its weight, layer by layer, and leave plain layers; returns how many there were.

    Arguments as ``LoRALinear.merged``.
    """
    adapted = [(name, part) for name, part in module.named_modules() if isinstance(part, LoRALinear)]
    for name, part in adapted:
        module.set_submodule(name, part.merged(dtype, like_original=like_original))
    return len(adapted)


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of a model's state, under the names of ``adapter_model.safetensors``."""
    return {PEFT_PREFIX + name: value for name, value in state.items() if name.endswith(_PARTS)}


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Content of ``adapter_model.safetensors`` or ``.bin`` without what peft puts around the model's own names."""
    return {_OF_DEFAULT.sub(r"\1.weight", name.removeprefix(PEFT_PREFIX)): value for name, value in state.items()}


def load_adapters(module: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Take the adapters of a peft file.

    Args:
        module: after ``add_adapters``.
        given: adapters by ``plain_names``.

    Raises:
        ModelError: adapters for other layers or of another rank, or some are missing.
    """
    own = {name: value for name, value in module.state_dict().items() if name.endswith(_PARTS)}
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
