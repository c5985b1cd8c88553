"""VLE's fusion layers: image and text streams side by side, each looks at itself and then at the other.

Source: METER's co-attention (Dou et al. 2022) on BERT's attention blocks; key names of VLE.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from models.layers import AddAndNorm, attention, join_heads, split_heads
from models.linear import Linear
from models.vle.config import VLEConfig


class FusionLayer(nn.Module):
    """One layer of one stream: self-attention, attention to the other stream, feed-forward; a norm after each."""

    def __init__(self, config: VLEConfig) -> None:
        """Build it with random weights."""
        super().__init__()
        self.attention = _AttentionBlock(config)
        self.crossattention = _AttentionBlock(config)
        self.intermediate = nn.Module()
        self.intermediate.dense = Linear(config.hidden_size, config.intermediate_size)
        self.output = _add_and_norm(config.intermediate_size, config)

    def forward(self, own: Tensor, other: Tensor, own_mask: Tensor | None, other_mask: Tensor | None) -> Tensor:
        """(B, N, W) of this stream and (B, M, W) of the other -> (B, N, W).

        Masks are boolean, True = may be looked at, (B, 1, 1, N) and (B, 1, 1, M); None: everything may.
        """
        own = self.attention(own, own, own_mask)
        own = self.crossattention(own, other, other_mask)
        return self.output(F.gelu(self.intermediate.dense(own)), own)


class _AttentionBlock(nn.Module):
    def __init__(self, config: VLEConfig) -> None:
        super().__init__()
        self._num_heads, self._dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        width = config.hidden_size
        self.self = nn.Module()
        self.self.query, self.self.key, self.self.value = (Linear(width, width) for _ in range(3))
        self.output = _add_and_norm(width, config)

    def forward(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        q = split_heads(self.self.query(queries), self._num_heads)
        k, v = (split_heads(layer(keys), self._num_heads) for layer in (self.self.key, self.self.value))
        out = attention(q, k, v, mask=mask, dropout=self._dropout if self.training else 0.0)
        return self.output(join_heads(out), queries)


def _add_and_norm(inner: int, config: VLEConfig) -> AddAndNorm:
    return AddAndNorm(inner, config.hidden_size, eps=config.layer_norm_eps, dropout=config.hidden_dropout_prob)
