"""BLEU-1 to 4 of captions (Papineni et al. 2002), over all images and of each, as in the COCO caption evaluation."""

import math
from collections import Counter
from collections.abc import Sequence

from data.metrics.ngrams import MAX_ORDER, count_ngrams

_TINY, _SMALL = 1e-15, 1e-9  # the package's, so that no logarithm or quotient fails


def bleu(
    captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]
) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 to BLEU-4, each over its own and all shorter n-grams.

    Args:
        captions: words of one caption an image.
        references: words of the reference captions of each image, at least one.

    Returns:
        The four values over all images, and four lists of the values of each image.
    """
    totals = [0.0] * (2 + 2 * MAX_ORDER)
    per_image: list[list[float]] = [[] for _ in range(MAX_ORDER)]
    for caption, others in zip(captions, references, strict=True):
        statistics = _statistics(caption, others)
        totals = [total + value for total, value in zip(totals, statistics, strict=True)]
        for values, value in zip(per_image, _values(statistics), strict=True):
            values.append(value)
    return _values(totals), per_image


def _statistics(caption: list[str], references: Sequence[list[str]]) -> list[float]:
    """Length, length of the closest reference, then n-grams there are and n-grams found for each n."""
    length = len(caption)
    closest = min((abs(len(other) - length), len(other)) for other in references)[1]  # the shorter one of two
    greatest: Counter[tuple[str, ...]] = Counter()
    for other in references:
        greatest |= count_ngrams(other)
    correct = [0] * MAX_ORDER
    for ngram, count in count_ngrams(caption).items():
        correct[len(ngram) - 1] += min(count, greatest[ngram])
    guesses = [max(0, length - order) for order in range(MAX_ORDER)]
    return [length, closest, *guesses, *correct]


def _values(statistics: Sequence[float]) -> list[float]:
    length, closest, *rest = statistics
    guesses, correct = rest[:MAX_ORDER], rest[MAX_ORDER:]
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    values, product = [], 1.0
    for order, (guess, right) in enumerate(zip(guesses, correct, strict=True), start=1):
        product *= (right + _TINY) / (guess + _SMALL)
        values.append(product ** (1 / order) * brevity)
    return values
