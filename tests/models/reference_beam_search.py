"""The beam search of BEiT-3's captioning, written plainly: no cache, one image at a time, one candidate at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.beit3.decoding import DecodingSettings, SpecialTokens
from models.beit3.tasks import BEiT3ForCaptioning


@dataclass
class Found:
    """What the search found for one image."""

    ids: list[int]
    score: float
    offered: list[list[int]]  # every caption that was offered, in order


@torch.inference_mode()
def beam_search(
    model: BEiT3ForCaptioning, image: Tensor, tokens: SpecialTokens, settings: DecodingSettings
) -> list[Found]:
    """Caption each image."""
    return [_search(model, one, tokens, settings) for one in image.split(1)]


def _search(model: BEiT3ForCaptioning, image: Tensor, tokens: SpecialTokens, settings: DecodingSettings) -> Found:
    num_beams, max_len, penalty = settings.num_beams, settings.max_tokens, settings.length_penalty
    beams = [([tokens.bos], 0.0 if place == 0 else -1e9) for place in range(num_beams)]
    best, best_score, offered = None, None, []
    for length in range(2, max_len):
        text = torch.tensor([[*words, tokens.mask] for words, _ in beams])
        logits = model(image.expand(num_beams, -1, -1, -1), text)[:, -1]
        scores = logits.log_softmax(dim=-1) + torch.tensor([score for _, score in beams])[:, None]
        top = scores.flatten().topk(3 * num_beams)
        candidates = [
            (value, *divmod(index, scores.shape[1]))
            for value, index in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        ]
        if best is not None and best_score >= candidates[0][0] / (max_len - 1) ** penalty:
            break
        following = []
        for value, beam, word in candidates:
            if word == tokens.eos or length + 1 == max_len:
                caption, score = [*beams[beam][0], tokens.mask], value / length**penalty
                offered.append(caption)
                if best is None or score > best_score:
                    best, best_score = caption, score
            else:
                following.append(([*beams[beam][0], word], value))
            if len(following) == num_beams:
                break
        beams = following
    ids = [*best, tokens.eos]
    return Found(ids + [tokens.pad] * (max_len - len(ids)), best_score, offered)
