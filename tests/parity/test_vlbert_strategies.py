"""The fine-tuning strategies against recorded numbers, as published (reference) and corrected."""

import pytest
import torch

from models.adaptive import constrain_k_loss, deterministic_policy_loss, sample_policy
from models.loading import load_weights
from models.losses import vqa_loss
from models.vlbert.vlbert import COPY, Encoder
from tests.parity.fixture_files import load_fixture
from tests.parity.vlbert_fixtures import (
    ROUNDED_FORWARD,
    ROUNDED_GRADIENT,
    assert_grad_norms,
    assert_grads,
    assert_near,
    clear,
    encoder_config,
    vqa_model,
)

PLAIN = ("standard", "pretrained_frozen", "last_k", "specific_k")
ADAPTIVE = ("spottune", "spottune_block", "blockdrop")


def encoder(recording, *, reference=False) -> Encoder:
    config = recording["config"]
    more = {"frozen_layers": tuple(config["FROZEN_LAYERS"]), "reference_behaviour": reference}
    return Encoder(encoder_config(config, config["finetune_strategy"], **more))


@pytest.mark.parametrize("name", PLAIN)
def test_the_recorded_parameters_are_frozen(name):
    recording = load_fixture(f"vlbert_encoder_{name}.pt")
    trains = {name: parameter.requires_grad for name, parameter in encoder(recording).named_parameters()}
    assert sorted(name for name, value in trains.items() if value) == sorted(recording["trainable"])
    assert sorted(name for name, value in trains.items() if not value) == sorted(recording["frozen"])


@pytest.mark.parametrize("behaviour", ["reference", "corrected"])
@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_encoder_under_a_policy(name, kind, behaviour):
    recording = load_fixture(f"vlbert_encoder_{name}.pt")
    if f"outputs_{behaviour}" not in recording:
        behaviour_key = "outputs_reference"  # both are the same arithmetic
    else:
        behaviour_key = f"outputs_{behaviour}"
    expected, inputs = recording[behaviour_key][kind], recording["inputs"]
    model = encoder(recording, reference=behaviour == "reference")
    load_weights(model, recording["state_dict"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == set(recording["trainable"])
    tokens = inputs["hidden_states"].clone().requires_grad_()
    policy = inputs[f"policy_{kind}"].clone().requires_grad_()
    layers = model(tokens, inputs["mask"][:, None, None, :].bool(), policy)
    for found, there in zip(layers, expected["all_layers"], strict=True):
        assert_near(found, there, "layers")
    loss = (layers[-1] * inputs["w"]).sum()
    assert_near(loss, expected["loss"], "loss")
    loss.backward()
    assert_near(tokens.grad, expected["grad_hidden_states"], "tokens", share=1e-4)
    assert_near(policy.grad, expected["grad_policy"], "policy", share=1e-4)
    assert_grads(model, expected["grads"])
    norms = {key: value for key, value in expected["grad_norms"].items() if not key.endswith("key.bias")}
    assert_grad_norms(model, norms)
    if kind == "hard" and behaviour == "corrected":
        with torch.no_grad():  # what is not needed is skipped, and the outputs stay
            skipped = model(tokens, inputs["mask"][:, None, None, :].bool(), policy)
        assert_near(skipped[-1], expected["all_layers"][-1], "skipped")


def test_sampling_and_auxiliary_losses():
    recording = load_fixture("vlbert_gumbel.pt")
    config, inputs, outputs = recording["config"], recording["inputs"], recording["outputs"]
    logits = inputs["logits"].clone().requires_grad_()
    policy = sample_policy(logits, inputs["U"], temperature=config["temperature"])
    assert_near(policy, outputs["policy"], "policy")
    loss_k = constrain_k_loss(policy, config["k"], config["k_scale"])
    loss_d = deterministic_policy_loss(policy, config["d_scale"])
    assert_near(loss_k, outputs["loss_k"], "constrain k")
    assert_near(loss_d, outputs["loss_d"], "deterministic")
    ((policy * inputs["w"]).sum() + loss_k + loss_d).backward()
    assert_near(logits.grad, recording["grads"]["logits"], "logits", share=1e-4)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_policy_and_model_together(name):
    recording = load_fixture(f"vlbert_joint_{name}.pt")
    config, inputs, outputs = recording["config"], recording["inputs"], recording["outputs"]
    more = {"strategy": config["FINETUNE_STRATEGY"], "reference_behaviour": True}
    model = vqa_model(config, recording["state_dict"], "VLBERT", config["ANSWER_VOCAB_SIZE"], **more)
    decider = vqa_model(config, recording["policy_state_dict"], "POLICY_VLBERT", config["POLICY_OUTPUT_SIZE"])
    batch = inputs["boxes"], inputs["im_info"], inputs["question"]
    logits = decider(*batch)
    assert_near(logits, outputs["policy_logits"], "policy logits", share=ROUNDED_FORWARD)
    policy = sample_policy(logits, inputs["U"], temperature=config["temperature"])
    assert_near(policy, outputs["policy"], "policy", share=ROUNDED_FORWARD)
    answers = model(*batch, policy)
    assert_near(answers, outputs["label_logits"], "answers", share=ROUNDED_FORWARD)
    loss_k = constrain_k_loss(policy, config["CONSTRAIN_K_NUM_BLOCKS"], config["CONSTRAIN_K_SCALE"])
    loss_d = deterministic_policy_loss(policy, config["DETERMINISTIC_POLICY_SCALE"])
    assert_near(loss_k, outputs["loss_k"], "constrain k", share=ROUNDED_FORWARD)
    assert_near(loss_d, outputs["loss_d"], "deterministic", share=ROUNDED_FORWARD)
    loss = vqa_loss(answers, inputs["label"]) + loss_k + loss_d
    loss.backward()
    for found, grads, norms in (
        (model, recording["grads"], recording["grad_norms"]),
        (decider, recording["policy_grads"], recording["policy_grad_norms"]),
    ):
        assert_grads(
            found, {key: value for key, value in grads.items() if not key.endswith("key.bias")}, share=ROUNDED_GRADIENT
        )
        assert_grad_norms(
            found, {key: value for key, value in norms.items() if not key.endswith("key.bias")}, share=ROUNDED_GRADIENT
        )
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == set(recording["frozen"])
    assert all(COPY in key for key in frozen)
    clear(model)
    decisions = (inputs["global_decisions"] / inputs["global_total"] > 0.5).float()
    assert torch.equal(decisions, outputs["global_policy"])
    with torch.no_grad():
        found = model(*batch, decisions.expand(len(answers), -1))
    assert_near(found, outputs["global_label_logits"], "global", share=ROUNDED_FORWARD)
