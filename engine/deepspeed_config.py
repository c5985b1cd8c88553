"""DeepSpeed's settings as plain dictionaries: a user's file with every "auto" resolved.

DeepSpeed is not imported here, and torch only where it is there already: a wrong stage is said at once.
"""

import copy
import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError

if TYPE_CHECKING:
    import torch

# sections and keys that are handed on as they are (DeepSpeed itself checks what is inside)
_HANDED_ON = frozenset(
    {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
        *("fp16", "bf16", "bfloat16", "data_types", "communication_data_type", "seq_parallel_communication_data_type"),
        *("prescale_gradients", "gradient_predivide_factor", "disable_allgather", "checkpoint", "aio"),
        *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
        *("flops_profiler", "comms_logger", "tensorboard", "csv_monitor", "wandb", "comet"),
        *("dataloader_drop_last", "vocabulary_size", "disable_python_gc"),
    }
)
# accepted and left out → why
_NOT_USED = {
    "optimizer": "the run's own settings decide (rate, betas, epsilon, weight decay)",
    "scheduler": "the run's own settings decide (rate, warm-up)",
    "activation_checkpointing": "programs that recompute have a flag for it",
}
# refused unless switched off → what to do instead
_NOT_OFFERED = {
    "amp": "choose the precision of the run instead",
    "torch_autocast": "choose the precision of the run instead",
    "compile": "leave it out, programs that compile have a flag for it",
    "autotuning": "choose the batch size by hand",
    "elasticity": "a ZeRO run goes on with as many processes as before",
    "curriculum_learning": "leave it out",
    "data_efficiency": "leave it out",
    "hybrid_engine": "leave it out",
    "compression_training": "leave it out",
    "weight_quantization": "leave it out",
    "sparse_attention": "leave it out",
    "sparse_gradients": "leave it out",
    "tensor_parallel": "leave it out",
    "expert_parallel": "leave it out",
    "sequence_parallel_size": "leave it out",
    "pipeline": "leave it out",
    "gradient_allreduce_op": "leave it out: gradients are averaged",
    "managed_gradient_accumulation": "leave it out: the micro-batches per step decide",
    "use_data_before_expert_parallelism": "leave it out",
    "datastates": "leave it out",
}
# inside zero_optimization → what to do instead
_NOT_OFFERED_ZERO = {
    "elastic_checkpoint": "leave it out",
    "legacy_stage1": "leave it out",
    "pipeline_loading_checkpoint": "leave it out",
    "zenflow": "leave it out",
    "cpu_offload": "write offload_optimizer",
    "cpu_offload_params": "write offload_param",
}
_INTEGERS_ZERO = (
    *("reduce_bucket_size", "allgather_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size"),
    *("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"),
)
AUTO = "auto"


