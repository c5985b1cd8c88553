"""Our VL-BERT against numbers recorded from the originals (float32, CPU, no dropout).

Tolerance: 1e-5 of the largest value forward, 1e-4 for gradients. Gradients of key biases are zero and not compared.
"""

import pytest
import torch

from engine.optim import TransformersAdamW
from models.loading import load_weights
from models.losses import vqa_loss
from models.vlbert.regions import coordinate_embedding
from models.vlbert.vlbert import VisualLinguisticBert
from tests.parity.fixture_files import load_fixture
from tests.parity.vlbert_fixtures import (
    assert_grad_norms,
    assert_grads,
    assert_near,
    transformer_config,
    vqa_model,
)


@pytest.mark.parametrize("name", ["ln", "scale"])
def test_transformer(name):
    recording = load_fixture(f"vlbert_core_{name}.pt")
    config, inputs, outputs = transformer_config(recording["config"]), recording["inputs"], recording["outputs"]
    model = VisualLinguisticBert(config)
    load_weights(model, recording["state_dict"])
    visual, words = inputs["object_vl_embeddings"].split([config.visual_size, config.hidden_size], dim=2)
    found = model(
        inputs["text_input_ids"],
        inputs["text_token_type_ids"],
        inputs["text_visual_embeddings"],
        inputs["text_mask"],
        visual,
        words,
        inputs["object_mask"],
    )
    assert_near(found.packed, outputs["embedding"], "embedding")
    for layer, expected in zip(found.layers, outputs["all_layers"], strict=True):
        assert_near(layer, expected, "layers")
    assert_near(found.text, outputs["text_out"], "text")
    assert_near(found.regions, outputs["object_out"], "regions")
    assert_near(found.pooled, outputs["pooled"], "pooled")
    loss = (found.text * inputs["w_text"]).sum() + (found.regions * inputs["w_object"]).sum()
    loss = loss + (found.pooled * inputs["w_pooled"]).sum()
    assert_near(loss, recording["loss"], "loss")
    loss.backward()
    assert_grads(model, recording["grads"])


def test_coordinate_embedding():
    recording = load_fixture("vlbert_coords.pt")
    boxes = recording["inputs"]["boxes"]
    for name, expected in recording["outputs"].items():
        found = coordinate_embedding(boxes[:, :4], boxes[:, 4:], expected.shape[-1] // 2)
        assert (found - expected).abs().max() <= 2e-4, name  # angles of up to 100: the last bits of a float32 sine


@pytest.mark.parametrize("head", ["mlm", "2fc", "1fc"])
def test_question_answering_on_precomputed_features(head):
    recording = load_fixture(f"vlbert_vqa_prec_{head}.pt")
    config, inputs, outputs = recording["config"], recording["inputs"], recording["outputs"]
    model = vqa_model(config, recording["state_dict"], "VLBERT", config["ANSWER_VOCAB_SIZE"])
    logits = model(inputs["boxes"], inputs["im_info"], inputs["question"])
    assert_near(logits, outputs["label_logits"], "logits")
    loss = vqa_loss(logits, inputs["label"])
    assert_near(loss, outputs["ans_loss"], "loss")
    score = inputs["label"].gather(1, logits.argmax(dim=1, keepdim=True)).mean()
    assert score.item() == pytest.approx(outputs["soft_acc"])
    loss.backward()
    assert_grads(model, {name: value for name, value in recording["grads"].items() if not name.endswith("key.bias")})
    norms = {name: value for name, value in recording["grad_norms"].items() if not name.endswith("key.bias")}
    assert_grad_norms(model, norms)


def test_four_training_steps():
    """Schedule, clip, then the optimizer, as the original orders them."""
    recording = load_fixture("vlbert_vqa_prec_mlm.pt")
    config, inputs, train = recording["config"], recording["inputs"], recording["train4"]
    model = vqa_model(config, recording["state_dict"], "VLBERT", config["ANSWER_VOCAB_SIZE"])
    groups = [{"params": list(model.parameters()), "weight_decay": train["weight_decay"]}]
    optimizer = TransformersAdamW(groups, lr=train["base_lr"], betas=(0.9, 0.999), eps=1e-6)
    for step, (loss_there, rate, norm) in enumerate(
        zip(train["losses"], train["lrs"], train["total_norms"], strict=True), start=1
    ):
        warmup, total = train["warmup_steps"], train["t_total"]
        factor = step / warmup if step < warmup else max(0.0, (total - step) / max(1, total - warmup))
        optimizer.param_groups[0]["lr"] = train["base_lr"] * factor
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)
        optimizer.zero_grad()
        loss = vqa_loss(model(inputs["boxes"], inputs["im_info"], inputs["question"]), inputs["label"])
        assert loss.item() == pytest.approx(loss_there, rel=1e-4)
        loss.backward()
        found = torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip_grad_norm"])
        assert found.item() == pytest.approx(norm, rel=1e-3)
        optimizer.step()
    parameters = dict(model.named_parameters())
    for name, expected in train["after"].items():
        if not name.endswith("key.bias"):
            assert_near(parameters[name].detach(), expected, name, share=1e-3)
