"""Adaptive fine-tuning: what moves, what gradients reach, what is skipped, what is refused."""

import pytest
import torch
from torch.testing import assert_close

from models.adaptive import (
    constrain_k_loss,
    decide,
    deterministic_policy_loss,
    frozen_layers,
    num_decisions,
    run_block_drop,
    sample_policy,
)
from models.errors import ModelError
from models.vlbert.vlbert import COPY, Encoder, EncoderConfig

SIZES = {"hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 16}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ADAPTIVE = ("SpotTune", "SpotTune_Block", "BlockDrop")


def encoder(strategy: str, **more: object) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**SIZES, **QUIET, strategy=strategy, **more))


def three_steps(model: Encoder, policy: torch.Tensor | None = None) -> set[str]:
    """Names of the parameters that moved."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(torch.randn(5, 6, 12), None, policy)[-1]
        (out * torch.randn_like(out)).sum().backward()
        optimizer.step()
    return {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(
    ("strategy", "listed", "frozen"),
    [
        ("standard", (), set()),
        ("pretrained_frozen", (), {0, 1, 2, 3}),
        ("last_1", (), {0, 1, 2}),
        ("last_4", (), set()),
        ("specific_k", (1, 2), {1, 2}),
    ],
)
def test_exactly_the_layers_that_are_not_frozen_move(strategy, listed, frozen):
    if strategy == "pretrained_frozen":
        assert not any(parameter.requires_grad for parameter in encoder(strategy).parameters())
        return
    model = encoder(strategy, frozen_layers=listed)
    moved = {int(name.split(".")[1]) for name in three_steps(model)}
    assert moved == set(range(4)) - frozen


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_frozen_copies_stay_where_they_are_share_no_memory_and_the_rest_moves(strategy):
    model = encoder(strategy)
    copies = {name for name, _ in model.named_parameters() if COPY in name}
    parameters = dict(model.named_parameters())
    assert all(parameters[n].data_ptr() != parameters[n.replace(COPY, "")].data_ptr() for n in copies)
    policy = torch.rand(5, model.config.num_decisions)
    moved = three_steps(model, policy)
    assert moved & copies == set()
    # the gradient of a key's bias is zero
    assert {n for n in parameters.keys() - copies - moved if not n.endswith("key.bias")} == set()


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_the_gradient_reaches_every_decision_of_every_sample(strategy):
    model = encoder(strategy)
    with torch.no_grad():  # with equal branches a choice makes no difference
        for name, parameter in model.named_parameters():
            if COPY in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    logits = torch.randn(5, 2 * model.config.num_decisions, requires_grad=True)
    out = model(torch.randn(5, 6, 12), None, sample_policy(logits))[-1]
    (out * torch.randn_like(out)).sum().backward()
    assert (logits.grad != 0).all()


@pytest.mark.parametrize("strategy", ["SpotTune_Block", "BlockDrop"])
def test_what_is_not_chosen_is_not_computed_and_the_outputs_are_the_same(strategy):
    model, tokens = encoder(strategy).eval(), torch.randn(6, 7, 12)
    mask = torch.rand(6, 1, 1, 7) < 0.8
    mask[..., 0] = True
    policy = torch.rand(6, 4).round()
    policy[:, 1] = 0.0
    expected = model(tokens, mask, policy)
    rows = []
    for layer in (*model.layer, *getattr(model, "parallel_layer", ())):
        layer.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.no_grad():
        found = model(tokens, mask, policy)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=1e-6, rtol=0)
    assert sum(rows) == (24 if strategy == "SpotTune_Block" else int(policy.sum()))


def test_a_dropped_block_is_the_identity():
    tokens = torch.randn(2, 3, 4)
    policy = torch.tensor([[1.0], [0.0]])
    (found,) = run_block_drop([lambda x, mask: x + 1], tokens, None, policy)
    assert torch.equal(found, tokens + policy[:, :, None])


def test_decisions_are_drawn_with_their_probability_and_taken_without_noise_on_request():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, 0.0, -2.0]]).repeat(20000, 1)
    share = sample_policy(logits).mean(dim=0)
    assert_close(share, torch.sigmoid(torch.tensor([1.0, -2.0])), atol=0.015, rtol=0)
    assert torch.equal(decide(logits[:1]), torch.tensor([[1.0, 0.0]]))


def test_auxiliary_losses_are_zero_where_they_should_be():
    policy = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    assert constrain_k_loss(policy, 2).item() == pytest.approx(0)
    assert constrain_k_loss(policy, 4, scale=3).item() == pytest.approx(12)
    assert deterministic_policy_loss(policy).item() == pytest.approx(0, abs=1e-6)
    assert deterministic_policy_loss(policy * torch.tensor([[1.0], [0.0]])).item() > 0.5


@pytest.mark.parametrize(
    ("strategy", "listed", "message"),
    [
        ("last_9", (), "the encoder has 4 layers, train 1 to 4"),
        ("last_0", (), "the encoder has 4 layers, train 1 to 4"),
        ("specific_k", (), r"from 0 to 3: got \[\]"),
        ("specific_k", (1, 4), "there is no layer 4"),
        ("spottune", (), "unknown strategy 'spottune': choose standard"),
    ],
)
def test_strategies_that_cannot_be_are_refused(strategy, listed, message):
    with pytest.raises(ModelError, match=message):
        frozen_layers(strategy, 4, listed)


def test_a_policy_of_the_wrong_size_or_none_where_one_is_needed_is_refused():
    assert num_decisions("SpotTune", 4, 3) == 24
    tokens = torch.randn(2, 3, 12)
    with pytest.raises(ModelError, match=r"a policy of shape \(2, 5\), the encoder takes \(batch, 4\)"):
        encoder("BlockDrop")(tokens, None, torch.ones(2, 5))
    with pytest.raises(ModelError, match="a policy of 20 decisions, the encoder takes 24"):
        encoder("SpotTune")(tokens, None, torch.ones(2, 20))
    with pytest.raises(ModelError, match="strategy BlockDrop needs a policy of 4 decisions"):
        encoder("BlockDrop")(tokens)
    with pytest.raises(ModelError, match="strategy standard takes no policy"):
        encoder("standard")(tokens, None, torch.ones(2, 4))


# ---- what a decision of 0 and 1 saves ----


def with_other_copies(strategy: str) -> Encoder:
    """Trained and frozen branch differ."""
    model = encoder(strategy)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if COPY in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("kind", ["mixed", "all", "none"])
@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_running_the_chosen_branch_alone_gives_the_plain_arithmetics_values_and_gradients(strategy, kind):
    """The plain arithmetic computes both branches and multiplies; a decision of nearly 0 or 1 takes that way."""
    model = with_other_copies(strategy)
    chosen = torch.rand(5, model.config.num_decisions).round()
    if kind != "mixed":
        chosen.fill_(float(kind == "all"))
    tokens, mask = torch.randn(5, 6, 12), torch.ones(5, 1, 1, 6, dtype=torch.bool)
    mask[0, :, :, 4:] = False
    weight = torch.randn(5, 6, 12)
    found = []
    for nudge in (0.0, 1e-6):
        x = tokens.clone().requires_grad_()
        policy = (chosen * (1 - 2 * nudge) + nudge).requires_grad_()
        model.zero_grad()
        out = model(x, mask, policy)[-1]
        (out * weight).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        found.append((out.detach(), x.grad, policy.grad, grads))
    for one, other in zip(found[0][:3], found[1][:3], strict=True):
        assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert found[0][3].keys() == found[1][3].keys()  # also where no sample chose a branch: zeros, not nothing
    for name, one in found[0][3].items():
        assert_close(one, found[1][3][name], atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_without_gradients_each_sample_goes_through_its_branch_alone(strategy, monkeypatch):
    model = with_other_copies(strategy)
    chosen = torch.tensor([[1.0], [0.0], [1.0]]).expand(-1, model.config.num_decisions)
    rows = []
    narrow = type(model.layer[0]).narrow

    def counted(self: object, wide: torch.Tensor, tokens: torch.Tensor, *, frozen: bool) -> torch.Tensor:
        rows.append(len(wide))
        return narrow(self, wide, tokens, frozen=frozen)

    monkeypatch.setattr(type(model.layer[0]), "narrow", counted)
    tokens = torch.randn(3, 6, 12)
    with torch.no_grad():
        fast = model(tokens, None, chosen)[-1]
    assert sum(rows) == (2 if strategy == "BlockDrop" else 3) * SIZES["num_hidden_layers"]
    plain = model(tokens, None, chosen * (1 - 2e-7) + 1e-7)[-1]
    assert_close(fast, plain.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_in_training_only_the_chosen_branch_keeps_a_graph(strategy, monkeypatch):
    model = with_other_copies(strategy)
    kept = []
    narrow = type(model.layer[0]).narrow

    def counted(self: object, wide: torch.Tensor, tokens: torch.Tensor, *, frozen: bool) -> torch.Tensor:
        kept.append(len(wide) if torch.is_grad_enabled() else 0)
        return narrow(self, wide, tokens, frozen=frozen)

    monkeypatch.setattr(type(model.layer[0]), "narrow", counted)
    chosen = torch.zeros(4, model.config.num_decisions)
    chosen[:1] = 1.0
    model(torch.randn(4, 6, 12), None, chosen.requires_grad_())
    assert sum(kept) == (1 if strategy == "BlockDrop" else 4) * SIZES["num_hidden_layers"]


def test_drawn_decisions_are_exactly_0_or_1():
    drawn = sample_policy(torch.randn(64, 40), temperature=0.3)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
