"""One more word of many captions at once: the image's keys and values once an image, the text's once a beam.

In captioning the image looks at nothing but itself, so that it goes through the layers once, whatever is written about
it. Every step then feeds two tokens of each caption, the last word and a mask whose prediction is the next word. The
word's keys and values stay, the mask's are written over by the next word.

Letters: B images, K captions (beams) of each, R = B K rows, image by image; I image tokens, T room for text, D width,
H heads, C = D / H.

Source: the incremental decoding of BEiT-3's captioning. Difference: there every beam has a copy of the image's keys and
values, which moves whenever beams change places, and grows by copying.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.beit3.beit3 import FIRST_POSITION, EncoderLayer
from models.beit3.tasks import BEiT3ForCaptioning
from models.errors import ModelError


@dataclass
class CaptionCache:
    """Keys and values of every layer; sizes do not change from step to step, so that a compiled step stays valid.

    image: per layer the keys and values of the image, (B, H, I, C) each.
    text: (layers, 2, R, H, T, C), keys and values of the words so far; what stands behind them is masked.
    """

    image: list[tuple[Tensor, Tensor]]
    text: Tensor

    def reorder_text(self, parents: Tensor, length: int) -> None:
        """Let row r go on from row ``parents[r]``; the first ``length`` positions move, the image's part never does."""
        words = self.text[..., :length, :]
        words.copy_(words.index_select(2, parents))

    def keep_images(self, kept: Tensor) -> None:
        """Drop all images but those at the (B',) places ``kept``, with their rows."""
        rows_per_image = self.text.shape[2] // self.image[0][0].shape[0]
        rows = rows_of_images(kept, rows_per_image)
        self.image = [(keys[kept], values[kept]) for keys, values in self.image]
        self.text = self.text.index_select(2, rows)


def rows_of_images(images: Tensor, rows_per_image: int) -> Tensor:
    """(B',) places of images -> (B' K,) places of their rows."""
    return (images[:, None] * rows_per_image + torch.arange(rows_per_image, device=images.device)).flatten()


def encode_images(model: BEiT3ForCaptioning, image: Tensor, rows_per_image: int, max_tokens: int) -> CaptionCache:
    """Run the images through the layers, and make room for text.

    Args:
        model: in evaluation mode.
        image: (B, 3, S, S), normalised.
        rows_per_image: K.
        max_tokens: T.

    Raises:
        ModelError: the text may become longer than the position table.
    """
    trunk = model.beit3
    room = model.config.max_text_positions - FIRST_POSITION
    if max_tokens > room:
        raise ModelError(f"a text of {max_tokens} tokens is longer than the {room} positions of the model: lower it")
    places = torch.arange(FIRST_POSITION, FIRST_POSITION + model.config.num_image_tokens, device=image.device)
    tokens = trunk.vision_embed(image) + trunk.encoder.embed_positions.A(places)
    cached = []
    for layer in trunk.encoder.layers:
        attention = layer.self_attn
        hidden = layer.self_attn_layer_norm.A(tokens)
        # heads() is a view that no matrix product can read in one go, and it is read at every step
        keys = attention.heads(attention.k_proj.A(hidden)).contiguous()
        values = attention.heads(attention.v_proj.A(hidden)).contiguous()
        cached.append((keys, values))
        if len(cached) < len(trunk.encoder.layers):  # nothing reads what the last layer makes of the image
            out = attention.attend_heads(attention.heads(attention.q_proj.A(hidden)), keys, values)
            tokens = tokens + attention.out_proj.A(attention.inner_attn_ln.A(out))
            tokens = tokens + layer.ffn.A(layer.final_layer_norm.A(tokens))
    num_rows = image.shape[0] * rows_per_image
    keys = cached[0][0]
    text = keys.new_zeros(len(cached), 2, num_rows, keys.shape[1], max_tokens, keys.shape[3])
    return CaptionCache(cached, text)


LayerStep = Callable[..., Tensor]


