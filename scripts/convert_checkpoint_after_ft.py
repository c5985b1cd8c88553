"""Turn the weights of a VLE run into a file, or a whole model folder, that the model and the original load.

python scripts/convert_checkpoint_after_ft.py                            # ./step=0.ckpt -> ./pytorch_model.bin
python scripts/convert_checkpoint_after_ft.py run/checkpoint-best my_vle     # a folder with config, tokenizer, weights
python scripts/convert_checkpoint_after_ft.py epoch=9.ckpt my_vle/pytorch_model.bin --model_dir hfl/vle-base

Takes checkpoint folders of ours, checkpoints of the original with and without DeepSpeed (after zero_to_fp32.py), and
plain state dicts: prefixes such as "module.model." are taken off once.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from dataclasses import replace

from scripts.arguments import OneLineParser
from scripts.program import run

WEIGHTS_FILE = "pytorch_model.bin"


def build_parser() -> argparse.ArgumentParser:
    """Two places, both with the original's defaults."""
    p = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("checkpoint", nargs="?", default="step=0.ckpt", help="file or folder to read (%(default)s)")
    p.add_argument("output", nargs="?", default=WEIGHTS_FILE, help="file (.bin, .pth, .safetensors) or folder to write")
    p.add_argument("--model_dir", help="folder whose config.json the weights must fit (default: the checkpoint's)")
    p.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return p


def main(argv: list[str] | None = None) -> None:
    """Read, check, write."""
    args = build_parser().parse_args(argv)

    from data.errors import DataError
    from engine.weights import read_state_dict
    from engine.whole_files import require_writable
    from models.vle.loading import unwrap_names

    checkpoint, output = Path(args.checkpoint), Path(args.output)
    if not checkpoint.exists():
        raise DataError(f"no checkpoint at {checkpoint}: give the file or folder as first argument")
    is_folder = output.suffix not in (".bin", ".pth", ".pt", ".safetensors")
    target = output / WEIGHTS_FILE if is_folder else output
    if target.exists() and not args.overwrite:
        raise DataError(f"{target} exists: give another output, or --overwrite")
    require_writable(target)
    state, strangers = unwrap_names(read_state_dict(checkpoint, model_key="state_dict|model|module"))
    for name in strangers:
        print(f"left out {name}: no weight of VLE")
    model_dir = Path(args.model_dir) if args.model_dir else checkpoint if checkpoint.is_dir() else None
    if model_dir is None and is_folder:
        raise DataError(f"{checkpoint} has no config.json beside it: give --model_dir, or a file as output")
    if model_dir is None:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        _write(state, output)
        return
    _write_checked(state, model_dir, target, with_files=is_folder)


def _write_checked(state: dict, model_dir: Path, target: Path, *, with_files: bool) -> None:
    """Load the weights into the model of ``model_dir`` first: what is written, fits."""
    from data.files import open_atomic
    from data.vqa_answers import AnswerVocabulary
    from models.loading import load_weights
    from models.vle.loading import prepare_vle_state_dict, published_state_dict
    from models.vle.vle import VLEForVQA
    from scripts.vle_model import folder_files, read_model_folder

    folder = read_model_folder(model_dir)
    rows = state["vqa_classifier.3.weight"].shape[0] if "vqa_classifier.3.weight" in state else None
    if folder.config.labels is None or (rows is not None and rows != len(folder.config.labels)):
        from data.errors import DataError

        raise DataError(
            f"{model_dir}/config.json names {len(folder.config.labels or ())} answers in id2label, the weights have "
            f"{rows}: give the --model_dir of these weights"
        )
    config = replace(folder.config)
    model = VLEForVQA(config)
    load_weights(model, prepare_vle_state_dict(state, config))
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    if with_files:
        for name, content in folder_files(folder, AnswerVocabulary(config.labels)).items():
            with open_atomic(target.parent / name, binary=True) as file:
                file.write(content)
    _write(published_state_dict(model.state_dict(), config), target)


def _write(state: dict, target: Path) -> None:
    from engine.whole_files import write_weights

    write_weights(state, target)
    print(f"wrote {len(state)} tensors to {target}")


if __name__ == "__main__":
    run(main)
