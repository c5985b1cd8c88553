"""How probable LLaVA finds a given answer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.llava.llava import LlavaForCausalLM
from models.llava.splice import Joined, positions_of


@torch.no_grad()
def answer_probability(model: LlavaForCausalLM, joined: Joined, words: Sequence[int]) -> Tensor:
    """Probability of the same answer under each prompt: the product of those of its words.

    Args:
        model: in evaluation mode.
        joined: prompts, padded on the left.
        words: ids of the answer, the end included if it counts.

    Returns:
        (B,) float64.
    """
    answer = torch.tensor(list(words), device=joined.embeds.device)
    batch, length = joined.embeds.shape[:2]
    said = model.model.embed_tokens(answer[:-1]).expand(batch, -1, -1)  # the last word is foretold, not read
    mask = torch.cat([joined.mask, joined.mask.new_ones(said.shape[:2])], dim=1)
    positions = positions_of(mask)
    hidden = model.model.decode(
        torch.cat([joined.embeds, said], dim=1), mask=None if bool(mask.all()) else mask, positions=positions
    ).tokens
    logits = model.lm_head(hidden[:, length - 1 :]).float()  # (B, words, V)
    chances = logits.log_softmax(dim=-1).gather(2, answer[None, :, None].expand(batch, -1, 1))
    return chances.double().sum(dim=(1, 2)).exp()
