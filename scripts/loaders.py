"""Records and loaders from the flags, for every family."""

import argparse
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.image_reader import check_images_exist
from data.loader import BatchSampler, SampleSource, build_eval_loader, build_train_loader
from data.replaced_images import limit_replaced
from engine import distributed
from engine.log import say


def usable_records(args: argparse.Namespace, records: list[Any]) -> list[Any]:
    """The first ``--limit_samples`` of them; their images must be there unless broken ones are to be replaced.

    Raises:
        DataError: images are missing.
    """
    records = records[: args.limit_samples]
    if not args.skip_broken_images:
        check_images_exist((record.image_path for record in records), Path(args.data_path))
    return records


def build_loader(
    args: argparse.Namespace,
    dataset: SampleSource,
    collate: Callable[[list[Any]], dict[str, Any]],
    *,
    train: bool,
    device: torch.device,
    done: Collection[int] = (),
    sampler: BatchSampler | None = None,
) -> Any:
    """Train loader (shuffled, or in the order of ``sampler``) or evaluation loader (every sample once, in order).

    An evaluation leaves out the batches whose samples are all in ``done``.
    """
    shared: dict[str, Any] = {
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "watch": partial(
            limit_replaced, num_samples=len(dataset), share=args.max_bad_samples, world_size=distributed.world_size()
        ),
    }
    if not train:
        return build_eval_loader(dataset, collate, args.eval_batch_size, done=done, **shared)
    return build_train_loader(
        dataset,
        collate,
        args.batch_size,
        accumulation_steps=args.update_freq,
        seed=args.seed,
        sampler=sampler,
        **shared,
    )


def warn_of_replaced(count: float) -> None:
    """Say how many images of an evaluation, of all processes, are grey stand-ins."""
    if count:
        say(f"warning: {int(count)} images could not be read and were replaced by a grey one")
