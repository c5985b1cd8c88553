"""Answers of LLaVA: greedy, drawn, or by beam search as transformers does it, with a cache of keys and values; and how
probable a given answer is.

Letters: B batch, T rows of the prompts, n beams, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import ModelError
from models.llava.llama import Cache
from models.llava.llava import Joined, LlavaForCausalLM, positions_of

_NEVER = -1e9
_COLDEST = 1e-6  # logits divided by less may leave the range of float32
_STRONGEST_PENALTY = 10  # a length to this power must leave scores in the range of float32


@dataclass(frozen=True)
class Decoding:
    """How words are chosen.

    Attributes:
        max_new_tokens: longest answer, the end included.
        num_beams: 1 takes the best word each time, or draws it where ``temperature`` is above 0.
        length_penalty: a beam's score is divided by its length to this power.
        early_stopping: a beam search ends as soon as ``num_beams`` answers are complete.
        temperature: 0 for the best word; logits are divided by it before a draw.
        top_k: draw among so many words; 0 for all.
        top_p: draw among the fewest words that have this probability together.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    temperature: float = 0.0
    top_k: int = 50
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.max_new_tokens < 1 or self.num_beams < 1:
            raise ModelError("max_new_tokens and num_beams must be at least 1")
        if self.temperature != 0 and not _COLDEST <= self.temperature < math.inf:
            raise ModelError(
                f"temperature must be 0 (the best word), or at least {_COLDEST:g} and finite, got {self.temperature:g}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ModelError(f"top_p must be above 0 and at most 1, got {self.top_p:g}")
        if not abs(self.length_penalty) <= _STRONGEST_PENALTY:
            raise ModelError(
                f"length_penalty must lie between {-_STRONGEST_PENALTY} and {_STRONGEST_PENALTY}, "
                f"got {self.length_penalty:g}"
            )
        if self.num_beams > 1 and self.temperature > 0:
            raise ModelError("a beam search draws nothing: leave the temperature at 0")


class _Steps:
    """Prompt, then word after word, through the decoder with a cache."""

    def __init__(self, model: LlavaForCausalLM, joined: Joined, copies: int, room: int) -> None:
        self._model = model
        embeds, mask = (x.repeat_interleave(copies, dim=0) for x in (joined.embeds, joined.mask))
        self._padded = not bool(mask.all())
        self._mask, self._lengths = mask, mask.sum(dim=1, keepdim=True)
        self._cache = Cache(model.config.text, len(embeds), embeds.shape[1] + room, embeds)
        self._given = 0
        positions = positions_of(mask)
        hidden = model.model.decode(
            embeds, mask=mask if self._padded else None, positions=positions, cache=self._cache
        ).tokens
        self.logits = model.lm_head(hidden[:, -1]).float()  # (rows, V) of the next word
        if not bool(self.logits.isfinite().all()):
            raise FloatingPointError("the model's logits are not finite numbers")

    def advance(self, words: Tensor) -> None:
        """Append (rows,) words."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(words), 1)], dim=1)
        positions = self._lengths + self._given
        self._given += 1
        hidden = self._model.model.decode(
            self._model.model.embed_tokens(words)[:, None],
            mask=self._mask if self._padded else None,
            positions=positions,
            cache=self._cache,
        ).tokens
        self.logits = self._model.lm_head(hidden[:, -1]).float()

    def reorder(self, rows: Tensor) -> None:
        """Keep these rows in this order."""
        self._cache.reorder(rows)
        self._mask, self._lengths = self._mask[rows], self._lengths[rows]


@torch.no_grad()
def generate(
    model: LlavaForCausalLM,
    joined: Joined,
    decoding: Decoding,
    *,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Answer each prompt.

    Args:
        model: in evaluation mode.
        joined: prompts, padded on the left (``model.join(..., padding_side="left")``).
        decoding: how.
        generator: of the draws; one for each prompt makes them independent of what else is in the batch.

    Returns:
        (B, up to max_new_tokens) ids of the new words, the end included, filled up with the padding id.

    Raises:
        FloatingPointError: what the model makes of the prompts is not finite.
    """
    last = joined.mask[:, -1]
    if not bool(last.all()):
        raise ModelError("prompts of a batch are padded on the left, so that the next word follows each of them")
    if decoding.num_beams > 1:
        return beam_search(model, joined, decoding)[0]
    config, steps = model.config.text, _Steps(model, joined, 1, decoding.max_new_tokens)
    words, open_ = [], torch.ones(len(last), dtype=torch.bool, device=last.device)
    for _ in range(decoding.max_new_tokens):
        if decoding.temperature > 0:
            chances = warped(steps.logits, decoding.temperature, decoding.top_k, decoding.top_p)
            word = _draw(chances, generator)
        else:
            word = steps.logits.argmax(dim=-1)
        word = torch.where(open_, word, config.pad_token_id)
        words.append(word)
        open_ = open_ & (word != config.eos_token_id)
        if not bool(open_.any()) or len(words) == decoding.max_new_tokens:
            break
        steps.advance(word)
    return torch.stack(words, dim=1)


def _draw(chances: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """(B, V) probabilities -> (B,) words."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(chances, 1, generator=generator).squeeze(1)
    rows = zip(chances, generator, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=own) for row, own in rows])


def warped(logits: Tensor, temperature: float, top_k: int, top_p: float | None) -> Tensor:
    """(B, V) logits -> probabilities after temperature, top-k and top-p, in this order."""
    logits = logits / temperature
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, places = logits.sort(dim=-1)
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, places, drop), -torch.inf)
    return logits.softmax(dim=-1)


class _Answers:
    """The best complete answers of one prompt."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self.found: list[tuple[float, list[int]]] = []
        self.done = False

    def add(self, words: list[int], total: float, length: int) -> None:
        """Close an answer with its sum of log probabilities; ``length`` counts the end."""
        score = total / length**self._decoding.length_penalty
        count = self._decoding.num_beams
        if len(self.found) < count or score > min(self.found)[0]:
            self.found.append((score, words))
            if len(self.found) > count:
                self.found.remove(min(self.found, key=lambda answer: answer[0]))

    def judge(self, best_open: float, length: int) -> None:
        """Whether nothing that is open can still enter."""
        if len(self.found) < self._decoding.num_beams:
            return
        worst = min(self.found)[0]
        self.done = self._decoding.early_stopping or worst >= best_open / length**self._decoding.length_penalty


@torch.no_grad()
def beam_search(model: LlavaForCausalLM, joined: Joined, decoding: Decoding, *, keep: int = 1) -> tuple[Tensor, Tensor]:
    """The ``keep`` best answers of each prompt.

    Returns:
        (B keep, words) ids, filled up with the padding id, the end appended where there is room; (B keep,) scores.
    """
    beams, config = decoding.num_beams, model.config.text
    batch, device = len(joined.embeds), joined.embeds.device
    steps = _Steps(model, joined, beams, decoding.max_new_tokens)
    scores = torch.zeros(batch, beams, device=device)
    scores[:, 1:] = _NEVER
    answers = [_Answers(decoding) for _ in range(batch)]
    said: list[list[int]] = [[] for _ in range(batch * beams)]
    for length in range(1, decoding.max_new_tokens + 1):
        totals = steps.logits.log_softmax(dim=-1).view(batch, beams, -1) + scores[..., None]
        vocabulary = totals.shape[-1]
        best, places = totals.flatten(1).topk(2 * beams, dim=1)
        best_values, best_places = best.tolist(), places.tolist()
        rows, words, sums = [], [], []
        for number, answer in enumerate(answers):
            if answer.done:  # its beams go on for nothing
                rows += [number * beams] * beams
                words += [config.pad_token_id] * beams
                sums.append([0.0] * beams)
                continue
            following: list[tuple[int, int, float]] = []
            for rank, (value, place) in enumerate(zip(best_values[number], best_places[number], strict=True)):
                row, word = number * beams + place // vocabulary, place % vocabulary
                if word == config.eos_token_id:
                    if rank < beams:
                        answer.add(said[row], value, length)
                    continue
                following.append((row, word, value))
                if len(following) == beams:
                    break
            rows += [row for row, _, _ in following]
            words += [word for _, word, _ in following]
            sums.append([value for _, _, value in following])
            answer.judge(best_values[number][0], length)
        scores = torch.tensor(sums, device=device)
        said = [[*said[row], word] for row, word in zip(rows, words, strict=True)]
        if all(answer.done for answer in answers):
            break
        if length < decoding.max_new_tokens:
            steps.reorder(torch.tensor(rows, device=device))
            steps.advance(torch.tensor(words, device=device))
    for number, answer in enumerate(answers):
        if not answer.done:
            for beam in range(beams):
                answer.add(said[number * beams + beam], float(scores[number, beam]), len(said[number * beams + beam]))
    return _as_tensors(answers, decoding, config.eos_token_id, config.pad_token_id, keep, device)


def _as_tensors(
    answers: list[_Answers], decoding: Decoding, eos: int, pad: int, keep: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    chosen = [answer for one in answers for answer in sorted(one.found, key=lambda a: -a[0])[:keep]]
    ended = [[*words, eos] if len(words) < decoding.max_new_tokens else words for _, words in chosen]
    longest = max(map(len, ended))
    ids = torch.tensor([[*words, *[pad] * (longest - len(words))] for words in ended], device=device)
    return ids, torch.tensor([score for score, _ in chosen], device=device)


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
