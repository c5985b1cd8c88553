"""The DeepSpeed settings that the originals write, as a plain dictionary; DeepSpeed itself is not imported here."""

from typing import Any

from engine.errors import EngineError


def fused_adam_fp16_config(
    *,
    batch_size: int,
    accumulation_steps: int,
    world_size: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
    initial_scale_power: int = 16,
    clip_grad: float | None = None,
    zero_stage: int = 0,
) -> dict[str, Any]:
    """Settings of BEiT-3's ``utils.create_ds_config``, key by key in its order: float16, Adam with decoupled decay.

    ``adam_w_mode`` stands where the original puts it, beside ``params``; DeepSpeed does not look for it there, and
    decoupled decay is its default for "Adam".

    Args:
        batch_size: samples per process and micro-batch.
        accumulation_steps: micro-batches per optimizer step.
        world_size: processes.
        lr: peak learning rate.
        weight_decay: decoupled decay.
        betas: of Adam.
        eps: of Adam.
        initial_scale_power: the loss scale starts at 2 to this power.
        clip_grad: gradient norm to clip to; None leaves the key out, as the original does.
        zero_stage: 0, or 1 with the original's bucket size.

    Raises:
        EngineError: a stage that the original refuses.
    """
    if zero_stage not in (0, 1):
        raise EngineError(f"the original's DeepSpeed settings know ZeRO stages 0 and 1, got {zero_stage}")
    config: dict[str, Any] = {
        "train_batch_size": batch_size * accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": batch_size,
        "steps_per_print": 1000,
        "optimizer": {
            "type": "Adam",
            "adam_w_mode": True,
            "params": {
                "lr": lr,
                "weight_decay": weight_decay,
                "bias_correction": True,
                "betas": list(betas),
                "eps": eps,
            },
        },
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": initial_scale_power,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": 1,
        },
        "amp": {"enabled": False, "opt_level": "O2"},
    }
    if clip_grad is not None:
        config["gradient_clipping"] = clip_grad
    if zero_stage:
        config["zero_optimization"] = {"stage": zero_stage, "reduce_bucket_size": 5e8}
    return config
