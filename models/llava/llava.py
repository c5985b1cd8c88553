"""LLaVA-1.5: CLIP's image tower, a projector, a Llama decoder; key names of the original's checkpoints.

Source: Liu et al. 2023, "Improved Baselines with Visual Instruction Tuning"; ``LlavaLlamaForCausalLM``, its
``mm_projector`` and its ``prepare_inputs_labels_for_multimodal``.

Letters: B batch, T0 ids with a place an image, T joined rows, I images, P rows an image, D width, V vocabulary.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.clip_vision import CLIPVisionConfig, CLIPVisionTransformer
from models.errors import ModelError
from models.linear import Linear
from models.llava.config import LlavaConfig
from models.llava.llama import IGNORED, LlamaModel, next_word_loss

IMAGE_PLACE = -200
_DROPPED = -(2**31)  # stands for a word behind the mask
_MLP = re.compile(r"mlp([1-9]\d?)x_gelu")


@dataclass(frozen=True)
class Rows:
    """embeds: (T, D) of each sample; labels: (T,) of each, -100 at images; None where none were given."""

    embeds: list[Tensor]
    labels: list[Tensor] | None


@dataclass(frozen=True)
class Joined:
    """embeds (B, T, D); labels (B, T), -100 at images and padding, or None; mask (B, T), True = a row; lengths."""

    embeds: Tensor
    labels: Tensor | None
    mask: Tensor
    lengths: list[int]


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
        """Text with image places, and images or their features, to the rows of each sample (``join_rows``)."""
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
            return Scored(next_word_loss(hidden, self.lm_head, targets))
        joined = pad_rows(rows, self.config.padding_side)
        # padding at the end is behind everything that is read: the causal kernel needs no mask
        left = self.config.padding_side == "left" and len(set(joined.lengths)) > 1
        hidden = self.model.decode(joined.embeds, mask=joined.mask if left else None).tokens
        loss = None
        if joined.labels is not None:
            loss = next_word_loss(hidden[:, :-1], self.lm_head, joined.labels[:, 1:])
        return Scored(loss, self.lm_head(hidden).float(), joined)


def _layers_of_tower(select: int, num_layers: int) -> int:
    """How many layers make hidden state ``select``, counted from the end where negative."""
    state = select if select >= 0 else num_layers + 1 + select
    if not 0 < state <= num_layers:
        raise ModelError(f"mm_vision_select_layer {select}: the tower has {num_layers} layers")
    return state


# ---- text with image places to rows ----


def positions_of(mask: Tensor) -> Tensor:
    """(B, T) masks of rows, padded on the left, to the place of each in its sequence; 0 where nothing is."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def join_rows(
    ids: Tensor,
    images: Sequence[Tensor],
    embed: Callable[[Tensor], Tensor],
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    max_length: int | None = None,
) -> Rows:
    """Put the vectors of the images at their places, sample by sample.

    The ids are read back from the device once, and it is waited for at no other place.

    Args:
        ids: (B, T0), ``IMAGE_PLACE`` where an image stands.
        images: (P, D) of each image in reading order over the batch. A sample without a place takes one all the same,
            with no row of it: its stand-in keeps the projector in the graph.
        embed: ids -> vectors.
        mask: (B, T0), True = a token; the others are dropped before anything else.
        labels: (B, T0).
        max_length: rows that are kept of each sample, from its beginning.

    Raises:
        ModelError: another number of images than places and samples without one.
    """
    # numpy: torch's own ``nonzero`` would wait for a device at each call
    host = (ids if mask is None else ids.masked_fill(~mask.bool(), _DROPPED)).cpu().numpy()
    kept, is_image = host != _DROPPED, host == IMAGE_PLACE
    wanted = is_image.sum(1).clip(1).sum()
    if wanted != len(images):
        raise ModelError(
            f"{len(images)} images for {wanted} places: each <image> of a text takes one, and a text without <image> a "
            "stand-in"
        )
    vectors = embed(ids.flatten()[_places(kept & ~is_image, ids.device)])
    own: Sequence[Tensor] = ()
    if labels is not None:
        own = labels.flatten()[_places(kept, ids.device)].split(kept.sum(1).tolist())
    rows, targets, used, first = [], [], 0, 0
    for number, (is_token, is_place) in enumerate(zip(kept, is_image, strict=True)):
        parts, marks = [], []
        places, length = is_place[is_token].nonzero()[0].tolist(), is_token.sum()
        begin = 0
        for place in [*places, length]:
            parts.append(vectors[first : first + place - begin])
            first += place - begin
            if labels is not None:
                marks.append(own[number][begin:place])
            if place < length:
                parts.append(images[used].to(vectors.dtype))
                if labels is not None:
                    marks.append(labels.new_full((len(images[used]),), IGNORED))
                used += 1
            begin = place + 1
        if not places:
            parts.append(images[used][:0].to(vectors.dtype))
            used += 1
        rows.append(torch.cat(parts)[:max_length])
        if labels is not None:
            targets.append(torch.cat(marks)[:max_length])
    return Rows(rows, None if labels is None else targets)


def pad_rows(rows: Rows, padding_side: str = "right") -> Joined:
    """Samples of unequal length as one batch, filled up on one side."""
    lengths = [len(row) for row in rows.embeds]
    longest = max(lengths)
    embeds = torch.stack([_padded(row, longest, 0.0, padding_side) for row in rows.embeds])
    labels = None
    if rows.labels is not None:
        labels = torch.stack([_padded(row, longest, IGNORED, padding_side) for row in rows.labels])
    ones = [torch.ones(length, dtype=torch.bool, device=embeds.device) for length in lengths]
    present = torch.stack([_padded(row, longest, 0, padding_side) for row in ones])
    return Joined(embeds, labels, present, lengths)


def _places(chosen: Any, device: torch.device) -> Tensor:
    """Where a numpy array of truths is true, counted through its rows."""
    return torch.from_numpy(chosen.ravel().nonzero()[0]).to(device, non_blocking=True)


def _padded(row: Tensor, length: int, value: float, side: str) -> Tensor:
    filling = row.new_full((length - len(row), *row.shape[1:]), value)
    return torch.cat([row, filling] if side == "right" else [filling, row])


# ---- the projector ----


def build_projector(kind: str, features: int, width: int) -> nn.Module:
    """A projector by its name.

    Args:
        kind: ``linear``, ``mlp<k>x_gelu`` (k linear layers with GELU between them) or ``identity``.
        features: width of the image features.
        width: of the decoder.

    Raises:
        ModelError: an unknown name, or ``identity`` between unequal widths.
    """
    if kind == "linear":
        return Linear(features, width)
    if kind == "identity":
        if features != width:
            raise ModelError(f"mm_projector_type identity joins equal widths, not {features} and {width}")
        return nn.Identity()
    found = _MLP.fullmatch(kind)
    if found is None:
        raise ModelError(f"unknown mm_projector_type {kind!r:.40}: choose linear, mlp2x_gelu or identity")
    layers: list[nn.Module] = [Linear(features, width)]
    for _ in range(int(found[1]) - 1):
        layers += [nn.GELU(), Linear(width, width)]
    return nn.Sequential(*layers)
