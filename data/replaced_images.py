"""How many broken images one pass over the data may replace by a grey one before the run ends."""

from collections.abc import Iterable, Iterator
from typing import Any

from data.errors import DataError

ALWAYS_ALLOWED = 10  # in a small set a share would forbid the first one


def limit_replaced(
    batches: Iterable[dict[str, Any]], *, num_samples: int, share: float, world_size: int = 1
) -> Iterator[dict[str, Any]]:
    """Pass batches on until too many of their images are stand-ins.

    Every process counts its own part of one pass, an epoch or an evaluation, so that no process has to ask another one.
    The same command stops at the same batch.

    Args:
        batches: with ``images_replaced`` and ``image_errors``.
        num_samples: of all processes.
        share: of a process's part that may be replaced; ``ALWAYS_ALLOWED`` images may in any case.
        world_size: number of processes.

    Raises:
        DataError: more images were replaced; the last one is named with its reason.
    """
    allowed = max(ALWAYS_ALLOWED, int(share * num_samples / world_size))
    replaced = 0
    for batch in batches:
        replaced += batch["images_replaced"]
        if replaced > allowed:
            raise DataError(
                f"{replaced} images could not be read; --skip_broken_images replaces at most {allowed} here "
                f"(--max_bad_samples {share:g} of what a process reads in one pass, at least {ALWAYS_ALLOWED}): mend "
                f"the images or raise --max_bad_samples; the last: {batch['image_errors'][-1]}"
            )
        yield batch
