"""BEiT-3's fine-tuned models: the trunk with the head of each task, and their losses.

Original: ``modeling_finetune.py``.

Difference: what the trunk computes in its last layer is limited to the tokens that the head reads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.beit3.beit3 import BEiT3, init_beit3_weights
from models.beit3.config import TASK_SUFFIXES, BEiT3Config
from models.errors import ModelError
from models.linear import Linear


class _BEiT3ForTask(nn.Module):
    """What every task shares: the trunk, and facts about parameter names that the optimizer asks for."""

    def __init__(self, config: BEiT3Config) -> None:
        super().__init__()
        self.config = config
        self.beit3 = BEiT3(config)

    @property
    def num_layers(self) -> int:
        """Encoder layers; ``layer_id`` goes from 0 to num_layers + 1."""
        return self.config.num_layers

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise rates: 0 embeddings, i + 1 layer i, num_layers + 1 all after layers."""
        if "embed" in name:
            return 0
        parts = name.split(".")
        if "layers" in parts:
            return int(parts[parts.index("layers") + 1]) + 1
        return self.num_layers + 1

    def no_weight_decay(self) -> set[str]:
        """Names without weight decay, besides vectors and biases. The text positions do decay, as in the original."""
        skipped = {"beit3.encoder.embed_positions.A.weight", "beit3.vision_embed.cls_token", "logit_scale"}
        return {name for name, _ in self.named_parameters() if name in skipped}

    def unused_in_finetuning(self) -> set[str]:
        """Names of parameters that the forward pass never reads: freeze them, then every other one gets a gradient."""
        return {"beit3.vision_embed.mask_token"}


class _Pooler(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dense = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(self.norm(x)))


class BEiT3ForVisualQuestionAnswering(_BEiT3ForTask):
    """Choose one of a list of answers from the image's class token."""

    def __init__(self, config: BEiT3Config, num_answers: int) -> None:
        """``num_answers`` is the length of the answer list."""
        super().__init__(config)
        dim, eps = config.embed_dim, config.layernorm_eps
        self.pooler = _Pooler(dim, eps)
        self.head = nn.Sequential(
            Linear(dim, 2 * dim), nn.LayerNorm(2 * dim, eps=eps), nn.GELU(), Linear(2 * dim, num_answers)
        )
        init_beit3_weights(self, config.start)

    def forward(self, image: Tensor, question: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, 3, S, S) images, (B, T) question ids and (B, T) padding (1 = padded) -> (B, num_answers) logits."""
        image_tokens, _ = self.beit3(image, question, padding_mask, keep=(1, 0))
        return self.head(self.pooler(image_tokens[:, 0]))


class BEiT3ForCaptioning(_BEiT3ForTask):
    """Predict masked words of a caption from the image and the words to the left."""

    def __init__(self, config: BEiT3Config) -> None:
        """The output layer has the vocabulary's rows and is not tied to the word embedding."""
        super().__init__(config)
        self.mlm_head = Linear(config.embed_dim, config.vocab_size)
        init_beit3_weights(self, config.start)

    def forward(
        self,
        image: Tensor,
        tokens: Tensor,
        padding_mask: Tensor | None = None,
        language_masked_pos: Tensor | None = None,
    ) -> Tensor:
        """Score the words.

        Args:
            image: (B, 3, S, S).
            tokens: (B, T) ids, some replaced by the mask token.
            padding_mask: (B, T), 1 where padded.
            language_masked_pos: (B, T), 1 at the positions to predict; None for all.

        Returns:
            (M, V) logits at the M masked positions, by sample and then by position; (B, T, V) when no positions are
            given.
        """
        _, text_tokens = self.beit3(image, tokens, padding_mask, causal_text=True, keep=(0, tokens.shape[1]))
        if language_masked_pos is not None:
            places = language_masked_pos.flatten().nonzero().squeeze(1)
            text_tokens = text_tokens.flatten(0, 1).index_select(0, places)
        return self.mlm_head(text_tokens)


