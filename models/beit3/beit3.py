"""BEiT-3's trunk: one Transformer over image and text tokens with separate weights for each.

Source: Wang et al. 2022, "Image as a Foreign Language"; original: torchscale's ``BEiT3``.

Differences, none of which changes a number beyond rounding: image and text stay two tensors through the layers and
meet in the attention only, so nothing else is split or joined; the last layer computes just the tokens that are read
(``keep``); captioning attends to the image without a mask. No shared vision-language expert and no relative
positions: the released models have neither.

Letters: B batch, I image tokens (class token first), T text tokens, N = I + T, P patches, D width, H heads.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.beit3.config import BEiT3Config, StartValues
from models.errors import ModelError
from models.layers import add_residual, attention, drop_path_scales, init_linear_truncated_
from models.linear import Linear
from models.recompute import NOTHING

FIRST_POSITION = 2  # both position tables begin with two rows that no token uses

# a stream is None where the pass has no such modality
Streams = tuple[Tensor | None, Tensor | None]


class Multiway(nn.Module):
    """Two modules of one shape: ``A`` for the image tokens, ``B`` for the text tokens."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        """Call ``build`` twice, A first."""
        super().__init__()
        self.A = build()
        self.B = build()

    def forward(self, image: Tensor | None, text: Tensor | None) -> Streams:
        """Each stream through its own module."""
        return None if image is None else self.A(image), None if text is None else self.B(text)


class AttentionMasks(NamedTuple):
    """What may be looked at (True); None where all of it may.

    joint: (B, 1, 1, N), image and text look at all tokens but padding.
    text: (1 or B, 1, T, N), the image looks at the image only and this says what the text looks at (captioning).
    """

    joint: Tensor | None = None
    text: Tensor | None = None


class MultiwayAttention(nn.Module):
    """Joint self-attention over image and text, with a layer norm before the output projection (sub-LN)."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        """``dim`` is D, split evenly over the heads."""
        super().__init__()
        self.num_heads = num_heads
        self.k_proj = Multiway(partial(Linear, dim, dim))
        self.v_proj = Multiway(partial(Linear, dim, dim))
        self.q_proj = Multiway(partial(Linear, dim, dim))
        self.out_proj = Multiway(partial(Linear, dim, dim))
        self.inner_attn_ln = Multiway(partial(nn.LayerNorm, dim, eps=eps))

    def forward(
        self, image: Tensor | None, text: Tensor | None, masks: AttentionMasks, keep: tuple[int, int] | None
    ) -> Streams:
        """Attend; with ``keep`` only the first tokens of each stream are queries, and only they are returned.

        Args:
            image: (B, I, D).
            text: (B, T, D).
            masks: see ``AttentionMasks``.
            keep: numbers of image and text queries, None for all.

        Returns:
            (B, I or keep[0], D) and (B, T or keep[1], D).
        """
        q_image, q_text = self.q_proj(*first_tokens(image, text, keep))
        k_image, k_text = self.k_proj(image, text)
        v_image, v_text = self.v_proj(image, text)
        if masks.text is not None:
            out_image = self.attend(q_image, k_image, v_image)
            mask = masks.text[..., : q_text.shape[1], :]
            out_text = self.attend(q_text, join(k_image, k_text), join(v_image, v_text), mask)
        else:
            out = self.attend(join(q_image, q_text), join(k_image, k_text), join(v_image, v_text), masks.joint)
            out_image, out_text = _split(out, q_image, q_text)
        return self.out_proj(*self.inner_attn_ln(out_image, out_text))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Multi-head attention of projected (B, Q, D) queries over (B, K, D) keys and values; (B, Q, D)."""
        return self.attend_heads(self.heads(q), self.heads(k), self.heads(v), mask)

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``attend`` of what is split into heads already: (B, H, Q, D / H) over (B, H, K, D / H); (B, Q, D)."""
        return attention(q, k, v, mask=mask).transpose(1, 2).flatten(2)

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, H, N, D / H), a view."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with an exact (erf) GELU and a layer norm on the hidden state (sub-LN)."""

    def __init__(self, dim: int, hidden_dim: int, eps: float) -> None:
        """``hidden_dim`` is the width between the two layers."""
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
        self.ffn_layernorm = nn.LayerNorm(hidden_dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(self.ffn_layernorm(F.gelu(self.fc1(x))))


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, everything but the attention itself once per modality."""

    def __init__(self, config: BEiT3Config) -> None:
        """All layers are alike."""
        super().__init__()
        dim, eps = config.embed_dim, config.layernorm_eps
        self.self_attn = MultiwayAttention(dim, config.num_heads, eps)
        self.self_attn_layer_norm = Multiway(partial(nn.LayerNorm, dim, eps=eps))
        self.ffn = Multiway(partial(FeedForward, dim, config.mlp_ratio * dim, eps))
        self.final_layer_norm = Multiway(
            partial(nn.LayerNorm, dim, eps=eps)
        )  # the pre-norm of the FFN, whatever its name says

    def forward(
        self,
        image: Tensor | None,
        text: Tensor | None,
        masks: AttentionMasks = AttentionMasks(),  # noqa: B008 - an immutable tuple
        keep: tuple[int, int] | None = None,
        scales: Tensor | None = None,
    ) -> Streams:
        """One layer.

        Args:
            image: (B, I, D) or None.
            text: (B, T, D) or None.
            masks: see ``AttentionMasks``.
            keep: compute and return only that many first tokens of each stream, None for all.
            scales: (2, B, 1, 1) stochastic-depth factors of the two residual branches, None for none.
        """
        attention_scale, ffn_scale = (None, None) if scales is None else scales.unbind(0)
        branches = self.self_attn(*self.self_attn_layer_norm(image, text), masks, keep)
        image, text = _add(first_tokens(image, text, keep), branches, attention_scale)
        branches = self.ffn(*self.final_layer_norm(image, text))
        return _add((image, text), branches, ffn_scale)


class Encoder(nn.Module):
    """Position tables, the layers, and for some tasks a final layer norm."""

    def __init__(self, config: BEiT3Config) -> None:
        """Build it with torch's own start values."""
        super().__init__()
        self.drop_path = config.drop_path
        self.recompute = NOTHING
        num_rows = iter((config.num_image_tokens + FIRST_POSITION, config.max_text_positions))
        self.embed_positions = Multiway(lambda: nn.Embedding(next(num_rows), config.embed_dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.layer_norm = (
            Multiway(partial(nn.LayerNorm, config.embed_dim, eps=config.layernorm_eps))
            if config.normalize_output
            else None
        )

    def forward(
        self, image: Tensor | None, text: Tensor | None, masks: AttentionMasks, keep: tuple[int, int] | None
    ) -> Streams:
        """Run the layers over embedded streams; ``keep`` applies to the last layer, see ``BEiT3.forward``."""
        stream = image if image is not None else text
        scales = [None] * len(self.layers)
        if self.training and self.drop_path > 0:
            scales = drop_path_scales(self.drop_path, len(self.layers), 2, stream.shape[0], stream.device).unbind(0)
        for index, (layer, layer_scales) in enumerate(zip(self.layers, scales, strict=True)):
            layer_keep = keep if index == len(self.layers) - 1 else None
            # the only draws, those of stochastic depth, are an input
            image, text = self.recompute.run(index, layer, image, text, masks, layer_keep, layer_scales, draws=False)
        if self.layer_norm is not None:
            image, text = self.layer_norm(image, text)
        return _tie_empty(image, text)


class VisionEmbedding(nn.Module):
    """Image patches -> tokens, class token first."""

    def __init__(self, config: BEiT3Config) -> None:
        """Sizes from the configuration; start values of the tokens are zero."""
        super().__init__()
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.mask_token = nn.Parameter(
            torch.zeros(1, 1, config.embed_dim)
        )  # of pre-training; fine-tuning never reads it
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.proj = nn.Conv2d(
            config.in_chans, config.embed_dim, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, image: Tensor) -> Tensor:
        """Embed.

        Args:
            image: (B, 3, S, S), normalised with mean 0.5 and deviation 0.5.

        Returns:
            (B, 1 + P, D), without positions.

        Raises:
            ModelError: if the image has another size than the model's.
        """
        if image.shape[-2:] != (self.image_size, self.image_size):
            height, width = image.shape[-2:]
            raise ModelError(
                f"an image of {height} x {width} pixels for a model of {self.image_size} x {self.image_size}: "
                f"resize the images to {self.image_size} or choose the model of their size"
            )
        patches = self.proj(image).flatten(2).transpose(1, 2)  # (B, P, D)
        return torch.cat([self.cls_token.to(patches.dtype).expand(image.shape[0], -1, -1), patches], dim=1)


class BEiT3(nn.Module):
    """Embeddings and encoder."""

    def __init__(self, config: BEiT3Config) -> None:
        """Modules only, with torch's own start values: the task models set theirs with ``init_beit3_weights``."""
        super().__init__()
        self.config = config
        self.text_embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.vision_embed = VisionEmbedding(config)
        self.encoder = Encoder(config)

    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        padding_mask: Tensor | None = None,
        *,
        causal_text: bool = False,
        keep: tuple[int, int] | None = None,
    ) -> Streams:
        """Encode an image, a text, or both.

        Args:
            image: (B, 3, S, S) or None.
            text: (B, T) token ids or None.
            padding_mask: (B, T), 1 where padded; None when nothing is, which lets the faster attention kernels be
                chosen.
            causal_text: captioning: the image looks at the image, text token i at the image and text tokens 0..i.
            keep: how many first image and text tokens are read afterwards; the last layer computes no others. A
                stream of which none is kept comes back empty, and its part of the last layer gets zero gradients (not
                None).

        Returns:
            (B, I or keep[0], D) and (B, T or keep[1], D); None for an absent modality.

        Raises:
            ModelError: for an image of the wrong size or a text longer than the position table.
        """
        image_tokens = text_tokens = None
        table_image, table_text = self.encoder.embed_positions.A.weight, self.encoder.embed_positions.B.weight
        if image is not None:
            image_tokens = self.vision_embed(image) + table_image[FIRST_POSITION:]
        if text is not None:
            last = text.shape[1] + FIRST_POSITION
            if last > table_text.shape[0]:
                raise ModelError(
                    f"a text of {text.shape[1]} tokens is longer than the {table_text.shape[0] - FIRST_POSITION} "
                    f"positions of the model: lower --num_max_bpe_tokens"
                )
            text_tokens = self.text_embed(text) + table_text[FIRST_POSITION:last]
            if padding_mask is not None:
                text_tokens = text_tokens.masked_fill(padding_mask.bool().unsqueeze(-1), 0)
        masks = build_masks(image_tokens, text_tokens, padding_mask, causal_text=causal_text)
        return self.encoder(image_tokens, text_tokens, masks, keep)


def build_masks(
    image: Tensor | None, text: Tensor | None, padding_mask: Tensor | None, *, causal_text: bool
) -> AttentionMasks:
    """Masks of one pass, from the embedded streams and the (B, T) padding mask (1 = padded)."""
    if text is None or (padding_mask is None and not causal_text):
        return AttentionMasks()
    num_image = 0 if image is None else image.shape[1]
    num_text = text.shape[1]
    allowed = None
    if padding_mask is not None:
        allowed = F.pad(~padding_mask.bool(), (num_image, 0), value=True)[:, None, None, :]  # (B, 1, 1, N)
    if not causal_text:
        return AttentionMasks(joint=allowed)
    causal = torch.ones(num_text, num_image + num_text, dtype=torch.bool, device=text.device).tril(num_image)[
        None, None
    ]
    return AttentionMasks(text=causal if allowed is None else causal & allowed)


def first_tokens(image: Tensor | None, text: Tensor | None, keep: tuple[int, int] | None) -> Streams:
    """The first keep[0] image and keep[1] text tokens, all for None."""
    if keep is None:
        return image, text
    return None if image is None else image[:, : keep[0]], None if text is None else text[:, : keep[1]]


def join(image: Tensor | None, text: Tensor | None) -> Tensor:
    """Image tokens, then text tokens."""
    if image is None or text is None:
        return text if image is None else image
    return torch.cat([image, text], dim=1)


def _split(joined: Tensor, image: Tensor | None, text: Tensor | None) -> Streams:
    """Undo ``join``."""
    if image is None or text is None:
        return (None, joined) if image is None else (joined, None)
    return joined.split([image.shape[1], text.shape[1]], dim=1)


def _tie_empty(image: Tensor | None, text: Tensor | None) -> Streams:
    """Add the sum of an empty stream, which is 0, to the other one.

    The empty stream's modules so belong to the graph of whatever is computed next and get zero gradients instead of
    none, as in the original; then data-parallel training needs no search for unused parameters.
    """
    if image is None or text is None:
        return image, text
    if text.shape[1] == 0:
        image = image + text.sum()
    elif image.shape[1] == 0:
        text = text + image.sum()
    return image, text


def _add(streams: Streams, branches: Streams, scale: Tensor | None) -> Streams:
    image, text = (
        None if stream is None else add_residual(stream, branch, scale)
        for stream, branch in zip(streams, branches, strict=True)
    )
    return image, text


def init_beit3_weights(model: nn.Module, start: StartValues) -> None:
    """Random weights of a trunk and its heads; layer norms and the patch convolution keep torch's own.

    The sub-LN paper's larger gain is left out: the original applies it and then overwrites it.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            init_linear_truncated_(module, std=start.linear, bound=start.linear)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=_embedding_deviation(name, module.embedding_dim, start))


def _embedding_deviation(name: str, width: int, start: StartValues) -> float:
    if name.endswith("embed_positions.A"):
        return start.image_positions
    if name.endswith("embed_positions.B"):
        return start.text_positions
    return start.words or width**-0.5


def compile_layers(model: nn.Module) -> None:
    """Compile every encoder layer in place; parameter names stay.

    Layers share their compiled graphs, so the number of compilations is that of the kinds of input: with and without
    gradient, mask, ``keep``, and one more when the text length first changes.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for module in model.modules():
        if isinstance(module, EncoderLayer):
            module.compile()
