"""VL-BERT for question answering, alone or with the small network that decides which layers or parts are used.

Source: ``ResNetVLBERT`` of VL-BERT's VQA part with its region vectors, and in the adaptive fork the pair of it and
``PolicyResNetVLBERT``. One module here, so that both train in one backward pass, under any parallelism, and travel in
one checkpoint; names of the deciding network begin with ``policy.``, those of the other are the original's.

Departures: no noise outside training, decisions are counted as whole numbers, the counts travel with the weights.

Letters: B batch, Q question tokens, K regions, A decisions.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.adaptive import decide, sample_policy
from models.errors import ModelError
from models.linear import Linear
from models.vlbert.vlbert import EPS, VisualLinguisticBert, VLBertConfig

_PADDING = -1.5  # padded regions have -2 everywhere
CLASSIFIERS = ("mlm", "2fc", "1fc")
POLICY = "policy."  # in front of the names of the deciding network
COUNTS = ("policy_decisions", "policy_samples", "policy_epoch")
FEATURE_SIZE = 2048
_WAVES = 256  # sines, and as many cosines, of each of four numbers
_BASE, _SCALE = 1000.0, 100.0
DROPOUT = 0.1  # fixed in the original


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


class Answered(NamedTuple):
    """logits (B, answers); decisions (B, A) of 0 and 1, None for strategies without a policy."""

    logits: Tensor
    decisions: Tensor | None


class AdaptiveVQA(VLBertForVQA):
    """Question, regions and perhaps the image to scores of all answers, as a strategy says."""

    def __init__(
        self,
        config: VLBertConfig,
        num_answers: int,
        *,
        policy: VLBertForVQA | None = None,
        global_decision: bool = False,
        **classifier: Any,
    ) -> None:
        """Build it with random weights.

        Args:
            config: of the transformer; its strategy says whether there is a policy.
            num_answers: of the classifier.
            policy: the deciding network, with two outputs for each decision; needed exactly where there is a policy.
            global_decision: outside training decide alike for all samples, as most samples of the last epoch did.
            classifier: see ``VLBertForVQA``.
        """
        super().__init__(config, num_answers, **classifier)
        decisions = config.encoder.num_decisions
        if (policy is None) != (decisions == 0):
            raise ModelError(
                f"strategy {config.encoder.strategy} " + ("needs a policy network" if decisions else "takes no policy")
            )
        self.policy: nn.Module | None = policy
        self.global_decision = global_decision
        if decisions:
            outputs = policy.final_mlp[-1].out_features
            if outputs != 2 * decisions:
                raise ModelError(f"a policy of {outputs} outputs, {decisions} decisions take {2 * decisions}")
            # of the epoch under way, or the last one, over all processes
            self.register_buffer("policy_decisions", torch.zeros(decisions, dtype=torch.int64))
            self.register_buffer("policy_samples", torch.zeros((), dtype=torch.int64))
            self.register_buffer("policy_epoch", torch.full((), -1, dtype=torch.int64))  # of which they are

    def forward(self, boxes: Tensor, sizes: Tensor, question: Tensor, image: Tensor | None = None) -> Answered:
        """Decide, then answer; arguments as ``VLBertForVQA``.

        In training decisions are drawn (``models.adaptive.sample_policy``), else they are the most probable ones.
        """
        decisions = None
        if self.policy is not None:
            if self.global_decision and not self.training:
                decisions = self.most_used().expand(len(question), -1)
            else:
                logits = self.policy(boxes, sizes, question, image=image)
                decisions = sample_policy(logits) if self.training else decide(logits)
        return Answered(super().forward(boxes, sizes, question, decisions, image), decisions)

    def most_used(self) -> Tensor:
        """(A,) of 0 and 1: what more than half of the samples of the last training epoch decided.

        Raises:
            ModelError: nothing has been counted.
        """
        if int(self.policy_samples) == 0:
            raise ModelError("a global decision needs the counts of a training epoch: give a checkpoint of such a run")
        return (2 * self.policy_decisions > self.policy_samples).float()

    @torch.no_grad()
    def count(self, decisions: Tensor, num_samples: Tensor) -> None:
        """Add (A,) sums of decisions over ``num_samples`` samples, both of all processes, to the epoch's counts."""
        self.policy_decisions += decisions.round().long()
        self.policy_samples += num_samples.round().long()

    @torch.no_grad()
    def begin_counts(self, epoch: int) -> None:
        """Forget the counts of another epoch than this one."""
        if int(self.policy_epoch) != epoch:
            self.policy_decisions.zero_()
            self.policy_samples.zero_()
            self.policy_epoch.fill_(epoch)


# ---- regions ----


def coordinate_embedding(boxes: Tensor, sizes: Tensor, num_waves: int = _WAVES) -> Tensor:
    """Centre and size of boxes, relative to their image, as waves.

    Args:
        boxes: (..., 4), x1 y1 x2 y2.
        sizes: (..., 2), width and height of the image, in the same unit.
        num_waves: sines a number; as many cosines follow them.

    Returns:
        (..., 4, 2 * num_waves).
    """
    left, top, right, bottom = boxes.unbind(-1)
    width, height = sizes.unbind(-1)
    numbers = (
        (left + right) / (2 * width),
        (top + bottom) / (2 * height),
        (right - left) / width,
        (bottom - top) / height,
    )
    numbers = torch.stack(numbers, dim=-1) * _SCALE
    waves = _BASE ** (torch.arange(num_waves, dtype=numbers.dtype, device=boxes.device) / num_waves)
    angles = numbers[..., None] / waves
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PrecomputedRegions(nn.Module):
    """Region vectors from features that a detector has computed before."""

    def __init__(self, width: int) -> None:
        """``width`` of the vectors."""
        super().__init__()
        self.obj_downsample = nn.Sequential(nn.Dropout(DROPOUT), Linear(2 * FEATURE_SIZE, width), nn.ReLU())

    def forward(self, boxes: Tensor, features: Tensor, sizes: Tensor, mask: Tensor) -> Tensor:
        """(B, K, 4) boxes, (B, K, 2048) features, (B, 2) image sizes, (B, K) mask -> (B, K, width), 0 at padding."""
        where = coordinate_embedding(boxes, sizes[:, None].expand(-1, boxes.shape[1], -1)).flatten(-2)
        vectors = self.obj_downsample(torch.cat([where.to(features.dtype), features], dim=-1))
        return vectors * mask[..., None].to(vectors.dtype)


# ---- classifier ----


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
