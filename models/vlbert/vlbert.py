"""VL-BERT's transformer: words with the picture's vector, regions and an END token, packed without gaps; its layers.

Beside the layers stand frozen copies where a strategy wants them; ``parallel_`` in a name means frozen copy.

Source: ``VisualLinguisticBert`` of VL-BERT (Su et al. 2020) and its adaptive fork; key names below ``vlbert.``.

Letters: B batch, T text tokens, K regions, L packed tokens, D width, V width of the visual input, H heads, C channels
of a head, F feed-forward width.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adaptive import (
    frozen_layers,
    num_decisions,
    run_block_drop,
    run_layers,
    run_spottune,
    run_spottune_block,
    set_trainable,
)
from models.errors import ModelError
from models.layers import AddAndNorm, attention, join_heads, split_heads
from models.linear import Linear
from models.recompute import NOTHING

EPS = 1e-12
COPY = "parallel_"  # in the names of frozen copies
_REGION_TYPE = 2  # segment of regions and END


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder and how it is fine-tuned."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    strategy: str = "standard"
    frozen_layers: tuple[int, ...] = ()  # of strategy specific_k
    reference_behaviour: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not fit."""
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @property
    def num_decisions(self) -> int:
        """Decisions of a policy for a sample; 0 without one."""
        return num_decisions(self.strategy, self.num_hidden_layers, self.num_attention_heads)


class Encoder(nn.Module):
    """All layers, run as the strategy says."""

    def __init__(self, config: EncoderConfig) -> None:
        """Build it with random weights; frozen copies start as copies of them."""
        super().__init__()
        self.config = config
        self.recompute = NOTHING
        parts, blocks = config.strategy == "SpotTune", config.strategy == "SpotTune_Block"
        self.layer = nn.ModuleList(Layer(config, with_copies=parts) for _ in range(config.num_hidden_layers))
        if blocks:
            self.parallel_layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        if not config.num_decisions:
            frozen = frozen_layers(config.strategy, config.num_hidden_layers, config.frozen_layers)
            set_trainable((self.layer[index] for index in frozen), trainable=False)
        for name, parameter in self.named_parameters():
            if COPY in name:
                parameter.requires_grad_(False)
        self.copy_to_frozen()

    def copy_to_frozen(self) -> None:
        """Give every frozen copy the values of what it is a copy of; for the start of a run, never after it."""
        own = dict(self.named_parameters())
        for name, parameter in own.items():
            if COPY in name:
                parameter.data.copy_(own[name.replace(COPY, "")].data)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, policy: Tensor | None = None) -> list[Tensor]:
        """Run the layers.

        Args:
            tokens: (B, L, D).
            mask: (B, 1, 1, L), True = may be looked at; None: everything may.
            policy: (B, decisions) where the strategy has one.

        Returns:
            (B, L, D) after each layer.
        """
        config = self.config
        if (policy is None) != (config.num_decisions == 0):
            needs = f"needs a policy of {config.num_decisions} decisions" if config.num_decisions else "takes no policy"
            raise ModelError(f"strategy {config.strategy} {needs}")
        run = partial(self.recompute.run, draws=self.training)
        if policy is None:
            return run_layers(self.layer, tokens, mask, run=run)
        if config.strategy == "BlockDrop":
            return run_block_drop(self.layer, tokens, mask, policy, run=run)
        how = {"reference": config.reference_behaviour, "run": run}
        if config.strategy == "SpotTune_Block":
            return run_spottune_block(self.layer, self.parallel_layer, tokens, mask, policy, **how)
        return run_spottune(self.layer, tokens, mask, policy, **how)


