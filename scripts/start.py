"""How every run begins: processes, device and seed, the output folder, the precision."""

import argparse
from functools import partial
from pathlib import Path

import torch

from engine import distributed
from engine.log import say
from engine.run_folder import prepare_run_folder


def start_processes(args: argparse.Namespace, *, group_of_one: bool = False) -> torch.device:
    """Join the other processes, and seed: the device to run on.

    What is drawn next, such as start weights, is the same on every rank; seed anew with the rank before its own draws.

    Args:
        args: ``device``, ``dist_timeout``, ``seed`` and ``tf32``.
        group_of_one: as in ``distributed.init``; DeepSpeed needs it.
    """
    device = distributed.init(args.device, timeout_s=args.dist_timeout, group_of_one=group_of_one)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    return device


def open_run_folder(args: argparse.Namespace, *, training: bool = True) -> tuple[Path | None, Path | None]:
    """Say the notes on the flags, and make the output folder.

    Returns:
        The folder (None in a dry run, which writes nothing), and the checkpoint to go on from (None to start anew).

    Raises:
        EngineError: see ``prepare_run_folder``.
    """
    for note in args.notes:
        say(f"note: {note}")
    if args.dry_run:
        return None, None
    output_dir = Path(args.output_dir)
    return output_dir, prepare_run_folder(
        output_dir, resume=args.resume, auto_resume=args.auto_resume, training=training
    )


def autocast_of(device: torch.device, dtype: torch.dtype | None) -> partial:
    """Gives a context for evaluation in the precision of the run; it does nothing for None."""
    return partial(torch.autocast, device.type, dtype or torch.float32, enabled=dtype is not None)


def precision_name(dtype: torch.dtype | None) -> str:
    """As the facts of a run have it."""
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")
