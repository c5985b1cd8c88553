"""CLIP's image processing against recorded pixel values: bit-equal."""

import torch

from data.clip_images import CLIPImageSettings, CLIPTransform, normalize
from data.images import decode_image
from tests.parity.fixture_files import load_fixture


def test_every_recorded_image_of_every_mode_gives_the_same_values():
    recording = load_fixture("vle_image.pt")
    config = recording["config"]
    always = {"mean": tuple(config["image_mean"]), "std": tuple(config["image_std"])}
    files = [bytes(image.tolist()) for image in recording["inputs"]["images"]]

    def values(file: bytes, edge: int, crop: int) -> torch.Tensor:
        settings = CLIPImageSettings(edge, (crop, crop), config["rescale_factor"], **always)
        return normalize(CLIPTransform(settings)(decode_image(file, "recorded"))[None], settings)[0]

    for case in recording["outputs"]["cases"]:
        for number, direct, through_rgba in zip(case["images"], case["direct"], case["through_rgba"], strict=True):
            found = values(files[number], case["size"], case["crop"])
            assert torch.equal(found, direct), (case["size"], recording["inputs"]["modes"][number])
            assert isinstance(through_rgba, str) or torch.equal(found, through_rgba)
    for file, expected in zip(files, recording["outputs"]["padded"], strict=False):
        assert torch.equal(values(file, 18, 25), expected)
