import math

import numpy as np
import pytest
import torch
from PIL import Image

from data.errors import DataError
from data.randaugment import RandAugment
from data.transforms import EvalTransform, TrainTransform, draw_crop, normalize


def photo(height=240, width=320, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (13, 17, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-10, 11, (height, width, 1))).clip(0, 255).astype(np.uint8)


def pillow(image, size, resampling=Image.Resampling.BICUBIC):
    resized = np.array(Image.fromarray(image).resize((size, size), resampling))
    return torch.from_numpy(resized).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(240, 320), (320, 240), (64, 64), (1, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("size", [48, 64])
def test_eval_transform_is_pillow_bicubic_without_keeping_the_aspect_ratio(shape, size):
    image = photo(*shape)
    out = EvalTransform(size)(image)
    assert out.shape == (3, size, size)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()
    assert torch.equal(out, pillow(image, size))


def test_normalize_maps_bytes_to_minus_one_to_one():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3).repeat(1, 3, 1, 1)
    out = normalize(images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    assert images.dtype == torch.uint8


def test_normalize_computes_in_float32_whatever_the_result_type():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    assert torch.equal(normalize(images, torch.bfloat16), normalize(images).to(torch.bfloat16))


def test_normalize_takes_means_and_deviations_per_channel():
    images = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    out = normalize(images, mean=(0.0, 0.5, 1.0), std=(1.0, 0.25, 0.5))
    assert out[:, 0, 0].tolist() == [1.0, 2.0, 0.0]


def test_normalize_copies_its_constants_to_the_device_once(monkeypatch):
    images = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.7]
    first = normalize(images, mean=mean, std=std)
    columns = [torch.tensor(values)[:, None, None] for values in (mean, std)]
    assert torch.equal(first, (images.float() / 255 - columns[0]) / columns[1])
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("made the constants again"))
    assert torch.equal(normalize(images, mean=mean, std=std), first)


@pytest.mark.parametrize("exact", [False, True])
def test_train_transform_gives_contiguous_bytes_and_leaves_the_image(exact):
    image = photo()
    before = image.copy()
    transform = TrainTransform(96, randaugment=RandAugment(), exact=exact)
    for seed in range(10):
        out = transform(image, np.random.default_rng(seed))
        assert out.shape == (3, 96, 96)
        assert out.dtype == torch.uint8
        assert out.is_contiguous()
    assert np.array_equal(image, before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
@pytest.mark.parametrize("exact", [False, True])
def test_train_transform_takes_images_of_any_shape(shape, exact):
    transform = TrainTransform(32, "random", RandAugment(), exact=exact)
    for seed in range(5):
        assert transform(photo(*shape), np.random.default_rng(seed)).shape == (3, 32, 32)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [96, 224, 480])
def test_fast_resize_stays_within_two_levels_in_few_values_of_the_exact_one(size, interpolation):
    """Measured at 640 x 480 to 480: at most 1 level (bicubic), 0.2 % of the values."""
    image = photo(480, 640)
    fast, exact = TrainTransform(size, interpolation), TrainTransform(size, interpolation, exact=True)
    for seed in range(4):
        first = fast(image, np.random.default_rng(seed)).int()
        difference = (first - exact(image, np.random.default_rng(seed)).int()).abs()
        assert difference.max() <= 2
        assert (difference > 0).float().mean() < 0.005


