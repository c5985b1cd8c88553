import pytest
import torch
from torch import nn

from engine.errors import EngineError
from engine.optim import (
    LRRule,
    TransformersAdamW,
    build_adamw,
    build_optimizer,
    head_multiplier_rule,
    layer_decay_rule,
    parameter_groups,
)
from models.beit3.config import beit3_config
from models.beit3.tasks import build_beit3


@pytest.fixture
def model():
    with torch.device("meta"):
        return build_beit3("vqav2", beit3_config("beit3_base_patch16_480", "vqav2"), num_classes=10)


@pytest.mark.parametrize("rule", ["none", "layers", "head"])
def test_every_trainable_parameter_is_in_exactly_one_group(model, rule):
    rules = {
        "none": None,
        "layers": layer_decay_rule(model.layer_id, model.num_layers, 0.8),
        "head": head_multiplier_rule("head", 20),
    }
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, rule=rules[rule])
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())


def test_frozen_parameters_are_left_out(model):
    for parameter in model.beit3.parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    names = [name for group in groups for name in group["param_names"]]
    assert names
    assert not any(name.startswith("beit3.") for name in names)


def test_everything_frozen_is_an_error():
    model = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(EngineError, match="everything is frozen"):
        parameter_groups(model.named_parameters(), weight_decay=0.0)


def test_listed_names_vectors_and_biases_do_not_decay():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Embedding(3, 2))
    groups = parameter_groups(model.named_parameters(), weight_decay=0.3, no_decay={"2.weight"})
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decays == {"0.weight": 0.3, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "2.weight": 0.0}


def test_layer_decay_outside_its_range_is_refused():
    with pytest.raises(EngineError, match=r"\(0, 1\], got 1.3"):
        layer_decay_rule(lambda name: 0, 2, 1.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "learning rate"),
        ({"lr": 1.0, "betas": (0.9, 1.0)}, "--opt_betas"),
        ({"lr": 1.0, "eps": 0.0}, "--opt_eps"),
    ],
)
def test_impossible_optimizer_settings_are_refused(options, message):
    groups = parameter_groups(nn.Linear(1, 1).named_parameters(), weight_decay=0.0, rule=LRRule(lambda n: 0, (1.0,)))
    with pytest.raises(EngineError, match=message):
        build_adamw(groups, **options)


def test_fused_adamw_takes_the_textbook_step():
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    groups = [{"name": "decay", "params": [weight], "weight_decay": 0.1, "lr_scale": 1.0}]
    optimizer = build_adamw(groups, lr=0.01, betas=(0.9, 0.999), eps=1e-8)
    weight.grad = torch.tensor([[0.5, -3.0]])
    optimizer.step()
    # first step: m / sqrt(v) is the sign of the gradient; decay is decoupled
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.01 * 0.1) - 0.01 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("kind", ["adamw", "transformers_adamw", "adam", "sgd"])
def test_optimizers_by_name_step_and_resume_exactly(kind):
    torch.manual_seed(0)
    start, grads = torch.randn(4, 3), torch.randn(6, 4, 3)

    def run(first: int, last: int, weight: torch.Tensor, state: dict | None = None):
        parameter = nn.Parameter(weight.clone())
        groups = [{"name": "all", "params": [parameter], "param_names": ["w"], "weight_decay": 0.1, "lr_scale": 1.0}]
        optimizer = build_optimizer(kind, groups, lr=0.1)
        if state is not None:
            optimizer.load_state_dict(state)
        for number in range(first, last):
            parameter.grad = grads[number].clone()
            optimizer.step()
        return parameter.detach(), optimizer.state_dict()

    whole, _ = run(0, 6, start)
    half, state = run(0, 3, start)
    resumed, _ = run(3, 6, half, state)
    assert torch.equal(whole, resumed)
    assert not torch.equal(whole, start)


def test_the_adamw_of_transformers_is_that_formula():
    weight, gradient, lr, beta1, beta2, eps, decay = 2.0, 0.5, 0.1, 0.9, 0.99, 0.3, 0.2
    parameter = nn.Parameter(torch.tensor([weight], dtype=torch.float64))
    optimizer = TransformersAdamW(
        [{"params": [parameter], "weight_decay": decay}], lr=lr, betas=(beta1, beta2), eps=eps
    )
    first = second = 0.0
    for step in (1, 2, 3):
        parameter.grad = torch.tensor([gradient * step], dtype=torch.float64)
        optimizer.step()
        first = beta1 * first + (1 - beta1) * gradient * step
        second = beta2 * second + (1 - beta2) * (gradient * step) ** 2
        weight -= lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) * first / (second**0.5 + eps)
        weight -= lr * decay * weight
    assert parameter.item() == pytest.approx(weight, rel=1e-12)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(EngineError, match="unknown optimizer 'lion'"):
        build_optimizer("lion", [], lr=1.0)
