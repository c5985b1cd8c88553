import json

import numpy as np
import pytest
import torch

from data.clip_images import CLIPImageSettings, CLIPTransform, center_crop, normalize
from data.errors import DataError


def test_settings_survive_being_written_and_read(tmp_path):
    settings = CLIPImageSettings().resized(48)
    (tmp_path / "p.json").write_bytes(settings.to_json())
    assert CLIPImageSettings.load(tmp_path / "p.json") == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resample": 2}, "resample 2 is not implemented here, only 3"),
        ({"size": {"height": 3}}, "size must be a whole number of pixels"),
        ({"crop_size": {"height": 0, "width": 3}}, "crop_size must be a whole number of pixels"),
        ({"image_mean": [1, 2]}, "image_mean must be three numbers"),
        ({"image_std": [1, 0, 1]}, "must be numbers other than 0"),
        ({"do_center_crop": False}, "do_center_crop False is not implemented"),
        ([], "must hold an object"),
    ],
)
def test_settings_that_do_not_work_are_refused_by_name(tmp_path, values, message):
    (tmp_path / "p.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        CLIPImageSettings.load(tmp_path / "p.json")


def test_absent_keys_are_clips_and_a_plain_size_is_taken(tmp_path):
    (tmp_path / "p.json").write_text('{"size": 30, "crop_size": 20}')
    assert CLIPImageSettings.load(tmp_path / "p.json") == CLIPImageSettings(30, (20, 20))


def test_the_shorter_side_is_resized_and_the_middle_kept():
    image = np.zeros((20, 41, 3), dtype=np.uint8)
    image[:, 20] = 255
    pixels = CLIPTransform(CLIPImageSettings(20, (20, 20)))(image)
    assert pixels.shape == (3, 20, 20)
    assert torch.equal(pixels[0], torch.from_numpy(image[:, 10:30, 0]))


def test_margins_are_rounded_down():
    image = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3)
    assert np.array_equal(center_crop(image, 2, 2), image[1:3, 1:3])


def test_values_are_scaled_and_normalised_by_channel():
    settings = CLIPImageSettings(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    found = normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), settings)
    assert found.flatten().tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_tables_made_in_an_evaluation_serve_a_training_step():
    settings, images = CLIPImageSettings().resized(7), torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with torch.inference_mode():
        normalize(images, settings)
    weight = torch.ones(1, requires_grad=True)
    (normalize(images, settings) * weight).sum().backward()
    assert weight.grad is not None
