"""Which samples a process reads, in which order: pure functions of seed, epoch and position, so any run can resume."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.errors import DataError


@dataclass(frozen=True)
class SampleKey:
    """One draw of one sample: its random numbers come from (seed, epoch, index) alone."""

    epoch: int
    index: int


class TrainBatchSampler:
    """Micro-batches of one process, shuffled anew each epoch; every optimizer step is whole.

    Step s of an epoch reads the same samples whatever the number of processes, as long as ``batch_size *
    accumulation_steps * world_size`` stays the same: the epoch's order is cut into steps, then into micro-batches,
    then over the ranks. Samples that do not fill the last step are left to other epochs' orders.
    """

    FLAGS = ("--batch_size", "--update_freq")  # of the two sizes, for messages

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        """See the class; ``batch_size`` is that of one process and micro-batch.

        Raises:
            DataError: no positive batch size, or fewer samples than one step needs.
        """
        if batch_size < 1 or accumulation_steps < 1:
            raise DataError(f"{' and '.join(self.FLAGS)} must be at least 1, got {batch_size} and {accumulation_steps}")
        self.samples_per_step = batch_size * accumulation_steps * world_size
        self.steps_per_epoch = num_samples // self.samples_per_step
        if self.steps_per_epoch == 0:
            batch_flag, accumulation_flag = (flag.lstrip("-") for flag in self.FLAGS)
            raise DataError(
                f"{num_samples} training samples do not fill one step of {self.samples_per_step} "
                f"({batch_flag} {batch_size} x {accumulation_flag} {accumulation_steps} x processes {world_size}): "
                "lower the batch size or add data"
            )
        self._num_samples, self._batch_size, self._accumulation_steps = num_samples, batch_size, accumulation_steps
        self._rank, self._world_size, self._seed = rank, world_size, seed
        self._epoch, self._first_step = 0, 0

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """The next iteration runs from optimizer step ``first_step`` of ``epoch`` to the epoch's end."""
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        """Number of micro-batches of the next iteration."""
        return (self.steps_per_epoch - self._first_step) * self._accumulation_steps

    def order(self, epoch: int) -> Sequence[int]:
        """Every sample once, as it comes in an epoch."""
        return np.random.default_rng((self._seed, epoch)).permutation(self._num_samples)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Lists of keys, one list a micro-batch."""
        order = self.order(self._epoch)
        for step in range(self._first_step, self.steps_per_epoch):
            for micro_batch in range(self._accumulation_steps):
                start = step * self.samples_per_step
                start += (micro_batch * self._world_size + self._rank) * self._batch_size
                yield [SampleKey(self._epoch, int(index)) for index in order[start : start + self._batch_size]]


class EvalBatchSampler:
    """Batches of one process such that all processes together see every sample exactly once, none repeated."""

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        done: Collection[int] = (),
        fixed_batches: bool = False,
    ) -> None:
        """Rank r reads samples r, r + world_size, …; the last batches may be short or missing on some ranks.

        With ``fixed_batches`` the file is cut into batches first, and rank r reads batches r, r + world_size, …: they
        are the same for any number of processes.

        Batches whose samples are all in ``done`` are left out. The others keep their samples, also those that are done:
        what a model computes for a sample may depend, in the last bits, on what else is in the batch.

        Raises:
            DataError: no sample, or no positive batch size.
        """
        if batch_size < 1:
            raise DataError(f"--eval_batch_size must be at least 1, got {batch_size}")
        if num_samples < 1:
            raise DataError("there is nothing to evaluate: the split has no samples")
        own = range(num_samples) if fixed_batches else range(rank, num_samples, world_size)
        batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]
        if fixed_batches:
            batches = batches[rank::world_size]
        done = frozenset(done)
        self._batches = [batch for batch in batches if not done.issuperset(batch)]

    def __len__(self) -> int:
        """Number of batches of this process."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Lists of keys in file order."""
        for batch in self._batches:
            yield [SampleKey(0, index) for index in batch]
