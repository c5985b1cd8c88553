"""Frozen linear layers whose weight takes 4 or 8 bits a value, made dense again for each product.

Sources: Dettmers et al. 2023 (QLoRA: 4-bit NormalFloat, double quantization), Dettmers et al. 2022 (8-bit data type of
the scales). Codes of 4 bits, their order and what they stand for are those of bitsandbytes; its 8-bit layers also
quantize their input, ours the weight alone.

The codes are frozen parameters and no buffers: DistributedDataParallel sends every buffer with every forward pass.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.errors import ModelError
from models.linear import Linear, linear

BLOCK = 64  # weights with one scale
GROUP = 256  # scales with one scale of their own
_BLOCKS_AT_ONCE = 1 << 16  # bounds what quantizing needs beside the weight to some 50 MB
_TINIEST = 1e-38  # stands for the largest value of a block of zeros
_TABLES: dict[tuple[str, torch.device], Tensor] = {}  # a plain one: torch.compile looks through functools.cache


def nf4_levels() -> Tensor:
    """(16,) float32, ascending from -1 to 1: quantiles of the normal distribution, one of them exactly zero.

    Appendix E of the paper. Half a level is cut off at the ends, which lie at infinity; the published values come from
    this rounded offset and from float32 quantiles.
    """
    offset = 0.9677083  # 1 - (1/30 + 1/32) / 2
    negative, positive = (
        torch.special.ndtri(torch.linspace(offset, 0.5, count, device="cpu")[:-1].double()) for count in (8, 9)
    )
    levels = torch.cat([-negative, negative.new_zeros(1), positive.flip(0)]).float()
    return levels / levels.max()


def dynamic_levels() -> Tensor:
    """(256,) float32, ascending: each decade from 1e-6 to 1 has twice the levels of the one below, of both signs."""
    positive = []
    for decade in range(7):
        borders = torch.linspace(0.1, 1, 2**decade + 1, device="cpu")
        positive.append((borders[:-1] + borders[1:]) / 2 * 10.0 ** (decade - 6))
    half = torch.cat(positive)
    return torch.cat([-half, half, half.new_tensor([0, 1])]).sort().values


class QuantizedWeight(nn.Module):
    """An (out, in) matrix in codes; stands where a linear layer has its ``weight``.

    4 bits: ``codes`` (N, 32) uint8 for N blocks of 64 values in the order of rows, the first of two in the high half,
    and ``scales`` (N,), the largest absolute values; with ``double_quant`` these are 8-bit codes, too, of what is left
    without their mean, with ``group_scales`` (ceil(N / 256),) and ``mean_scale`` ().
    8 bits: ``codes`` (out, in) int8 and ``scales`` (out, 1); ``double_quant`` has nothing to gain and is left out.

    ``half()`` and the like leave it alone, since its numbers are codes and float32 scales.
    """

    def __init__(self, weight: Tensor, bits: int, *, double_quant: bool) -> None:
        """Quantize ``weight`` where it lies.

        Raises:
            ModelError: other bits, no dense matrix of fractions, or values that are not finite.
        """
        super().__init__()
        _check(weight, bits)
        self.shape, self.dtype, self.bits = weight.shape, weight.dtype, bits
        self.double_quant = double_quant and bits == 4
        with torch.no_grad():
            codes, scales = _to_nf4(weight) if bits == 4 else _to_int8(weight)
            if not torch.isfinite(scales).all():
                raise ModelError("the weight holds NaN or infinite values: its file is broken")
            self.codes = nn.Parameter(codes, requires_grad=False)
            if self.double_quant:
                mean = scales.mean()
                scales, group_scales = _to_codes(_blocks(scales - mean, GROUP), _table("dynamic", scales.device))
                scales = scales.flatten()[: len(codes)].clone()
                self.group_scales = nn.Parameter(group_scales, requires_grad=False)
                self.mean_scale = nn.Parameter(mean, requires_grad=False)
            self.scales = nn.Parameter(scales, requires_grad=False)

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    @torch.no_grad()
    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """(out, in): computed in float32 and rounded once."""
        if self.bits == 8:
            return torch.mul(self.codes, self.scales).to(dtype)
        # two levels are fetched with one look-up, as if they were one number of 8 bytes
        pairs = _table("nf4_pairs", self.device).index_select(0, self.codes.flatten().int())
        values = pairs.view(torch.float32).view(-1, BLOCK).mul_(self._scales()[:, None]).to(dtype)
        return values.flatten()[: self.shape.numel()].view(self.shape)

    def _scales(self) -> Tensor:
        if not self.double_quant:
            return self.scales
        levels = _table("dynamic", self.device).index_select(0, self.scales.int())
        return levels * self.group_scales.repeat_interleave(GROUP)[: len(levels)] + self.mean_scale

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X weight^T + bias, (..., in) -> (..., out), in the dtype of ``x`` or of autocast; no gradient of itself."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        return _Product.apply(x, None if bias is None else bias.to(x.dtype), self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keeping_dtype(value: Tensor) -> Tensor:
            result = fn(value)
            return result if result.dtype == value.dtype else value.to(result.device)

        return super()._apply(keeping_dtype, recurse)

    def extra_repr(self) -> str:
        """Size and bits."""
        return f"{tuple(self.shape)}, bits={self.bits}, double_quant={self.double_quant}"


class _Product(torch.autograd.Function):
    """Keeps nothing for the backward pass but where the codes are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: QuantizedWeight) -> Tensor:
        ctx.weight = weight
        return linear(x, weight.dequantized(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = linear(grad, ctx.weight.dequantized(grad.dtype).t()) if needs_x else None
        return grad_x, grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None, None


class QuantizedLinear(nn.Module):
    """``nn.Linear`` with a frozen quantized weight."""

    def __init__(self, base: nn.Linear, *, bits: int = 4, double_quant: bool = True) -> None:
        """Take over the bias of ``base``, frozen, and quantize its weight; errors as ``QuantizedWeight``."""
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = QuantizedWeight(base.weight, bits, double_quant=double_quant)
        self.bias = None if base.bias is None else base.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.weight(x, self.bias)


@dataclass(frozen=True)
class QuantizationReport:
    """Names of the quantized layers, and bytes of their weights before and after."""

    layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int


def quantize_layers(
    module: nn.Module,
    which: Callable[[str], bool],
    *,
    bits: int = 4,
    double_quant: bool = True,
    device: torch.device | str | None = None,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> QuantizationReport:
    """Replace linear layers by quantized ones, one after the other, so that never two weights are held twice.

    Adapters come afterwards (``lora.add_adapters``).

    Args:
        module: with dense weights.
        which: says it of the name of each linear layer.
        bits: 4 or 8.
        double_quant: quantize the scales of 4 bits, too, which saves 0.37 bits a weight.
        device: where to quantize and leave them, such as a GPU too small for the dense model; None: where they lie.
        progress: sees the names as they are worked off, such as tqdm.

    Raises:
        ModelError: nothing to quantize, or a layer that is no plain linear one with finite dense weights.
    """
    kinds = (nn.Linear, QuantizedLinear)
    names = [name for name, part in module.named_modules() if isinstance(part, kinds) and which(name)]
    if not names:
        raise ModelError("no linear layer is to be quantized: check which were chosen")
    for name in names:
        part = module.get_submodule(name)
        if type(part) not in (nn.Linear, Linear):
            what = type(part).__name__
            raise ModelError(f"{name} is a {what}: only plain linear layers are quantized, once and before adapters")
        _check(part.weight, bits, name)
    del part  # which would hold one weight too long
    before = after = 0
    for name in progress(names):
        weight, quantized = _quantize_layer(module, name, bits, double_quant, device)
        before, after = before + weight, after + quantized
    return QuantizationReport(tuple(names), before, after)


def _quantize_layer(
    module: nn.Module, name: str, bits: int, double_quant: bool, device: torch.device | str | None
) -> tuple[int, int]:
    """Bytes of its weight before and after."""
    layer = module.get_submodule(name)
    before = layer.weight.nbytes
    try:
        quantized = QuantizedLinear(layer.to(device), bits=bits, double_quant=double_quant)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None
    module.set_submodule(name, quantized)
    return before, sum(part.nbytes for part in quantized.weight.parameters())


def _check(weight: Tensor, bits: int, name: str = "the weight") -> None:
    if bits not in (4, 8):
        raise ModelError(f"bits must be 4 or 8, got {bits}")
    if weight.is_meta:
        raise ModelError(f"{name} has no values yet: load the weights before quantizing")
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ModelError(f"{name} must be a matrix of fractions, got {tuple(weight.shape)} of {weight.dtype}")


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    table = _table("nf4", weight.device)
    parts = (_to_codes(part, table) for part in _blocks(weight, BLOCK).split(_BLOCKS_AT_ONCE))
    codes, scales = (torch.cat(kind) for kind in zip(*parts, strict=True))
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = [], []
    for part in weight.split(max(1, _BLOCKS_AT_ONCE * BLOCK // weight.shape[1])):
        scale = part.abs().amax(1, keepdim=True).float() / 127
        codes.append(torch.round(part.float() / scale.clamp_min(_TINIEST)).to(torch.int8))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def _to_codes(blocks: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(N, S) -> number of the level (L,) that is nearest to each value over the block's largest (N,)."""
    blocks = blocks.float()
    scales = blocks.abs().amax(1)
    values = (blocks * scales.clamp_min(_TINIEST).reciprocal()[:, None]).clamp_(-1, 1)
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8), scales


def _blocks(values: Tensor, size: int) -> Tensor:
    """(..., ) -> (N, size), filled up with zeros."""
    flat = values.detach().reshape(-1)
    return F.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _table(kind: str, device: torch.device) -> Tensor:
    """Levels, made once for each device."""
    if (kind, device) not in _TABLES:
        levels = dynamic_levels() if kind == "dynamic" else nf4_levels()
        if kind == "nf4_pairs":  # (256,) of two float32 each, in the order of the codes
            pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
            levels = pairs.view(torch.int64).flatten()
        _TABLES[kind, device] = levels.to(device)
    return _TABLES[kind, device]
