"""The course baseline: the ResNet against torchvision's, and what is refused."""

import pytest
import torch
import torchvision

from models.baseline import FEATURES, BaselineVQA, ResNet18
from models.errors import ModelError


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 224), (65, 90)])
def test_without_biases_it_is_torchvisions_resnet18(size: tuple[int, int]):
    torch.manual_seed(0)
    ours, theirs = ResNet18().eval(), torchvision.models.resnet18(num_classes=FEATURES).eval()
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        own = state.pop(name.replace("downsample", "shortcut"))
        if name.endswith(("running_mean", "bn1.bias", "bn2.bias", "downsample.1.bias")):
            value.normal_(std=0.1)
        own.copy_(value)
    for name, bias in state.items():
        assert name.endswith("bias")
        bias.zero_()
    image = torch.rand(2, 3, *size)
    torch.testing.assert_close(ours(image), theirs(image), atol=1e-5, rtol=1e-5)


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = BaselineVQA(5, 4)
    model(torch.rand(2, 3, 64, 64), torch.ones(2, 5)).logsumexp(dim=1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(("sizes", "message"), [((0, 3), "num_words .* got 0"), ((3, 0), "num_answers .* got 0")])
def test_empty_dictionaries_are_refused(sizes: tuple[int, int], message: str):
    with pytest.raises(ModelError, match=message):
        BaselineVQA(*sizes)


@pytest.mark.parametrize("shape", [(2, 6), (1, 5), (5,)])
def test_question_vectors_of_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ModelError, match=r"shape \(2, 5\), got"):
        BaselineVQA(5, 4)(torch.rand(2, 3, 32, 32), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 32, 32)])
def test_images_of_other_shapes_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ModelError, match=r"\(batch, 3, height, width\), got"):
        BaselineVQA(5, 4)(torch.rand(shape), torch.zeros(2, 5))
