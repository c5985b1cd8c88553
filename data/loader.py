"""The one place where worker processes, batches and the random numbers of samples come together."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.errors import DataError
from data.samplers import EvalBatchSampler, SampleKey, TrainBatchSampler

Collate = Callable[[list[Any]], dict[str, Any]]


class SampleSource(Protocol):
    """What a family's data set offers."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Any:
        """Read and transform one sample; every random draw comes from ``rng``."""
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
    """Joins samples, or passes the first failure on."""

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        for sample in samples:
            if isinstance(sample, _Failure):
                return sample
        return self._collate(samples)


class TrainLoader:
    """Endless source of training micro-batches that can start at any step of any epoch."""

    def __init__(self, loader: DataLoader, sampler: TrainBatchSampler) -> None:
        """Built by ``build_train_loader``."""
        self._loader, self._sampler = loader, sampler
        self.steps_per_epoch = sampler.steps_per_epoch
        self.samples_per_step = sampler.samples_per_step

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[dict[str, Any]]:
        """Micro-batches from optimizer step ``first_step`` of ``epoch`` to the epoch's end."""
        self._sampler.set_position(epoch, first_step)
        return _checked(self._loader)


class EvalLoader:
    """This process's share of an evaluation set; iterating again reads it again."""

    def __init__(self, loader: DataLoader, num_samples: int) -> None:
        """Built by ``build_eval_loader``; ``num_samples`` counts those of all processes."""
        self._loader, self.num_samples = loader, num_samples

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Batches in file order."""
        return _checked(self._loader)


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
) -> TrainLoader:
    """Loader of shuffled micro-batches (see ``TrainBatchSampler``); the draws do not depend on ``num_workers``."""
    sampler = TrainBatchSampler(
        len(source),
        batch_size,
        accumulation_steps=accumulation_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )
    return TrainLoader(_data_loader(source, collate, sampler, seed, num_workers, pin_memory), sampler)


def build_eval_loader(
    source: SampleSource,
    collate: Collate,
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> EvalLoader:
    """Loader over every sample once (see ``EvalBatchSampler``)."""
    sampler = EvalBatchSampler(len(source), batch_size, rank=rank, world_size=world_size)
    return EvalLoader(_data_loader(source, collate, sampler, 0, num_workers, pin_memory), len(source))


def _data_loader(
    source: SampleSource,
    collate: Collate,
    sampler: TrainBatchSampler | EvalBatchSampler,
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
        # the loader draws a base seed per epoch; from a generator of its own, or resume would shift the model's draws
        generator=torch.Generator().manual_seed(0),
    )


def _checked(loader: DataLoader) -> Iterator[dict[str, Any]]:
    for batch in loader:
        if isinstance(batch, _Failure):
            raise DataError(batch.message)
        yield batch
