"""The small files that a run stores beside its weights: a checkpoint folder needs no further flags (no torch)."""

import json
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.vqa_index import ANSWER_FILE

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "beit3.spm"
_KINDS = {"model": (str, "a text")} | dict.fromkeys(
    ("image_size", "vocab_size", "num_answers", "num_max_bpe_tokens"), (int, "a whole number above 0")
)


def checkpoint_folder(weights: str | Path) -> Path | None:
    """The folder that a run wrote around its weights, given it or a file in it; None for any other weights."""
    if not weights:
        return None
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    way_out = "restore the file, or give the weights file in another folder"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path} is not JSON: {way_out}") from None
    if not isinstance(config, dict) or config.get("family") != "beit3":
        return None
    for name, (kind, words) in _KINDS.items():
        value = config.get(name)
        if type(value) not in (kind, type(None)) or (kind is int and value is not None and value < 1):
            raise DataError(f"{path}: {name} must be {words}, it is {value!r:.80}: {way_out}")
    return folder


def read_checkpoint_config(weights: str | Path) -> dict[str, Any]:
    """What a run wrote about its model into ``config.json`` beside the weights; empty for any other weights."""
    folder = checkpoint_folder(weights)
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")) if folder else {}


def checkpoint_files(
    *,
    task: str,
    model_name: str,
    image_size: int,
    vocab_size: int,
    max_tokens: int,
    answer_rows: list[dict[str, str | int]] | None,
    tokenizer_file: str,
) -> dict[str, bytes]:
    """Name → content of the files: model and sizes, sentencepiece model, and the answer list of tasks that have one."""
    config = {
        "family": "beit3",
        "task": task,
        "model": model_name,
        "image_size": image_size,
        "vocab_size": vocab_size,
        "num_max_bpe_tokens": max_tokens,
    }
    files = {TOKENIZER_FILE: Path(tokenizer_file).read_bytes()}
    if answer_rows is not None:
        config["num_answers"] = len(answer_rows)
        files[ANSWER_FILE] = "".join(json.dumps(row) + "\n" for row in answer_rows).encode()
    return {CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(), **files}
