"""What DeepSpeed writes for ZeRO 0-3, read without DeepSpeed: the weights of all ranks, whole and in float32.

Layout of a checkpoint folder (DeepSpeed 0.5.9 to 0.19, runtime/engine.py and the optimizers' state_dict):
``mp_rank_00_model_states.pt`` (stage 3: one ``zero_pp_rank_<r>_mp_rank_00_model_states.pt`` a rank) with the module's
entries, names and shapes; ``[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt`` with rank r's share of the float32
masters, flat. Stage 0 has no such shares.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.weight_files import DEEPSPEED_FILE
from engine.weights import load_torch_file

RUN_FILE = "deepspeed_run.pth"  # what our own backend keeps beside DeepSpeed's files
_SHARE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")


class _Stage(int):
    """DeepSpeed's ZeroStageEnum, a number."""


class _Ignored:
    """One of DeepSpeed's objects that is of no use without DeepSpeed (loss scaler, place of a fragment)."""

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_STAND_INS = [
    (_Stage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.utils.tensor_fragment.fragment_address"),
]


def find_zero_folder(checkpoint_dir: Path, tag: str | None) -> Path:
    """The folder of a tag; without one, what ``latest`` names, or ``checkpoint_dir`` where the files are in it.

    Raises:
        EngineError: there is none.
    """
    if not checkpoint_dir.is_dir():
        raise EngineError(f"{checkpoint_dir} is no folder: give the folder that holds the tag's folder")
    if tag is None:
        if any(checkpoint_dir.glob("*_model_states.pt")):
            return checkpoint_dir
        try:
            tag = (checkpoint_dir / "latest").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise EngineError(
                f"{checkpoint_dir} has no readable file 'latest': give the tag, the name of a folder in it"
            ) from None
    folder = checkpoint_dir / tag
    if not tag or not folder.is_dir():
        raise EngineError(f"{checkpoint_dir} has no folder {tag!r}: give the tag of a checkpoint")
    return folder


def read_whole_weights(folder: Path, tell: Callable[[str], None] = lambda _: None) -> dict[str, Tensor]:
    """Merge one checkpoint into name → float32 tensor (integer buffers stay), under the names of the file.

    Args:
        folder: of one tag.
        tell: gets lines about what is found.

    Raises:
        EngineError: no checkpoint of DeepSpeed, files of some ranks missing or broken, shares that do not add up.
    """
    shares = _find_shares(folder)
    if not shares:
        return _read_stage_0(folder, tell)
    states = []
    for path in shares:
        state = _entry(_load(path), "optimizer_state_dict", path)
        state.pop("base_optimizer_state", None)  # the moments: two thirds of the file
        states.append(state)
    stage = int(_entry(states[0], "zero_stage", shares[0]))
    count = _entry(states[0], "partition_count", shares[0])
    count = max(count) if isinstance(count, list) else int(count)
    if count != len(shares):
        raise EngineError(
            f"{folder} needs the *_optim_states.pt of {count} ranks and has {len(shares)}: copy them from all machines"
        )
    tell(f"ZeRO stage {stage}, {count} ranks")
    if stage == 3:
        weights = _merge_stage_3(folder, shares, states)
    elif stage in (1, 2):
        weights = _merge_stage_1_and_2(folder, shares, states)
    else:
        raise EngineError(f"{shares[0]} is of ZeRO stage {stage}, which this program does not know")
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def strip_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove ``module.`` and then ``model.``, each once and only where every name begins with it."""
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _find_shares(folder: Path) -> list[Path]:
    """Files of the float32 shares in the order of ranks, from 0 on without a gap."""
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        match = _SHARE.fullmatch(path.name)
        if match is None:
            continue
        if int(match[2]) > 0:
            raise EngineError(f"{folder} is of a model-parallel run ({path.name}), which this program cannot merge")
        if int(match[1]) in found:
            raise EngineError(f"{folder} has two shares of rank {match[1]}: it is a mixture of two checkpoints")
        found[int(match[1])] = path
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing:
        raise EngineError(f"{folder} lacks the *_optim_states.pt of rank {missing[0]}: copy it from its machine")
    return [found[rank] for rank in sorted(found)]


def _load(path: Path) -> dict[str, Any]:
    content = load_torch_file(path, also_safe=_STAND_INS)
    if not isinstance(content, dict):
        raise EngineError(f"{path} holds a {type(content).__name__}, it is no file of a DeepSpeed checkpoint")
    return content


def _entry(content: Any, key: str, path: Path) -> Any:
    if not isinstance(content, dict) or content.get(key) is None:
        raise EngineError(f"{path} has no {key!r}: it is no file of a DeepSpeed checkpoint, or of an unknown version")
    return content[key]


def _load_model_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EngineError(f"{path.parent} has no {path.name}: copy it, or give the tag of a DeepSpeed checkpoint")
    content = _load(path)
    _entry(content, "module", path)
    return content


def _read_stage_0(folder: Path, tell: Callable[[str], None]) -> dict[str, Tensor]:
    path = folder / DEEPSPEED_FILE
    content = _load_model_file(path)
    if content.get("param_shapes"):
        raise EngineError(
            f"{folder} has no *_optim_states.pt, in which the float32 weights are: copy those of all ranks"
        )
    weights = _tensors(content["module"])
    tell("ZeRO stage 0")
    masters = _masters_of_stage_0(folder, content)
    if masters:
        weights |= masters
    elif any(value.dtype in (torch.float16, torch.bfloat16) for value in weights.values()):
        tell("the float32 masters have no names in this file: the 16-bit weights are taken")
    return {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}


def _masters_of_stage_0(folder: Path, content: dict[str, Any]) -> dict[str, Tensor]:
    """Float32 masters beside 16-bit weights: a list per parameter group, whose names only our own runs keep."""
    optimizer = content.get("optimizer")
    if not isinstance(optimizer, dict) or "fp32_groups" not in optimizer or not (folder / RUN_FILE).is_file():
        return {}
    names = [group["params"] for group in _entry(_load(folder / RUN_FILE), "groups", folder / RUN_FILE)]
    masters = optimizer["fp32_groups"]
    if [len(group) for group in names] != [len(group) for group in masters]:
        raise EngineError(f"{folder}: {RUN_FILE} and {DEEPSPEED_FILE} are not of one checkpoint")
    return {
        name: value.detach()
        for group, values in zip(names, masters, strict=True)
        for name, value in zip(group, values, strict=True)
    }


def _merge_stage_1_and_2(folder: Path, shares: list[Path], states: list[dict[str, Any]]) -> dict[str, Tensor]:
    path = folder / DEEPSPEED_FILE
    model = _load_model_file(path)
    weights = _tensors(model["module"])  # buffers and frozen weights; the trained ones are replaced below
    weights |= _tensors(model.get("frozen_param_fragments") or {})
    shapes = _entry(model, "param_shapes", path)
    flat = [
        _entry(state, "single_partition_of_fp32_groups", share) for state, share in zip(states, shares, strict=True)
    ]
    paddings = states[0].get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
    if len({len(groups) for groups in (*flat, shapes, paddings)}) != 1:
        raise EngineError(f"{folder}: the ranks' files have different numbers of parameter groups")
    for index, group in enumerate(shapes):
        whole = torch.cat([groups[index] for groups in flat])
        offset = 0
        for (name, shape), padding in zip(group.items(), paddings[index], strict=True):
            size = math.prod(shape)
            if offset + size > whole.numel():
                raise EngineError(f"{folder}: the ranks' shares end before {name}: files of two checkpoints?")
            weights[name] = whole[offset : offset + size].view(torch.Size(shape))
            offset += size + padding
        step = 2 * len(shares)  # partitions are padded to multiples of it
        if math.ceil(offset / step) != math.ceil(whole.numel() / step):
            raise EngineError(f"{folder}: {offset} weights are named, the shares hold {whole.numel()}")
    return _with_shared(weights, model)


def _merge_stage_3(folder: Path, shares: list[Path], states: list[dict[str, Any]]) -> dict[str, Tensor]:
    paths = [folder / f"zero_pp_rank_{rank}_{DEEPSPEED_FILE}" for rank in range(len(shares))]
    models = [_load_model_file(path) for path in paths]
    buffers = set(models[0].get("buffer_names") or ())
    weights = {name: value for name, value in _tensors(models[0]["module"]).items() if name in buffers}
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        pieces = [
            _entry(model, "frozen_param_fragments", path)[name] for model, path in zip(models, paths, strict=True)
        ]
        weights[name] = _cut(pieces, 0, shape)[0]
    flat = [
        torch.cat([group.flatten() for group in _entry(state, "fp32_flat_groups", share)])
        for state, share in zip(states, shares, strict=True)
    ]
    offset = 0
    for group in _entry(models[0], "param_shapes", paths[0]):
        for name, shape in group.items():
            if offset + math.ceil(math.prod(shape) / len(flat)) > min(share.numel() for share in flat):
                raise EngineError(f"{folder}: the ranks' shares end before {name}: files of two checkpoints?")
            weights[name], offset = _cut(flat, offset, shape)
    if any(share.numel() != offset for share in flat):
        raise EngineError(f"{folder}: {offset} weights a rank are named, the shares hold {flat[0].numel()}")
    return _with_shared(weights, models[0])


def _cut(shares: list[Tensor], offset: int, shape: torch.Size) -> tuple[Tensor, int]:
    """One parameter, of which every rank has an equal piece from ``offset`` on (the last one padded)."""
    size = math.prod(shape)
    piece = math.ceil(size / len(shares))
    whole = torch.cat([share.flatten()[offset : offset + piece] for share in shares])
    return whole[:size].view(torch.Size(shape)), offset + piece


def _with_shared(weights: dict[str, Tensor], model: dict[str, Any]) -> dict[str, Tensor]:
    for name, other in (model.get("shared_params") or {}).items():
        if other in weights:
            weights[name] = weights[other]
    return weights


def _tensors(entries: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in entries.items() if isinstance(value, Tensor)}
