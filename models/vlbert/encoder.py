"""VL-BERT's encoder: BERT layers, beside them frozen copies where a strategy wants them, under the original's names.

Source: the encoder of VL-BERT (Su et al. 2020) and its adaptive fork. ``parallel_`` in a name means frozen copy.

Letters: B batch, L tokens, D width, H heads, C channels of a head, F feed-forward width.
"""

from dataclasses import dataclass
from functools import partial

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
