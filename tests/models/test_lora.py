"""Adapters: nothing at first, all that trains afterwards, the same merged, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from models.errors import ModelError
from models.linear import Linear
from models.lora import LoRAConfig, LoRALinear, adapter_state, add_adapters, load_adapters, merge_adapters, plain_names

CONFIG = LoRAConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=("q_proj", "o_proj"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj, self.other = Linear(5, 6), Linear(6, 5, bias=False), Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x + self.o_proj(torch.relu(self.q_proj(x))))


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def trained(block: Block) -> None:
    for name, parameter in block.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def test_an_untrained_adapter_changes_nothing_at_all(block):
    x = torch.randn(4, 5)
    before = block(x)
    assert sorted(add_adapters(block, CONFIG)) == ["o_proj", "q_proj"]
    assert torch.equal(block(x), before)


def test_only_the_adapters_move_and_the_weights_keep_their_names(block):
    names = set(block.state_dict())
    add_adapters(block, CONFIG)
    block.other.requires_grad_(False)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    assert {name for name in before if "lora_" not in name} == names
    optimizer = torch.optim.AdamW([p for p in block.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        block(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
    moved = {name for name, value in block.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_merged_is_unmerged(block):
    add_adapters(block, CONFIG)
    trained(block)
    x = torch.randn(4, 5)
    before = block(x)
    merge_adapters(block)
    assert not any(isinstance(module, LoRALinear) for module in block.modules())
    assert_close(block(x), before, atol=1e-5, rtol=1e-5)


def test_merged_into_another_dtype_and_as_the_original_does(block):
    add_adapters(block, CONFIG)
    trained(block)
    layer, weight = block.q_proj, block.q_proj.weight.clone()
    a, b = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
    assert torch.equal(layer.merged(torch.float16).weight, (weight + 2 * (b @ a)).half())
    rounded = weight.half() + (2 * (b.half().float() @ a.half().float())).half()
    assert torch.equal(layer.merged(torch.float16, like_original=True).weight, rounded)
    assert not torch.equal(layer.merged(torch.float16).weight, rounded)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.lora_B.weight, b)  # merging twice gives the same
    assert merge_adapters(block, torch.float16) == 2
    assert block.q_proj.weight.dtype == block.o_proj.weight.dtype == torch.float16


def test_under_autocast_the_input_is_cast_to_16_bits_once(block):
    """In float32 it would be copied twice for each adapter, of which there are seven a layer."""
    add_adapters(block, CONFIG)
    trained(block)
    layer = block.bfloat16().q_proj
    layer.lora_A.float(), layer.lora_B.float()
    x, copies = torch.randn(2, 4, 5, dtype=torch.bfloat16, requires_grad=True), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == x.shape:
                copies.append(kwargs)
            return func(*args, **kwargs or {})

    with torch.autocast("cpu", torch.bfloat16), Watch():
        found = layer(x)
    assert copies == []
    assert found.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.float()).dtype == torch.bfloat16  # as what is frozen, whatever came in
    exact = x.float() @ layer.weight.float().t() + layer.bias.float() + x.float() @ layer.change().t()
    assert_close(found.float(), exact, atol=0.03, rtol=0.02)


def test_dropout_acts_on_the_adapters_input_alone(block):
    add_adapters(block, LoRAConfig(r=3, lora_alpha=6, lora_dropout=0.5, target_modules=("q_proj",)))
    x = torch.randn(4, 5)
    assert torch.equal(block.train()(x), block.train()(x))  # the change is still nothing
    trained(block)
    assert not torch.equal(block.train()(x), block.train()(x))
    assert torch.equal(block.eval()(x), block.eval()(x))


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_dropout_has_the_gradients_of_torchs_and_keeps_no_dropped_copy(precision):
    torch.manual_seed(0)
    autocast, dtype = precision == "autocast", torch.bfloat16 if precision == "bfloat16" else torch.float32
    layer = nn.ModuleDict({"q_proj": nn.Linear(64, 48)})
    add_adapters(layer, LoRAConfig(r=3, lora_alpha=6, lora_dropout=0.4, target_modules=("q_proj",)))
    layer = layer["q_proj"].to(dtype)
    nn.init.normal_(layer.lora_B.weight)
    x, grad = torch.randn(2, 32, 64, dtype=dtype), torch.randn(2, 32, 48, dtype=dtype)

    def ours(x):
        return layer(x)

    def plain(x):
        low = F.linear(F.dropout(x, 0.4), layer.lora_A.weight)
        return F.linear(x, layer.weight, layer.bias) + F.linear(2 * low, layer.lora_B.weight)

    found = []
    for side in (ours, plain):
        layer.zero_grad()
        inputs, kept = x.clone().requires_grad_(), {}
        torch.manual_seed(1)

        def note(value, kept=kept, inputs=inputs):
            if value.shape[-1] == 64 and value.untyped_storage().data_ptr() != inputs.untyped_storage().data_ptr():
                kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes() / value.numel()
            return value

        layer.train()
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(note, lambda v: v),
        ):
            out = side(inputs)
        out.backward(grad.to(out.dtype))
        gradients = [inputs.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad]
        found.append((out, gradients, list(kept.values())))
    (out, gradients, kept), (plain_out, plain_gradients, plain_kept) = found
    bound = 1e-6 if precision == "float32" else 0.02  # measured: 0, and 0.003 under autocast
    for one, other in zip([out, *gradients], [plain_out, *plain_gradients], strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()
    assert sum(kept) < sum(plain_kept)


def test_what_is_saved_can_be_loaded_under_every_name_of_pefts(block):
    add_adapters(block, CONFIG)
    trained(block)
    saved = {name: value.clone() for name, value in adapter_state(block.state_dict()).items()}
    assert all(name.startswith("base_model.model.") for name in saved)
    x = torch.randn(4, 5)
    expected = block(x)
    for form in (lambda name: name, lambda name: name.replace(".weight", ".default.weight")):
        torch.manual_seed(0)
        other = Block()
        add_adapters(other, CONFIG)
        load_adapters(other, plain_names({form(name): value for name, value in saved.items()}))
        assert torch.equal(other(x), expected)


def test_adapters_that_do_not_fit_are_refused(block):
    with pytest.raises(ModelError, match="no linear layer is called k_proj"):
        add_adapters(block, LoRAConfig(target_modules=("q_proj", "k_proj")))
    torch.manual_seed(0)
    block = Block()
    add_adapters(block, CONFIG)
    saved = adapter_state(block.state_dict())
    short = {name: value for name, value in saved.items() if "o_proj" not in name}
    with pytest.raises(ModelError, match=r"the adapter lacks o_proj.lora_A.weight"):
        load_adapters(block, plain_names(short))
    with pytest.raises(ModelError, match="for which there is no place"):
        load_adapters(block, plain_names(saved | {"base_model.model.x.lora_A.weight": torch.zeros(1)}))
    name = "base_model.model.q_proj.lora_A.weight"
    with pytest.raises(ModelError, match=r"q_proj.lora_A.weight is \(4, 5\), here \(3, 5\)"):
        load_adapters(block, plain_names(saved | {name: torch.zeros(4, 5)}))


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"peft_type": "IA3"}, {"rank_pattern": {"q": 4}},
        {"modules_to_save": "lm_head"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "loftq"},
        {"use_qalora": True}, {"target_parameters": ["q_proj.weight"]}, {"trainable_token_indices": [3]},
        {"alora_invocation_tokens": [3, 4]}, {"kasa_config": {"beta": 0.1}}, {"arrow_config": {"top_k": 3}}, {"r": 0},
        {"target_modules": "all-linear"}, {"fan_in_fan_out": True},
    ],
)  # fmt: skip
def test_options_that_change_the_arithmetic_are_refused_by_name(change):
    values = CONFIG.as_dict()
    assert LoRAConfig.from_dict(values).scale == CONFIG.scale
    (key,) = change
    with pytest.raises(ModelError, match=key):
        LoRAConfig.from_dict(values | change)
