"""ROUGE-L of captions (Lin 2004), as in the COCO caption evaluation."""

from collections.abc import Sequence

_BETA_SQUARED = 1.2**2  # recall counts a little more than precision


def rouge_l(caption: list[str], references: Sequence[list[str]]) -> float:
    """F-measure of the longest common subsequence; the best precision and recall may be of different references.

    Args:
        caption: words of the caption of one image.
        references: words of its reference captions, at least one.
    """
    words = caption or [""]  # the package counts an empty caption as one empty word
    common = [(_longest_common_subsequence(words, other or [""]), len(other or [""])) for other in references]
    precision = max(length / len(words) for length, _ in common)
    recall = max(length / size for length, size in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _BETA_SQUARED) * precision * recall / (recall + _BETA_SQUARED * precision)


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    lengths = [0] * (len(other) + 1)  # of the words of ``one`` so far and each beginning of ``other``
    for word in one:
        diagonal = 0
        for place, match in enumerate(other, start=1):
            above = lengths[place]
            lengths[place] = diagonal + 1 if word == match else max(above, lengths[place - 1])
            diagonal = above
    return lengths[-1]
