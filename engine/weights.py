"""Read model weights from any file or folder that people pass around; nothing in a file is ever executed."""

import argparse
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import EngineError

# What a folder may hold, in order of preference: ours, then the published layouts, then DeepSpeed's.
FOLDER_FILES = (
    "model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "mp_rank_00_model_states.pt",
)

# Harmless classes that the originals pickle beside the weights (their argument namespace, numpy scalars).
_SAFE_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    np._core.multiarray.scalar,
    np._core.multiarray._reconstruct,
    *{type(np.dtype(name)) for name in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool")},
]


def load_torch_file(path: Path) -> Any:
    """``torch.load`` on the CPU with ``weights_only``; the single place of the tree that calls it.

    Raises:
        EngineError: the file is missing, empty, truncated, no checkpoint at all, or wants to execute code.
    """
    _check_is_file(path)
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            # memory-mapping works for the zip format only, and keeps a large file from being read twice
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if (
            "Unsupported" in str(error)
            or "GLOBAL" in str(error)
            or "weights_only" in str(error).split("invalid load")[0]
        ):
            if "invalid load key" not in str(error):
                raise EngineError(
                    f"{path} is refused: it holds pickled Python objects beside tensors ({_first_reason(error)}); "
                    "loading those could execute code. Save its state dict of tensors alone and give that file"
                ) from None
        raise EngineError(f"{path} is not a checkpoint: {_what_it_is(path)}") from None
    except (EOFError, RuntimeError, ValueError, OSError, KeyError, IndexError, AttributeError, TypeError, MemoryError):
        raise EngineError(f"{path} cannot be read as a checkpoint: {_what_it_is(path)}") from None


def read_state_dict(path: str | Path, *, model_key: str = "model|module") -> dict[str, Tensor]:
    """Name → tensor from a checkpoint folder, a ``.pth/.pt/.bin/.model/.safetensors`` file or a sharded index.

    Args:
        path: file or folder; a folder may hold any of ``FOLDER_FILES``.
        model_key: ``|``-separated keys; the first that the file has selects the state dict, else the file is one.

    Returns:
        Tensors on the CPU under the names of the file.

    Raises:
        EngineError: missing, broken or unsafe file; a file without tensors.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).exists()]
        if not found:
            raise EngineError(f"{path} holds no weights: looked for {', '.join(FOLDER_FILES)}")
        path = found[0]
    _check_is_file(path)
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = load_torch_file(path)
    if isinstance(content, dict):
        content = next((content[key] for key in model_key.split("|") if key in content), content)
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds a {type(content).__name__}, not a state dict of named tensors")
    state = {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if not state:
        keys = ", ".join(str(key) for key in list(content)[:5]) or "nothing"
        raise EngineError(
            f"{path} holds no named tensors (its keys: {keys}): give the key of the weights by --model_key"
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise EngineError(f"{path} is not a sound safetensors file ({error}): download it again") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise EngineError(f"{index} is not a shard index: it needs an object with weight_map (name to file)") from None
    state: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise EngineError(f"{index} names the shard {name!r}: shards must lie beside their index")
        shard = index.parent / name
        if not shard.is_file():
            raise EngineError(f"{index} needs the shard {name}, which is not in {index.parent}: download it")
        state.update(_read_safetensors(shard) if shard.suffix == ".safetensors" else load_torch_file(shard))
    return state


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise EngineError(f"no checkpoint at {path}: check the path given by --finetune, --resume or --checkpoint")
    if path.stat().st_size == 0:
        raise EngineError(f"{path} is empty (0 bytes): download or copy it again")


def _first_reason(error: Exception) -> str:
    for line in str(error).splitlines():
        if "GLOBAL" in line or "Unsupported" in line:
            words = line.split("GLOBAL", 1)[-1].split()
            return words[0] if words and "GLOBAL" in line else line.strip()[:80]
    return str(error).splitlines()[0][:80]


def _what_it_is(path: Path) -> str:
    """What a file that torch cannot read looks like, and what to do."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "it is a web page, probably the error page of a download; download it again"
    if head.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"it is cut off at {path.stat().st_size} bytes; download or copy it again"
    return "it is damaged or of another format; download or copy it again"
