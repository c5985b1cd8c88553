"""VL-BERT's own orders of samples: contiguous shards of a shuffled epoch, and batches of images of like shape.

Source: the distributed and the grouped batch sampler of VL-BERT. Departures: every epoch has the same number of whole
optimizer steps on all processes, and the validation repeats no sample.
"""

from collections.abc import Iterator, Sequence

import torch

from data.errors import DataError
from data.samplers import SampleKey


def epoch_shard(num_samples: int, epoch: int, *, rank: int, world_size: int, shuffle: bool = True) -> list[int]:
    """Samples of one process: a contiguous part of the epoch's order, which its own beginning fills up.

    The order depends on the number of the epoch alone, as in the original.
    """
    order = list(range(num_samples))
    if shuffle:
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(epoch)).tolist()
    length = -(-num_samples // world_size)
    order += order[: length * world_size - num_samples]
    return order[rank * length : (rank + 1) * length]


def grouped_batches(
    order: Sequence[int], group_of: Sequence[int], batch_size: int, *, drop_uneven: bool = False
) -> list[list[int]]:
    """Batches that mix no groups; each group keeps its order, and batches come in the order of their first samples.

    Args:
        order: samples.
        group_of: group of every sample, by its number.
        batch_size: of all but the last batch of a group.
        drop_uneven: leave the short batches out.
    """
    members: dict[int, list[int]] = {}
    place = {}
    for position, sample in enumerate(order):
        members.setdefault(int(group_of[sample]), []).append(sample)
        place.setdefault(sample, position)
    batches = [group[i : i + batch_size] for group in members.values() for i in range(0, len(group), batch_size)]
    batches.sort(key=lambda batch: place[batch[0]])
    return [batch for batch in batches if len(batch) == batch_size or not drop_uneven]


class ShardBatchSampler:
    """Micro-batches of one process out of its contiguous shard (the interface of ``TrainBatchSampler``)."""

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        group_of: Sequence[int] | None = None,
    ) -> None:
        """See the class; with ``group_of`` no batch mixes groups, and those at a group's end are short.

        Raises:
            DataError: fewer samples than one step needs.
        """
        self.samples_per_step = batch_size * accumulation_steps * world_size
        shard = -(-num_samples // world_size)
        self.steps_per_epoch = shard // (batch_size * accumulation_steps)  # groups can only make more batches
        if self.steps_per_epoch == 0:
            raise DataError(
                f"{num_samples} training samples do not fill one step of {self.samples_per_step}: lower BATCH_IMAGES "
                "or GRAD_ACCUMULATE_STEPS, or add data"
            )
        self._num_samples, self._batch_size, self._accumulation_steps = num_samples, batch_size, accumulation_steps
        self._rank, self._world_size, self._shuffle, self._group_of = rank, world_size, shuffle, group_of
        self._epoch, self._first_step = 0, 0

    def set_position(self, epoch: int, first_step: int = 0) -> None:
        """The next iteration runs from optimizer step ``first_step`` of ``epoch`` to the epoch's end."""
        self._epoch, self._first_step = epoch, first_step

    def __len__(self) -> int:
        """Number of micro-batches of the next iteration."""
        return (self.steps_per_epoch - self._first_step) * self._accumulation_steps

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Lists of keys, one list a micro-batch."""
        order = epoch_shard(
            self._num_samples, self._epoch, rank=self._rank, world_size=self._world_size, shuffle=self._shuffle
        )
        groups = self._group_of if self._group_of is not None else [0] * self._num_samples
        batches = grouped_batches(order, groups, self._batch_size)
        first = self._first_step * self._accumulation_steps
        for batch in batches[first : self.steps_per_epoch * self._accumulation_steps]:
            yield [SampleKey(self._epoch, index) for index in batch]
