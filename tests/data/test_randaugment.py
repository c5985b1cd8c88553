import numpy as np
import pytest

from data.randaugment import OPS, POLICY_OPS, RandAugment, apply_op, warp_affine

CENTRED = {"Identity": None, "Brightness": 1.0, "Sharpness": 1.0, "ShearX": 0.0, "ShearY": 0.0, "Rotate": 0.0}
ARGUMENTS = {"Brightness": 1.36, "Sharpness": 1.36, "Color": 1.36, "Contrast": 1.36, "Solarize": 179, "Posterize": 2}
ARGUMENTS |= {"ShearX": -0.21, "ShearY": 0.21, "TranslateX": 7.0, "TranslateY": -7.0, "Rotate": 21.0}


def noise(height=40, width=56, low=0, high=256, seed=0):
    return np.random.default_rng(seed).integers(low, high, (height, width, 3)).astype(np.uint8)


def bilinear_by_definition(image, matrix, fill=128):
    """The fixed-point rule pixel by pixel, in plain integers; the matrix maps source to output."""
    height, width, _ = image.shape
    (a, b, c), (d, e, f) = np.asarray(matrix, np.float64).tolist()
    scale = 1 / (a * e - b * d)
    a, b, d, e = e * scale, -b * scale, -d * scale, a * scale
    c, f = -a * c - b * f, -d * c - e * f
    out = np.empty_like(image)

    def pixel(row, column):
        inside = 0 <= row < height and 0 <= column < width
        return image[row, column].astype(int) if inside else np.full(3, fill)

    for y in range(height):
        for x in range(width):
            across = (round((b * y + c) * 1024) + 16 + round(a * x * 1024)) >> 5
            down = (round((e * y + f) * 1024) + 16 + round(d * x * 1024)) >> 5
            fx, fy, column, row = across & 31, down & 31, across >> 5, down >> 5
            total = (32 - fx) * (32 - fy) * 32 * pixel(row, column)
            total += fx * (32 - fy) * 32 * pixel(row, column + 1)
            total += (32 - fx) * fy * 32 * pixel(row + 1, column)
            total += fx * fy * 32 * pixel(row + 1, column + 1)
            out[y, x] = (total + 16384) >> 15
    return out


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_operation_keeps_shape_type_and_input(name, reference):
    image = noise()
    before = image.copy()
    out = apply_op(image, name, ARGUMENTS.get(name), reference)
    assert out.shape == image.shape
    assert out.dtype == np.uint8
    assert np.array_equal(image, before)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("name", OPS)
def test_operation_takes_tiny_images(name, shape):
    image = noise(*shape)
    assert apply_op(image, name, ARGUMENTS.get(name)).shape == image.shape


@pytest.mark.parametrize("name", OPS)
def test_operation_takes_views_that_are_not_contiguous(name):
    image = noise(40, 112)[:, ::2]
    assert np.array_equal(apply_op(image, name, ARGUMENTS.get(name)), apply_op(image.copy(), name, ARGUMENTS.get(name)))


@pytest.mark.parametrize("name", CENTRED)
def test_neutral_argument_changes_nothing(name):
    image = noise()
    assert np.array_equal(apply_op(image, name, CENTRED[name]), image)


@pytest.mark.parametrize("shape", [(23, 31), (31, 23), (5, 40)])
@pytest.mark.parametrize("factor", [0.21, -0.21, 0.9, -0.03])
def test_shears_are_the_fixed_point_warp(shape, factor):
    """Largest difference 0: shifting rows or columns is the general rule with one whole coordinate."""
    image = noise(*shape)
    factor32 = np.float32(factor)
    sheared_x = apply_op(image, "ShearX", factor)
    sheared_y = apply_op(image, "ShearY", factor)
    assert np.array_equal(sheared_x, bilinear_by_definition(image, [[1, factor32, 0], [0, 1, 0]]))
    assert np.array_equal(sheared_y, bilinear_by_definition(image, [[1, 0, 0], [factor32, 1, 0]]))


@pytest.mark.parametrize("pixels", [7.0, -7.0, 2.5, -0.3, 100.0, -100.0])
def test_translations_are_the_fixed_point_warp(pixels):
    image = noise(17, 21)
    shift = np.float32(pixels)
    assert np.array_equal(
        apply_op(image, "TranslateX", pixels), bilinear_by_definition(image, [[1, 0, -shift], [0, 1, 0]])
    )
    assert np.array_equal(
        apply_op(image, "TranslateY", pixels), bilinear_by_definition(image, [[1, 0, 0], [0, 1, -shift]])
    )


@pytest.mark.parametrize("matrix", [[[0.9, 0.4, -3.3], [-0.4, 0.9, 8.1]], [[2.0, 0.3, -60.0], [0.1, 0.5, 40.0]]])
def test_general_warp_is_the_fixed_point_rule(matrix):
    image = noise(19, 26)
    assert np.array_equal(warp_affine(image, np.array(matrix), 77), bilinear_by_definition(image, matrix, 77))


def test_positive_angle_turns_counter_clockwise_about_the_centre():
    image = np.zeros((41, 41, 3), np.uint8)
    image[18:23, 36:41] = 255  # on the right
    turned = apply_op(image, "Rotate", 90.0)
    rows, columns = np.nonzero(turned[..., 0] == 255)
    assert rows.max() <= 6  # now at the top
    assert abs(columns.mean() - 20) <= 1


