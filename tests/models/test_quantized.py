"""Quantized layers: the published levels, nearest codes, what they cost, exact gradients, adapters over them."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from models.clip_vision import CLIPVisionConfig
from models.errors import ModelError
from models.linear import Linear
from models.llava.config import LlavaConfig
from models.llava.llava import LlavaForCausalLM
from models.llava.quantized import quantize_decoder
from models.lora import LoRAConfig, LoRALinear, adapter_state, add_adapters, load_adapters, merge_adapters, plain_names
from models.quantized import (
    QuantizedLinear,
    QuantizedWeight,
    dynamic_levels,
    nf4_levels,
    quantize_layers,
)

PUBLISHED = [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
]  # fmt: skip
KINDS = [(4, False), (4, True), (8, False)]
CONFIG = LoRAConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=("up", "down"))
kinds = pytest.mark.parametrize(("bits", "double_quant"), KINDS)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.other = Linear(20, 30), Linear(30, 20, bias=False), Linear(20, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x + self.down(torch.relu(self.up(x))))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def up_and_down(name: str) -> bool:
    return name in ("up", "down")


def dequantized(layer: QuantizedLinear) -> Linear:
    """A plain frozen layer with the weight that ``layer`` stands for."""
    plain = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None).requires_grad_(False)
    plain.weight.copy_(layer.weight.dequantized(torch.float32))
    plain.bias = layer.bias
    return plain


def quantized_block(bits: int = 4, double_quant: bool = True) -> Block:
    block = Block()
    quantize_layers(block, up_and_down, bits=bits, double_quant=double_quant)
    return block


def test_the_levels_are_the_published_ones_bit_for_bit():
    assert torch.equal(nf4_levels(), torch.tensor(PUBLISHED))


def test_the_levels_of_scales_are_those_of_the_dynamic_data_type():
    levels = dynamic_levels()
    assert torch.equal(levels.sort().values, levels)
    assert len(levels.unique()) == 256
    assert {0.0, 1.0} <= set(levels.tolist())
    assert torch.equal(levels[levels < 0], -levels[(levels > 0) & (levels < 1)].flip(0))
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        assert ((levels > low) & (levels < high)).sum() == 2**decade


@pytest.mark.parametrize("shape", [(64, 64), (3, 5), (1, 1), (7, 19), (130, 65)])
def test_each_value_has_the_nearest_level_of_its_block(shape):
    weight = torch.randn(shape)
    quantized = QuantizedWeight(weight, 4, double_quant=False)
    levels, found = torch.tensor(PUBLISHED, dtype=torch.float64), quantized.dequantized(torch.float32)
    for block, values in zip(weight.flatten().split(64), found.flatten().split(64), strict=True):
        scale = block.abs().max()
        nearest = (block.double()[:, None] / scale.double() - levels).abs().argmin(1)
        assert torch.equal(values, levels.float()[nearest] * scale)
    # the farthest is half of the widest gap away, which is between -1 and its neighbour
    assert (found - weight).abs().max() <= 0.152 * weight.abs().max()


def test_the_first_of_two_codes_is_in_the_high_half():
    quantized = QuantizedWeight(torch.tensor([[1.0, -1.0, 0.0, 0.3379]]), 4, double_quant=False)
    assert quantized.codes.shape == (1, 32)
    assert quantized.codes[0, :2].tolist() == [0xF0, 0x7B]


def test_scales_of_doubly_quantized_weights_are_near_the_true_ones():
    weight = torch.randn(257, 130) * torch.rand(257, 1)  # two groups of scales, the last of them not full
    once, twice = (QuantizedWeight(weight, 4, double_quant=double) for double in (False, True))
    assert torch.equal(once.codes, twice.codes)
    left = once.scales - once.scales.mean()
    for number, (group, code) in enumerate(zip(left.split(256), twice.scales.split(256), strict=True)):
        scale = group.abs().max()
        nearest = (group[:, None] / scale - dynamic_levels()).abs().min(1).values * scale
        restored = dynamic_levels()[code.int()] * twice.group_scales[number]
        assert_close((restored - group).abs(), nearest, atol=1e-6, rtol=0)
    dense = twice.dequantized(torch.float32)
    assert 0 < (dense - once.dequantized(torch.float32)).abs().max() < 0.02 * weight.abs().max()


def test_eight_bits_round_to_255_steps_of_each_row():
    weight = torch.randn(9, 33) * torch.logspace(-6, 2, 9)[:, None]
    quantized = QuantizedWeight(weight, 8, double_quant=True)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((quantized.dequantized(torch.float32) - weight).abs() <= step * 0.5001).all()
    assert quantized.codes.abs().amax(1).tolist() == [127] * 9


@kinds
def test_what_is_zero_stays_zero_and_half_precision_is_rounded_once(bits, double_quant):
    weight = torch.randn(4, 64).bfloat16()
    weight[1:3] = 0
    quantized = QuantizedWeight(weight, bits, double_quant=double_quant)
    wide = quantized.dequantized(torch.float32)
    assert not wide[1:3].any()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(quantized.dequantized(dtype), wide.to(dtype))


@pytest.mark.parametrize(("bits", "double_quant", "expected"), [(4, True, 4.127), (4, False, 4.5), (8, False, 8.0625)])
def test_bits_of_a_weight(bits, double_quant, expected):
    block = nn.Sequential(nn.Linear(512, 512, dtype=torch.bfloat16))
    report = quantize_layers(block, lambda name: True, bits=bits, double_quant=double_quant)
    assert report.layers == ("0",)
    assert report.bytes_before == 2 * 512 * 512
    assert report.bytes_after == sum(value.nbytes for name, value in block.state_dict().items() if "weight" in name)
    assert 8 * report.bytes_after / 512**2 == pytest.approx(expected, abs=1e-3)


@kinds
@pytest.mark.parametrize("sizes", [(5, 30, 20), (64, 512, 512)])  # the larger one multiplies with oneDNN
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_dense_layer_exactly(bits, double_quant, sizes, dtype):
    rows, width, out = sizes
    layer = QuantizedLinear(nn.Linear(width, out), bits=bits, double_quant=double_quant)
    dense = dequantized(layer).to(dtype)
    x = torch.randn(2, rows // 2, width, dtype=dtype)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(first), dense(second)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(first.grad, second.grad)
    assert torch.equal(layer(x[0, 0]), dense(x[0, 0]))


def test_a_bias_that_is_trained_all_the_same_gets_its_gradient():
    layer = QuantizedLinear(nn.Linear(8, 6))
    dense = dequantized(layer)
    x, bias = torch.randn(2, 3, 8), layer.bias.requires_grad_()
    expected = torch.autograd.grad(dense(x).square().sum(), bias)
    assert_close(torch.autograd.grad(layer(x).square().sum(), bias), expected)


@kinds
def test_nothing_is_kept_for_the_backward_pass(bits, double_quant):
    layer = QuantizedLinear(nn.Linear(64, 48), bits=bits, double_quant=double_quant)
    kept = []
    x = torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        y = layer(x)
    assert kept == []
    y.sum().backward()
    assert_close(x.grad, dequantized(layer).weight.sum(0).expand(4, 64))


@kinds
def test_autocast_decides_the_dtype_of_the_product(bits, double_quant):
    layer = QuantizedLinear(nn.Linear(64, 48), bits=bits, double_quant=double_quant)
    dense = dequantized(layer).requires_grad_(False)
    first = torch.randn(4, 64, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(first), dense(second)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert first.grad.dtype == torch.float32
    assert torch.equal(first.grad, second.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(first.double()).dtype == dense.double()(first.double()).dtype == torch.float64


def test_recomputed_layers_have_the_same_gradients():
    block = quantized_block()
    add_adapters(block, CONFIG)
    nn.init.normal_(block.up.lora_B.weight)
    x, grads = torch.randn(4, 20), []
    for recompute in (False, True):
        block.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        y.float().square().sum().backward()
        grads.append([parameter.grad for parameter in block.parameters() if parameter.requires_grad])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@kinds
def test_adapters_over_codes_learn_and_nothing_else_moves(bits, double_quant):
    block = quantized_block(bits, double_quant)
    block.other.requires_grad_(False)
    add_adapters(block, CONFIG)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    x, wanted = torch.randn(32, 20), torch.randn(32, 20)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.03), []
    for _ in range(40):
        loss = (block(x) - wanted).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, value in block.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}


@kinds
def test_merged_is_unmerged(bits, double_quant):
    block = quantized_block(bits, double_quant)
    add_adapters(block, CONFIG)
    for layer in (block.up, block.down):
        nn.init.normal_(layer.lora_B.weight, std=0.3)
    x = torch.randn(4, 20)
    before = block(x)
    merge_adapters(block)
    assert {type(layer) for layer in block.children()} == {Linear}
    assert_close(block(x), before, atol=1e-5, rtol=1e-5)


def test_merged_layers_have_the_dtype_of_before_and_are_rounded_once():
    base = nn.Linear(64, 8, dtype=torch.bfloat16)
    layer = LoRALinear(QuantizedLinear(base), CONFIG)
    nn.init.normal_(layer.lora_B.weight)
    expected = layer.weight.dequantized(torch.float32) + layer.change()
    assert torch.equal(layer.merged().weight, expected.bfloat16())


def test_adapters_are_saved_under_the_same_names_and_fit_the_dense_model():
    block, dense = quantized_block(), Block()
    for model in (block, dense):
        add_adapters(model, CONFIG)
    nn.init.normal_(block.up.lora_B.weight)
    saved = adapter_state(block.state_dict())
    assert saved.keys() == adapter_state(dense.state_dict()).keys()
    load_adapters(dense, plain_names(saved))
    assert torch.equal(dense.up.change(), block.up.change())


@kinds
def test_the_state_goes_round_and_comes_back(bits, double_quant):
    block = quantized_block(bits, double_quant)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    other = quantized_block(bits, double_quant)
    x = torch.randn(4, 20)
    assert not torch.equal(other(x), block(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), block(x))
    assert torch.equal(copy.deepcopy(block)(x), block(x))


@kinds
def test_codes_and_scales_are_no_buffers_take_no_gradient_and_keep_their_dtype(bits, double_quant):
    layer = QuantizedLinear(nn.Linear(64, 48), bits=bits, double_quant=double_quant)
    assert list(layer.buffers()) == []  # which DistributedDataParallel would send with every forward pass
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    before = {name: value.clone() for name, value in layer.weight.state_dict().items()}
    layer.half().to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    after = layer.weight.state_dict()
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())
    assert {value.device.type for value in layer.to("meta").parameters()} == {"meta"}


def test_layers_are_replaced_one_after_the_other():
    block = Block()
    weights = {name: weakref.ref(getattr(block, name).weight) for name in ("up", "down")}
    held = []

    def watched(names):
        for name in names:
            held.append([other for other, weight in weights.items() if weight() is not None])
            yield name

    quantize_layers(block, up_and_down, progress=watched)
    assert held == [["up", "down"], ["down"]]
    assert type(block.other) is Linear


def test_what_cannot_be_quantized_is_refused_and_nothing_is_changed():
    block = Block()
    with pytest.raises(ModelError, match="no linear layer is to be quantized"):
        quantize_layers(block, lambda name: False)
    with pytest.raises(ModelError, match="bits must be 4 or 8, got 3"):
        quantize_layers(block, lambda name: name == "up", bits=3)
    with pytest.raises(ModelError, match="bits must be 4 or 8, got 3"):
        QuantizedWeight(torch.ones(2, 2), 3, double_quant=False)
    block.down.to("meta")
    with pytest.raises(ModelError, match="down has no values yet"):
        quantize_layers(block, up_and_down)
    assert type(block.up) is Linear
    block = quantized_block()
    with pytest.raises(ModelError, match="up is a QuantizedLinear: only plain linear layers are quantized, once"):
        quantize_layers(block, lambda name: True)
    add_adapters(block, CONFIG)
    with pytest.raises(ModelError, match="up is a LoRALinear"):
        quantize_layers(block, lambda name: True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bits, value):
    block = Block()
    block.down.weight.data[3, 4] = value
    with pytest.raises(ModelError, match="down: the weight holds NaN or infinite values"):
        quantize_layers(block, up_and_down, bits=bits)


@kinds
def test_of_llava_the_layers_of_the_decoder_are_quantized_and_nothing_else(bits, double_quant):
    text = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40,
        "mm_hidden_size": 32,
    }  # fmt: skip
    vision = CLIPVisionConfig(32, 2, 2, 32, image_size=32, patch_size=16)
    model = LlavaForCausalLM(LlavaConfig.from_dict(text), vision).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids, pixels = torch.tensor([[1, -200, 5, 6, 7]]), torch.randn(1, 3, 32, 32)
    dense = model(ids, pixels).logits
    report = quantize_decoder(model, bits=bits, double_quant=double_quant)
    assert len(report.layers) == 2 * 7
    same = {name for name, value in model.state_dict().items() if name in before and torch.equal(value, before[name])}
    assert {f"{name}.weight" for name in report.layers} == before.keys() - same
    change = (model(ids, pixels).logits - dense).norm() / dense.norm()
    assert 0 < change < (0.2 if bits == 4 else 0.02)
    assert len(add_adapters(model.model.layers, LoRAConfig(r=2))) == 2 * 7
    model(ids, pixels, labels=torch.tensor([[-100, -100, 5, 6, 7]])).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.lora_B.weight.grad.any()
