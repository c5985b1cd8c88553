"""What one caption for all images would score: the bar that a captioning model has to clear."""

from collections import Counter
from collections.abc import Mapping, Sequence

from data.metrics.caption_words import caption_words
from data.metrics.cider import cider

NUM_CANDIDATES = 50  # of the most frequent captions, and as many of all lengths, are tried


def best_constant_caption(train_captions: Sequence[str], references: Mapping[int, Sequence[str]]) -> str:
    """The caption with the best mean CIDEr, if every image gets it, among the most frequent ones of training.

    Args:
        train_captions: all captions of the training images.
        references: image id → reference captions of the images to be captioned.
    """
    counts = Counter(train_captions)
    frequent = [text for text, _ in counts.most_common(NUM_CANDIDATES)]
    by_length = sorted(counts, key=lambda text: (len(text.split()), text))
    step = max(1, len(by_length) // NUM_CANDIDATES)
    others = [[caption_words(text) for text in texts] for texts in references.values()]
    best, best_value = frequent[0], -1.0
    for text in dict.fromkeys([*frequent, *by_length[::step]]):
        values = cider([caption_words(text)] * len(others), others)
        value = sum(values) / len(values)
        if value > best_value:
            best, best_value = text, value
    return best
