"""Image files to (H, W, 3) uint8 arrays, equal to Pillow's ``Image.open(...).convert("RGB")``.

An array with the channels last is what both decoders deliver and what resizing and RandAugment are fastest on; torch
takes it over without a copy. JPEG files (known by their first bytes, not by name) go through torchvision.io, which is
faster and bit-equal for gray and three-channel files; CMYK and everything else goes through Pillow, which also has the
last word on a JPEG that torchvision refuses. The EXIF orientation is ignored, as in the originals.

The size is read from the header and checked before anything is decoded.
"""

import codecs
import contextlib
import io
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.errors import DataError

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # announced by torchvision 0.29 for a later release; Pillow's pixels are the same, a little slower
    decode_jpeg = None

MAX_PIXELS = 64_000_000  # more is taken for a decompression bomb
# Pillow opens many more formats, some by starting other programs (EPS); data sets use these.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# file names by which images are found in a folder
IMAGE_SUFFIXES = (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_WAY_OUT = "replace the file or remove its entry from the data file that names it"


def load_image(path: str | Path) -> np.ndarray:
    """Read one image file.

    Args:
        path: an image in one of ``FORMATS``; of an animation the first frame is taken.

    Returns:
        (H, W, 3) uint8, RGB, C-contiguous and writable.

    Raises:
        DataError: missing, empty, cut off, broken or too large file, or no image at all; names the file and the reason.
    """
    return decode_image(read_image_file(path), str(path))


def read_image_file(path: str | Path) -> bytes:
    """The bytes of an image file.

    Raises:
        DataError: missing, unreadable, or no file but a folder, a pipe, which would be waited for without end, or a
            device.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"cannot read image {path}: it is a directory, a pipe or a device, no file: {_WAY_OUT}")
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"no image {path}: check its folder and the data file that names it") from None
    except OSError as error:
        raise DataError(f"cannot read image {path}: {error.strerror or error}") from None


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decode the content of one image file.

    Args:
        data: the bytes of the file.
        name: what to call it in errors.

    Returns:
        (H, W, 3) uint8, RGB, C-contiguous and writable.

    Raises:
        DataError: as ``load_image``.
    """
    if not data:
        raise _unreadable(name, "the file is empty")
    header = jpeg_header(data)
    if header is not None:
        height, width, channels = header
        _check_size(name, height, width)
        if channels in (1, 3) and decode_jpeg is not None:
            with contextlib.suppress(RuntimeError):  # then Pillow decodes it or says in better words what is wrong
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                return decode_jpeg(encoded, mode=ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy()
    return _decode_with_pillow(data, name)


def jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, number of channels) from the frame header of a JPEG, None if there is no usable one."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            return (height, width, data[position + 9]) if height and width else None
        elif marker == 0x01 or 0xD0 <= marker <= 0xD9:  # markers without content
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def _decode_with_pillow(data: bytes, name: str) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata and palettes: Pillow's pixels are what we want
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(name, image.height, image.width)
                return np.array(image.convert("RGB"))
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _unreadable(name, f"it has more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise _unreadable(name, _describe_foreign(data)) from None
    except Exception as error:  # Pillow's format plugins raise about every kind of error on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason == "cannot load this image":  # Pillow's words for this case
            reason = "it has a header but no image data"
        raise _unreadable(name, reason) from None


def _describe_foreign(data: bytes) -> str:
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg")):
        return "it holds a web page or XML, not an image"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the image itself"
    with contextlib.suppress(UnicodeDecodeError):
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # may end within a character
        if all(letter.isprintable() or letter.isspace() for letter in text):
            return "it holds text, not an image"
    return f"no image format that is read here ({', '.join(FORMATS)}), or its header is broken"


def _check_size(name: str, height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise _unreadable(name, f"{width} x {height} pixels, more than {MAX_PIXELS:,}")


def _unreadable(name: str, reason: str) -> DataError:
    return DataError(f"cannot read image {name}: {reason}; {_WAY_OUT}")
