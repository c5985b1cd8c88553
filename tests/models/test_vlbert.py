"""VL-BERT's modules: packing, heads, loading, what is refused."""

from dataclasses import replace

import pytest
import torch

from models.errors import ModelError
from models.vlbert.fast_rcnn import FastRCNN, FastRCNNConfig, blocks_of, without_aliases
from models.vlbert.loading import classifier_from_words, load_bert, load_pretrained
from models.vlbert.vlbert import EncoderConfig, VLBertConfig
from models.vlbert.vqa import COUNTS, AdaptiveVQA, SpecialIds, VLBertForVQA

ENCODER = EncoderConfig(
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=3,
    intermediate_size=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
IDS = SpecialIds(cls=1, sep=2, mask=3)


def small(**more: object) -> VLBertForVQA:
    torch.manual_seed(0)
    config = VLBertConfig(encoder=ENCODER, visual_size=12, vocab_size=30, max_position_embeddings=40)
    return VLBertForVQA(config, 5, special_ids=IDS, **more)


def batch(num_regions: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    boxes = torch.rand(2, num_regions, 4 + 2048)
    return boxes, torch.tensor([[100.0, 80.0], [60.0, 90.0]]), torch.tensor([[7, 8, 9], [7, 0, 0]])


def test_padding_of_words_and_regions_changes_no_answer():
    model = small().eval()
    torch.nn.init.ones_(model.vlbert.visual_ln_text.weight)
    torch.nn.init.ones_(model.vlbert.visual_ln_object.weight)
    boxes, sizes, question = batch()
    boxes[1, 2] = -2
    both = model(boxes, sizes, question)
    alone = model(boxes[1:, :2], sizes[1:], question[1:, :1])
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_at_the_start_the_visual_input_is_silent():
    model = small().eval()
    boxes, sizes, question = batch()
    torch.testing.assert_close(model(boxes, sizes, question), model(torch.rand_like(boxes), sizes, question))


def test_regions_of_a_wrong_width_and_questions_without_a_region_are_refused():
    boxes, sizes, question = batch()
    with pytest.raises(ModelError, match=r"regions of 104 numbers, the model takes 4 \+ 2048"):
        small()(boxes[..., :104], sizes, question)
    with pytest.raises(ModelError, match="a question without any region"):
        small()(torch.full_like(boxes, -2), sizes, question)
    with pytest.raises(ModelError, match="unknown classifier '3fc': choose mlm, 2fc, 1fc"):
        small(classifier="3fc")


def test_files_that_do_not_fit_are_refused():
    model = small()
    with pytest.raises(ModelError, match="BERT's weights lack encoder.layer.0.attention.self.query.weight"):
        load_bert(model, {"bert.pooler.dense.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match="none of the 1 weights, such as x, is VL-BERT's"):
        load_pretrained(model, {"x": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"end_embedding.weight is \(1, 3\), the model's \(1, 12\)"):
        load_pretrained(model, {"vlbert.end_embedding.weight": torch.zeros(1, 3)})
    with pytest.raises(ModelError, match="'a to b' must be of the form old->new"):
        load_pretrained(model, {}, ["a to b"])
    with pytest.raises(ModelError, match="2 answers for a classifier of 5 rows"):
        classifier_from_words(model, [[1], [2]])
    with pytest.raises(ModelError, match="answer 3 has no word piece"):
        classifier_from_words(model, [[1], [2], [3], [], [4]])


def test_the_head_of_the_image_path_may_stand_under_either_name():
    config = FastRCNNConfig(blocks=(1, 1, 1, 1), stem_width=2)
    state = {f"image_feature_extractor.{n}": v for n, v in FastRCNN(4, config).state_dict().items()}
    name, alias = "image_feature_extractor.roi_head_feature_extractor.", "image_feature_extractor.head.0."
    alias_only = {n.replace(name, alias): v for n, v in state.items()}
    assert alias_only.keys() != state.keys()
    for given in (alias_only, state | alias_only):
        assert without_aliases(given).keys() == state.keys()
    with pytest.raises(ModelError, match="a ResNet of 34 layers is not offered"):
        blocks_of(34)
    with pytest.raises(ModelError, match="frozen stages are numbered 1 to 5"):
        FastRCNN(4, FastRCNNConfig(blocks=(1, 1, 1, 1), stem_width=2, frozen_stages=(0,)))


def test_frozen_batch_norms_keep_their_statistics_in_training():
    model = FastRCNN(4, FastRCNNConfig(blocks=(1, 1, 1, 1), stem_width=2)).train()
    before = model.backbone.bn1.running_mean.clone()
    boxes = torch.tensor([[[0.0, 0.0, 40.0, 30.0]]])
    model(torch.randn(1, 3, 64, 64), boxes, torch.tensor([[64.0, 64.0]]), torch.ones(1, 1, dtype=torch.bool))
    assert torch.equal(model.backbone.bn1.running_mean, before)


# ---- network and policy in one ----


def adaptive(strategy: str = "BlockDrop", outputs: int = 2, **more: object) -> AdaptiveVQA:
    torch.manual_seed(0)
    encoder = replace(ENCODER, strategy=strategy)
    config = VLBertConfig(encoder=encoder, visual_size=12, vocab_size=30, max_position_embeddings=40)
    policy = VLBertForVQA(replace(config, encoder=ENCODER), outputs, special_ids=IDS)
    return AdaptiveVQA(config, 5, policy=policy, special_ids=IDS, **more)


def test_names_of_the_network_are_the_originals_and_the_policys_stand_behind_a_prefix():
    names = set(adaptive().state_dict())
    own = {name for name in names if not name.startswith("policy")}
    assert own == set(small().state_dict())
    assert {name.removeprefix("policy.") for name in names if name.startswith("policy.")} == own
    assert names - own - {n for n in names if n.startswith("policy.")} == set(COUNTS)


def test_training_draws_decisions_and_everything_else_takes_the_most_probable_ones():
    model = adaptive("SpotTune", outputs=2 * 6)
    found = {model.train()(*batch()).decisions.sum().item() for _ in range(20)}
    assert len(found) > 1
    assert {model.eval()(*batch()).decisions.sum().item() for _ in range(3)} <= {0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0}
    first, second = (model.eval()(*batch()) for _ in range(2))
    assert first.decisions.shape == (2, 6)
    boxes = batch()
    assert torch.equal(model(*boxes).logits, model(*boxes).logits)


def test_counts_say_what_most_samples_chose_and_begin_anew_with_an_epoch():
    model = adaptive(global_decision=True).eval()
    with pytest.raises(ModelError, match="a global decision needs the counts of a training epoch"):
        model(*batch())
    model.begin_counts(0)
    model.count(torch.tensor([3.0]), torch.tensor(4.0))
    assert model.most_used().tolist() == [1.0]
    assert model(*batch()).decisions.tolist() == [[1.0], [1.0]]
    model.begin_counts(0)
    model.count(torch.tensor([0.0]), torch.tensor(2.0))
    assert model.most_used().tolist() == [0.0]  # three of six are no majority
    model.begin_counts(1)
    assert (model.policy_decisions.tolist(), int(model.policy_samples), int(model.policy_epoch)) == ([0], 0, 1)


def test_a_policy_that_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="a policy of 4 outputs, 1 decisions take 2"):
        adaptive(outputs=4)
    with pytest.raises(ModelError, match="strategy standard takes no policy"):
        adaptive("standard")
    config = VLBertConfig(encoder=replace(ENCODER, strategy="BlockDrop"), visual_size=12)
    with pytest.raises(ModelError, match="strategy BlockDrop needs a policy network"):
        AdaptiveVQA(config, 5)


@pytest.mark.parametrize("grounding", [True, False])
def test_words_see_the_image_unless_they_must_not(grounding):
    model = small(grounding=grounding)
    torch.nn.init.ones_(model.vlbert.visual_ln_text.weight)
    model(*batch()).sum().backward()
    assert bool(model.vlbert.visual_ln_text.weight.grad.abs().sum() > 0) == grounding


def test_a_pooler_that_nobody_asks_waits_for_no_gradient():
    config = VLBertConfig(encoder=ENCODER, visual_size=12, vocab_size=30, with_pooler=True)
    model = VLBertForVQA(config, 5, special_ids=IDS)
    model(*batch()).sum().backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_padding_beyond_the_position_table_does_no_harm():
    """Regions share a position, so more of them than positions are fine, also beside a sample with few."""
    model = small().eval()
    boxes, sizes, question = batch(num_regions=60)
    boxes[1, 3:] = -2
    together = model(boxes, sizes, question)
    alone = model(boxes[1:, :3], sizes[1:], question[1:])
    assert torch.allclose(together[1:], alone, atol=1e-5)
