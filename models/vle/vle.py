"""VLE: both towers, the fusion of their tokens, and the head for question answering.

Source: the VLE repository (iflytek/VLE) and its key names; the fusion is METER's co-attention (Dou et al. 2022) on
BERT's attention blocks.

Letters: B batch, L text tokens, N image tokens (class token first), W fusion width.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.clip_vision import CLIPVisionTransformer
from models.errors import ModelError
from models.layers import AddAndNorm, attention, join_heads, split_heads
from models.linear import Linear
from models.recompute import NOTHING
from models.vle.config import VLEConfig
from models.vle.deberta import DebertaV2

_TEXT, _IMAGE = 0, 1  # rows of the table of token types


@dataclass(frozen=True)
class Boxes:
    """Boxes of each image, as patches that they cover, whose mean is a token more.

    patches: image -> box -> patch numbers, row by row from 0.
    image_types: image -> token type of each box.
    text_types: image -> token type of the first text tokens; the rest has type 0.
    """

    patches: list[list[list[int]]]
    image_types: list[list[int]]
    text_types: list[list[int]]


@dataclass(frozen=True)
class Fused:
    """What the trunk gives: pooled (B, 2 W), text first; text (B, L, W); image (B, N or more, W)."""

    pooled: Tensor
    text: Tensor
    image: Tensor


class VLE(nn.Module):
    """The trunk."""

    def __init__(self, config: VLEConfig) -> None:
        """Build it with random weights."""
        super().__init__()
        self.config = config
        self.recompute = NOTHING  # of the fusion layers
        width = config.hidden_size
        self.vision_model = nn.Module()
        self.vision_model.vision_model = CLIPVisionTransformer(config.vision)
        self.text_model = DebertaV2(config.text)
        self.text_projection_layer = Linear(config.text.hidden_size, width)
        self.image_projection_layer = Linear(config.vision.hidden_size, width)
        self.token_type_embeddings = nn.Embedding(config.num_token_types, width)
        self.cross_modal_image_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_hidden_layers))
        self.cross_modal_text_layers = nn.ModuleList(FusionLayer(config) for _ in range(config.num_hidden_layers))
        self.cross_modal_image_pooler = _Pooler(width)
        self.cross_modal_text_pooler = _Pooler(width)

    def forward(
        self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, boxes: Boxes | None = None
    ) -> Fused:
        """Fuse an image and a text each.

        Args:
            pixels: (B, 3, S, S), normalised.
            input_ids: (B, L).
            attention_mask: (B, L), 1 or true = a word. None: nothing is padded, which is faster.
            boxes: of the images.
        """
        vision = self.vision_model.vision_model
        image = self.image_projection_layer(vision.post_layernorm(vision(pixels)))  # of all tokens, unlike CLIP
        text = self.text_projection_layer(self.text_model(input_ids, attention_mask))
        types = self.token_type_embeddings.weight
        image_mask = None
        if boxes is None:
            text, image = text + types[_TEXT], image + types[_IMAGE]
        else:
            text, image, image_mask = self._with_boxes(text, image, boxes)
        text_mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        pairs = zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True)
        for number, (text_layer, image_layer) in enumerate(pairs):
            run = partial(self.recompute.run, number, draws=self.training)
            text, image = (
                run(text_layer, text, image, text_mask, image_mask),
                run(image_layer, image, text, image_mask, text_mask),
            )
        pooled = torch.cat([self.cross_modal_text_pooler(text), self.cross_modal_image_pooler(image)], dim=-1)
        return Fused(pooled, text, image)

    def _with_boxes(self, text: Tensor, image: Tensor, boxes: Boxes) -> tuple[Tensor, Tensor, Tensor]:
        """Append a token for each box and give every token its type; text, image, image mask (B, 1, 1, N')."""
        batch_size, num_tokens, _ = image.shape
        device, room = image.device, max(len(patches) for patches in boxes.patches)
        image_types = torch.zeros(batch_size, num_tokens + room, dtype=torch.long, device=device)
        image_types[:, :num_tokens] = _IMAGE
        text_types = torch.full(text.shape[:2], _TEXT, device=device)
        mask = torch.zeros(batch_size, num_tokens + room, dtype=torch.bool, device=device)
        added = image.new_zeros(batch_size, room, image.shape[2])
        for place, patches in enumerate(boxes.patches):
            for number, box in enumerate(patches):
                added[place, number] = image[place, [patch + 1 for patch in box]].mean(dim=0)  # after the class token
            end = num_tokens + len(patches)
            mask[place, :end] = True
            image_types[place, num_tokens:end] = torch.tensor(boxes.image_types[place], device=device)
            said = boxes.text_types[place][: text.shape[1]]
            text_types[place, : len(said)] = torch.tensor(said, device=device)
        image = torch.cat([image, added], dim=1)
        types = self.token_type_embeddings
        return text + types(text_types), image + types(image_types), mask[:, None, None, :]


class _Pooler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.dense(tokens[:, 0]))


class VLEForVQA(nn.Module):
    """Scores of all answers to a question about an image."""

    def __init__(self, config: VLEConfig, num_answers: int | None = None) -> None:
        """Build it with random weights.

        Args:
            config: sizes.
            num_answers: rows of the output layer; as many as ``config.labels`` if None.
        """
        super().__init__()
        if num_answers is None and config.labels is None:
            raise ModelError("config.json has no id2label, so the number of answers is unknown: give the answer list")
        self.config = config
        self.vle = VLE(config)
        width = 2 * config.hidden_size
        self.vqa_classifier = nn.Sequential(
            Linear(width, width),
            nn.LayerNorm(width, eps=1e-5),
            nn.GELU(),
            Linear(width, num_answers or len(config.labels)),
        )
        self.apply(self._start_values)

    def _start_values(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Arguments as for ``VLE``; (B, answers) logits."""
        return self.vqa_classifier(self.vle(pixels, input_ids, attention_mask).pooled)


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
