"""Runs of words that BLEU and CIDEr count."""

from collections import Counter
from collections.abc import Sequence

MAX_ORDER = 4


def count_ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    """How often each run of one to four words occurs."""
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, MAX_ORDER + 1)
        for start in range(len(words) - order + 1)
    )
