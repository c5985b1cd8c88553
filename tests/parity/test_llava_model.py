"""LLaVA's parts against recorded numbers: tower, projector, decoder, splice, adapters, generation.

Measured: forward at most 3e-6, gradients at most 1e-5 of the largest value; ids equal.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from models.clip_vision import CLIPVisionConfig, CLIPVisionTransformer
from models.linear import Linear
from models.llava.config import LlamaConfig
from models.llava.generation import Decoding, beam_search, generate, warped
from models.llava.llama import Cache, LlamaModel, next_word_loss
from models.llava.llava import LlavaForCausalLM, build_projector
from models.loading import load_weights
from models.lora import LoRAConfig, adapter_state, add_adapters, load_adapters, merge_adapters, plain_names
from tests.parity.fixture_files import load_fixture
from tests.parity.llava_fixtures import LAST_OF_TOWER, llava_model

FORWARD, GRADIENT = 1e-5, 1e-4  # of the largest absolute value


def assert_near(found: Tensor, expected: Tensor, what: str = "", *, share: float = FORWARD) -> None:
    assert found.shape == expected.shape, what
    largest = max(expected.abs().max().item(), 1e-6)
    assert (found - expected).abs().max().item() <= share * largest, what


def assert_grads(model: nn.Module, recorded: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, expected in recorded.items():
        if name.endswith("k_proj.bias"):  # in truth zero: a softmax does not see what it adds
            assert parameters[name].grad.abs().max() < 1e-7
        else:
            assert_near(parameters[name].grad, expected, name, share=GRADIENT)


# ---- tower and projector ----


def test_tower():
    recording = load_fixture("llava_clip_vision.pt")
    config = CLIPVisionConfig.from_dict(recording["config"])
    tower = CLIPVisionTransformer(config)
    state = {name.removeprefix("vision_model."): value for name, value in recording["state_dict"].items()}
    load_weights(tower, state)
    pixels, outputs = recording["inputs"]["pixel_values"], recording["outputs"]
    states = tower.hidden_states(pixels)
    for found, expected in zip(states, outputs["hidden_states"], strict=True):
        assert_near(found, expected)
    assert_near(states[-2][:, 1:], outputs["llava_patch_select_-2"])
    assert_near(states[-2], outputs["llava_cls_patch_select_-2"])
    assert_near(states[-1][:, 1:], outputs["llava_patch_select_-1"])
    loss = (states[-2][:, 1:] * recording["inputs"]["loss_weight"]).mean()
    loss.backward()
    assert_near(loss.detach(), recording["loss"])
    assert_grads(tower, {n.removeprefix("vision_model."): g for n, g in recording["grads"].items()})
    without = {f"vision_model.{name}" for name, parameter in tower.named_parameters() if parameter.grad is None}
    assert without == set(recording["params_without_grad"])


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_projector(kind):
    recording = load_fixture("llava_projector.pt")
    config, expected = recording["config"], recording["outputs"][kind]
    width = config["mm_hidden_size"] if kind == "identity" else config["hidden_size"]
    projector = build_projector(kind, config["mm_hidden_size"], width)
    load_weights(projector, expected["state_dict"])
    out = projector(recording["inputs"]["x"])
    assert_near(out.detach(), expected["output"])
    if kind != "identity":
        (out * expected["loss_weight"]).sum().backward()
        assert_grads(projector, expected["grads"])


# ---- decoder ----


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, ids: Tensor, **more: Any) -> Tensor:
        return self.lm_head(self.model.decode(self.model.embed_tokens(ids), **more).tokens)


def decoder(recording: dict[str, Any], **changes: Any) -> Decoder:
    model = Decoder(LlamaConfig.from_dict(recording["config"] | changes))
    state = dict(recording["state_dict"])
    if changes.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    load_weights(model, state)
    return model


def test_decoder_layer_by_layer():
    recording = load_fixture("llava_llama.pt")
    model, inputs, outputs = decoder(recording), recording["inputs"], recording["outputs"]
    decoded = model.model.decode(model.model.embed_tokens(inputs["input_ids"]), keep_layers=True)
    for found, expected in zip(decoded.layers, outputs["hidden_states"], strict=True):
        assert_near(found, expected)
    assert_near(model.lm_head(decoded.tokens), outputs["logits"])


@pytest.mark.parametrize("with_mask", [True, False])
def test_decoder_with_padding_at_the_right_with_and_without_a_mask(with_mask):
    recording = load_fixture("llava_llama.pt")
    model, inputs = decoder(recording), recording["inputs"]
    mask = inputs["attention_mask_right"].bool()
    found = model(inputs["input_ids_right"], mask=mask if with_mask else None)
    assert_near(found[mask], recording["outputs"]["logits_right_padded"][mask])
    hidden = model.model.decode(model.model.embed_tokens(inputs["input_ids_right"])).tokens
    for chunk in (3, 1024):
        model.zero_grad()
        loss = next_word_loss(hidden[:, :-1], model.lm_head, inputs["labels_right"][:, 1:], chunk=chunk)
        loss.backward(retain_graph=True)
        assert_near(loss.detach(), recording["loss"])
        assert_grads(model, recording["grads"])


def test_decoder_with_padding_at_the_left():
    recording = load_fixture("llava_llama.pt")
    model, inputs = decoder(recording), recording["inputs"]
    mask = inputs["attention_mask_left"].bool()
    found = model(inputs["input_ids_left"], mask=mask, positions=inputs["position_ids_left"])
    assert_near(found[mask], recording["outputs"]["logits_left_padded"][mask])


def test_cache():
    recording = load_fixture("llava_llama.pt")
    model, outputs = decoder(recording), recording["outputs"]
    ids = recording["inputs"]["input_ids"]
    prefix = outputs["cache_prefill_logits"].shape[1]
    cache = Cache(model.model.config, len(ids), ids.shape[1], model.lm_head.weight)
    with torch.no_grad():
        assert_near(model(ids[:, :prefix], cache=cache), outputs["cache_prefill_logits"])
        assert_near(cache.keys[0, :, :, :prefix], outputs["prefill_keys_layer0"])
        assert_near(cache.values[0, :, :, :prefix], outputs["prefill_values_layer0"])
        for step in range(ids.shape[1] - prefix):
            found = model(ids[:, prefix + step : prefix + step + 1], cache=cache)
            assert_near(found[:, 0], outputs["cache_step_logits"][:, step])


def test_scaled_positions_and_tied_embeddings():
    recording = load_fixture("llava_llama.pt")
    ids, outputs = recording["inputs"]["input_ids"], recording["outputs"]
    scaled = decoder(recording, rope_scaling={"type": "linear", "factor": 4.0})
    assert_near(scaled(ids), outputs["rope_scaling_linear_4_logits"])
    assert_near(decoder(recording, tie_word_embeddings=True)(ids), outputs["tied_embeddings_logits"])


# ---- images in text ----


@pytest.fixture(scope="module")
def multimodal() -> tuple[dict[str, Any], LlavaForCausalLM]:
    recording = load_fixture("llava_multimodal.pt")
    return recording, llava_model(recording["config"], recording["state_dict"])


def test_features(multimodal):
    recording, model = multimodal
    features = model.tower_features(recording["inputs"]["pixel_values"])
    assert_near(features, recording["outputs"]["tower_features"])
    assert_near(model.image_vectors(features), recording["outputs"]["image_features"])


CASES = ["right", "left", "right_truncated", "right_truncated_away", "two_images_in_one_sample", "no_mask_no_labels"]


@pytest.mark.parametrize("case", CASES)
def test_joined_sequences_logits_and_loss(multimodal, case):
    recording, model = multimodal
    inputs, expected = recording["inputs"], recording["outputs"]["cases"][case]
    ids, mask, labels = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
    pixels, changes = inputs["pixel_values"], {"padding_side": "left" if case == "left" else "right"}
    if case.startswith("right_truncated"):
        changes["max_length"] = expected["inputs_embeds"].shape[1]
        if expected["inputs_embeds"].shape[0] == 1:
            ids, mask, labels, pixels = (value[:1] for value in (ids, mask, labels, pixels))
    elif case == "two_images_in_one_sample":
        ids, labels = inputs["two_images_input_ids"], inputs["two_images_labels"]
        pixels, mask = inputs["two_images_pixel_values"], ids != 0
    elif case == "no_mask_no_labels":
        count = expected["inputs_embeds"].shape[0]
        ids, pixels, mask, labels = ids[:count], pixels[:count], None, None
        length = expected["inputs_embeds"].shape[1] - (recording["outputs"]["image_features"].shape[1] - 1)
        ids = ids[:, :length]
    model.config = replace(model.config, **{"max_length": recording["config"]["tokenizer_model_max_length"], **changes})
    model.zero_grad()
    scored = model(ids, pixels, mask=mask, labels=labels, with_logits=True)
    real = scored.joined.mask
    assert_near(scored.joined.embeds[real], expected["inputs_embeds"][real])
    assert_near(scored.logits[real], expected["logits"][real])
    if expected["attention_mask"] is not None:
        assert torch.equal(real, expected["attention_mask"])
    if labels is not None:
        assert torch.equal(scored.joined.labels, expected["labels"])
        assert_close(scored.loss, expected["loss"], rtol=FORWARD, atol=0, equal_nan=True)
    if labels is not None and scored.loss.isfinite():
        packed = model(ids, pixels, mask=mask, labels=labels)
        assert packed.logits is None
        assert_close(packed.loss, expected["loss"], rtol=FORWARD, atol=0)
    if case == "right":
        for loss in (scored.loss, packed.loss):
            model.zero_grad()
            loss.backward()
            assert_near(loss.detach(), recording["loss"])
            assert_grads(model, recording["grads"])


# ---- adapters ----


def test_joining_reads_the_ids_once_and_waits_for_the_device_nowhere_else(multimodal):
    recording, model = multimodal
    inputs, waits = recording["inputs"], []
    asks = {
        *(torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default),
        *(torch.ops.aten.masked_select.default, torch.ops.aten.equal.default),
    }

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            by_mask = func is torch.ops.aten.index.Tensor and any(i.dtype == torch.bool for i in args[1])
            if func in asks or by_mask:
                waits.append(func)
            return func(*args, **kwargs or {})

    features = model.tower_features(inputs["pixel_values"])
    assert features.shape[1] == model.image_rows
    with Watch():
        rows = model.rows(
            inputs["input_ids"], features=features, mask=inputs["attention_mask"], labels=inputs["labels"]
        )
    assert len(rows.embeds) == len(inputs["input_ids"])
    assert waits == []


def adapted(recording: dict[str, Any]) -> LlavaForCausalLM:
    model = llava_model(recording["config"], recording["state_dict"])
    config = LoRAConfig.from_dict(json.loads(recording["inputs"]["adapter_config"]))
    model.requires_grad_(False)
    add_adapters(model.model.layers, config)
    model.model.mm_projector.requires_grad_(True)
    load_adapters(model, plain_names(recording["inputs"]["adapter"]))
    prefix = "base_model.model."
    rest = {name.removeprefix(prefix): v for name, v in recording["inputs"]["non_lora_trainables"].items()}
    load_weights(model, rest, may_miss=("*",))
    return model


def test_adapter():
    recording = load_fixture("llava_lora.pt")
    model, inputs, outputs = adapted(recording), recording["inputs"], recording["outputs"]
    trainable = {f"base_model.model.{n}": list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    recorded = {name.replace(".default.", "."): shape for name, shape in outputs["trainable"]}
    assert trainable == recorded
    arguments = {"mask": inputs["attention_mask"], "labels": inputs["labels"], "with_logits": True}
    scored = model(inputs["input_ids"], inputs["pixel_values"], **arguments)
    real = scored.joined.mask
    assert_near(scored.logits[real].detach(), outputs["logits"][real])
    assert_near(scored.loss.detach(), recording["loss"])
    scored.loss.backward()
    grads = {n.removeprefix("base_model.model.").replace(".default.", "."): g for n, g in recording["grads"].items()}
    assert_grads(model, grads)
    assert adapter_state(model.state_dict()).keys() == inputs["adapter"].keys()
    merge_adapters(model)
    state = model.state_dict()
    for name, expected in outputs["merged"].items():
        assert_near(state[name], expected, name)
    merged_names = {name for name in outputs["merged_keys"] if name in state or "vision_tower" not in name}
    assert merged_names == set(state)
    merged = model(inputs["input_ids"], inputs["pixel_values"], **arguments)
    assert_near(merged.logits[real].detach(), outputs["merged_logits"][real])


# ---- generation ----


@pytest.fixture(scope="module")
def writer() -> tuple[dict[str, Any], LlavaForCausalLM]:
    recording = load_fixture("llava_generate.pt")
    return recording, llava_model(recording["config"], recording["state_dict"]).eval()


def test_greedy_one_by_one_and_in_a_batch(writer):
    recording, model = writer
    inputs, outputs = recording["inputs"], recording["outputs"]
    decoding = Decoding(max_new_tokens=inputs["max_new_tokens_greedy"])
    pixels = inputs["pixel_values"]
    for number, prompt in enumerate(inputs["prompts"]):
        joined = model.join(torch.tensor([prompt]), pixels[number : number + 1], padding_side="left")
        assert generate(model, joined, decoding)[0].tolist() == outputs["greedy_single"][number]
    mask = inputs["attention_mask_left"]
    joined = model.join(inputs["input_ids_left"], pixels, mask=mask, padding_side="left")
    assert torch.equal(generate(model, joined, decoding), outputs["greedy_batch_left"])


def test_beam_search(writer):
    recording, model = writer
    inputs = recording["inputs"]
    for case in recording["outputs"]["beam"].values():
        names = ("num_beams", "length_penalty", "early_stopping", "max_new_tokens")
        decoding = Decoding(**{name: case[name] for name in names})
        for number, (prompt, expected) in enumerate(zip(inputs["prompts"], case["results"], strict=True)):
            pixels = inputs["pixel_values"][number : number + 1]
            joined = model.join(torch.tensor([prompt]), pixels, padding_side="left")
            ids, scores = beam_search(model, joined, decoding, keep=len(expected["sequences"]))
            assert ids.tolist() == expected["sequences"], case
            assert scores.tolist() == pytest.approx(expected["scores"], rel=1e-5)


def test_beam_search_of_a_batch(writer):
    recording, model = writer
    inputs, expected = recording["inputs"], recording["outputs"]["beam3_batch_left"]
    mask = inputs["attention_mask_left"]
    joined = model.join(inputs["input_ids_left"], inputs["pixel_values"], mask=mask, padding_side="left")
    decoding = Decoding(num_beams=3, max_new_tokens=inputs["max_new_tokens_beam"])
    ids, scores = beam_search(model, joined, decoding)
    assert torch.equal(ids, expected["sequences"])
    assert_near(scores, expected["scores"])


def test_probabilities_of_a_draw(writer):
    warpers = writer[0]["outputs"]["warpers"]
    for case in warpers["cases"].values():
        found = warped(warpers["logits"], case["temperature"], case["top_k"], case["top_p"])
        assert_close(found, case["probs"], atol=1e-6, rtol=1e-5)


def test_the_layers_that_nobody_looks_at_are_not_built(multimodal):
    recording, model = multimodal
    extra = recording["state_dict"].keys() - model.state_dict().keys()
    assert extra
    assert all("vision_model" in name for name in extra)
    assert LAST_OF_TOWER
