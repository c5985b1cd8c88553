"""DeBERTa-v2 with the options of DeBERTa-v3: disentangled attention over words and their distances.

Source: He et al. 2021, "DeBERTa" and "DeBERTaV3"; key names and arithmetic of transformers' DebertaV2Model 4.26.

Difference: a distance term is a product with the few distances that occur, shifted into place, where the reference
gathers it for every head and sample; its embeddings are projected once a layer, not once a sample.

Letters: B batch, L tokens, H heads, C channels of a head, D width, S buckets to either side, R distances -(L-1)..L-1.
"""

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import AddAndNorm, attention, join_heads, split_heads
from models.linear import Linear
from models.recompute import NOTHING
from models.vle.config import VLETextConfig


def distance_buckets(distances: Tensor, num_buckets: int, max_positions: int) -> Tensor:
    """Distances (whole numbers, any shape) -> buckets of the same shape.

    Up to half of ``num_buckets`` each distance has its own; farther ones share logarithmically wider ones. The bucket
    of -d is minus that of d.
    """
    middle = num_buckets // 2
    size = distances.abs().clamp(min=middle).to(torch.float32)  # the reference's precision: it decides where ceil jumps
    steps = torch.log(size / middle) / math.log((max_positions - 1) / middle) * (middle - 1)
    far = (torch.ceil(steps) + middle).to(distances.dtype) * distances.sign()
    return torch.where(distances.abs() <= middle, distances, far)


class DebertaV2(nn.Module):
    """Token ids to contextual tokens."""

    def __init__(self, config: VLETextConfig) -> None:
        """Build it with random weights."""
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) ids -> (B, L, D).

        Args:
            input_ids: of the vocabulary.
            attention_mask: (B, L), 1 or true = a word; padding neither looks nor is looked at. None: all are words.
        """
        return self.encoder(self.embeddings(input_ids, attention_mask), attention_mask)


class _Embeddings(nn.Module):
    def __init__(self, config: VLETextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        tokens = self.LayerNorm(self.word_embeddings(input_ids))
        if attention_mask is not None:
            tokens = tokens * attention_mask.unsqueeze(-1).to(tokens.dtype)
        return self.dropout(tokens)


class _Encoder(nn.Module):
    def __init__(self, config: VLETextConfig) -> None:
        super().__init__()
        self._config = config
        self.recompute = NOTHING
        self.layer = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.rel_embeddings = nn.Embedding(2 * config.position_buckets, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # of the distances

    def forward(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        rows, place = _rows_of_distances(tokens.shape[1], self._config.position_buckets, self._config.max_positions)
        place = None if place is None else place.to(tokens.device)
        embedded = self.LayerNorm(self.rel_embeddings(rows.to(tokens.device)))
        hidden = None
        if attention_mask is not None:
            words = attention_mask.bool()
            hidden = ~(words[:, None, :, None] & words[:, None, None, :])  # (B, 1, L, L)
        for number, layer in enumerate(self.layer):
            tokens = self.recompute.run(number, layer, tokens, embedded, place, hidden, draws=self.training)
        return tokens


@functools.lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # kept tensors must be ordinary ones: a training step may be the next to use them
def _rows_of_distances(length: int, num_buckets: int, max_positions: int) -> tuple[Tensor, Tensor | None]:
    """The rows of the distance table that a text of this length needs, and which of them each distance has.

    Returns:
        (R',) rows, each once; (R,) places in them by distance, None where every distance has a row of its own.
    """
    distances = torch.arange(1 - length, length)
    rows = distance_buckets(distances, num_buckets, max_positions) + num_buckets
    rows = rows.clamp(0, 2 * num_buckets - 1)
    if length - 1 <= num_buckets // 2:
        return rows, None
    return torch.unique(rows, return_inverse=True)


class _Layer(nn.Module):
    def __init__(self, config: VLETextConfig) -> None:
        super().__init__()
        self.attention = nn.Module()
        self.attention.self = _DisentangledAttention(config)
        width = config.hidden_size
        norm = {"eps": config.layer_norm_eps, "dropout": config.hidden_dropout_prob}
        self.attention.output = AddAndNorm(width, width, **norm)
        self.intermediate = nn.Module()
        self.intermediate.dense = Linear(width, config.intermediate_size)
        self.output = AddAndNorm(config.intermediate_size, width, **norm)

    def forward(self, tokens: Tensor, embedded: Tensor, place: Tensor | None, hidden: Tensor | None) -> Tensor:
        tokens = self.attention.output(self.attention.self(tokens, embedded, place, hidden), tokens)
        return self.output(F.gelu(self.intermediate.dense(tokens)), tokens)


class _DisentangledAttention(nn.Module):
    """q_i k_j + q_i PK(i - j) + k_j PQ(i - j), PK and PQ the distances' embeddings through the same projections."""

    def __init__(self, config: VLETextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self._num_heads, self._dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query_proj, self.key_proj, self.value_proj = (Linear(width, width) for _ in range(3))
        self.pos_dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: Tensor, embedded: Tensor, place: Tensor | None, hidden: Tensor | None) -> Tensor:
        """Mix the tokens.

        Args:
            tokens: (B, L, D).
            embedded: (R', D), the embeddings of the buckets that occur.
            place: (R,) the bucket of each distance among them; None: each has its own.
            hidden: (B, 1, L, L), True = query i may not look at key j; None: all may.
        """
        q, k, v = (
            split_heads(layer(tokens), self._num_heads) for layer in (self.query_proj, self.key_proj, self.value_proj)
        )
        # before the products, so that they stay small in float16
        scale = (3 * q.shape[-1]) ** -0.5
        q, k_scaled = q * scale, k * scale
        embedded = self.pos_dropout(embedded)
        of_keys, of_queries = (
            layer(embedded).unflatten(-1, (self._num_heads, -1)).permute(1, 2, 0)  # (H, C, R')
            for layer in (self.key_proj, self.query_proj)
        )
        content_to_position, position_to_content = q @ of_keys, k_scaled @ of_queries  # (B, H, L, R')
        if place is not None:
            content_to_position, position_to_content = content_to_position[..., place], position_to_content[..., place]
        bias = _shift(content_to_position.flip(-1)) + _shift(position_to_content).transpose(2, 3)
        if hidden is not None:
            bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        out = attention(q, k, v, mask=bias, dropout=self._dropout if self.training else 0.0, scale=1.0)
        if hidden is not None:  # padding attends to nothing
            out = out.masked_fill(hidden.all(dim=-1, keepdim=True), 0)
        return join_heads(out)


def _shift(scores: Tensor) -> Tensor:
    """(..., L, 2 L - 1) -> (..., L, L): row i, column j of the result is column j - i + L - 1 of the same row.

    A view: each row starts one place earlier than the one above it.
    """
    length = scores.shape[-2]
    flat = scores.flatten(-2)[..., length - 1 :]
    if length == 1:
        return flat.unflatten(-1, (1, 1))
    return flat[..., : length * (2 * length - 2)].unflatten(-1, (length, 2 * length - 2))[..., :length]
