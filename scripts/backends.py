"""The backend of a run from its flags; shared by the training programs."""

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from engine import distributed
from engine.backend import Backend, TorchBackend, WeightsFormat
from engine.deepspeed_config import resolve_config
from engine.ema import ModelEMA
from engine.log import say


def build_backend(
    args: argparse.Namespace,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    dtype: torch.dtype | None,
    deepspeed_file: dict[str, Any] | None,
    *,
    clip_parts: Mapping[str, float | None] = MappingProxyType({}),
    weights: WeightsFormat | None = None,
) -> tuple[Backend, dict[str, Any]]:
    """What takes the steps: plain torch, or DeepSpeed when it is asked for; and the settings of DeepSpeed.

    ``clip_parts`` and ``weights`` as in ``TorchBackend``; DeepSpeed clips everything together.
    """
    ema = None
    if args.model_ema:
        ema = ModelEMA(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    if not args.enable_deepspeed:
        backend = TorchBackend(
            model,
            optimizer,
            device=device,
            autocast_dtype=dtype,
            accumulation_steps=args.update_freq,
            clip_grad=args.clip_grad,
            clip_parts=clip_parts,
            ema=ema,
            initial_loss_scale=2.0**args.initial_scale_power,
            weights=weights,
        )
        return backend, {}
    if set(clip_parts.values()) - {args.clip_grad}:
        say(f"note: DeepSpeed clips all gradients together, to {args.clip_grad}")
    from engine.deepspeed_backend import DeepSpeedBackend  # seconds to import

    config, notices = resolve_config(
        deepspeed_file,
        zero_stage=args.zero_stage,
        batch_size=args.batch_size,
        accumulation_steps=args.update_freq,
        world_size=distributed.world_size(),
        dtype=dtype,
        clip_grad=args.clip_grad,
        initial_scale_power=args.initial_scale_power,
    )
    for notice in notices:
        say(f"note: {notice}")
    backend = DeepSpeedBackend(
        model,
        optimizer,
        device=device,
        config=config,
        dtype=dtype,
        timeout_s=args.dist_timeout,
        ema=ema,
        weights=weights,
    )
    return backend, {"deepspeed": config}
