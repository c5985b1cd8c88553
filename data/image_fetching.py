"""Images fetched from the addresses in an annotation file, into one folder, checked, and safe to begin again.

The only code of plainvl that uses the network. An image is written under another name until it is whole and its pixels
have the size that the file says; one that is there already is not fetched again.
"""

import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import check_relative, open_atomic, read_json
from data.images import decode_image

URL_KEYS = ("coco_url", "flickr_url", "url")
SCHEMES = ("http", "https")
MAX_BYTES = 100 * 2**20  # of one image
_TIMEOUT_S = 30.0
_CHUNK = 2**16


@dataclass(frozen=True)
class RemoteImage:
    """One image to fetch; width and height are None where the file does not say them."""

    file_name: str
    url: str
    width: int | None = None
    height: int | None = None


class FetchError(Exception):
    """Why an image could not be fetched; ``again`` says whether another try may help."""

    def __init__(self, message: str, *, again: bool) -> None:
        """``message`` is one line, without the image's name."""
        super().__init__(message)
        self.again = again


def read_remote_images(path: str | Path) -> list[RemoteImage]:
    """Names, addresses and sizes of a COCO-style file (NoCaps, COCO).

    Raises:
        DataError: the file is broken, an entry has no address, the name leads out of the folder or stands twice, or
            the address is not one of the web; the entry is named.
    """
    content = read_json(path)
    rows = content.get("images") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise DataError(f'{path}: needs a non-empty list under "images"')
    images: list[RemoteImage] = []
    seen: set[str] = set()
    for place, row in enumerate(rows):
        where = f"{path}: images[{place}]"
        if not isinstance(row, dict):
            raise DataError(f"{where} must be an object, it is {row!r:.80}")
        name = check_relative(row.get("file_name"), f"{where}: file_name")
        url = next((row[key] for key in URL_KEYS if type(row.get(key)) is str and row[key]), None)
        if url is None:
            raise DataError(f"{where} has no address: needs one of {', '.join(URL_KEYS)}")
        if urllib.parse.urlsplit(url).scheme not in SCHEMES:
            raise DataError(f"{where}: the address {url!r:.80} must begin with http:// or https://")
        if name in seen:
            raise DataError(f"{where}: the name {name} stands twice")
        seen.add(name)
        sizes = (row.get(key) if type(row.get(key)) is int else None for key in ("width", "height"))
        images.append(RemoteImage(name, url, *sizes))
    return images


def fetch_image(image: RemoteImage, folder: Path, *, tries: int = 4, pause_s: float = 1.0) -> bool:
    """Fetch one image unless it is there; returns whether it was fetched.

    Args:
        image: what to fetch.
        folder: where it goes; folders in its name are made.
        tries: how often at most, where another try may help.
        pause_s: before the second try; twice as long before each further one.

    Raises:
        FetchError: it could not be had, or is not what the annotation file says.
        OSError: it cannot be written.
    """
    target = folder / image.file_name
    if target.is_file() and not _what_is_wrong(image, target.read_bytes()):
        return False
    for number in range(tries):
        try:
            content = _download(image.url)
            reason = _what_is_wrong(image, content)
            if reason:
                raise FetchError(reason, again=False)
            break
        except FetchError as error:
            if not error.again or number + 1 == tries:
                raise
            time.sleep(pause_s * 2**number)
    with open_atomic(target, binary=True) as file:
        file.write(content)
    return True


def _what_is_wrong(image: RemoteImage, content: bytes) -> str:
    """Why these bytes are not the image; empty if they are."""
    try:
        pixels = decode_image(content, image.file_name)
    except DataError as error:
        return str(error)
    height, width = pixels.shape[:2]
    if image.width and image.height and (width, height) != (image.width, image.height):
        return f"it has {width} x {height} pixels, the annotation file says {image.width} x {image.height}"
    return ""


class _WebOnly(urllib.request.HTTPRedirectHandler):
    """Follow redirections on the web only; urllib itself would also follow them to FTP."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in SCHEMES:
            raise FetchError(f"redirected to {newurl!r:.80}, which is refused", again=False)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str) -> bytes:
    opener = urllib.request.build_opener(_WebOnly)
    request = urllib.request.Request(url, headers={"User-Agent": "plainvl"})
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            promised = answer.headers.get("Content-Length")
            content = bytearray()
            while chunk := answer.read(_CHUNK):
                content += chunk
                if len(content) > MAX_BYTES:
                    raise FetchError(f"larger than {MAX_BYTES} bytes", again=False)
    except urllib.error.HTTPError as error:
        # 408, 429 and the 500s pass; others, such as 404, do not
        raise FetchError(
            f"HTTP {error.code} {error.reason}", again=error.code in (408, 429) or error.code >= 500
        ) from None
    except (OSError, HTTPException, ValueError) as error:
        raise FetchError(f"{getattr(error, 'reason', error) or type(error).__name__}", again=True) from None
    if promised is not None and promised.isdigit() and len(content) != int(promised):
        raise FetchError(f"cut off after {len(content)} of {promised} bytes", again=True)
    return bytes(content)


def failures_file(folder: Path) -> Path:
    """Where the failures of the last call are listed, a JSON object a line."""
    return folder / "download_failures.jsonl"
