"""Merge a DeepSpeed ZeRO checkpoint (stages 0 to 3, any number of ranks) into one file of float32 weights.

python scripts/zero_to_fp32.py output/vqav2 vqa.pth checkpoint-9

Takes ours and those of other programs on DeepSpeed; needs neither DeepSpeed nor a GPU. The file loads with --finetune.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from scripts.arguments import HelpFormatter, OneLineParser


def build_parser() -> argparse.ArgumentParser:
    """Three places, as the originals have them."""
    parser = OneLineParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint_dir", help="folder that holds the tag's folder, such as the output folder of a run")
    parser.add_argument("output_file", help="file to write: .pth or .bin (torch), or .safetensors")
    parser.add_argument("tag", nargs="?", help="name of the checkpoint's folder (default: what the file 'latest' says)")
    parser.add_argument("-d", "--debug", action="store_true", help="print the name and shape of every weight")
    parser.add_argument("--overwrite", action="store_true", help="replace an output file that exists")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Read, merge, write."""
    args = build_parser().parse_args(argv)

    from engine.errors import EngineError
    from engine.whole_files import require_writable, write_weights
    from engine.zero_files import find_zero_folder, read_whole_weights, strip_wrappers

    output = Path(args.output_file)
    if output.is_dir() or output.suffix not in (".pth", ".bin", ".pt", ".safetensors"):
        raise EngineError(f"{output} must be a file ending in .pth, .bin, .pt or .safetensors")
    if output.exists() and not args.overwrite:
        raise EngineError(f"{output} exists: give another file, or --overwrite")
    if not output.absolute().parent.is_dir():
        raise EngineError(f"there is no folder {output.parent} to write {output.name} into: make it first")
    require_writable(output)
    folder = find_zero_folder(Path(args.checkpoint_dir), args.tag)
    weights = strip_wrappers(read_whole_weights(folder, tell=lambda line: print(f"{folder}: {line}")))
    if args.debug:
        for name, value in weights.items():
            print(f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    write_weights(weights, output)
    print(f"wrote {len(weights)} tensors, {sum(value.numel() for value in weights.values())} numbers, to {output}")


if __name__ == "__main__":
    from scripts.program import run

    run(main)
