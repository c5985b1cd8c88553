"""Writing captions: beam search, greedy, nucleus sampling, for a batch of images at once.

Source of the beam search: BEiT-3's captioning evaluation, of which every choice is kept: 3 K candidates a step, one
finished caption kept an image, its score divided by a power of its length (begin and mask counted), the stop rule.
All bookkeeping is done by tensors; the host learns once a step which images are finished.

Letters: B images, K beams, V words, L the greatest length.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.beit3.caption_cache import (
    CaptionCache,
    LayerStep,
    encode_images,
    next_word_logits,
    rows_of_images,
    step_through_layer,
)
from models.beit3.tasks import BEiT3ForCaptioning
from models.errors import ModelError

METHODS = ("beam", "greedy", "nucleus")
CANDIDATES_PER_BEAM = 3
MIN_TOKENS = 3  # begin, mask, end
_UNREACHABLE = -1e9  # score of the beams but the first before the first step: they are copies of it


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that the decoder writes and looks for."""

    bos: int
    pad: int
    eos: int
    mask: int


@dataclass(frozen=True)
class DecodingSettings:
    """How captions are found.

    max_tokens: L; a caption has at most L - 3 words.
    num_beams, length_penalty: of the beam search.
    top_p, temperature: of nucleus sampling (Holtzman et al. 2020).
    """

    method: str = "beam"
    num_beams: int = 3
    length_penalty: float = 0.6
    max_tokens: int = 64
    top_p: float = 0.9
    temperature: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        """Check what cannot work.

        Raises:
            ModelError: naming the setting.
        """
        if self.method not in METHODS:
            raise ModelError(f"unknown decoding {self.method!r}: choose one of {', '.join(METHODS)}")
        if self.num_beams < 1:
            raise ModelError(f"--num_beams must be at least 1, got {self.num_beams}")
        if self.max_tokens < MIN_TOKENS:
            raise ModelError(f"--num_max_bpe_tokens must be at least {MIN_TOKENS} for captions, got {self.max_tokens}")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"--top_p must be in (0, 1], got {self.top_p}")
        if self.temperature <= 0:
            raise ModelError(f"--temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True)
class Generated:
    """Captions of a batch.

    ids: (B, L): begin, words, mask, end, padding.
    scores: (B,) float32, log-probability over a power of the length; not finite where the model's output is not.
    """

    ids: Tensor
    scores: Tensor


@torch.inference_mode()
def generate(
    model: BEiT3ForCaptioning,
    image: Tensor,
    tokens: SpecialTokens,
    settings: DecodingSettings,
    *,
    seeds: Tensor | None = None,
    agree_done: Callable[[bool], bool] = lambda done: done,
) -> Generated:
    """Caption a batch of images.

    Args:
        model: in evaluation mode.
        image: (B, 3, S, S), normalised, on the model's device.
        tokens: the tokenizer's special ids.
        settings: see there.
        seeds: (B,) int64, for nucleus sampling: the draws of an image depend on its seed and the word's place only.
        agree_done: gets whether all captions of this batch are finished; with weights that are spread over processes
            it has to be the same answer on all of them, since each step is a collective.

    Raises:
        ModelError: settings and model do not go together.
    """
    if model.config.vocab_size < CANDIDATES_PER_BEAM:
        raise ModelError(f"a vocabulary of {model.config.vocab_size} words is too small to search in")
    search = _BeamSearch if settings.method == "beam" else _SinglePath
    return search(model, image, tokens, settings, seeds).run(agree_done)


@functools.cache
def _compiled_step() -> LayerStep:
    return torch.compile(step_through_layer, dynamic=False)


class _Search(ABC):
    """What both ways share: the cache, the captions being written, the best one of each image."""

    def __init__(
        self,
        model: BEiT3ForCaptioning,
        image: Tensor,
        tokens: SpecialTokens,
        settings: DecodingSettings,
        seeds: Tensor | None,
    ) -> None:
        self.model, self.tokens, self.settings = model, tokens, settings
        self.num_beams = settings.num_beams if settings.method == "beam" else 1
        num_images, device = image.shape[0], image.device
        self.seeds = torch.zeros(num_images, dtype=torch.int64, device=device) if seeds is None else seeds
        self.cache: CaptionCache = encode_images(model, image, self.num_beams, settings.max_tokens)
        self.layer_step = _compiled_step() if settings.compile else step_through_layer
        self.ids = torch.full(
            (num_images, settings.max_tokens), tokens.pad, dtype=torch.int64, device=device
        )  # of the best caption of each image
        self.best = torch.full((num_images,), -torch.inf, device=device)
        # of the images that are still in the batch:
        self.places = torch.arange(num_images, device=device)  # in the whole batch
        self.done = torch.zeros(num_images, dtype=torch.bool, device=device)
        self.words = torch.full((num_images, self.num_beams, settings.max_tokens), tokens.pad, device=device)
        self.words[:, :, 0] = tokens.bos
        self.sums = torch.zeros(num_images, self.num_beams, device=device)  # log-probabilities
        self.sums[:, 1:] = _UNREACHABLE

    def run(self, agree_done: Callable[[bool], bool]) -> Generated:
        # length counts begin, words and the mask that is filled in
        for length in range(2, self.settings.max_tokens):
            position = torch.tensor(length - 2, device=self.words.device)
            last_words = self.words[:, :, length - 2].flatten()
            logits = next_word_logits(
                self.model, self.cache, last_words, self.tokens.mask, position, layer_step=self.layer_step
            )
            self.choose(logits.float().unflatten(0, (-1, self.num_beams)), length)
            if agree_done(length + 1 == self.settings.max_tokens or self._drop_finished()):
                break
        return Generated(self.ids, self.best)

    @abstractmethod
    def choose(self, logits: Tensor, length: int) -> None:
        """Turn (B, K, V) logits into the next words, and note captions that end."""

    def offer(self, offered: Tensor, sums: Tensor, words: Tensor, length: int) -> None:
        """Keep a finished caption where it is better than the one that the image has.

        Args:
            offered: (B,), whether the image has one to offer.
            sums: (B,) log-probabilities.
            words: (B, L), begin and words; what stands behind them is not read.
            length: with begin and mask.
        """
        scores = sums / length**self.settings.length_penalty
        best = self.best[self.places]
        better = offered & ((scores > best) | best.isneginf())
        self.best[self.places] = torch.where(better, scores, best)
        caption = torch.full_like(words, self.tokens.pad)
        caption[:, : length - 1] = words[:, : length - 1]
        caption[:, length - 1] = self.tokens.mask
        caption[:, length : length + 1] = self.tokens.eos
        self.ids[self.places] = torch.where(better[:, None], caption, self.ids[self.places])

    def _drop_finished(self) -> bool:
        """Whether all are finished. Finished ones leave when half are: moving the rest costs about a step of theirs."""
        left = int((~self.done).sum())
        if 0 < left <= len(self.done) // 2:
            kept = (~self.done).nonzero().squeeze(1)
            self.cache.keep_images(kept)
            self.places, self.done, self.seeds = self.places[kept], self.done[kept], self.seeds[kept]
            self.words, self.sums = self.words[kept], self.sums[kept]
        return left == 0


class _BeamSearch(_Search):
    def choose(self, logits: Tensor, length: int) -> None:
        num_beams, num_words = logits.shape[1:]
        num_candidates = CANDIDATES_PER_BEAM * num_beams
        # the best of all beams are among the best of each
        top = logits.topk(min(num_candidates, num_words), dim=2)
        sums = top.values - logits.logsumexp(dim=2, keepdim=True) + self.sums[:, :, None]
        chosen = sums.flatten(1).topk(num_candidates, dim=1)
        candidate_sums = chosen.values  # (B, 3 K), falling
        beams = chosen.indices // top.values.shape[2]
        words = top.indices.flatten(1).gather(1, chosen.indices)

        # no caption can still become better than this, if it got no worse by its further words
        bound = candidate_sums[:, 0] / (self.settings.max_tokens - 1) ** self.settings.length_penalty
        self.done |= self.best[self.places] >= bound

        ends = words == self.tokens.eos
        if length + 1 == self.settings.max_tokens:
            ends = torch.ones_like(ends)
        goes_on = ~ends
        before = goes_on.cumsum(dim=1) - goes_on.long()  # candidates that go on, ahead of each
        walked = before < num_beams  # the walk ends when all beams are filled
        # all that end in this step have one length, so the first is the best of them
        ended = (ends & walked).long()
        first = ended.argmax(dim=1, keepdim=True)
        offered = ended.any(dim=1) & ~self.done
        histories = self.words.gather(1, beams.gather(1, first)[:, :, None].expand(-1, -1, self.words.shape[2]))
        self.offer(offered, candidate_sums.gather(1, first).squeeze(1), histories.squeeze(1), length)
        if length + 1 == self.settings.max_tokens:
            return

        # places of the first K candidates that go on, in order
        taken = torch.where(goes_on, before, num_candidates).argsort(dim=1, stable=True)[:, :num_beams]
        parents = beams.gather(1, taken)
        self.sums = candidate_sums.gather(1, taken)
        self.words = self.words.gather(1, parents[:, :, None].expand(-1, -1, self.words.shape[2]))
        self.words[:, :, length - 1] = words.gather(1, taken)
        images = torch.arange(len(parents), device=parents.device)
        rows = (images[:, None] * num_beams + parents).flatten()
        unmoved = rows_of_images(images, num_beams)
        if self.words.device.type != "cpu" or not torch.equal(rows, unmoved):
            self.cache.reorder_text(rows, length - 1)


class _SinglePath(_Search):
    """The most probable word each time, or a draw from the most probable ones."""

    def choose(self, logits: Tensor, length: int) -> None:
        logits = logits[:, 0]
        log_probs = logits - logits.logsumexp(dim=1, keepdim=True)
        if self.settings.method == "greedy":
            word = log_probs.argmax(dim=1, keepdim=True)
        else:
            draws = _uniform(self.seeds, length)
            word = _draw_from_nucleus(logits, draws, self.settings.top_p, self.settings.temperature)
        sums = self.sums[:, 0] + log_probs.gather(1, word).squeeze(1)
        ends = word.squeeze(1) == self.tokens.eos
        if length + 1 == self.settings.max_tokens:
            ends = torch.ones_like(ends)
        self.offer(ends & ~self.done, sums, self.words[:, 0], length)
        self.done |= ends
        self.sums = sums[:, None]
        self.words[:, :, length - 1] = word


def _draw_from_nucleus(logits: Tensor, draws: Tensor, top_p: float, temperature: float) -> Tensor:
    """(B, 1) words: from the smallest set of most probable words that holds ``top_p``, by (B,) uniform draws."""
    probs, words = (logits / temperature).softmax(dim=1).sort(dim=1, descending=True)
    up_to = probs.cumsum(dim=1)
    in_nucleus = up_to - probs < top_p  # always the first
    total = torch.where(in_nucleus, probs, 0).sum(dim=1)
    place = (up_to <= (draws * total)[:, None]).sum(dim=1, keepdim=True)
    last = (in_nucleus.sum(dim=1, keepdim=True) - 1).clamp(min=0)  # below 0 where nothing is a number
    return words.gather(1, place.minimum(last))


def _uniform(seeds: Tensor, step: int) -> Tensor:
    """(B,) float32 in [0, 1) from (seed, step) alone: the mixing function of SplitMix64 (Steele et al. 2014)."""
    state = seeds + _signed((step + 1) * 0x9E3779B97F4A7C15)  # int64 products and sums wrap around
    state = (state ^ _shift_right(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shift_right(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shift_right(state, 31)
    return _shift_right(state, 40).float() * 2.0**-24


def _signed(value: int) -> int:
    """The int64 of the same lowest 64 bits."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift without copying the sign."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
