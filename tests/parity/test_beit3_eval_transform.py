"""The evaluation transform of BEiT-3 against the recording (beit3_data.pt, ``eval_image``): maximal difference 0."""

import io

import pytest
import torch
from PIL import Image

from data.images import decode_image
from data.transforms import EvalTransform, normalize
from tests.parity.fixture_files import load_fixture


def test_eval_transform_reproduces_the_recording_exactly():
    recorded = load_fixture("beit3_data.pt")
    image, expected = recorded["inputs"]["eval_image"].numpy(), recorded["outputs"]["eval_image"]
    out = EvalTransform(expected.shape[-1])(image)
    assert out.dtype == torch.uint8
    torch.testing.assert_close(normalize(out), expected, rtol=0, atol=0)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_eval_transform_of_a_lossless_file_reproduces_the_recording_exactly(file_format):
    recorded = load_fixture("beit3_data.pt")
    expected = recorded["outputs"]["eval_image"]
    buffer = io.BytesIO()
    Image.fromarray(recorded["inputs"]["eval_image"].numpy()).save(buffer, file_format)
    image = decode_image(buffer.getvalue(), f"image.{file_format.lower()}")
    assert torch.equal(normalize(EvalTransform(expected.shape[-1])(image)), expected)
