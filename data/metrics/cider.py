"""CIDEr of captions (Vedantam et al. 2015), its D variant, as in the COCO caption evaluation."""

import math
from collections import Counter
from collections.abc import Sequence

from data.metrics.ngrams import MAX_ORDER, count_ngrams

_SIGMA = 6.0  # of the penalty on another length
_SCALE = 10.0

NGram = tuple[str, ...]


def cider(captions: Sequence[list[str]], references: Sequence[Sequence[list[str]]]) -> list[float]:
    """CIDEr of each image; their mean is that of the corpus.

    The rarer a run of words is among the images, the more it counts; so a value depends on all references given. With
    one image alone all values are 0.

    Args:
        captions: words of one caption an image.
        references: words of the reference captions of each image, at least one.
    """
    counted = [[count_ngrams(words) for words in others] for others in references]
    images_with: Counter[NGram] = Counter()
    for others in counted:
        images_with.update({ngram for counts in others for ngram in counts})
    log_images = math.log(len(counted)) if counted else 0.0
    rarity = {ngram: log_images - math.log(number) for ngram, number in images_with.items()}
    values = []
    for caption, others in zip(captions, counted, strict=True):
        ours = _Weighted(count_ngrams(caption), rarity, log_images)
        total = sum(_similarity(ours, _Weighted(counts, rarity, log_images)) for counts in others)
        values.append(_SCALE * total / MAX_ORDER / len(others))
    return values


class _Weighted:
    """Weights of the runs of one caption by their length, and the length of each vector."""

    def __init__(self, counts: Counter[NGram], rarity: dict[NGram, float], unseen: float) -> None:
        self.weights: list[dict[NGram, float]] = [{} for _ in range(MAX_ORDER)]
        for ngram, count in counts.items():
            self.weights[len(ngram) - 1][ngram] = count * rarity.get(ngram, unseen)
        self.norms = [math.sqrt(sum(weight**2 for weight in weights.values())) for weights in self.weights]
        self.num_pairs = sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _similarity(ours: _Weighted, theirs: _Weighted) -> float:
    """Sum over the four lengths of runs."""
    total = 0.0
    for our_weights, their_weights, our_norm, their_norm in zip(
        ours.weights, theirs.weights, ours.norms, theirs.norms, strict=True
    ):
        product = sum(
            min(weight, their_weights[ngram]) * their_weights[ngram]
            for ngram, weight in our_weights.items()
            if ngram in their_weights
        )
        if our_norm and their_norm:
            product /= our_norm * their_norm
        total += product
    return total * math.exp(-((ours.num_pairs - theirs.num_pairs) ** 2) / (2 * _SIGMA**2))
