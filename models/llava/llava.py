"""LLaVA-1.5: CLIP's image tower, a projector, a Llama decoder; key names of the original's checkpoints.

Source: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"; ``LlavaLlamaForCausalLM``.

Letters: B batch, T0 ids with a place an image, T joined rows, I images, P rows an image, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.clip_vision import CLIPVisionConfig, CLIPVisionTransformer
from models.errors import ModelError
from models.linear import Linear
from models.llava.config import LlavaConfig
from models.llava.llama import LlamaModel
from models.llava.projector import build_projector
from models.llava.splice import Joined, join
from models.losses import chunked_cross_entropy


@dataclass(frozen=True)
class Scored:
    """logits (B, T, V) where they were asked for; loss; labels and mask of the joined rows."""

    logits: Tensor | None
    loss: Tensor | None
    joined: Joined


class LlavaForCausalLM(nn.Module):
    """Images and text to the next word."""

    def __init__(self, config: LlavaConfig, vision: CLIPVisionConfig) -> None:
        """Build it with random weights; the tower is frozen."""
        super().__init__()
        if vision.hidden_size != config.mm_hidden_size:
            raise ModelError(
                f"image features of width {vision.hidden_size}, mm_hidden_size says {config.mm_hidden_size}"
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

    @torch.no_grad()
    def tower_features(self, pixels: Tensor) -> Tensor:
        """(I, 3, S, S), normalised -> (I, P, C) features, without gradients."""
        features = self.tower(pixels)
        return features if self.config.mm_vision_select_feature == "cls_patch" else features[:, 1:]

    def image_vectors(self, features: Tensor) -> Tensor:
        """(I, P, C) features of the tower -> (I, P, D)."""
        return self.model.mm_projector(features)

    def join(
        self,
        ids: Tensor,
        pixels: Tensor | None = None,
        *,
        features: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        padding_side: str | None = None,
    ) -> Joined:
        """Text with image places, and images or their features, to one sequence a sample (``splice.join``)."""
        if features is None and pixels is not None:
            features = self.tower_features(pixels)
        vectors: Sequence[Tensor] = [] if features is None else list(self.image_vectors(features))
        return join(
            ids,
            vectors,
            self.model.embed_tokens,
            mask=mask,
            labels=labels,
            max_length=self.config.max_length,
            padding_side=padding_side or self.config.padding_side,
        )

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

        Args:
            ids: (B, T0), -200 where an image stands.
            pixels: (I, 3, S, S) in reading order; one stand-in for each sample without an image.
            features: (I, P, C) of the tower in their place.
            mask: (B, T0), True = a token.
            labels: (B, T0), -100 where nothing is to be learnt.
            with_logits: give all logits, which take much memory.
        """
        joined = self.join(ids, pixels, features=features, mask=mask, labels=labels)
        # padding at the end is behind everything that is read: the causal kernel needs no mask
        left = self.config.padding_side == "left" and len(set(joined.lengths)) > 1
        hidden = self.model.decode(joined.embeds, mask=joined.mask if left else None).tokens
        loss = None
        if joined.labels is not None:
            loss = chunked_cross_entropy(hidden[:, :-1], self.lm_head, joined.labels[:, 1:])
        return Scored(self.lm_head(hidden).float() if with_logits or labels is None else None, loss, joined)


def _layers_of_tower(select: int, num_layers: int) -> int:
    """How many layers make hidden state ``select``, counted from the end where negative."""
    state = select if select >= 0 else num_layers + 1 + select
    if not 0 < state <= num_layers:
        raise ModelError(f"mm_vision_select_layer {select}: the tower has {num_layers} layers")
    return state
