"""Which layers of a run are recomputed: as the flags say, or as few as its memory allows."""

import argparse
import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from engine import distributed
from engine.errors import EngineError
from engine.evaluation import to_device
from engine.log import say
from engine.loop import LossFunction, TrainLoader
from models.recompute import Recompute, set_recompute
from scripts.start import autocast_of

CANDIDATES = ("none", "every_4", "every_3", "every_2", "full")  # from the fewest recomputed layers to the most


def apply_recompute(
    args: argparse.Namespace,
    model: nn.Module,
    loader: TrainLoader,
    loss_fn: LossFunction,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    prepare: Callable[[nn.Module], None] = lambda copy: None,
) -> dict[str, Any]:
    """Give the model its policy; the facts of a run about it. All processes call it together.

    ``auto`` takes the first of ``CANDIDATES`` with which a step on the run's first batch is predicted to fit.

    Args:
        args: ``recompute``, ``memory_gb``, ``update_freq``, ``model_ema`` and ``model_ema_force_cpu``.
        model: on its device, before any backend has wrapped it; its weights that train are marked.
        loader: of the run.
        loss_fn: of the run, or one of equal memory; must leave nothing behind.
        device: of the run.
        dtype: of autocast, None for none.
        prepare: what a copy of the model without values needs before ``loss_fn`` can run.

    Raises:
        EngineError: even with all layers recomputed a step does not fit.
    """
    if args.recompute != "auto":
        set_recompute(model, Recompute.parse(args.recompute))
        return {"recompute": args.recompute}
    from engine.fitting import first_that_fits
    from engine.without_values import copy_without_values  # loads torch's compiler

    batch = distributed.together(lambda: to_device(next(loader.batches(0, 0)), device))
    copy = copy_without_values(model).train()
    prepare(copy)
    found = first_that_fits(
        [partial(set_recompute, policy=Recompute.parse(text)) for text in CANDIDATES],
        copy,
        lambda copy: loss_fn(copy, batch, 0)["loss"],
        device=device,
        autocast=autocast_of(device, dtype),
        keeps_gradients=args.update_freq > 1 or distributed.world_size() > 1,
        limit=None if args.memory_gb is None else int(args.memory_gb * 1e9),
        later=_moving_average_bytes(args, model, device),
    )
    del copy
    gc.collect()  # it goes in circles, and a dry run counts the tensors that are there
    peak, limit = (f"{number / 1e9:.3g} GB" for number in (found.peaks[-1], found.limit))
    if found.choice is None:
        error = EngineError(
            f"--recompute auto: even with all layers recomputed a step is predicted to take {peak} of tensors, and "
            f"there are {limit}: lower the batch size and accumulate more, or give --recompute full to try it"
        )
        error.agreed = True
        raise error
    chosen = CANDIDATES[found.choice]
    set_recompute(model, Recompute.parse(chosen))
    say(f"recompute: {chosen}, with which a step is predicted to take {peak} of tensors; there are {limit}")
    predicted = dict(zip(CANDIDATES, found.peaks, strict=False))
    return {"recompute": chosen, "recompute_forecast": {"peak_bytes": predicted, "limit_bytes": found.limit}}


def _moving_average_bytes(args: argparse.Namespace, model: nn.Module, device: torch.device) -> int:
    """Of ``engine.ema.ModelEMA``, which a backend makes."""
    if not args.model_ema or (args.model_ema_force_cpu and device.type != "cpu"):
        return 0
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())