class _TwoLayerHead(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(in_dim, eps=eps)
        self.dense1 = Linear(in_dim, hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim, eps=eps)
        self.dense2 = Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class BEiT3ForVisualReasoning(_BEiT3ForTask):
    """NLVR2: is the sentence true of the two images?"""

    def __init__(self, config: BEiT3Config, num_classes: int = 2) -> None:
        """A new head starts near zero."""
        super().__init__(config)
        self.head = _TwoLayerHead(4 * config.embed_dim, 2 * config.embed_dim, num_classes, config.layernorm_eps)
        init_beit3_weights(self, config.start)
        _scale_(self.head.dense1, self.head.dense2)

    def forward(self, image_a: Tensor, image_b: Tensor, text: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Two (B, 3, S, S) image batches, (B, T) ids and (B, T) padding (1 = padded) -> (B, num_classes) logits."""
        twice_padding = None if padding_mask is None else torch.cat([padding_mask, padding_mask])
        image_tokens, text_tokens = self.beit3(
            torch.cat([image_a, image_b]), torch.cat([text, text]), twice_padding, keep=(1, 1)
        )
        pair = torch.cat([image_tokens[:, 0], text_tokens[:, 0]], dim=-1)  # (2B, 2D), images a then images b
        return self.head(torch.cat(pair.chunk(2), dim=-1))


class BEiT3ForImageClassification(_BEiT3ForTask):
    """Classify the mean of the patch tokens."""

    def __init__(self, config: BEiT3Config, num_classes: int = 1000) -> None:
        """A new head starts near zero."""
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.embed_dim, eps=config.layernorm_eps)
        self.head = Linear(config.embed_dim, num_classes)
        init_beit3_weights(self, config.start)
        _scale_(self.head)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, num_classes) logits."""
        image_tokens, _ = self.beit3(image)
        return self.head(self.fc_norm(image_tokens[:, 1:].mean(dim=1)))

    def unused_in_finetuning(self) -> set[str]:
        """Also everything of the text side."""
        text_side = {name for name, _ in self.named_parameters() if ".B." in name or "text_embed" in name}
        return super().unused_in_finetuning() | text_side


class BEiT3ForRetrieval(_BEiT3ForTask):
    """Two separate encoders, of images and of texts, whose features are compared by their cosine."""

    def __init__(self, config: BEiT3Config) -> None:
        """The factor on the cosines starts at 1 / 0.07."""
        super().__init__(config)
        self.language_head = Linear(config.embed_dim, config.embed_dim, bias=False)
        self.vision_head = Linear(config.embed_dim, config.embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        init_beit3_weights(self, config.start)

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """(B, 3, S, S) images and/or (B, T) texts -> (B, D) unit vectors of each (or None), and the log scale."""
        vision = language = None
        if image is not None:
            vision = F.normalize(self.vision_head(self.beit3(image, keep=(1, 0))[0][:, 0]), dim=-1)
        if text is not None:
            text_tokens = self.beit3(text=text, padding_mask=padding_mask, keep=(0, 1))[1]
            language = F.normalize(self.language_head(text_tokens[:, 0]), dim=-1)
        return vision, language, self.logit_scale


@torch.no_grad()
def _scale_(*linears: nn.Linear) -> None:
    """Shrink start values, so that a new head begins near zero."""
    for linear in linears:
        linear.weight.mul_(0.001)
        linear.bias.mul_(0.001)


def build_beit3(task: str, config: BEiT3Config, *, num_classes: int | None = None) -> nn.Module:
    """The model of ``--task``.

    Args:
        task: a key of ``TASK_SUFFIXES``.
        config: from ``beit3_config``.
        num_classes: answers (vqav2, where it must be given) or classes (nlvr2: 2, imagenet: 1000); captioning and
            retrieval have none.

    Raises:
        ModelError: for an unknown task, or vqav2 without the number of answers.
    """
    role = TASK_SUFFIXES.get(task)
    if role is None:
        raise ModelError(f"unknown task {task!r}: choose one of {', '.join(TASK_SUFFIXES)}")
    if role == "captioning":
        return BEiT3ForCaptioning(config)
    if role == "retrieval":
        return BEiT3ForRetrieval(config)
    if role == "nlvr2":
        return BEiT3ForVisualReasoning(config, num_classes or 2)
    if role == "imageclassification":
        return BEiT3ForImageClassification(config, num_classes or 1000)
    if not num_classes:
        raise ModelError(
            "question answering needs the number of answers: take it from the answer list (answer2label.txt)"
        )
    return BEiT3ForVisualQuestionAnswering(config, num_classes)


# ---- losses, in float32 ----


def captioning_loss(
    logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.1, drop_worst_ratio: float = 0.0
) -> Tensor:
    """KL divergence from the smoothed targets, averaged over the positions; its floor is 0, unlike the cross entropy's.

    Args:
        logits: (M, V).
        targets: (M,) ids.
        label_smoothing: probability spread evenly over the other V - 1 classes.
        drop_worst_ratio: leave out this fraction of positions, those of the largest loss (noisy captions). The caller
            passes 0 until its step count is beyond ``--drop_worst_after``.
    """
    losses = _smoothed_kl(logits.float(), targets, label_smoothing)
    if drop_worst_ratio > 0:
        num_kept = max(1, int(losses.shape[0] * (1 - drop_worst_ratio)))  # a mean of none would be NaN
        losses = losses.topk(num_kept, largest=False, sorted=False).values
    return losses.mean()


def _smoothed_kl(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """(M,): sum over classes of q (ln q - ln p), q = 1 - smoothing on the target and the rest spread over the others.

    Written with two reductions of log p, so that no (M, V) target distribution is made.
    """
    num_classes = logits.shape[-1]
    log_probs = logits.log_softmax(dim=-1)
    of_target = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    rest = smoothing / (num_classes - 1)
    negative_entropy = sum(
        count * q * math.log(q) for count, q in ((1, 1 - smoothing), (num_classes - 1, rest)) if q > 0
    )
    cross = (1 - smoothing) * of_target
    if smoothing > 0:
        cross = cross + rest * (log_probs.sum(dim=-1) - of_target)
    return negative_entropy - cross


def contrastive_loss(
    vision: Tensor,
    language: Tensor,
    logit_scale: Tensor,
    *,
    all_vision: Tensor | None = None,
    all_language: Tensor | None = None,
    first_label: int = 0,
) -> Tensor:
    """Mean of the two cross entropies of matching images to texts and texts to images.

    Args:
        vision: (B, D) unit vectors of this process.
        language: (B, D) unit vectors, row i belongs to image i.
        logit_scale: log of the factor on the cosines.
        all_vision: (W, D) image vectors of all processes, gathered with gradient; None with one process.
        all_language: (W, D) likewise.
        first_label: row of ``vision[0]`` in ``all_vision``, that is rank * B.
    """
    scale = logit_scale.float().exp()
    vision, language = vision.float(), language.float()
    all_vision = vision if all_vision is None else all_vision.float()
    all_language = language if all_language is None else all_language.float()
    labels = torch.arange(first_label, first_label + vision.shape[0], device=vision.device)
    of_images = F.cross_entropy(scale * vision @ all_language.T, labels)
    of_texts = F.cross_entropy(scale * language @ all_vision.T, labels)
    return (of_images + of_texts) / 2
