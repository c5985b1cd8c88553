"""The one place where worker processes, batches and the random numbers of samples come together."""

import contextlib
import multiprocessing.queues
import multiprocessing.util
import os
import signal
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.errors import DataError
from data.samplers import EvalBatchSampler, SampleKey, TrainBatchSampler

Collate = Callable[[list[Any]], dict[str, Any]]
Watch = Callable[[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]


class SampleSource(Protocol):
    """What a family's data set offers."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Any:
        """Read and transform one sample; every random draw comes from ``rng``."""
        ...


class BatchSampler(Protocol):
    """Which samples this process reads in an epoch, from any step on."""

    steps_per_epoch: int
    samples_per_step: int  # over all processes

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """Where the next iteration begins."""
        ...

    def __len__(self) -> int:
        """Number of micro-batches of the next iteration."""
        ...

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Lists of keys, one list a micro-batch."""
        ...


class _Failure:
    """Carries a data error out of a worker: the loader would wrap a raised one in the worker's traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _KeyedDataset(Dataset):
    """Gives each draw its own generator, a function of (seed, epoch, sample index) and of nothing else."""

    def __init__(self, source: SampleSource, seed: int) -> None:
        self._source, self._seed = source, seed

    def __getitem__(self, key: SampleKey) -> Any:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self._seed, key.epoch, key.index))))
        try:
            return self._source.sample(key.index, rng)
        except DataError as error:
            return _Failure(str(error))


class _CheckedCollate:
    """Joins samples, or passes the first failure on.

    In a loader process the tensors move into shared memory here. The queue would do it in a thread of its own, where a
    lack of room is only printed: the batch is lost, and the main process waits for it for ever. From here the error
    reaches the main process.
    """

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        for sample in samples:
            if isinstance(sample, _Failure):
                return sample
        batch = self._collate(samples)
        if get_worker_info() is not None:
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.share_memory_()
        return batch


def _start_loader_process(_: int) -> None:
    """Leave signals to the main process, and end with an error when a batch cannot be passed on.

    Launchers and SLURM signal loader processes too, while the main one needs them until its last step is saved; its end
    is theirs. A queue that fails, such as for open files, would lose the batch without a word.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    def leave(error: BaseException, _: object) -> None:
        if not isinstance(error, BrokenPipeError):  # the main process has gone, and has said why
            os.write(2, f"loader process {os.getpid()}: cannot pass its batch on ({error})\n".encode())
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(leave)
    remove = multiprocessing.util._remove_temp_dir

    def remove_quietly(*arguments: Any) -> None:
        with contextlib.suppress(OSError):  # of the open files that are lacking; the main process says what is wrong
            remove(*arguments)

    multiprocessing.util._remove_temp_dir = remove_quietly


class TrainLoader:
    """Endless source of training micro-batches that can start at any step of any epoch."""

    def __init__(self, loader: DataLoader, sampler: BatchSampler, watch: Watch = iter) -> None:
        """Built by ``build_train_loader``."""
        self._loader, self._sampler, self._watch = loader, sampler, watch
        self.steps_per_epoch = sampler.steps_per_epoch
        self.samples_per_step = sampler.samples_per_step

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[dict[str, Any]]:
        """Micro-batches from optimizer step ``first_step`` of ``epoch`` to the epoch's end."""
        self._sampler.set_position(epoch, first_step)
        return self._watch(_checked(self._loader))


class EvalLoader:
    """This process's share of an evaluation set; iterating again reads it again."""

    def __init__(self, loader: DataLoader, num_samples: int, watch: Watch = iter) -> None:
        """Built by ``build_eval_loader``; ``num_samples`` counts those of all processes, also the ones left out."""
        self._loader, self.num_samples, self._watch = loader, num_samples, watch

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches in file order."""
        return self._watch(_checked(self._loader))


def build_train_loader(
    source: SampleSource,
    collate: Collate,
    batch_size: int,
    *,
    accumulation_steps: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
    watch: Watch = iter,
    sampler: BatchSampler | None = None,
) -> TrainLoader:
    """Loader of shuffled micro-batches (see ``TrainBatchSampler``); the draws do not depend on ``num_workers``.

    ``watch`` passes on the batches of each pass over the data and may end it with an error. A ``sampler`` of one's own
    takes the place of the usual one.
    """
    sampler = sampler or TrainBatchSampler(
        len(source),
        batch_size,
        accumulation_steps=accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )
    return TrainLoader(_data_loader(source, collate, sampler, seed, num_workers, pin_memory), sampler, watch)


def build_eval_loader(
    source: SampleSource,
    collate: Collate,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    done: Collection[int] = (),
    fixed_batches: bool = False,
    watch: Watch = iter,
) -> EvalLoader:
    """Loader over every sample once, without the batches whose samples are all in ``done`` (``EvalBatchSampler``).

    ``watch`` as in ``build_train_loader``.
    """
    sampler = EvalBatchSampler(
        len(source), batch_size, rank=rank, world_size=world_size, done=done, fixed_batches=fixed_batches
    )
    return EvalLoader(_data_loader(source, collate, sampler, 0, num_workers, pin_memory), len(source), watch)


def _data_loader(
    source: SampleSource,
    collate: Collate,
    sampler: BatchSampler | EvalBatchSampler,
    seed: int,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    if num_workers < 0:
        raise DataError(f"--num_workers must not be negative, got {num_workers}")
    return DataLoader(
        _KeyedDataset(source, seed),
        batch_sampler=sampler,
        collate_fn=_CheckedCollate(collate),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_start_loader_process,
        # the loader draws a base seed per epoch; from a generator of its own, or resume would shift the model's draws
        generator=torch.Generator().manual_seed(0),
    )


def _checked(loader: DataLoader) -> Iterator[dict[str, Any]]:
    for batch in loader:
        if isinstance(batch, _Failure):
            raise DataError(batch.message)
        yield batch
