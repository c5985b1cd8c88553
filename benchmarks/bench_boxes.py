"""Reading the regions of an image: packed arrays beside the original's JSON with base64, the same numbers.

    python benchmarks/bench_boxes.py

Drawn regions, between 10 and 100 an image as in the published files; images in random order, several rounds in turns.
Files lie in the page cache on both sides; on a cold disk both wait for it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.rows import Result, Row, write_result
from data.box_features import FEATURE_SIZE, JSONRegions, PackedRegions, Regions, pack, write_json


def main(argv: list[str] | None = None) -> Result:
    """Draw, pack, check, measure, print."""
    args = build_parser().parse_args(argv)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "json"
        folder.mkdir()
        for image_id in range(args.images):
            count = int(rng.integers(10, 101))
            boxes, features = (rng.random((count, width), dtype=np.float32) for width in (4, FEATURE_SIZE))
            write_json(folder / f"{image_id}.json", image_id, Regions(boxes, features, features[0], (640, 480)))
        total = pack(JSONRegions(folder), range(args.images), Path(place) / "packed")
        sources = {"json": JSONRegions(folder), "packed": PackedRegions(Path(place) / "packed")}
        for image_id in range(args.images):
            one, other = (source.regions(image_id) for source in sources.values())
            if not all(
                np.array_equal(getattr(one, name), getattr(other, name)) for name in ("boxes", "features", "whole")
            ):
                raise SystemExit(f"error: image {image_id} differs")
        times: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(args.rounds):
            order = rng.permutation(args.images).tolist()
            for name, source in sources.items():
                start = time.perf_counter()
                for image_id in order:
                    source.regions(image_id)
                times[name].append((time.perf_counter() - start) / args.images)
    found = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{args.images} images, {total / args.images:.0f} regions each: JSON {1e3 * found['json']:.3g} ms an image, "
        f"packed {1e3 * found['packed']:.3g} ms, ratio {found['json'] / found['packed']:.1f}; equal numbers"
    )
    setting = f"{args.images} images of {total / args.images:.0f} regions, one thread, files in memory"
    row = Row("data", "VL-BERT: regions of an image", setting, found["packed"], "JSON with base64", found["json"])
    row.check = "equal numbers"
    return write_result(args.json, Result([row]), vars(args))


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser


if __name__ == "__main__":
    main()
