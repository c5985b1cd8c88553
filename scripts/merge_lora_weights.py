"""Merge an adapter into its base: a full LLaVA folder that loads by itself.

python scripts/merge_lora_weights.py --model-path ADAPTER --model-base BASE --save-model-path OUT

Adds in float32 and rounds once; the original, which --float16_merge reproduces, rounds the change and the sum.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from data.errors import DataError
from scripts.arguments import OneLineParser, number
from scripts.llava_kinds import ADAPTER_CONFIG, is_adapter
from scripts.program import run


def build_parser() -> argparse.ArgumentParser:
    """The original's three flags, and ours."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model-path", "--model_path", type=Path, required=True, help="folder of the adapter")
    p.add_argument("--model-base", "--model_base", type=Path, help="folder of its base (default: the one it names)")
    p.add_argument("--save-model-path", "--save_model_path", type=Path, required=True, help="folder to write")
    p.add_argument("--vision-tower", "--vision_tower", type=Path, help="folder of CLIP (default: the config's)")
    p.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the result (%(default)s)"
    )
    p.add_argument("--float16_merge", action="store_true", help="the original's arithmetic, rounding twice")
    p.add_argument(
        "--max_shard_gb", type=number(float, low=0, above=True), default=5.0, help="size of a file (%(default)s)"
    )
    p.add_argument("--overwrite", action="store_true", help="replace a model folder that exists")
    return p


def main(argv: list[str] | None = None) -> None:
    """Read, merge, write."""
    args = build_parser().parse_args(argv)
    if args.float16_merge and args.dtype != "float16":
        raise DataError(f"--float16_merge gives float16, not --dtype {args.dtype}: leave one of them out")

    import torch

    from engine.whole_files import require_writable
    from models.lora import merge_adapters
    from scripts.llava_folder import read_llava_folder
    from scripts.llava_saving import check_output, save_full_model

    output = args.save_model_path
    for source in filter(None, (args.model_path, args.model_base)):
        if output.resolve() == source.resolve():
            raise DataError(f"--save-model-path {output} is an input itself: give another folder")
    check_output(output, overwrite=args.overwrite)
    require_writable(output)
    if not args.model_path.is_dir():
        raise DataError(f"no folder {args.model_path}: give --model-path with an adapter")
    if not is_adapter(args.model_path):
        raise DataError(f"{args.model_path} has no {ADAPTER_CONFIG}, so there is nothing to merge: give an adapter")
    dtype = getattr(torch, args.dtype)
    folder = read_llava_folder(
        args.model_path,
        base=args.model_base,
        vision_tower=args.vision_tower,
        dtype=torch.float16 if args.float16_merge else None,
    )
    merged = merge_adapters(folder.model, dtype, like_original=args.float16_merge)
    save_full_model(
        output, folder, dtype=dtype, max_shard_bytes=int(args.max_shard_gb * 10**9), overwrite=args.overwrite
    )
    print(f"merged {merged} adapters of {args.model_path}, wrote {output}")


if __name__ == "__main__":
    run(main)