def test_geometric_operations_fill_with_the_given_gray():
    image = np.zeros((20, 20, 3), np.uint8)
    assert (apply_op(image, "TranslateX", 7.0, fill=50)[:, -7:] == 50).all()
    assert (apply_op(image, "TranslateY", -7.0, fill=50)[:7] == 50).all()
    assert apply_op(image, "Rotate", 21.0, fill=50)[0, 0, 0] == 50
    assert apply_op(image, "ShearX", 0.21, fill=50).max() == 50
    assert apply_op(image, "ShearY", 0.21, fill=50).max() == 50


def test_autocontrast_stretches_each_channel_to_the_full_range():
    image = noise(low=40, high=200)
    out = apply_op(image, "AutoContrast")
    assert (out.min(axis=(0, 1)) == 0).all()
    assert (out.max(axis=(0, 1)) >= 254).all()  # truncation may lose one level
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    wanted = (image - low.astype(float)) * 255 / (high - low.astype(float))
    assert np.abs(out - wanted).max() < 1.001


def test_autocontrast_of_the_original_turns_a_channel_without_black_white():
    image = noise(low=40, high=200)
    assert apply_op(image, "AutoContrast", reference=True).min() == 255
    image[0, 0] = 0
    assert np.array_equal(apply_op(image, "AutoContrast", reference=True), apply_op(image, "AutoContrast"))


def test_autocontrast_leaves_a_constant_channel_alone():
    image = noise(low=40, high=200)
    image[..., 1] = 90
    assert (apply_op(image, "AutoContrast")[..., 1] == 90).all()


def test_sharpness_clips_where_the_original_wraps_around():
    image = np.zeros((9, 9, 3), np.uint8)
    image[:, 5:] = 255
    exact = apply_op(image, "Sharpness", 1.36)
    wrapped = apply_op(image, "Sharpness", 1.36, reference=True)
    # beside the edge: smooth = 3 / 13 of 255 = 59, out = 59 - 0.36 * ... = 59 + 1.36 * (0 - 59) = -21.24, cut to -21
    assert exact[4, 4, 0] == 0
    assert wrapped[4, 4, 0] == 256 - 21
    assert exact[4, 5, 0] == 255


def test_sharpness_is_the_rounded_kernel_and_leaves_the_border():
    image = noise(12, 15)
    wide = image.astype(int)
    total = 4 * wide[1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total = total + wide[row : row + 10, column : column + 13]
    smooth = np.rint(total / 13).astype(np.float32)
    sharp = smooth + np.float32(1.9) * (wide[1:-1, 1:-1].astype(np.float32) - smooth)
    out = apply_op(image, "Sharpness", 1.9)
    assert np.array_equal(out[1:-1, 1:-1], sharp.clip(0, 255).astype(np.uint8))
    border = np.ones((12, 15), bool)
    border[1:-1, 1:-1] = False
    assert np.array_equal(out[border], image[border])


def test_equalize_spreads_a_narrow_histogram():
    image = noise(64, 64, low=100, high=110)
    out = apply_op(image, "Equalize")
    assert out.min() < 20
    assert out.max() > 235


def test_equalize_leaves_an_image_of_one_colour_alone():
    image = np.full((20, 20, 3), 77, np.uint8)
    assert np.array_equal(apply_op(image, "Equalize"), image)


def test_point_operations_on_known_values():
    image = np.array([[[0, 100, 188], [178, 179, 255]]], np.uint8)
    assert apply_op(image, "Brightness", 1.36).tolist() == [[[0, 136, 255], [242, 243, 255]]]
    assert apply_op(image, "Solarize", 179).tolist() == [[[0, 100, 188 - 121], [178, 76, 0]]]
    assert apply_op(image, "Posterize", 2).tolist() == [[[0, 64, 128], [128, 128, 192]]]


def test_unknown_operation_is_an_error():
    with pytest.raises(ValueError, match="unknown operation 'Blur'"):
        apply_op(noise(), "Blur")


def test_wrong_array_is_an_error():
    with pytest.raises(ValueError, match="float64"):
        apply_op(noise().astype(float), "Identity")
    with pytest.raises(ValueError, match=r"\(40, 56\)"):
        apply_op(noise()[..., 0], "Identity")


def test_policy_draws_every_operation_about_equally_often_and_applies_half():
    rng = np.random.default_rng(0)
    drawn = [name for _ in range(4000) for name, _ in RandAugment().draw(rng)]
    assert abs(len(drawn) - 4000) < 200
    for name in POLICY_OPS:
        assert abs(drawn.count(name) - 400) < 80, name


def test_policy_draws_both_signs_and_the_documented_arguments():
    rng = np.random.default_rng(0)
    arguments = {}
    for _ in range(2000):
        for name, arg in RandAugment(magnitude=7).draw(rng):
            arguments.setdefault(name, set()).add(None if arg is None else round(arg, 9))
    for name in ("Brightness", "Sharpness"):
        assert arguments[name] == {1.36}
    for name, size in (("ShearX", 0.21), ("ShearY", 0.21), ("TranslateX", 7), ("TranslateY", 7), ("Rotate", 21)):
        assert arguments[name] == {size, -size}
    for name in ("Identity", "AutoContrast", "Equalize"):
        assert arguments[name] == {None}


def test_policy_repeats_under_one_seed_with_both_generators():
    image = noise()
    for build in (np.random.default_rng, np.random.RandomState):
        first = [RandAugment()(image, build(seed)) for seed in range(10)]
        second = [RandAugment()(image, build(seed)) for seed in range(10)]
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert any(not np.array_equal(a, image) for a in first)


def test_policy_without_operations_returns_the_image():
    image = noise()
    assert RandAugment(num_ops=0)(image, np.random.default_rng(0)) is image


@pytest.mark.parametrize("options", [{"num_ops": -1}, {"magnitude": 11}, {"magnitude": -1}, {"fill": 256}])
def test_impossible_policy_is_an_error(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        RandAugment(**options)