class Layer(nn.Module):
    """A post-norm layer; with copies it also has a frozen version of each part (``models.adaptive.LayerParts``)."""

    def __init__(self, config: EncoderConfig, *, with_copies: bool = False) -> None:
        """Build it with random weights."""
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        norm = {"eps": EPS, "dropout": config.hidden_dropout_prob}
        self._num_heads, self._attention_dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        for copy in ("", COPY) if with_copies else ("",):
            for name in ("query", "key", "value"):
                setattr(self.attention.self, copy + name, Linear(width, width))
            setattr(self.attention, f"{copy}output", AddAndNorm(width, width, **norm))
            intermediate = nn.Module()
            intermediate.dense = Linear(width, inner)
            setattr(self, f"{copy}intermediate", intermediate)
            setattr(self, f"{copy}output", AddAndNorm(inner, width, **norm))

    def forward(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """(B, L, D) -> (B, L, D), the trained version."""
        context = self.attend(*self.projections(tokens, frozen=False), mask)
        attended = self.attention_output(context, tokens, frozen=False)
        return self.narrow(self.widen(attended, frozen=False), attended, frozen=False)

    def projections(self, tokens: Tensor, *, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, D) -> queries, keys, values, (B, H, L, C) each."""
        copy, projections = COPY if frozen else "", self.attention.self
        q, k, v = (
            split_heads(getattr(projections, copy + name)(tokens), self._num_heads)
            for name in ("query", "key", "value")
        )
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, L, C) each -> (B, H, L, C)."""
        return attention(q, k, v, mask=mask, dropout=self._attention_dropout if self.training else 0.0)

    def attention_output(self, context: Tensor, tokens: Tensor, *, frozen: bool) -> Tensor:
        """(B, H, L, C), (B, L, D) -> (B, L, D)."""
        return getattr(self.attention, f"{COPY if frozen else ''}output")(join_heads(context), tokens)

    def widen(self, tokens: Tensor, *, frozen: bool) -> Tensor:
        """(B, L, D) -> (B, L, F)."""
        return F.gelu(getattr(self, f"{COPY if frozen else ''}intermediate").dense(tokens))

    def narrow(self, wide: Tensor, tokens: Tensor, *, frozen: bool) -> Tensor:
        """(B, L, F), (B, L, D) -> (B, L, D)."""
        return getattr(self, f"{COPY if frozen else ''}output")(wide, tokens)


@dataclass(frozen=True)
class VLBertConfig:
    """Sizes; names as in the original's ``VLBERT`` section."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    visual_size: int = 768
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 3
    visual_ln: bool = True
    visual_scale_text_init: float = 0.0
    visual_scale_object_init: float = 0.0
    with_pooler: bool = False
    initializer_range: float = 0.02

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.encoder.hidden_size


@dataclass(frozen=True)
class Encoded:
    """text (B, T, D), where shorter texts are followed by what is packed there; regions (B, K, D), 0 at padding; pooled
    (B, D) or None; layers: (B, L, D) after each; packed: (B, L, D), what went into the first.
    """

    text: Tensor
    regions: Tensor
    pooled: Tensor | None
    layers: list[Tensor]
    packed: Tensor


class VisualLinguisticBert(nn.Module):
    """Embedding, encoder, and optionally a pooler."""

    def __init__(self, config: VLBertConfig) -> None:
        """Build it with random weights; the visual input starts silent where the config says so."""
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.end_embedding = nn.Embedding(1, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.embedding_LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.embedding_dropout = nn.Dropout(config.encoder.hidden_dropout_prob)
        if config.visual_size != width:
            self.visual_1x1_text = Linear(config.visual_size, width)
            self.visual_1x1_object = Linear(config.visual_size, width)
        if config.visual_ln:
            self.visual_ln_text = nn.LayerNorm(width, eps=EPS)
            self.visual_ln_object = nn.LayerNorm(width, eps=EPS)
        else:
            self.visual_scale_text = nn.Parameter(torch.tensor(config.visual_scale_text_init))
            self.visual_scale_object = nn.Parameter(torch.tensor(config.visual_scale_object_init))
        self.encoder = Encoder(config.encoder)
        if config.with_pooler:
            self.pooler = nn.Module()
            self.pooler.dense = Linear(width, width)
        self.apply(self._start_values)
        if config.visual_ln:
            nn.init.constant_(self.visual_ln_text.weight, config.visual_scale_text_init)
            nn.init.constant_(self.visual_ln_object.weight, config.visual_scale_object_init)
        self.encoder.copy_to_frozen()

    def _start_values(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        text_ids: Tensor,
        text_types: Tensor,
        text_visual: Tensor,
        text_mask: Tensor,
        region_visual: Tensor,
        region_words: Tensor,
        region_mask: Tensor,
        policy: Tensor | None = None,
    ) -> Encoded:
        """Embed, pack, encode, and take apart again.

        Args:
            text_ids: (B, T).
            text_types: (B, T) segments, 0 or 1.
            text_visual: (B, T, V), the visual part of each word.
            text_mask: (B, T), True = a word; words come first.
            region_visual: (B, K, V).
            region_words: (B, K, D), the word part of each region.
            region_mask: (B, K), True = a region; regions come first.
            policy: see ``Encoder``.
        """
        packed, mask, order = self._pack(
            text_ids, text_types, text_visual, text_mask, region_visual, region_words, region_mask
        )
        # with no padding the kernels need no mask
        layers = self.encoder(packed, mask[:, None, None, :], policy)
        last, num_words = layers[-1], text_ids.shape[1]
        # where each region was packed: behind the words
        place = text_mask.sum(dim=1, keepdim=True) + torch.arange(region_mask.shape[1], device=last.device)
        place = place.clamp(max=last.shape[1] - 1)[..., None].expand(-1, -1, last.shape[2])
        regions = last.gather(1, place) * region_mask[..., None].to(last.dtype)
        pooled = torch.tanh(self.pooler.dense(last[:, 0])) if self.config.with_pooler else None
        return Encoded(last[:, :num_words], regions, pooled, layers, packed)

    def _visual(self, visual: Tensor, kind: str) -> Tensor:
        if self.config.visual_size != self.config.hidden_size:
            visual = getattr(self, f"visual_1x1_{kind}")(visual)
        if self.config.visual_ln:
            return getattr(self, f"visual_ln_{kind}")(visual)
        return visual * getattr(self, f"visual_scale_{kind}")

    def _pack(
        self,
        text_ids: Tensor,
        text_types: Tensor,
        text_visual: Tensor,
        text_mask: Tensor,
        region_visual: Tensor,
        region_words: Tensor,
        region_mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Words, regions and END of each sample without gaps: (B, L, D), (B, L) True = a token, and the order."""
        batch_size, num_words = text_ids.shape
        num_regions, device = region_mask.shape[1], text_ids.device
        words = self.word_embeddings(text_ids) + self._visual(text_visual, "text")
        regions = region_words + self._visual(region_visual, "object")
        end = self.end_embedding.weight.expand(batch_size, 1, -1)
        vectors = torch.cat([words, regions.to(words.dtype), end.to(words.dtype)], dim=1)
        valid = torch.cat([text_mask, region_mask, text_mask.new_ones(batch_size, 1)], dim=1)
        length = num_words + num_regions + 1
        # valid ones first, each kind in its order
        order = torch.where(valid, 0, length).add(torch.arange(length, device=device)).argsort(dim=1)
        longest = int(valid.sum(dim=1).max())
        order = order[:, :longest]
        mask = valid.gather(1, order)
        packed = vectors.gather(1, order[..., None].expand(-1, -1, vectors.shape[2])) * mask[..., None].to(
            vectors.dtype
        )

        is_region = (order >= num_words) & (order < num_words + num_regions) & mask
        is_end = (order == num_words + num_regions) & mask
        words_there = text_mask.sum(dim=1, keepdim=True)
        positions = torch.arange(longest, device=device).expand(batch_size, -1)
        positions = torch.where(is_region, words_there, positions)
        positions = torch.where(is_end, words_there + 1, positions)
        types = text_types.gather(1, order.clamp(max=num_words - 1))
        types = torch.where(is_region | is_end, _REGION_TYPE, torch.where(mask, types, 0))
        positions = positions.clamp(max=self.position_embeddings.num_embeddings - 1)  # padding may be beyond the table
        packed = packed + self.position_embeddings(positions) + self.token_type_embeddings(types)
        return self.embedding_dropout(self.embedding_LayerNorm(packed)), mask, order