def read_config(path: str | Path) -> dict[str, Any]:
    """A settings file of DeepSpeed: one JSON object.

    Raises:
        EngineError: no such file, not JSON, a key twice, or not an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            raise EngineError(f"DeepSpeed's file {path} has the key {repeated!r} twice: keep one")
        return dict(pairs)

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique)
    except OSError as error:
        raise EngineError(f"DeepSpeed's file {path}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise EngineError(
            f"DeepSpeed's file {path} is not JSON (line {error.lineno}: {error.msg}): mend that line"
        ) from None
    except UnicodeDecodeError:
        raise EngineError(f"DeepSpeed's file {path} is not UTF-8 text: give DeepSpeed's JSON file") from None
    if not isinstance(content, dict):
        raise EngineError(f"DeepSpeed's file {path} must hold one JSON object, has a {type(content).__name__}")
    return content


def choose_stage(flag: int | None, user: dict[str, Any] | None) -> int:
    """ZeRO stage from the flag (None: not given) and the settings file; the file decides what the flag leaves.

    Raises:
        EngineError: they differ, or the file's is no stage.
    """
    stage = _section(user or {}, "zero_optimization").get("stage", AUTO)
    if stage == AUTO:
        return flag or 0
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise EngineError(f"DeepSpeed's settings: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    if flag is not None and flag != stage:
        raise EngineError(
            f"ZeRO stage {flag} but zero_optimization.stage {stage} in DeepSpeed's settings: make them equal, "
            "or leave one out"
        )
    return int(stage)


def choose_precision(amp: str, user: dict[str, Any] | None) -> str:
    """The precision to go by; ``auto`` follows the settings file where that says something.

    Raises:
        EngineError: the file enables bf16 and fp16, or something else than ``amp``.
    """
    said = {name: _section(user or {}, name).get("enabled", AUTO) for name in ("bf16", "bfloat16", "fp16")}
    said = {name: value for name, value in said.items() if value != AUTO}
    for name, value in said.items():
        if not isinstance(value, bool):
            raise EngineError(f"DeepSpeed's settings: {name}.enabled must be true, false or {AUTO!r}, got {value!r}")
    enabled = {name.replace("bfloat16", "bf16") for name, value in said.items() if value}
    if len(enabled) > 1:
        raise EngineError("DeepSpeed's settings enable bf16 and fp16: keep one of them")
    if not said:
        return amp
    wanted = enabled.pop() if enabled else "no"
    if amp not in ("auto", wanted):
        text = ", ".join(f"{name}.enabled {str(value).lower()}" for name, value in said.items())
        raise EngineError(
            f"precision {amp} but {text} in DeepSpeed's settings: make them agree, or write {AUTO!r} in the file"
        )
    return wanted


def resolve_config(
    user: dict[str, Any] | None,
    *,
    zero_stage: int,
    batch_size: int,
    accumulation_steps: int,
    world_size: int,
    dtype: "torch.dtype | None",
    clip_grad: float | None,
    initial_scale_power: int,
) -> tuple[dict[str, Any], list[str]]:
    """The settings for ``deepspeed.initialize``, with nothing left to guess.

    Args:
        user: content of the user's file, or None. Every value may be "auto".
        zero_stage: from ``choose_stage``.
        batch_size: samples per process and micro-batch.
        accumulation_steps: micro-batches per optimizer step.
        world_size: processes.
        dtype: of the parameters: ``torch.bfloat16``, ``torch.float16``, or None for float32 (``choose_precision``).
        clip_grad: gradient norm to clip to; None takes the file's, else no clipping.
        initial_scale_power: the fp16 loss scale starts at 2 to this power.

    Returns:
        The settings, and one line for each of the user's values that was changed or left out.

    Raises:
        EngineError: an unknown or unsupported key, or a value that contradicts a flag.
    """
    import torch

    config = copy.deepcopy(user or {})
    notices = _check_sections(config)
    _drop_autos(config)
    per_step = batch_size * accumulation_steps * world_size
    for key, value, flags in (
        ("train_micro_batch_size_per_gpu", batch_size, f"batch size {batch_size}"),
        ("gradient_accumulation_steps", accumulation_steps, f"accumulation {accumulation_steps}"),
        ("train_batch_size", per_step, f"batch size {batch_size} x accumulation {accumulation_steps} x {world_size}"
         " processes"),
    ):  # fmt: skip
        if config.get(key, value) != value:
            raise EngineError(
                f"DeepSpeed's settings: {key} is {config[key]!r} but {flags} gives {value}: make them equal, "
                f"or write {AUTO!r} in the file"
            )
        config[key] = value
    config["gradient_clipping"] = _clipping(config.get("gradient_clipping"), clip_grad)
    config["steps_per_print"] = config.get("steps_per_print") or 1_000_000_000
    config["zero_allow_untested_optimizer"] = True  # DeepSpeed calls torch's own AdamW untested
    config["zero_optimization"] = _zero_section(config.get("zero_optimization", {}), zero_stage)
    if "offload_optimizer" in config["zero_optimization"]:
        config["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW runs on the host as well
    bf16 = config.pop("bfloat16", {}) | config.get("bf16", {})
    if bf16.pop("check_grad_overflow", True) is not True:
        notices.append("bf16.check_grad_overflow stays true: a non-finite gradient must never reach the weights")
    config["bf16"] = bf16 | {"enabled": dtype is torch.bfloat16, "check_grad_overflow": True}
    config["fp16"], more = _fp16_section(config.get("fp16", {}), dtype is torch.float16, initial_scale_power)
    return config, notices + more


def _check_sections(config: dict[str, Any]) -> list[str]:
    """Refuse unknown and unsupported keys; remove those that are not used and say so."""
    notices = []
    for key in list(config):
        if key in _NOT_USED:
            del config[key]
            notices.append(f"DeepSpeed's settings: {key} is not used: {_NOT_USED[key]}")
        elif key in _NOT_OFFERED:
            if not _is_off(config.pop(key)):
                raise EngineError(f"DeepSpeed's settings: {key} is not offered here: {_NOT_OFFERED[key]}")
        elif key not in _HANDED_ON:
            close = difflib.get_close_matches(key, [*_HANDED_ON, *_NOT_USED, *_NOT_OFFERED], n=1)
            meant = f"did you mean {close[0]!r}?" if close else "leave it out"
            raise EngineError(f"DeepSpeed's settings: unknown key {key!r}: {meant}")
    checkpoint = _section(config, "checkpoint")
    for key in ("load_universal", "use_node_local_storage", "writer", "parallel_write"):
        if checkpoint.get(key):
            raise EngineError(f"DeepSpeed's settings: checkpoint.{key} is not offered here: leave it out")
    for name in ("zero_optimization", "fp16", "bf16", "bfloat16", "data_types"):
        _section(config, name)
    return notices


def _is_off(value: Any) -> bool:
    """Whether a section is present only to say that it is not wanted."""
    if isinstance(value, dict):
        return value.get("enabled") is False or not value
    return value in (False, None, 1, "mean", "auto") and value is not True


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise EngineError(f"DeepSpeed's settings: {name} must be an object, got {section!r}")
    return section


def _drop_autos(section: dict[str, Any]) -> None:
    """Remove every "auto": what depends on flags is written afterwards, the rest has DeepSpeed's default."""
    for key, value in list(section.items()):
        if value == AUTO:
            del section[key]
        elif isinstance(value, dict):
            _drop_autos(value)


