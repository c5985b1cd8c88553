"""The config file of ``run_vle_vqa.py``: its keys, what each may hold, and how it is read."""

import difflib
import json
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_json

COSINE = "cosine"
ORIGINAL_MAX_TEXT_LEN = 50
PRECISIONS = {"16": "fp16", "32": "no", "bf16": "bf16"}  # precision → --amp of the shared parts
_OPTIMIZERS = ("adamw", "adam", "sgd")


# ---- values of the config; a flag is a text, a value of the file is JSON ----


def _whole(low: int) -> Any:
    def check(value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = int(value)
            except ValueError:
                raise ValueError("a whole number") from None
        if type(value) is not int or value < low:
            raise ValueError(f"a whole number of at least {low}")
        return value

    return check


def _real(low: float) -> Any:
    def check(value: Any) -> float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise ValueError("a number") from None
        if type(value) not in (int, float) or not low <= value < float("inf"):
            raise ValueError(f"a number of at least {low:g}")
        return value

    return check


def _truth(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false", "1", "0"):
        return value.lower() in ("true", "1")
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def _path_or_none(value: Any) -> str:
    return "" if value is None else _text(value)


def _steps(value: Any) -> int | None:
    """``max_steps``: null and -1 mean no limit."""
    return None if value is None or str(value) in ("-1", "null", "None") else _whole(1)(value)


def _devices(value: Any) -> int | list[int]:
    """``num_gpus``: how many, or a list of device numbers."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("a whole number, or a list of device numbers such as [0, 1]") from None
    if isinstance(value, list):
        if not value or not all(type(device) is int and device >= 0 for device in value):
            raise ValueError("a whole number, or a list of device numbers")
        return value
    return _whole(1)(value)


def _precision(value: Any) -> str:
    if str(value) not in PRECISIONS:
        raise ValueError('16, 32 or "bf16"')
    return str(value)


def _power(value: Any) -> float | str:
    return COSINE if value == COSINE else _real(0.0)(value)


def _warmup(value: Any) -> int | float:
    """A fraction of all steps where it has a decimal point, else a number of steps."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            return _real(0.0)(value)
    return value if type(value) is int and value >= 0 else _real(0.0)(value)


def _optimizer(value: Any) -> str:
    if value not in _OPTIMIZERS:
        raise ValueError(" or ".join(_OPTIMIZERS))
    return value


def _deepspeed(value: Any) -> dict[str, Any] | str:
    """An object, or the path of a file that holds one."""
    if not isinstance(value, dict | str):
        raise ValueError("an object of DeepSpeed's settings, or the path of a file")
    return value


# key → (check, what it is)
CONFIG_KEYS: dict[str, tuple[Any, str]] = {
    "seed": (_whole(0), "seed of data order and start values"),
    "model_dir": (_text, "folder of a VLE model: config.json, weights, spm.model, preprocessor_config.json"),
    "data_root": (_text, "folder of the row files that write_vqa.py wrote"),
    "num_workers": (_whole(0), "loader processes per rank"),
    "batch_size": (_whole(1), "samples per optimizer step over all processes"),
    "per_gpu_batchsize": (_whole(1), "samples per process and micro-batch"),
    "image_size": (_whole(1), "image side in pixels; the position table is resized"),
    "max_text_len": (_whole(3), "longest question in tokens, both ends included; longer ones are cut"),
    "draw_false_image": (_whole(0), "without effect, as in the original"),
    "draw_false_text": (_whole(0), "without effect, as in the original"),
    "image_only": (_truth, "must be false"),
    "log_dir": (_text, "folder of the runs"),
    "num_gpus": (_devices, "processes of this machine, or a list of device numbers; started from here"),
    "num_nodes": (_whole(1), "machines; MASTER_ADDR, MASTER_PORT and NODE_RANK say which one this is"),
    "max_epoch": (_whole(1), "epochs"),
    "max_steps": (_steps, "optimizer steps of the whole run, instead of epochs (-1: epochs decide)"),
    "precision": (_precision, '16, 32 or "bf16"'),
    "resume_from": (_path_or_none, "checkpoint folder to go on from"),
    "fast_dev_run": (_truth, "build everything, take two steps, write nothing (--dry_run)"),
    "val_check_interval": (_real(0.0), "must be 1.0: validation after every epoch"),
    "save_top_k": (_whole(-1), "without effect: checkpoint-best is kept, and the newest"),
    "save_weights_only": (_truth, "without effect: what a resume needs is always saved"),
    "test_only": (_truth, "predict only"),
    "learning_rate": (_real(0.0), "peak rate of the towers"),
    "weight_decay": (_real(0.0), "decay of weight matrices"),
    "lr_mult_head": (_real(0.0), "factor of the head's rate"),
    "lr_mult_cross_modal": (_real(0.0), "factor of the fusion layers' rate"),
    "end_lr": (_real(0.0), "rate at the end"),
    "decay_power": (_power, "power of the polynomial decay, or cosine"),
    "optim_type": (_optimizer, "adamw, adam or sgd"),
    "warmup_steps": (_warmup, "steps of warm-up, or with a decimal point a fraction of all"),
    "use_deepspeed": (_truth, "train with DeepSpeed instead of plain torch"),
    "deepspeed_config": (_deepspeed, "settings of DeepSpeed, or a file that holds them"),
}


def read_config_file(path: Path) -> dict[str, Any]:
    """Settings of a file, checked key by key.

    Raises:
        DataError: not JSON, an unknown key, or a value of a wrong kind.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold one JSON object of settings")
    for key, value in content.items():
        if key not in CONFIG_KEYS:
            near = difflib.get_close_matches(key, CONFIG_KEYS, n=1)
            meant = f"did you mean {near[0]}?" if near else "leave it out"
            raise DataError(f"{path}: unknown key {key!r:.80}: {meant}")
        try:
            content[key] = CONFIG_KEYS[key][0](value)
        except ValueError as error:
            raise DataError(f"{path}: {key} must be {error}, got {value!r:.80}") from None
    return content


def warmup_steps_of(setting: float, total_steps: int) -> int:
    """Steps of warm-up: a float is a fraction of all steps, rounded down."""
    return int(total_steps * setting) if isinstance(setting, float) else setting
