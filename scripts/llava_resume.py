"""Whether a checkpoint fits the run that is to go on from it: the same base, scale, projector and training data."""

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_object
from data.llava_conversation import TEMPLATES
from data.llava_dataset import Conversation
from engine import distributed
from engine.log import say
from engine.zero_files import RUN_FILE
from models.lora import LoRAConfig
from scripts.llava_folder import CONFIG_FILE, TOWER_SIZES, LlavaFolder
from scripts.llava_kinds import ADAPTER_CONFIG, PROJECTOR_FILE

DATA_FILE = "training_data.json"  # in every checkpoint: what it has been trained on
_TRAINED = {
    "lora": "adapters",
    "projector": "the projector alone (--tune_mm_mlp_adapter True)",
    "full": "the model itself (--lora_enable False)",
}
_NOT_OF_THE_MODEL = ("mm_projector_lr", "mm_vision_tower", TOWER_SIZES)
# flags of the run before: a run may go on with others, but hardly by intention
_NOTED = ("image_folder", "image_aspect_ratio", "model_max_length", "bits", "vision_tower", "tokenizer", "seed")
_PATHS = ("image_folder", "vision_tower", "tokenizer")


def describe_data(samples: Sequence[Conversation], args: argparse.Namespace) -> dict[str, Any]:
    """What tells training data from others: number, template, and a checksum of texts, answers and image names."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((sample.turns, sample.image, sample.answers)).encode())
    return {"samples": len(samples), "version": args.version, "sha256": digest.hexdigest()}


def check_data(checkpoint: Path, args: argparse.Namespace) -> None:
    """Refuse a checkpoint of other data or another template than ``args.training_data``; all call it together.

    Whoever asks for the checkpoint by ``--resume_from_checkpoint`` is taken at their word, with a warning.

    Raises:
        DataError: it was trained on others.
    """
    distributed.on_main(lambda: _check_data(checkpoint, args))


def _check_data(checkpoint: Path, args: argparse.Namespace) -> None:
    other = _other_data(checkpoint, args)
    if other and not args.resume:
        raise DataError(
            f"{checkpoint} was trained on {other}: give the same data, or another --output_dir to train anew; "
            "--resume_from_checkpoint latest goes on with the new data"
        )
    if other:
        say(f"warning: goes on from {checkpoint}, which was trained on {other}")


def check_resume(checkpoint: Path, folder: LlavaFolder, args: argparse.Namespace) -> None:
    """Refuse a checkpoint of another model, and say which other settings differ; all processes call it together.

    Args:
        checkpoint: to go on from.
        folder: of this run, as ``build_for_training`` made it.
        args: of this run.

    Raises:
        DataError: it was trained on another base, with another rank, scale, projector, or other parts of the model.
        ModelError: its adapter is of a kind that no run of ours writes.
    """
    distributed.on_main(lambda: _check(checkpoint, folder, args))


def _check(checkpoint: Path, folder: LlavaFolder, args: argparse.Namespace) -> None:
    differences = _differences(checkpoint, folder, args)
    if differences:
        raise DataError(
            f"{checkpoint} is of another run ({'; '.join(differences)}): give the same flags, or another --output_dir"
        )
    _say_other_settings(checkpoint.parent / "run.json", args)


def _differences(checkpoint: Path, folder: LlavaFolder, args: argparse.Namespace) -> list[str]:
    files = {"lora": ADAPTER_CONFIG, "projector": PROJECTOR_FILE}
    mode = next((mode for mode, name in files.items() if (checkpoint / name).exists()), "full")
    if mode != args.mode:
        return [f"it trained {_TRAINED[mode]}, this one trains {_TRAINED[args.mode]}"]
    saved = read_object(checkpoint / CONFIG_FILE)
    found, base = _other_backend(checkpoint, args), saved.get("_name_or_path", "")
    if folder.adapter is not None:
        where = checkpoint / ADAPTER_CONFIG
        before = LoRAConfig.from_dict(read_object(where), str(where))
        base = before.base_model_name_or_path
        for flag, old, new in (
            ("--lora_r", before.r, folder.adapter.r),
            ("--lora_alpha", before.lora_alpha, folder.adapter.lora_alpha),
            ("target_modules", sorted(before.target_modules), sorted(folder.adapter.target_modules)),
        ):
            if old != new:
                found.append(f"{flag} {new} instead of {old}")
    if mode != "full" and base and not _is_same_place(base, args.model_name_or_path):
        found.append(f"--model_name_or_path {args.model_name_or_path} instead of {base}")
    mine = json.loads(json.dumps(folder.values))
    for key in sorted(saved.keys() | mine.keys()):
        if key.startswith("mm_") and key not in _NOT_OF_THE_MODEL and saved.get(key) != mine.get(key):
            found.append(f"{key} {mine.get(key)} instead of {saved.get(key)}")
    return found


def _other_backend(checkpoint: Path, args: argparse.Namespace) -> list[str]:
    """Whether it was trained with DeepSpeed and this run is not, or the reverse."""
    with_deepspeed = (checkpoint / RUN_FILE).is_file()
    if with_deepspeed == args.enable_deepspeed:
        return []
    if not with_deepspeed:
        return ["--deepspeed, which it was trained without"]
    return ["no --deepspeed, with which it was trained"]


def _other_data(checkpoint: Path, args: argparse.Namespace) -> str:
    """How the data of a checkpoint differ from this run's; empty if they do not, or if it does not tell."""
    if not (checkpoint / DATA_FILE).is_file():
        return ""
    before, data = read_object(checkpoint / DATA_FILE), args.training_data
    if before.get("sha256") != data["sha256"]:
        which = f"{before.get('samples')} samples, this file has {data['samples']}"
        if before.get("samples") == data["samples"]:
            which = f"as many samples, but other questions, prompts, answers or images: {data['samples']}"
        return f"other data than {args.data_path} ({which})"
    version = before.get("version")
    if TEMPLATES.get(version) != TEMPLATES[args.version]:
        return f"prompts of another template (--version {args.version} instead of {version})"
    return ""


def _is_same_place(before: str, now: str) -> bool:
    """Whether two names mean one folder; one that has gone may have been moved, under its own name."""
    old, new = Path(before).resolve(), Path(now).resolve()
    return old == new or (not old.is_dir() and Path(before).name == Path(now).name)


def _say_other_settings(run_file: Path, args: argparse.Namespace) -> None:
    before = read_object(run_file).get("arguments") if run_file.is_file() else None
    if not isinstance(before, dict):
        return
    changes = []
    for name in (*_NOTED, "lora_dropout") if args.mode == "lora" else _NOTED:
        values = [before.get(name), getattr(args, name)]
        if name in _PATHS:
            values = [value and os.path.abspath(value) for value in values]
        if name in before and values[0] != values[1]:
            changes.append(f"--{name} {getattr(args, name)} instead of {before[name]}")
    if changes:
        say(f"warning: goes on with other settings than the run before: {', '.join(changes)}")