def _clipping(in_file: Any, flag: float | None) -> float:
    """Always a number: DeepSpeed's own default for a missing key changed between versions, from none to 1."""
    if in_file is None:
        return float(flag or 0.0)
    if isinstance(in_file, bool) or not isinstance(in_file, int | float) or not 0 <= in_file < float("inf"):
        raise EngineError(f"DeepSpeed's settings: gradient_clipping must be a number of at least 0, got {in_file!r}")
    if flag is not None and flag != in_file:
        raise EngineError(
            f"gradients are clipped to {flag} but gradient_clipping is {in_file} in DeepSpeed's settings: make them "
            f"equal, or write {AUTO!r} in the file"
        )
    return float(in_file)


def _zero_section(section: dict[str, Any], stage: int) -> dict[str, Any]:
    for key, way_out in _NOT_OFFERED_ZERO.items():
        if section.get(key):
            raise EngineError(f"DeepSpeed's settings: zero_optimization.{key} is not offered here: {way_out}")
    if section.pop("compute_grad_norm", True) is not True:
        raise EngineError("DeepSpeed's settings: zero_optimization.compute_grad_norm must be true: leave it out")
    for key in _INTEGERS_ZERO:
        value = section.get(key)
        if isinstance(value, float) and value.is_integer():  # 5e8 is a float in JSON
            section[key] = int(value)
        elif value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise EngineError(f"DeepSpeed's settings: zero_optimization.{key} must be a whole number, got {value!r}")
    for key in ("offload_optimizer", "offload_param"):
        device = _section(section, key).get("device", "none")
        if device == "none":
            section.pop(key, None)
        elif device != "cpu":
            raise EngineError(
                f"DeepSpeed's settings: zero_optimization.{key}.device {device!r} is not offered here: "
                "'cpu' is, or leave it out"
            )
        elif stage < (1 if key == "offload_optimizer" else 3):
            needed = "stage 1, 2 or 3" if key == "offload_optimizer" else "stage 3"
            raise EngineError(f"DeepSpeed's settings: zero_optimization.{key} needs {needed}, got stage {stage}")
    if float(_section(section, "offload_optimizer").get("ratio", 1.0)) != 1.0:
        raise EngineError("DeepSpeed's settings: offload_optimizer.ratio below 1 is not offered here: leave it out")
    return section | {"stage": stage}


def _fp16_section(section: dict[str, Any], enabled: bool, power: int) -> tuple[dict[str, Any], list[str]]:
    notices = []
    minimum = section.get("min_loss_scale", 1)
    if isinstance(minimum, float) and minimum > 0:
        section["min_loss_scale"] = max(int(minimum), 1)
        if section["min_loss_scale"] != minimum:
            notices.append(
                f"DeepSpeed's settings: fp16.min_loss_scale {minimum:g} is taken as {section['min_loss_scale']}: "
                "DeepSpeed takes whole numbers only"
            )
    section.setdefault("initial_scale_power", power)
    return section | {"enabled": enabled}, notices
