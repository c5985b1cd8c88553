import math

import pytest
import torch
from torch import nn

from models.errors import ModelError
from models.loading import load_weights


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).state_dict()


def test_fitting_weights_are_copied_and_reported():
    target, state = model(), weights()
    report = load_weights(target, state)
    assert all(torch.equal(value, state[name]) for name, value in target.state_dict().items())
    assert set(report.loaded) == set(state)
    assert report.newly_initialised == report.ignored == ()


def test_missing_unexpected_and_wrongly_shaped_names_come_in_one_line():
    state = weights()
    del state["0.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["1.weight"] = torch.zeros(5, 4)
    with pytest.raises(ModelError) as error:
        load_weights(model(), state)
    message = str(error.value)
    assert "1 missing from the file: 0.bias" in message
    assert "1 unexpected in the file: extra.weight" in message
    assert "1 of another shape: 1.weight (5, 4) in the file, (2, 4) in the model" in message
    assert "\n" not in message


def test_long_lists_are_counted_and_cut():
    with pytest.raises(ModelError, match=r"10 unexpected in the file: x0, .*, and 4 more"):
        load_weights(model(), {**weights(), **{f"x{i}": torch.zeros(1) for i in range(10)}})


def test_listed_patterns_may_miss_differ_and_be_extra():
    target, state = model(), weights()
    start = {name: value.clone() for name, value in target.state_dict().items()}
    del state["1.bias"]
    state["1.weight"] = torch.zeros(5, 4)
    state["mim_head.weight"] = torch.zeros(1)
    report = load_weights(target, state, may_miss=["1.*"], may_mismatch=["1.weight"], may_be_extra=["mim_head.*"])
    assert report.newly_initialised == ("1.bias", "1.weight")
    assert report.ignored == ("mim_head.weight",)
    assert torch.equal(target[1].weight, start["1.weight"])
    assert torch.equal(target[0].weight, state["0.weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weights_are_refused_by_name_and_change_nothing(value: float):
    target, state = model(), weights()
    start = target[0].weight.clone()
    state["1.bias"][0] = value
    with pytest.raises(ModelError, match=r"'1\.bias' holds NaN or infinite"):
        load_weights(target, state)
    assert torch.equal(target[0].weight, start)


def test_half_precision_weights_are_converted():
    target, state = model(), weights()
    load_weights(target, {name: value.half() for name, value in state.items()})
    assert target[0].weight.dtype == torch.float32
    assert torch.equal(target[0].weight, state["0.weight"].half().float())


def test_whole_numbers_in_place_of_fractions_are_refused_by_name():
    target, state = model(), weights()
    start = target[0].weight.clone()
    with pytest.raises(ModelError, match=r"'1\.bias' holds int8 where the model has float32: give .* quantised"):
        load_weights(target, {**state, "1.bias": state["1.bias"].to(torch.int8)})
    assert torch.equal(target[0].weight, start)


def test_an_entry_that_is_no_tensor_is_refused():
    with pytest.raises(ModelError, match="'epoch' is a int, not a tensor"):
        load_weights(model(), {**weights(), "epoch": 3})
