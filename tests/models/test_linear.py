"""The linear layer against torch's own, on the way that large products take."""

import io

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models import linear as linear_module
from models.linear import Linear


@pytest.fixture
def onednn_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small products take the way of large ones on AMD's processors."""
    monkeypatch.setattr(linear_module, "_MIN_PRODUCTS_FOR_ONEDNN", 1)
    monkeypatch.setattr(linear_module, "_PREFERS_ONEDNN", True)


@pytest.mark.usefixtures("onednn_always")
@pytest.mark.parametrize("shape", [(300, 24), (2, 200, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_large_cpu_products_equal_torch_forward_and_backward(shape: tuple[int, ...], bias: bool):
    """Measured: 1e-6 of the largest entry."""
    torch.manual_seed(0)
    linear = Linear(shape[-1], 40, bias=bias)
    x = torch.randn(*shape, requires_grad=True)
    weights = torch.randn(*shape[:-1], 40)
    results = []
    for product in (linear, lambda x: F.linear(x, linear.weight, linear.bias)):
        out = product(x)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [x, *linear.parameters()])])
    for ours, expected in zip(*results, strict=True):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.mark.usefixtures("onednn_always")
def test_a_slice_of_wider_rows_gives_the_same_gradients():
    torch.manual_seed(0)
    linear, wide = Linear(24, 40), torch.randn(300, 64, requires_grad=True)
    ours = torch.autograd.grad(linear(wide[:, 8:32]).pow(2).sum(), [wide, linear.weight])
    expected = torch.autograd.grad(
        F.linear(wide[:, 8:32], linear.weight, linear.bias).pow(2).sum(), [wide, linear.weight]
    )
    for grad, whole in zip(ours, expected, strict=True):
        assert (grad - whole).abs().max() <= 5e-6 * whole.abs().max()


@pytest.mark.usefixtures("onednn_always")
def test_a_frozen_linear_layer_computes_no_weight_gradient():
    linear = Linear(16, 8).requires_grad_(False)
    x = torch.randn(256, 16, requires_grad=True)
    linear(x).sum().backward()
    assert linear.weight.grad is None
    assert linear.bias.grad is None
    assert_close(x.grad, linear.weight.sum(0).expand(256, 16))


@pytest.mark.usefixtures("onednn_always")
def test_under_autocast_a_linear_layer_computes_in_the_lower_precision():
    linear = Linear(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(256, 16)).dtype == torch.bfloat16


@pytest.mark.parametrize("prefers", [True, False])
def test_only_amds_processors_take_onednns_way(prefers: bool, monkeypatch: pytest.MonkeyPatch):
    """On Intel's torch's own products are the faster ones."""
    taken = []
    product = linear_module.onednn_product
    monkeypatch.setattr(linear_module, "onednn_product", lambda *inputs: taken.append(1) or product(*inputs))
    monkeypatch.setattr(linear_module, "_PREFERS_ONEDNN", prefers)
    linear, x = Linear(300, 300), torch.randn(300, 300, requires_grad=True)
    linear(x).sum().backward()
    assert len(taken) == (3 if prefers else 0)


@pytest.mark.parametrize(
    ("lines", "maker"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n\nvendor_id\t: other\n", "AuthenticAMD"),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\n", "GenuineIntel"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", ""),  # Arm
        (None, "AuthenticAMD"),  # Windows has no such file
    ],
)
def test_the_maker_of_the_processor(lines: str | None, maker: str, monkeypatch: pytest.MonkeyPatch):
    def read(name: str, **options: str) -> io.StringIO:
        assert name == "/proc/cpuinfo"
        if lines is None:
            raise FileNotFoundError(name)
        return io.StringIO(lines)

    monkeypatch.setattr(linear_module, "open", read, raising=False)
    monkeypatch.setattr(linear_module.platform, "processor", lambda: "AMD64 Family 25 Model 17, AuthenticAMD")
    assert linear_module._maker_of_the_processor() == maker
