"""Reading the regions of an image, and whole batches: packed arrays beside the original's JSON with base64.

    python benchmarks/bench_boxes.py

Drawn regions, between 10 and 100 an image as in the published files; images in random order, several rounds in turns.
Files lie in the page cache on both sides; on a cold disk both wait for it.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.rows import Result, Row, write_result
from data.box_features import FEATURE_SIZE, JSONRegions, PackedRegions, Regions, RegionSource, pack, write_json
from data.vlbert_dataset import VLBertCollate, VLBertDataset
from data.vlbert_vqa import RegionPlaces, VLBertRecord

BATCH = 16
NUM_ANSWERS = 3129


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
        for one, other in zip(
            *(read_batches(source, list(range(args.images)), seed=0) for source in sources.values()), strict=True
        ):
            if not all(torch.equal(one[key], other[key]) for key in ("boxes", "sizes", "question", "targets")):
                raise SystemExit("error: a batch differs")
        times: dict[str, list[float]] = {name: [] for name in sources}
        batch_times: dict[str, list[float]] = {name: [] for name in sources}
        for number in range(args.rounds):
            order = rng.permutation(args.images).tolist()
            for name, source in sources.items():
                start = time.perf_counter()
                for image_id in order:
                    source.regions(image_id).features.sum()  # a map is read when it is looked at
                middle = time.perf_counter()
                for _ in read_batches(source, order, seed=number):
                    pass
                times[name].append((middle - start) / args.images)
                batch_times[name].append((time.perf_counter() - middle) / args.images)
    found = {name: statistics.median(values) for name, values in times.items()}
    whole = {name: statistics.median(values) for name, values in batch_times.items()}
    print(
        f"{args.images} images, {total / args.images:.0f} regions each: JSON {1e3 * found['json']:.3g} ms an image, "
        f"packed {1e3 * found['packed']:.3g} ms, ratio {found['json'] / found['packed']:.1f}; equal numbers"
    )
    print(
        f"samples in batches of {BATCH}: JSON {1 / whole['json']:.0f} a second, packed {1 / whole['packed']:.0f}, "
        f"ratio {whole['json'] / whole['packed']:.1f}; equal batches"
    )
    setting = f"{args.images} images of {total / args.images:.0f} regions, one thread, files in memory"
    row = Row("data", "VL-BERT: regions of an image", setting, found["packed"], "JSON with base64", found["json"])
    row.check = "equal numbers"
    setting += f", batches of {BATCH}, half of the samples mirrored, {NUM_ANSWERS} answers"
    batch_row = Row("data", "VL-BERT: sample to batch", setting, whole["packed"], "JSON with base64", whole["json"])
    batch_row.check = "equal batches"
    return write_result(args.json, Result([row, batch_row]), vars(args))


def read_batches(source: RegionSource, image_ids: list[int], *, seed: int) -> Iterator[dict[str, Any]]:
    """The training data set over some images, as a loader's process goes through it."""
    records = [
        VLBertRecord(image_id, image_id, "train2014", "", tokens=tuple(range(5, 17)), labels=(3, 9), scores=(0.6, 1.0))
        for image_id in image_ids
    ]
    dataset = VLBertDataset(records, RegionPlaces({"train2014": source}, "nowhere"), flip_prob=0.5)
    collate, rng = VLBertCollate(NUM_ANSWERS), np.random.default_rng(seed)
    for first in range(0, len(records), BATCH):
        yield collate([dataset.sample(place, rng) for place in range(first, min(first + BATCH, len(records)))])


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything there")
    return parser


if __name__ == "__main__":
    main()
