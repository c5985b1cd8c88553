"""An adapter of LLaVA for the rest of the world: peft loads it over transformers' LlavaForConditionalGeneration.

python scripts/export_adapter.py --model-path ADAPTER --save-path OUT --base-name llava-hf/llava-1.5-7b-hf

Layers and projector get the names of transformers 4.52 and newer; no number changes, and no base is needed. The other
way round needs no program: what peft has written over transformers' LLaVA is read as it is, wherever an adapter is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from data.errors import DataError
from scripts.arguments import OneLineParser
from scripts.llava_kinds import ADAPTER_CONFIG, is_adapter
from scripts.program import run


def build_parser() -> argparse.ArgumentParser:
    """Where from, where to, and whose adapter it is."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--model-path", "--model_path", type=Path, required=True, help="folder of the adapter")
    p.add_argument("--save-path", "--save_path", type=Path, required=True, help="folder to write, new or empty")
    p.add_argument(
        "--base-name",
        "--base_name",
        help="base in transformers' layout that the adapter shall name (default: the base that it was trained on)",
    )
    return p


def main(argv: list[str] | None = None) -> None:
    """Read, rename, write."""
    args = build_parser().parse_args(argv)

    from dataclasses import replace

    from models.llava.adapters import to_transformers
    from scripts.llava_folder import REST_FILE, read_adapter, read_rest
    from scripts.llava_saving import save_for_transformers

    if not is_adapter(args.model_path):
        raise DataError(f"{args.model_path} has no {ADAPTER_CONFIG}: give the folder of an adapter")
    config, weights = read_adapter(args.model_path)
    rest_file = args.model_path / REST_FILE
    config, state = to_transformers(config, weights, read_rest(rest_file) if rest_file.exists() else {})
    if args.base_name:
        config = replace(config, base_model_name_or_path=args.base_name)
    save_for_transformers(args.save_path, config, state)
    layers = sum(name.endswith(".lora_A.weight") for name in state)
    what = f"{layers} layers{' and the projector' if config.modules_to_save else ''}"
    print(f"wrote {what} to {args.save_path}, for {config.base_model_name_or_path or 'an unnamed base'}")


if __name__ == "__main__":
    run(main)
