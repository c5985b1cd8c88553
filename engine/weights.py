"""Read model weights from any file or folder that people pass around; nothing in a file is ever executed."""

import argparse
import json
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

try:
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:  # numpy 1
    from numpy.core.multiarray import _reconstruct, scalar

from engine.errors import EngineError
from engine.weight_files import FOLDER_FILES

# Harmless classes that the originals pickle beside the weights (their argument namespace, numpy scalars and arrays,
# whose functions numpy 2 has moved: files of either name are about, whatever numpy is installed).
_SAFE_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdFDSU"},
]

# how torch's safe loader says that a pickle names something beyond its list, not merely that bytes make no sense
_WORDS_OF_REFUSAL = ("Unsupported global", "GLOBAL", "Unsupported class", "Trying to call reduce", "Can only")
# broken bytes end in about every kind of error, from the zip reader, the unpickler or the tensor builder
_READ_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, struct.error, zipfile.BadZipFile),
)


def load_torch_file(path: Path, *, also_safe: Sequence[Any] = ()) -> Any:
    """``torch.load`` on the CPU with ``weights_only``; the single place of the tree that calls it.

    Args:
        path: the file.
        also_safe: further harmless classes that it may hold, as ``torch.serialization.safe_globals`` takes them.

    Raises:
        EngineError: the file is missing, empty, truncated, no checkpoint at all, or wants to execute code.
    """
    _check_is_file(path)
    is_zip = _is_sound_zip(path)
    try:
        with torch.serialization.safe_globals([*_SAFE_GLOBALS, *also_safe]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of files that are about to be refused or that load all the same
            # memory-mapping works for the zip format only, and keeps a large file from being read twice
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if any(word in str(error) for word in _WORDS_OF_REFUSAL):
            raise EngineError(
                f"{path} is refused: it holds pickled Python objects beside tensors ({_first_reason(error)}); "
                "loading those could execute code. Save its state dict of tensors alone and give that file"
            ) from None
        raise EngineError(f"{path} cannot be read as a checkpoint: {_what_it_is(path)}") from None
    except _READ_ERRORS:
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
            inside = sorted(path.glob("checkpoint-*"))
            if inside:
                best = path / "checkpoint-best"
                raise EngineError(f"{path} is the folder of a run: give {best if best in inside else inside[-1]}")
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
            f"{path} holds no named tensors (its keys: {keys}): give a file of weights, or the key of the weights in it"
        )
    _refuse_odd_tensors(path, state)
    return state


def stream_weights(path: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor one after the other, holding one shard at a time: for models that hardly fit into memory.

    Args:
        path: as in ``read_state_dict``; a folder with a sharded index, or a single file.

    Yields:
        Tensors on the CPU. Those of one shard may share its memory, so copy or convert them before the next shard.

    Raises:
        EngineError: missing, broken or unsafe file; a tensor that the index promises is in no shard.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FOLDER_FILES if (path / name).exists()]
        if not found:
            raise EngineError(f"{path} holds no weights: looked for {', '.join(FOLDER_FILES)}")
        path = found[0]
    _check_is_file(path)
    if not path.name.endswith(".index.json"):
        yield from _stream_file(path)
        return
    places = _weight_map(path)
    for shard_name in sorted(set(places.values())):
        shard = path.parent / shard_name
        if not shard.is_file():
            raise EngineError(f"{path} needs the shard {shard_name}, which is not in {path.parent}: download it")
        promised = {name for name, place in places.items() if place == shard_name}
        for name, value in _stream_file(shard):
            promised.discard(name)
            yield name, value
        if promised:
            raise EngineError(
                f"{path} says that {min(promised)} is in {shard_name}, where it is not: download both again"
            )


def _stream_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    yield name, file.get_tensor(name)
        except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
            raise EngineError(f"{path} is not a sound safetensors file ({error}): {_what_it_is(path)}") from None
        return
    yield from read_state_dict(path).items()  # mapped: a tensor is read when it is looked at


def _weight_map(index: Path) -> dict[str, str]:
    """Name → shard of a sharded index, checked."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(places.values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise EngineError(f"{index} is not a shard index: it needs an object with weight_map (name to file)") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise EngineError(f"{index} names the shard {name!r}: shards must lie beside their index")
    return places


def _refuse_odd_tensors(path: Path, state: dict[str, Tensor]) -> None:
    """Only dense numbers in memory are weights: a tensor may also be sparse, quantised, or a shape without content."""
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
            kind = "quantised" if value.is_quantized else "sparse" if value.device.type == "cpu" else "without content"
            raise EngineError(
                f"{path} is refused: its entry {name!r} is a tensor that is {kind}; save the weights as dense numbers"
            )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise EngineError(f"{path} is not a sound safetensors file ({error}): {_what_it_is(path)}") from None


def _read_shards(index: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in sorted(set(_weight_map(index).values())):
        shard = index.parent / name
        if not shard.is_file():
            raise EngineError(f"{index} needs the shard {name}, which is not in {index.parent}: download it")
        content = _read_safetensors(shard) if shard.suffix == ".safetensors" else load_torch_file(shard)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise EngineError(f"{shard} is no shard of weights: it must hold named tensors only; download it again")
        state.update(content)
    return state


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise EngineError(f"no checkpoint at {path}: check the path that was given")
    if path.stat().st_size == 0:
        raise EngineError(f"{path} is empty (0 bytes): download or copy it again")
    if not os.access(path, os.R_OK):
        raise EngineError(f"{path} cannot be read (permission denied): check whose file it is")


def _is_sound_zip(path: Path) -> bool:
    """Whether this is a zip file as torch writes it: no entry of it is compressed, as those of a zip bomb would be."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except _READ_ERRORS:
        raise EngineError(f"{path} cannot be read as a checkpoint: {_what_it_is(path)}") from None
    is_checkpoint = any(entry.filename.endswith("/data.pkl") for entry in entries)
    if is_checkpoint and any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise EngineError(
            f"{path} is refused: its entries are compressed, which torch never does (zipped again, or a zip bomb); "
            "give the file as it was saved"
        )
    return True


def _first_reason(error: Exception) -> str:
    """The name that was refused, else the words that hold it."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)|unrecognized function <?([^>\n]{1,60})|but got <?class '([\w.\[\]]+)'", text)
    if found:
        return found[1] or found[2] or found[3]
    _, marker, after = text.partition("WeightsUnpickler error:")  # before it torch advises to trust the file
    return " ".join((after if marker else text).split())[:80]


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
    if head.startswith(b"PK") and b"data.pkl" not in head:  # torch writes this entry first
        return "it is a zip archive of other files; unpack it and give the checkpoint in it"
    if head[257:262] == b"ustar":
        return "it is a tar file; unpack it, or save a checkpoint of a torch before 0.2 again with a newer one"
    if head.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\xfd7zXZ", b"BZh")):
        return "it is a compressed archive; unpack it and give the checkpoint in it"
    if head.startswith(b"\x80"):
        return "it is damaged, or a pickle of other things than tensors; download or copy it again"
    return "it is damaged or of another format; download or copy it again"
