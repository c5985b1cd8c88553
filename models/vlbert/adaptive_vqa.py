"""VL-BERT for question answering together with the small network that decides which of its layers or parts are used.

Source: the pair of ``ResNetVLBERT`` and ``PolicyResNetVLBERT`` in the adaptive fork of VL-BERT. One module here, so
that both train in one backward pass, under any parallelism, and travel in one checkpoint; names of the deciding network
begin with ``policy.``, those of the other are the original's.

Departures: no noise outside training, decisions are counted as whole numbers, the counts travel with the weights.

Letters: B batch, A decisions.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.adaptive import decide, sample_policy
from models.errors import ModelError
from models.vlbert.vlbert import VLBertConfig
from models.vlbert.vqa import VLBertForVQA

POLICY = "policy."  # in front of the names of the deciding network
COUNTS = ("policy_decisions", "policy_samples", "policy_epoch")


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
