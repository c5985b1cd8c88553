"""LLaVA's order of samples: those of one step are of like length, and all with images or all without.

Source: ``LengthGroupedSampler`` of LLaVA (``llava/train/llava_trainer.py``), option ``group_by_modality_length``. Which
samples a step reads depends on the size of the step alone, not on how it is cut into processes and micro-batches.

Deliberate differences: the draws come from a generator of our own with seed + epoch, so that all processes agree and a
resumed run goes on as an unbroken one; samples that do not fill the last step are left out instead of repeating others.
"""

from collections.abc import Iterable, Sequence

import torch

from data.errors import DataError
from data.samplers import TrainBatchSampler


def modality_length(texts: Iterable[str], *, has_image: bool) -> int:
    """Words between white space over all turns of a sample, ``<image>`` among them; below 0 without an image."""
    words = sum(len(text.split()) for text in texts)
    return words if has_image else -words


def even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deal samples out into chunks of equal number and similar total length.

    Args:
        indices: samples, the longest first.
        lengths: of all samples, by index.
        num_chunks: how many. If it does not divide the number of samples, every ``num_chunks``-th goes to a chunk.
    """
    if len(indices) % num_chunks:
        return [list(indices[first::num_chunks]) for first in range(num_chunks)]
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals = [0.0] * num_chunks
    for index in indices:
        shortest = totals.index(min(totals))
        chunks[shortest].append(index)
        totals[shortest] += lengths[index]
        if len(chunks[shortest]) * num_chunks == len(indices):
            totals[shortest] = float("inf")  # full
    return chunks


def grouped_order(lengths: Sequence[int], batch_size: int, num_batches: int, generator: torch.Generator) -> list[int]:
    """Random order in which samples of like length come together.

    Args:
        lengths: of all samples.
        batch_size: of one process and micro-batch.
        num_batches: of a step: processes times accumulation.
        generator: one permutation is drawn from it.

    Returns:
        Every index once. Steps are consecutive runs of ``batch_size * num_batches``, batches are runs in these.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    result: list[int] = []
    for block in _blocks(order, batch_size * num_batches):
        block.sort(key=lambda index: lengths[index], reverse=True)  # reverse keeps the order of equals
        for chunk in even_chunks(block, lengths, num_batches):
            result += chunk
    return result


def modality_grouped_order(
    lengths: Sequence[int], batch_size: int, num_batches: int, generator: torch.Generator
) -> list[int]:
    """``grouped_order`` in which a step has either samples with images or samples without, but for the last ones.

    The last blocks of both kinds, which may be short, are joined and come at the end, in the order of the file.

    Args:
        lengths: of all samples; below 0 for those without an image. With one kind alone this is ``grouped_order`` of
            the numbers as they are, so texts then come shortest first, as in the original.
        batch_size: of one process and micro-batch.
        num_batches: of a step: processes times accumulation.
        generator: three permutations are drawn from it: of images, of texts, of blocks.

    Raises:
        DataError: a length is 0, so its sample is of neither kind.
    """
    _check_lengths(lengths)
    with_image = [index for index, length in enumerate(lengths) if length > 0]
    without_image = [index for index, length in enumerate(lengths) if length < 0]
    if not with_image or not without_image:
        return grouped_order(lengths, batch_size, num_batches, generator)
    blocks: list[list[int]] = []
    remainder: list[int] = []
    for kind in (with_image, without_image):
        order = grouped_order([abs(lengths[index]) for index in kind], batch_size, num_batches, generator)
        *whole, last = _blocks([kind[place] for place in order], batch_size * num_batches)
        blocks += whole
        remainder += last
    shuffled = torch.randperm(len(blocks), generator=generator).tolist()
    return [index for number in shuffled for index in blocks[number]] + sorted(remainder)


def _check_lengths(lengths: Sequence[int]) -> None:
    if 0 in lengths:
        raise DataError(
            f"sample {list(lengths).index(0)} (counted from 0) has no words at all: remove it from the training file"
        )


def _blocks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


class ShuffledSampler(TrainBatchSampler):
    """Micro-batches of one process in an order that looks at nothing."""

    FLAGS = ("--per_device_train_batch_size", "--gradient_accumulation_steps")


class LengthGroupedSampler(ShuffledSampler):
    """Micro-batches of one process, grouped by length and kind."""

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
    ) -> None:
        """``lengths``: ``modality_length`` of every sample; epoch e has the original's order for ``seed + e``.

        Raises:
            DataError: as ``TrainBatchSampler``, or a length of 0.
        """
        super().__init__(
            len(lengths),
            batch_size,
            accumulation_steps=accumulation_steps,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        _check_lengths(lengths)
        self._lengths, self._num_batches = lengths, world_size * accumulation_steps

    def order(self, epoch: int) -> list[int]:
        """Every sample once, as it comes in an epoch."""
        generator = torch.Generator().manual_seed(self._seed + epoch)
        return modality_grouped_order(self._lengths, self._batch_size, self._num_batches, generator)
