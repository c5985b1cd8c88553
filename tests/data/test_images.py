import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import data.images
from data.errors import DataError
from data.images import MAX_PIXELS, jpeg_header, load_image


def photo(height=48, width=64, seed=0):
    """Smooth colours with grain, so that a JPEG of it has content in all frequencies."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-10, 11, (height, width, 1))).clip(0, 255).astype(np.uint8))


def encode(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def written(folder, data, name="image.jpg"):
    path = folder / name
    path.write_bytes(data)
    return path


def pillow_rgb(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def png_header(width, height):
    """A PNG that claims a size and has next to no data: what a decompression bomb looks like from outside."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def jpeg_of_claimed_size(width, height):
    data = bytearray(encode(photo(), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def exif_rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees for display
    return encode(photo(), "JPEG", exif=exif)


def palette_with_transparency():
    image = photo().quantize(16)
    image.info["transparency"] = bytes(range(0, 256, 16))
    return encode(image, "PNG")


def gray_alpha():
    image = photo().convert("LA")
    image.putalpha(Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64).astype(np.uint8)))
    return encode(image, "PNG")


def sixteen_bit():
    return encode(Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20), "PNG")


def animated_gif():
    frames = [photo(seed=seed).quantize(32) for seed in range(3)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


LEGAL = {
    "jpeg 4:2:0": lambda: encode(photo(), "JPEG", quality=90),
    "jpeg 4:4:4": lambda: encode(photo(), "JPEG", quality=95, subsampling=0),
    "jpeg progressive": lambda: encode(photo(), "JPEG", progressive=True),
    "jpeg odd size": lambda: encode(photo(33, 17), "JPEG"),
    "jpeg stored as RGB": lambda: encode(photo(), "JPEG", keep_rgb=True),
    "jpeg gray": lambda: encode(photo().convert("L"), "JPEG"),
    "jpeg CMYK": lambda: encode(photo().convert("CMYK"), "JPEG"),
    "jpeg EXIF orientation 6": exif_rotated,
    "jpeg followed by other data": lambda: encode(photo(), "JPEG") + b"junk" * 50,
    "jpeg 1 x 1": lambda: encode(photo(1, 1), "JPEG"),
    "jpeg 1 x 5000": lambda: encode(photo(5000, 1), "JPEG"),
    "png RGB": lambda: encode(photo(), "PNG"),
    "png L": lambda: encode(photo().convert("L"), "PNG"),
    "png LA": gray_alpha,
    "png RGBA": lambda: encode(photo().convert("RGBA"), "PNG"),
    "png palette with transparency": palette_with_transparency,
    "png 16 bit": sixteen_bit,
    "png 1 x 1": lambda: encode(photo(1, 1), "PNG"),
    "png 5000 x 1": lambda: encode(photo(1, 5000), "PNG"),
    "webp": lambda: encode(photo(), "WEBP"),
    "gif, first frame": animated_gif,
    "bmp": lambda: encode(photo(), "BMP"),
    "tiff": lambda: encode(photo(), "TIFF"),
}


@pytest.fixture(params=["torchvision and pillow", "pillow alone"])
def _decoder(request, monkeypatch):
    """Both sets of decoders: later releases of torchvision will come without theirs."""
    if request.param == "pillow alone":
        monkeypatch.setattr("data.images.decode_jpeg", None)
    else:
        assert data.images.decode_jpeg is not None


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("kind", LEGAL)
def test_legal_file_decodes_to_what_pillow_gives(kind, tmp_path):
    data = LEGAL[kind]()
    image = load_image(written(tmp_path, data))  # named .jpg whatever it is
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable
    assert np.array_equal(image, pillow_rgb(data))


def test_exif_orientation_is_ignored(tmp_path):
    assert load_image(written(tmp_path, exif_rotated())).shape == (48, 64, 3)


def test_jpeg_with_flipped_bits_decodes_as_pillow_does_or_fails_as_it_does(tmp_path):
    """Entropy-coded data has no check sum: both decoders go on, with the same picture."""
    data = encode(photo(120, 160), "JPEG", quality=90)
    rng = np.random.default_rng(3)
    decoded = 0
    for number in range(20):
        broken = bytearray(data)
        for position in rng.integers(len(data) // 4, len(data) * 3 // 4, 4):
            broken[position] ^= 1 << rng.integers(8)
        path = written(tmp_path, broken, f"flipped_{number}.jpg")
        try:
            expected = pillow_rgb(bytes(broken))
        except OSError:
            with pytest.raises(DataError, match=path.name):
                load_image(path)
            continue
        decoded += 1
        assert np.array_equal(load_image(path), expected)
    assert decoded


def corrupt_png():
    data = bytearray(encode(photo(), "PNG"))
    start = data.index(b"IDAT") + 40
    data[start : start + 200] = b"\xaa" * 200
    return bytes(data)


def header_only(file_format):
    data = encode(photo(), file_format)
    return data[: data.index(b"\xff\xda")] if file_format == "JPEG" else data[:33]


JPEG = encode(photo(120, 160), "JPEG", quality=90)
PROGRESSIVE = encode(photo(120, 160), "JPEG", quality=90, progressive=True)
PNG = encode(photo(120, 160), "PNG")
ILLEGAL = {
    "empty": (lambda: b"", "the file is empty"),
    "web page": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", "web page or XML"),
    "text": (lambda: b"Not found\n", "holds text"),
    "git-lfs pointer": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "git-lfs pointer",
    ),
    "other binary": (lambda: bytes(range(256)), "no image format"),
    "jpeg cut at half": (lambda: JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg without its last 10 bytes": (lambda: JPEG[:-10], "truncated"),
    "jpeg without its last 2 bytes": (lambda: JPEG[:-2], "truncated"),
    "progressive jpeg cut at half": (lambda: PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated"),
    "progressive jpeg without its last 10 bytes": (lambda: PROGRESSIVE[:-10], "truncated"),
    # Pillow before 13 does not open such a file at all, newer ones find no data: either way the header is named
    "jpeg header only": (lambda: header_only("JPEG"), "header (but no image data|is broken)"),
    "jpeg of 3 bytes": (lambda: JPEG[:3], "no image format"),
    "png cut at half": (lambda: PNG[: len(PNG) // 2], "truncated"),
    "png header only": (lambda: header_only("PNG"), "image"),
    "png with corrupt data": (corrupt_png, "broken"),
    "png of 12000 x 12000": (lambda: png_header(12000, 12000), "pixels"),
    "png of 15000 x 15000": (lambda: png_header(15000, 15000), "pixels"),
    "png just over the limit": (lambda: png_header(8000, 8001), "8000 x 8001 pixels"),
    "jpeg of 60000 x 60000": (lambda: jpeg_of_claimed_size(60000, 60000), "60000 x 60000 pixels"),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "text"),
}


@pytest.mark.usefixtures("_decoder")
@pytest.mark.parametrize("kind", ILLEGAL)
def test_illegal_file_gives_one_line_with_file_and_reason(kind, tmp_path):
    build, reason = ILLEGAL[kind]
    path = written(tmp_path, build())
    with pytest.raises(DataError, match=reason) as caught:
        load_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


def test_image_of_exactly_the_limit_is_not_called_too_large(tmp_path):
    assert 8000 * 8000 == MAX_PIXELS
    with pytest.raises(DataError) as caught:  # its data are missing, its size is fine
        load_image(written(tmp_path, png_header(8000, 8000)))
    assert "pixels" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no image .*absent\.jpg"):
        load_image(tmp_path / "absent.jpg")


def test_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read image .*directory"):
        load_image(tmp_path)


def test_a_pipe_or_a_device_among_the_images_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/null")
    for name in ("device.jpg", "pipe.jpg"):
        with pytest.raises(DataError, match=rf"cannot read image .*{name}: it is a directory, a pipe or a device"):
            load_image(tmp_path / name)


def test_jpeg_header_gives_size_and_channels():
    assert jpeg_header(encode(photo(33, 17), "JPEG", progressive=True)) == (33, 17, 3)
    assert jpeg_header(encode(photo(5, 9).convert("L"), "JPEG")) == (5, 9, 1)
    assert jpeg_header(encode(photo(5, 9).convert("CMYK"), "JPEG")) == (5, 9, 4)
    assert jpeg_header(PNG) is None


def test_every_prefix_of_a_jpeg_is_refused(tmp_path):
    """No cut, wherever it falls, may pass as an image."""
    data = encode(photo(24, 24), "JPEG")
    for length in range(0, len(data) - 1, 7):
        with pytest.raises(DataError):
            load_image(written(tmp_path, data[:length]))
