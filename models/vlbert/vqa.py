"""VL-BERT for question answering, and the small one of the same kind that decides for it (the policy).

Source: ``ResNetVLBERT`` of VL-BERT's VQA part and ``PolicyResNetVLBERT`` of its adaptive fork.

Letters: B batch, Q question tokens, K regions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import ModelError
from models.linear import Linear
from models.vlbert.encoder import EPS
from models.vlbert.regions import FEATURE_SIZE, PrecomputedRegions
from models.vlbert.vlbert import VisualLinguisticBert, VLBertConfig

_PADDING = -1.5  # padded regions have -2 everywhere
CLASSIFIERS = ("mlm", "2fc", "1fc")


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the vocabulary that are put around a question."""

    cls: int = 101
    sep: int = 102
    mask: int = 103


class VLBertForVQA(nn.Module):
    """Question and regions to scores of all answers (or of all decisions, as a policy)."""

    def __init__(
        self,
        config: VLBertConfig,
        num_outputs: int,
        *,
        classifier: str = "mlm",
        classifier_hidden_size: int = 1024,
        classifier_dropout: float = 0.1,
        special_ids: SpecialIds | None = None,
        regions: nn.Module | None = None,
        grounding: bool = True,
    ) -> None:
        """Build it with random weights.

        Args:
            config: of the transformer.
            num_outputs: answers; for a policy two for each decision.
            classifier: ``mlm``, ``2fc`` or ``1fc``.
            classifier_hidden_size: inner width of ``2fc``.
            classifier_dropout: of the classifier.
            special_ids: of the vocabulary; those of bert-base-uncased if None.
            regions: what makes region vectors; from precomputed features if None.
            grounding: whether words see the whole image.
        """
        super().__init__()
        self._grounding = grounding
        self.config = config
        self.special_ids = special_ids or SpecialIds()
        self.image_feature_extractor = regions or PrecomputedRegions(config.visual_size)
        self.object_linguistic_embeddings = nn.Embedding(1, config.hidden_size)
        nn.init.normal_(self.object_linguistic_embeddings.weight, std=config.initializer_range)
        self.vlbert = VisualLinguisticBert(config)
        if config.with_pooler:  # not looked at by this head: no gradient is to be waited for
            self.vlbert.pooler.requires_grad_(False)
        self.final_mlp = _classifier(
            classifier, config.hidden_size, classifier_hidden_size, num_outputs, classifier_dropout
        )

    def forward(
        self, boxes: Tensor, sizes: Tensor, question: Tensor, policy: Tensor | None = None, image: Tensor | None = None
    ) -> Tensor:
        """Score answers.

        Args:
            boxes: (B, K, 4 + 2048) boxes in pixels with their features, or (B, K, 4) where ``image`` is given; padding
                rows are -2. The first one is the whole image.
            sizes: (B, 2 or more): width and height of the images.
            question: (B, Q) ids, 0 where padded.
            policy: see ``Encoder``.
            image: (B, 3, height, width) for models that look at the image themselves.

        Returns:
            (B, outputs) logits.
        """
        mask = boxes[:, :, 0] > _PADDING
        longest = int(mask.sum(dim=1).max())
        if longest == 0:
            raise ModelError("a question without any region: every image needs at least the whole-image box")
        mask, boxes = mask[:, :longest], boxes[:, :longest]
        if image is None and boxes.shape[2] != 4 + FEATURE_SIZE:
            raise ModelError(f"regions of {boxes.shape[2]} numbers, the model takes 4 + {FEATURE_SIZE}")
        if image is None:
            vectors = self.image_feature_extractor(boxes[..., :4], boxes[..., 4:], sizes[:, :2], mask)
        else:
            vectors = self.image_feature_extractor(image, boxes[..., :4], sizes[:, :2], mask)
        text_ids, types, text_mask, answer_place = self._text(question)
        seen = vectors[:, :1].expand(-1, text_ids.shape[1], -1)
        encoded = self.vlbert(
            text_ids,
            types,
            seen if self._grounding else torch.zeros_like(seen),
            text_mask,
            vectors,
            self.object_linguistic_embeddings.weight.expand(*mask.shape, -1),
            mask,
            policy,
        )
        rows = torch.arange(len(question), device=question.device)
        return self.final_mlp(encoded.text[rows, answer_place])

    def _text(self, question: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[CLS] question [SEP] [MASK] [SEP]: ids, segments and mask (B, Q'), and the (B,) places of [MASK]."""
        ids = self.special_ids
        words = (question > 0).sum(dim=1)
        longest = int(words.max())
        text = question.new_zeros(len(question), longest + 4)
        text[:, 0] = ids.cls
        text[:, 1 : longest + 1] = question[:, :longest] * (question[:, :longest] > 0)
        rows = torch.arange(len(question), device=question.device)
        text[rows, words + 1], text[rows, words + 2], text[rows, words + 3] = ids.sep, ids.mask, ids.sep
        place = torch.arange(longest + 4, device=question.device)
        mask = place <= (words + 3)[:, None]
        types = ((place >= (words + 2)[:, None]) & mask).long()
        return text, types, mask, words + 2


class _Transform(nn.Module):
    """Linear, GELU, norm: the head of masked-language modelling without its vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


def _classifier(kind: str, width: int, inner: int, num_outputs: int, dropout: float) -> nn.Sequential:
    if kind == "mlm":
        layers = [_Transform(width), nn.Dropout(dropout), Linear(width, num_outputs)]
    elif kind == "2fc":
        layers = [nn.Dropout(dropout), Linear(width, inner), nn.ReLU(), nn.Dropout(dropout), Linear(inner, num_outputs)]
    elif kind == "1fc":
        layers = [nn.Dropout(dropout), Linear(width, num_outputs)]
    else:
        raise ModelError(f"unknown classifier {kind!r}: choose {', '.join(CLASSIFIERS)}")
    for module in nn.Sequential(*layers).modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return nn.Sequential(*layers)
