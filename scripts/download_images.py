"""Fetch the images of NoCaps (or any COCO-style file) from the addresses in its annotation file.

python scripts/download_images.py --annotations data/coco/nocaps_val_4500_captions.json --output data/coco/val

Give the same command again after a stop or failures: images that are there and whole are kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from scripts.arguments import OneLineParser, positive_int
from scripts.program import run

if TYPE_CHECKING:
    from data.image_fetching import RemoteImage


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--annotations", required=True, help="JSON file whose images have file_name and coco_url")
    parser.add_argument("--output", required=True, help="folder for the images; made if it is not there")
    parser.add_argument("--num_threads", type=positive_int, default=8, help="images fetched at once (%(default)s)")
    parser.add_argument("--tries", type=positive_int, default=4, help="tries for an image (%(default)s)")
    parser.add_argument("--limit", type=positive_int, help="only the first N images of the file")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Fetch what is missing, list what failed."""
    args = build_parser().parse_args(argv)

    from data.errors import DataError
    from data.files import write_jsonl_atomic
    from data.image_fetching import failures_file, read_remote_images
    from engine.errors import RunError

    images = read_remote_images(args.annotations)[: args.limit]
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output {folder}: {error.strerror}: choose another folder") from None
    fetched, failures = _fetch_all(images, folder, args.num_threads, args.tries)
    there = len(images) - fetched - len(failures)
    print(f"{fetched} images fetched, {there} were there, {len(failures)} failed; in {folder}")
    log = failures_file(folder)
    if failures:
        write_jsonl_atomic(log, failures)
        first = failures[0]
        raise RunError(
            f"{len(failures)} of {len(images)} images could not be fetched, the first {first['file_name']}: "
            f"{first['reason']}; all are listed in {log}; run the same command again to try these once more"
        )
    log.unlink(missing_ok=True)


def _fetch_all(
    images: list["RemoteImage"], folder: Path, num_threads: int, tries: int
) -> tuple[int, list[dict[str, str]]]:
    """How many were fetched, and name, address and reason of each that failed, in the order of the file."""
    from tqdm import tqdm

    from data.image_fetching import FetchError, fetch_image
    from engine.errors import RunError
    from engine.write_failures import could_not_write

    stopped = threading.Event()

    def fetch(image: "RemoteImage") -> bool:
        return not stopped.is_set() and fetch_image(image, folder, tries=tries)

    fetched, reasons = 0, {}
    with ThreadPoolExecutor(num_threads) as pool, tqdm(total=len(images), unit="image", disable=None) as bar:
        waiting: dict[Future, RemoteImage] = {pool.submit(fetch, image): image for image in images}
        try:
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    image = waiting.pop(future)
                    bar.update()
                    try:
                        fetched += future.result()
                    except FetchError as error:
                        reasons[image.file_name] = str(error)
                    except OSError as error:
                        raise RunError(
                            f"{could_not_write(folder / image.file_name, error)}: free some space or choose "
                            "another --output, then run the same command again; what is there is kept"
                        ) from None
        finally:
            stopped.set()  # after an interruption those that have not begun end at once
    failed = [image for image in images if image.file_name in reasons]
    return fetched, [{"file_name": i.file_name, "url": i.url, "reason": reasons[i.file_name]} for i in failed]


if __name__ == "__main__":
    run(main)
