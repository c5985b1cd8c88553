"""Pack box files (JSON with base64, one an image; a folder or a .zip) into arrays that are mapped, not decoded.

python scripts/pack_box_features.py --input boxes/trainval2014 --output regions/trainval2014
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Iterable, Sequence

from data.errors import DataError
from scripts.arguments import OneLineParser
from scripts.program import run


def build_parser() -> argparse.ArgumentParser:
    """Flags of this program."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", type=Path, required=True, help="folder of <image number>.json files, or its .zip")
    p.add_argument("--output", type=Path, required=True, help="folder to write")
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16"),
        help="of the features: float32 is equal, float16 takes half the room (%(default)s)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace a packed folder that exists")
    return p


def main(argv: list[str] | None = None) -> None:
    """Read every box file, write the arrays."""
    args = build_parser().parse_args(argv)

    from data.box_features import open_regions, pack

    if (args.output / "regions.json").exists() and not args.overwrite:
        raise DataError(f"--output {args.output} holds packed regions: give --overwrite or another --output")
    source = open_regions(args.input)
    ids = source.image_ids()
    total = pack(source, ids, args.output, dtype=args.dtype, progress=_progress)
    print(f"wrote {total} regions of {len(ids)} images to {args.output}")


def _progress(ids: Sequence[int]) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(ids, desc="packing", unit="image", mininterval=1.0, disable=None)  # None: only on a terminal


if __name__ == "__main__":
    run(main)
