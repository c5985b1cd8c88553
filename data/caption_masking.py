"""Masking of captions for training: some tokens are hidden, and the model learns to fill them in.

Source: the caption masking of BEiT-3's captioning data set. With Python's ``random`` under a seed the draws are those
of the original, bit for bit. Training hands in a ``random.Random`` of its own per sample, so that neither the number of
workers nor a resumed run changes what is masked.
"""

from collections.abc import Sequence
from typing import Protocol

from data.errors import DataError

FIRST_RANDOM_ID = 3  # smallest id that may replace a token; 0, 1, 2 are begin, padding and end
MASK_UP_TO, KEEP_UP_TO = (
    0.8,
    0.9,
)  # a draw below the first hides the token, below the second leaves it, else replaces it


class MaskingDraws(Protocol):
    """What masking asks of a random generator: the module ``random`` and ``random.Random`` have it."""

    def randint(self, a: int, b: int) -> int:
        """Draw an integer from a to b, both included."""

    def random(self) -> float:
        """Draw a float in [0, 1)."""


def mask_caption(
    tokens: Sequence[int], mask_prob: float, mask_id: int, vocab_size: int, rng: MaskingDraws
) -> tuple[list[int], list[int]]:
    """Hide a share of a caption's tokens, at least one and never the first; the end token may be hidden.

    Draws, in this order for each try: a position; if it is still free, what to do with its token; if that is to replace
    it, the new id from 3 to ``vocab_size - 1``, which may be <unk>, <mask> or the token itself.

    Args:
        tokens: ids of one caption with begin and end, without padding.
        mask_prob: share of the tokens, begin and end included in the count, in [0, 1].
        mask_id: id of <mask>.
        vocab_size: of the tokenizer, not of the model, which has unused rows.
        rng: where the draws come from; see ``MaskingDraws``.

    Returns:
        Tokens with the masked ones exchanged, and 1 at each position that the loss counts (0 elsewhere), both as long
        as ``tokens``. The targets are the clean tokens at those positions.

    Raises:
        DataError: fewer than two tokens, or a share outside [0, 1].
    """
    num_tokens = len(tokens)
    if num_tokens < 2:
        raise DataError(f"a caption to mask needs its begin and end token at least, got {list(tokens)}")
    if not 0 <= mask_prob <= 1:
        raise DataError(f"--captioning_mask_prob must be in [0, 1], got {mask_prob}")
    num_masked = max(1, min(int(num_tokens * mask_prob + 0.5), num_tokens - 1))
    masked_tokens = list(tokens)
    masked_positions = [0] * num_tokens
    while num_masked > 0:
        position = rng.randint(1, num_tokens - 1)
        if masked_positions[position]:
            continue
        masked_positions[position] = 1
        num_masked -= 1
        draw = rng.random()
        if draw < MASK_UP_TO:
            masked_tokens[position] = mask_id
        elif draw >= KEEP_UP_TO:
            masked_tokens[position] = rng.randint(FIRST_RANDOM_ID, vocab_size - 1)
    return masked_tokens, masked_positions