def next_word_logits(
    model: BEiT3ForCaptioning,
    cache: CaptionCache,
    words: Tensor,
    mask_id: int,
    position: Tensor,
    *,
    layer_step: LayerStep | None = None,
) -> Tensor:
    """Feed the last word of each row and a mask; (R, V) logits of the word in the mask's place.

    Args:
        model: in evaluation mode.
        cache: gets the words' keys and values.
        words: (R,) ids.
        mask_id: id of the mask.
        position: scalar tensor, place of ``words`` in the text, from 0; a tensor, so that a compiled step is not made
            anew for each of them.
        layer_step: ``step_through_layer`` or a compiled form of it.
    """
    trunk = model.beit3
    layer_step = layer_step or step_through_layer
    pair = torch.stack([words, torch.full_like(words, mask_id)], dim=1)
    places = position + torch.arange(2, device=words.device)  # of the word and of the mask
    tokens = trunk.text_embed(pair) + trunk.encoder.embed_positions.B(places + FIRST_POSITION)  # (R, 2, D)
    seen = torch.arange(cache.text.shape[4], device=words.device) <= places[:, None]  # (2, T)
    layers = trunk.encoder.layers
    for index, (layer, (keys, values)) in enumerate(zip(layers, cache.image, strict=True)):
        is_last = index == len(layers) - 1
        tokens = layer_step(layer, tokens, keys, values, cache.text[index], places, seen, mask_only=is_last)
    norm = trunk.encoder.layer_norm
    return model.mlm_head((tokens if norm is None else norm.B(tokens))[:, -1])


def step_through_layer(
    layer: EncoderLayer,
    tokens: Tensor,
    image_keys: Tensor,
    image_values: Tensor,
    text: Tensor,
    places: Tensor,
    seen: Tensor,
    *,
    mask_only: bool = False,
) -> Tensor:
    """One layer over the two new tokens of each row.

    Args:
        layer: of the encoder.
        tokens: (R, 2, D).
        image_keys: (B, H, I, C).
        image_values: (B, H, I, C).
        text: (2, R, H, T, C), keys and values; gets those of the new tokens.
        places: (2,) where in T they belong.
        seen: (2, T), which text either of them looks at.
        mask_only: the last layer: compute the mask's output only.

    Returns:
        (R, 2, D); (R, 1, D) with ``mask_only``.
    """
    attention = layer.self_attn
    hidden = layer.self_attn_layer_norm.B(tokens)
    text[0].index_copy_(2, places, attention.heads(attention.k_proj.B(hidden)).to(text.dtype))
    text[1].index_copy_(2, places, attention.heads(attention.v_proj.B(hidden)).to(text.dtype))
    if mask_only:
        tokens, hidden, seen = tokens[:, 1:], hidden[:, 1:], seen[1:]
    queries = attention.heads(attention.q_proj.B(hidden))  # (R, H, Q, C)
    out = _attend_both(queries, image_keys, image_values, text[0], text[1], seen)
    tokens = tokens + attention.out_proj.B(attention.inner_attn_ln.B(out))
    return tokens + layer.ffn.B(layer.final_layer_norm.B(tokens))


def _attend_both(
    queries: Tensor, image_keys: Tensor, image_values: Tensor, text_keys: Tensor, text_values: Tensor, seen: Tensor
) -> Tensor:
    """One softmax over an image's keys, which its K rows share, and each row's own text; (R, Q, D).

    The rows of an image are queries of one matrix product with its keys, which so are read once and not K times.
    """
    num_rows, num_heads, num_queries, width = queries.shape
    num_images, num_image_tokens = image_keys.shape[0], image_keys.shape[2]
    per_image = num_rows // num_images * num_queries
    queries = queries * width**-0.5
    # (R, H, Q, C) -> (B, H, K Q, C)
    of_image = queries.unflatten(0, (num_images, -1)).transpose(1, 2).reshape(num_images, num_heads, per_image, width)
    image_scores = of_image @ image_keys.transpose(2, 3)  # (B, H, K Q, I)
    text_scores = (queries @ text_keys.transpose(2, 3)).masked_fill(~seen, -torch.inf)  # (R, H, Q, T)
    text_scores = text_scores.unflatten(0, (num_images, -1)).transpose(1, 2).flatten(2, 3)  # (B, H, K Q, T)
    weights = torch.cat([image_scores, text_scores], dim=-1).softmax(dim=-1, dtype=torch.float32).to(queries.dtype)
    out = weights[..., :num_image_tokens] @ image_values  # (B, H, K Q, C)
    out = out.unflatten(2, (-1, num_queries)).transpose(1, 2).flatten(0, 1)  # (R, H, Q, C)
    text_weights = weights[..., num_image_tokens:].unflatten(2, (-1, num_queries)).transpose(1, 2).flatten(0, 1)
    out = out + text_weights @ text_values
    return out.transpose(1, 2).flatten(2)
