"""VL-BERT's image and box transform, its optimizer and schedule, against recorded numbers."""

import pytest
import torch
from torch.testing import assert_close

from data.vlbert_images import pad_boxes, pad_images, target_size, transform
from engine.optim import TransformersAdamW
from engine.schedule import multi_step, triangle
from tests.parity.fixture_files import load_fixture


def test_images_boxes_and_their_batch():
    recording = load_fixture("vlbert_data.pt")
    config, found = recording["config"], []
    for sample in recording["inputs"]["samples"]:
        image = sample["image_u8"].numpy()
        size = image.shape[1], image.shape[0]
        scales = config["min_size"], config["max_size"]
        sized = transform(sample["boxes"], size, image, flip=sample["flip"], scales=scales)
        assert_close(sized.info, sample["im_info"], atol=1e-4, rtol=0)
        assert_close(sized.boxes, sample["out_boxes"], atol=1e-4, rtol=0)
        assert_close(sized.image[:, ::3, ::3], sample["out_image"], atol=1e-3, rtol=0)
        found.append(sized)
    collated = recording["outputs"]["collated"]
    images = pad_images([sized.image for sized in found])
    assert list(images.shape) == collated["image_shape"]
    assert images.double().sum().item() == pytest.approx(collated["image_sum"].item(), rel=1e-5)
    assert_close(pad_boxes([sized.boxes for sized in found]), collated["boxes"], atol=1e-4, rtol=0)


def test_sizes_of_the_published_scales():
    for case in load_fixture("vlbert_data.pt")["outputs"]["sizes_600_1000"]:
        width, height = case["w"], case["h"]
        assert target_size(width, height, 600, 1000) == tuple(int(side) for side in case["im_info"][:2]), case
        sized = transform(torch.empty(0, 4), (width, height))
        assert_close(sized.info, case["im_info"], atol=1e-4, rtol=0)


def test_optimizer_under_the_triangle_schedule():
    recording = load_fixture("vlbert_optim.pt")
    config, inputs, outputs = recording["config"], recording["inputs"], recording["outputs"]
    parameters = [torch.nn.Parameter(value.clone()) for value in inputs["params"]]
    groups = [{"params": parameters, "weight_decay": config["weight_decay"]}]
    optimizer = TransformersAdamW(groups, lr=config["lr"], betas=tuple(config["betas"]), eps=config["eps"])
    rate = triangle(config["lr"], warmup_steps=config["warmup_steps"], total_steps=config["t_total"])
    for step, (grads, expected, lr) in enumerate(zip(inputs["grads"], outputs["params"], outputs["lrs"], strict=True)):
        optimizer.param_groups[0]["lr"] = rate(step)
        assert rate(step) == pytest.approx(lr, rel=1e-9)
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
        for parameter, value in zip(parameters, expected, strict=True):
            assert_close(parameter.detach(), value, atol=1e-6, rtol=0)


def test_step_schedule():
    recording = load_fixture("vlbert_optim.pt")
    config = recording["config"]["step"]
    rate = multi_step(
        config["base_lr"],
        config["milestones"],
        config["gamma"],
        warmup_steps=config["warmup_iters"],
        warmup_factor=config["warmup_factor"],
    )
    for step, expected in enumerate(recording["outputs"]["step_lrs"]):
        assert rate(step) == pytest.approx(expected, rel=1e-9)
