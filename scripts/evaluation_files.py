"""The files of an evaluation beside its results: what was predicted before a stop, and what a stop left behind."""

import argparse
import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from engine import distributed
from engine.backend import resolve_precision
from engine.partial_results import PartialResults, weights_identity

# flags that a model's outputs depend on, beside weights, data and precision; a program need not have them all
_FLAGS = (
    *("task", "model", "model_key", "model_prefix", "vocab_size", "num_max_bpe_tokens", "eval_split", "shuffle_images"),
    *("eval_batch_size", "skip_broken_images", "tf32", "compile", "settings_sha256"),
    *("decoding", "num_beams", "length_penalty", "top_p", "temperature", "seed"),
)


def open_partial_results(
    args: argparse.Namespace,
    name: str,
    expected_ids: Collection[int],
    *,
    records: Iterable[Any],
    answers: Iterable[str],
    tokenizer: str,
    image_size: int,
    device: torch.device,
) -> PartialResults:
    """Results kept in ``--output_dir``, with those that the same evaluation had when it was stopped.

    A dry run keeps none; ``--no_auto_resume`` discards what is there. All processes call it together.

    Args:
        args: of the program.
        name: task and split, as in the names of the results.
        expected_ids: ids of the records.
        records: what is evaluated; their ``repr`` says all that matters of them.
        answers: what the numbers among the results mean; empty for tasks without an answer list.
        tokenizer: its fingerprint.
        image_size: side in pixels.
        device: where the model runs.
    """
    folder = None if args.dry_run else Path(args.output_dir)
    key: dict[str, Any] = {}
    if folder is not None and distributed.is_main():
        key = {flag: getattr(args, flag, None) for flag in _FLAGS} | {
            "data_path": str(Path(args.data_path).resolve()),
            "weights": weights_identity(args.finetune),
            "samples": len(expected_ids),
            "samples_sha256": _checksum(map(repr, records)),
            "answers_sha256": _checksum(answers),
            "tokenizer": tokenizer,
            "image_size": image_size,
            "precision": str(resolve_precision(args.amp, device)),
            "device": device.type,
            "torch": torch.__version__,
        }
    return PartialResults(folder, name, key, expected_ids, resume=args.auto_resume)


def clear_temporaries(*paths: Path) -> None:
    """Remove what a stop inside ``data.files.open_atomic`` left beside these files: ``.<name>.tmp<process>``."""
    for path in paths:
        beginning = f".{path.name}.tmp"
        for leftover in path.parent.iterdir():
            if leftover.name.startswith(beginning) and leftover.name.removeprefix(beginning).isdigit():
                leftover.unlink(missing_ok=True)


def _checksum(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()
