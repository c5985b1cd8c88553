"""LLaVA-1.5: CLIP's image tower, a projector, a Llama decoder; key names of the original's checkpoints.

Source: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"; ``LlavaLlamaForCausalLM``.

Letters: B batch, T0 ids with a place an image, T joined rows, I images, P rows an image, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.clip_vision import CLIPVisionConfig, CLIPVisionTransformer
from models.errors import ModelError
from models.linear import Linear
from models.llava.config import LlavaConfig
from models.llava.llama import LlamaModel
from models.llava.projector import build_projector
from models.llava.splice import IGNORED, Joined, Rows, join_rows, pad_rows
from models.losses import chunked_cross_entropy


@dataclass(frozen=True)
class Scored:
    """loss, a scalar, or None; logits (B, T, V) and the joined rows where they were asked for."""

    loss: Tensor | None
    logits: Tensor | None = None
    joined: Joined | None = None


class LlavaForCausalLM(nn.Module):
    """Images and text to the next word."""

    def __init__(self, config: LlavaConfig, vision: CLIPVisionConfig) -> None:
        """Build it with random weights; the tower is frozen."""
        super().__init__()
        if vision.hidden_size != config.mm_hidden_size:
            raise ModelError(
                f"the image tower's features are {vision.hidden_size} wide, mm_hidden_size of the model's config says "
                f"{config.mm_hidden_size}: give the tower that the model was trained with"
            )
        self.config, self.vision_config = config, vision
        self.model = LlamaModel(config.text)
        self.model.mm_projector = build_projector(
            config.mm_projector_type, config.mm_hidden_size, config.text.hidden_size
        )
        layers = _layers_of_tower(config.mm_vision_select_layer, vision.num_hidden_layers)
        # the names of checkpoints that carry the tower; layers that nobody looks at are not built
        self.model.vision_tower = nn.Module()
        self.model.vision_tower.vision_tower = nn.Module()
        tower = CLIPVisionTransformer(replace(vision, num_hidden_layers=layers))
        del tower.post_layernorm  # of the class token behind the last layer
        self.model.vision_tower.vision_tower.vision_model = tower.requires_grad_(False)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        if config.text.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def tower(self) -> CLIPVisionTransformer:
        """The image tower."""
        return self.model.vision_tower.vision_tower.vision_model

    @property
    def image_rows(self) -> int:
        """P: rows that an image takes in a sequence."""
        return self.vision_config.num_tokens - (self.config.mm_vision_select_feature == "patch")

    def tower_features(self, pixels: Tensor) -> Tensor:
        """(I, 3, S, S), normalised -> (I, P, C) features."""
        features = self.tower(pixels)
        # dense, as features that come from elsewhere are: the last bit of the projector's sums depends on it
        return features if self.config.mm_vision_select_feature == "cls_patch" else features[:, 1:].contiguous()

    def image_vectors(self, features: Tensor) -> Tensor:
        """(I, P, C) features of the tower -> (I, P, D)."""
        return self.model.mm_projector(features)

    def rows(
        self,
        ids: Tensor,
        pixels: Tensor | None = None,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Rows:
        """Text with image places, and images or their features, to the rows of each sample (``splice.join_rows``)."""
        if features is None and pixels is not None:
            features = self.tower_features(pixels)
        vectors: Sequence[Tensor] = [] if features is None else list(self.image_vectors(features))
        embed, longest = self.model.embed_tokens, self.config.max_length
        return join_rows(ids, vectors, embed, mask=mask, labels=labels, max_length=longest)

    def join(self, *inputs: Any, padding_side: str | None = None, **more: Any) -> Joined:
        """The same as one batch, filled up on one side; arguments as ``rows``."""
        return pad_rows(self.rows(*inputs, **more), padding_side or self.config.padding_side)

    def forward(
        self,
        ids: Tensor,
        pixels: Tensor | None = None,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        with_logits: bool = False,
    ) -> Scored:
        """Loss over the answers' words, or logits.

        For a loss the samples lie one behind the other, without padding, and none sees another.

        Args:
            ids: (B, T0), -200 where an image stands.
            pixels: (I, 3, S, S) in reading order; one stand-in for each sample without an image.
            features: (I, P, C) of the tower in their place.
            mask: (B, T0), True = a token.
            labels: (B, T0), -100 where nothing is to be learnt.
            with_logits: give all logits of the padded batch, which take much memory.
        """
        rows = self.rows(ids, pixels, features=features, mask=mask, labels=labels)
        if rows.labels is not None and not with_logits:
            lengths = [len(row) for row in rows.embeds]
            hidden = self.model.decode(torch.cat(rows.embeds)[None], lengths=lengths).tokens[0]
            # what a row foretells is the next label of its own sample
            targets = torch.cat([torch.cat([row[1:], row.new_full((1,), IGNORED)]) for row in rows.labels])
            return Scored(chunked_cross_entropy(hidden, self.lm_head, targets))
        joined = pad_rows(rows, self.config.padding_side)
        # padding at the end is behind everything that is read: the causal kernel needs no mask
        left = self.config.padding_side == "left" and len(set(joined.lengths)) > 1
        hidden = self.model.decode(joined.embeds, mask=joined.mask if left else None).tokens
        loss = None
        if joined.labels is not None:
            loss = chunked_cross_entropy(hidden[:, :-1], self.lm_head, joined.labels[:, 1:])
        return Scored(loss, self.lm_head(hidden).float(), joined)


def _layers_of_tower(select: int, num_layers: int) -> int:
    """How many layers make hidden state ``select``, counted from the end where negative."""
    state = select if select >= 0 else num_layers + 1 + select
    if not 0 < state <= num_layers:
        raise ModelError(f"mm_vision_select_layer {select}: the tower has {num_layers} layers")
    return state
