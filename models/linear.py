"""A linear layer that is fast on every CPU: the one place that knows which library multiplies matrices."""

import platform
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Below this many multiplications the overhead of an operator of our own (0.1 ms) outweighs the gain.
_MIN_PRODUCTS_FOR_ONEDNN = 15_000_000
# torch multiplies float32 matrices on x86 with MKL, which gives its fast kernels to Intel's processors only. Measured
# with two threads, GFLOP/s of MKL and of oneDNN: 190 and 360 on an EPYC with AVX-512; on a Xeon with AVX-512 350 and
# 330, and 350 and 170 where a weight is transposed, as in the backward pass. oneDNN's linear op is in every x86 build
# of torch, but has no public name.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _maker_of_the_processor() -> str:
    """``AuthenticAMD``, ``GenuineIntel`` or another; empty where nothing says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:  # Windows: "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"
        return platform.processor().rsplit(", ", 1)[-1]


# by the maker, not by a measurement: the choice decides the last bits of sums, and a resumed run needs the same ones
_PREFERS_ONEDNN = _maker_of_the_processor() == "AuthenticAMD"


class Linear(nn.Linear):
    """``nn.Linear`` that on AMD's CPUs computes large float32 products with oneDNN, forward and backward; else just it.

    The same numbers but for rounding: the largest relative error of a product is 1e-6 where MKL's is 4e-7.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of ``Linear``, (..., in) with (out, in) -> (..., out)."""
    if _use_onednn(x, weight):
        return _onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def has_onednn() -> bool:
    """Whether ``onednn_product`` works in this build of torch."""
    return _ONEDNN_LINEAR is not None


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X weight^T + bias, (..., in) with (out, in) -> (..., out), float32 on the CPU, without gradients.

    ``weight`` must be dense or the transpose of a dense matrix, else oneDNN is 1000 x slower.
    """
    return _ONEDNN_LINEAR(x, weight, bias, "none", [], "")


def fits_onednn(x: Tensor, y: Tensor) -> bool:
    """Whether oneDNN is there, is the faster way, and takes the two: float32 that autocast does not make smaller."""
    return (
        has_onednn()
        and _PREFERS_ONEDNN
        and x.device.type == "cpu"
        and x.dtype == y.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        fits_onednn(x, weight)
        and x.numel() * weight.shape[0] >= _MIN_PRODUCTS_FOR_ONEDNN
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


# an operator of its own, because torch.compile knows oneDNN's only with constant weights
@torch.library.custom_op("plainvl::onednn_linear", mutates_args=())
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return onednn_product(x, weight, bias).contiguous()


@_onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _onednn_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    rows, grad_rows = x.flatten(0, -2).contiguous(), grad.flatten(0, -2)
    grad_x = _onednn_linear(grad, weight.t(), None) if needs_x else None
    grad_weight = _onednn_linear(grad_rows.t(), rows.t(), None) if needs_weight else None
    return grad_x, grad_weight, grad_rows.sum(0) if needs_bias else None


_onednn_linear.register_autograd(_onednn_linear_backward, setup_context=_save_for_backward)