def test_exact_train_transform_is_pillow_crop_resize_and_flip():
    image = photo()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        top, left, height, width = draw_crop(240, 320, 0.5, rng)
        cropped = Image.fromarray(image).crop((left, top, left + width, top + height))
        expected = cropped.resize((96, 96), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        out = TrainTransform(96, exact=True)(image, np.random.default_rng(seed))
        assert np.array_equal(out.permute(1, 2, 0).numpy(), np.array(expected))


def test_no_crop_and_no_flip_is_the_eval_transform():
    image = photo()
    transform = TrainTransform(96, min_crop_scale=1.0, hflip=False, exact=True)
    for seed in range(5):
        assert torch.equal(transform(image, np.random.default_rng(seed)), EvalTransform(96)(image))


@pytest.mark.parametrize("exact", [False, True])
def test_flip_happens_in_half_of_the_samples_only_if_asked_for(exact):
    image = photo(60, 80)
    plain = TrainTransform(48, min_crop_scale=1.0, hflip=False, exact=exact)(image, np.random.default_rng(0))
    flipping = TrainTransform(48, min_crop_scale=1.0, exact=exact)
    outputs = [flipping(image, np.random.default_rng(seed)) for seed in range(200)]
    flipped = sum(torch.equal(out, plain.flip(2)) for out in outputs)
    assert flipped + sum(torch.equal(out, plain) for out in outputs) == 200
    assert 70 <= flipped <= 130


def test_random_interpolation_draws_both_kinds():
    image = photo(60, 80)
    transform = TrainTransform(48, "random", min_crop_scale=1.0, hflip=False, exact=True)
    bicubic, bilinear = pillow(image, 48), pillow(image, 48, Image.Resampling.BILINEAR)
    outputs = [transform(image, np.random.default_rng(seed)) for seed in range(40)]
    kinds = {"bicubic" if torch.equal(out, bicubic) else "bilinear" for out in outputs}
    assert kinds == {"bicubic", "bilinear"}
    assert all(torch.equal(out, bicubic) or torch.equal(out, bilinear) for out in outputs)


def test_randaugment_comes_last_and_draws_from_the_same_generator():
    image = photo()
    policy = RandAugment()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        draw_crop(240, 320, 0.5, rng)
        rng.random()
        plain = TrainTransform(64)(image, np.random.default_rng(seed)).permute(1, 2, 0).numpy()
        expected = policy(plain, rng)
        out = TrainTransform(64, randaugment=policy)(image, np.random.default_rng(seed))
        assert np.array_equal(out.permute(1, 2, 0).numpy(), expected)


def test_same_generator_state_gives_the_same_sample_and_another_one_another():
    image = photo()
    transform = TrainTransform(64, "random", RandAugment())
    first, again, other = (transform(image, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_crops_lie_inside_with_area_and_aspect_in_their_ranges():
    rng = np.random.default_rng(0)
    fractions = []
    for _ in range(2000):
        top, left, height, width = draw_crop(480, 640, 0.5, rng)
        assert 0 <= top <= 480 - height
        assert 0 <= left <= 640 - width
        fractions.append(height * width / (480 * 640))
        assert 3 / 4 - 0.01 <= width / height <= 4 / 3 + 0.01
    assert 0.495 <= min(fractions) < 0.51
    assert max(fractions) > 0.95


def test_crop_reaches_every_side_of_the_image():
    rng = np.random.default_rng(0)
    crops = [draw_crop(40, 50, 0.5, rng) for _ in range(1000)]
    assert min(top for top, _, _, _ in crops) == 0
    assert min(left for _, left, _, _ in crops) == 0
    assert max(top + height for top, _, height, _ in crops) == 40
    assert max(left + width for _, left, _, width in crops) == 50


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((10, 1000), (0, 493, 10, 13)), ((1000, 12), (492, 0, 16, 12)), ((1, 5000), (0, 2499, 1, 1))],
)
def test_crop_that_never_fits_falls_back_to_the_centre(shape, expected):
    assert draw_crop(*shape, 0.5, np.random.default_rng(0)) == expected


def test_area_fraction_and_log_aspect_are_uniform():
    """On a square the first try fits unless the aspect is extreme; the mean of both draws shows their law."""
    rng = np.random.default_rng(0)
    crops = [draw_crop(1000, 1000, 0.2, rng) for _ in range(4000)]
    logs = [math.log(width / height) for _, _, height, width in crops]
    assert abs(np.mean(logs)) < 0.01
    assert max(logs) > 0.95 * math.log(4 / 3)
    fractions = np.array([height * width / 1e6 for _, _, height, width in crops])
    small = fractions[fractions < 0.7]  # below 3/4 every aspect fits
    assert abs(small.mean() - 0.45) < 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "side"),
        ({"size": 8, "interpolation": "lanczos"}, "'lanczos'"),
        ({"size": 8, "min_crop_scale": 0.0}, "min_crop_scale"),
        ({"size": 8, "min_crop_scale": 1.2}, "1.2"),
    ],
)
def test_impossible_settings_are_errors(options, words):
    with pytest.raises(DataError, match=words):
        TrainTransform(**options)
