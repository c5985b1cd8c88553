"""The config file of ``run_vle_vqa.py``: its keys, what each may hold, and how it is read."""

import json
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_json
from scripts.config_checks import real, recompute, text, truth, unknown_key, whole

COSINE = "cosine"
ORIGINAL_MAX_TEXT_LEN = 50
PRECISIONS = {"16": "fp16", "32": "no", "bf16": "bf16"}  # precision → --amp of the shared parts
_OPTIMIZERS = ("adamw", "adam", "sgd")


# ---- values of the config ----


def _path_or_none(value: Any) -> str:
    return "" if value is None else text(value)


def _steps(value: Any) -> int | None:
    """``max_steps``: null and -1 mean no limit."""
    return None if value is None or str(value) in ("-1", "null", "None") else whole(1)(value)


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
    return whole(1)(value)


def _precision(value: Any) -> str:
    if str(value) not in PRECISIONS:
        raise ValueError('16, 32 or "bf16"')
    return str(value)


def _power(value: Any) -> float | str:
    return COSINE if value == COSINE else real(0.0)(value)


def _warmup(value: Any) -> int | float:
    """A fraction of all steps where it has a decimal point, else a number of steps."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            return real(0.0)(value)
    return value if type(value) is int and value >= 0 else real(0.0)(value)


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
    "seed": (whole(0), "seed of data order and start values"),
    "model_dir": (text, "folder of a VLE model: config.json, weights, spm.model, preprocessor_config.json"),
    "data_root": (text, "folder of the row files that write_vqa.py wrote"),
    "num_workers": (whole(0), "loader processes per rank"),
    "batch_size": (whole(1), "samples per optimizer step over all processes"),
    "per_gpu_batchsize": (whole(1), "samples per process and micro-batch"),
    "image_size": (whole(1), "image side in pixels; the position table is resized"),
    "max_text_len": (whole(3), "longest question in tokens, both ends included; longer ones are cut"),
    "draw_false_image": (whole(0), "without effect, as in the original"),
    "draw_false_text": (whole(0), "without effect, as in the original"),
    "image_only": (truth, "must be false"),
    "log_dir": (text, "folder of the runs"),
    "num_gpus": (_devices, "processes of this machine, or a list of device numbers; started from here"),
    "num_nodes": (whole(1), "machines; MASTER_ADDR, MASTER_PORT and NODE_RANK say which one this is"),
    "max_epoch": (whole(1), "epochs"),
    "max_steps": (_steps, "optimizer steps of the whole run, instead of epochs (-1: epochs decide)"),
    "precision": (_precision, '16, 32 or "bf16"'),
    "recompute": (recompute, "ours: layers that the backward pass computes again: none, full, every_K or auto"),
    "resume_from": (_path_or_none, "checkpoint folder to go on from"),
    "fast_dev_run": (truth, "build everything, take two steps, write nothing (--dry_run)"),
    "val_check_interval": (real(0.0), "must be 1.0: validation after every epoch"),
    "save_top_k": (whole(-1), "without effect: checkpoint-best is kept, and the newest"),
    "save_weights_only": (truth, "without effect: what a resume needs is always saved"),
    "test_only": (truth, "predict only"),
    "learning_rate": (real(0.0), "peak rate of the towers"),
    "weight_decay": (real(0.0), "decay of weight matrices"),
    "lr_mult_head": (real(0.0), "factor of the head's rate"),
    "lr_mult_cross_modal": (real(0.0), "factor of the fusion layers' rate"),
    "end_lr": (real(0.0), "rate at the end"),
    "decay_power": (_power, "power of the polynomial decay, or cosine"),
    "optim_type": (_optimizer, "adamw, adam or sgd"),
    "warmup_steps": (_warmup, "steps of warm-up, or with a decimal point a fraction of all"),
    "use_deepspeed": (truth, "train with DeepSpeed instead of plain torch"),
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
            raise DataError(f"{path}: {unknown_key(key, CONFIG_KEYS)}")
        try:
            content[key] = CONFIG_KEYS[key][0](value)
        except ValueError as error:
            raise DataError(f"{path}: {key} must be {error}, got {value!r:.80}") from None
    return content


def warmup_steps_of(setting: float, total_steps: int) -> int:
    """Steps of warm-up: a float is a fraction of all steps, rounded down."""
    return int(total_steps * setting) if isinstance(setting, float) else setting
