"""LLaVA from its published layouts: the tiny folders give the recorded logits and answers, whatever their key names.

Measured: logits at most 2e-6 of their largest value; ids equal.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.clip_images import CLIPImageSettings, normalize
from data.images import load_image
from data.llava_images import LlavaTransform
from engine.errors import EngineError
from engine.weights import read_state_dict, stream_weights
from models.clip_vision import CLIPVisionConfig
from models.errors import ModelError
from models.llava.config import LlavaConfig
from models.llava.generation import Decoding, generate
from models.llava.llava import LlavaForCausalLM
from models.llava.loading import TOWER, load_stream, missing_weights, start_projector
from models.lora import LoRAConfig, add_adapters, load_adapters, merge_adapters, plain_names
from tests.parity.fixture_files import fixture_path
from tests.parity.test_llava_model import assert_near


@pytest.fixture(scope="module")
def tiny() -> Path:
    return fixture_path("llava_tiny")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def build(config: LlavaConfig, vision: CLIPVisionConfig) -> LlavaForCausalLM:
    with torch.device("meta"):
        return LlavaForCausalLM(config, vision).eval()


def of_llava(tiny: Path) -> LlavaForCausalLM:
    """The original's layout: sharded files for the decoder, the tower from CLIP's folder."""
    vision = CLIPVisionConfig.from_dict(read(tiny / "clip" / "config.json"))
    model = build(LlavaConfig.from_dict(read(tiny / "llava" / "config.json")), vision)
    load_stream(model, stream_weights(tiny / "llava"), dtype=torch.float32, skip=(TOWER,))
    load_stream(model, stream_weights(tiny / "clip"), dtype=torch.float32)
    assert missing_weights(model) == []
    return model


def of_hf(tiny: Path, weights: Path | None = None) -> LlavaForCausalLM:
    """transformers' layout: everything in one file."""
    values = read(tiny / "llava-hf" / "config.json")
    vision = CLIPVisionConfig.from_dict(values["vision_config"])
    model = build(LlavaConfig.from_hf(values), vision)
    load_stream(model, stream_weights(weights or tiny / "llava-hf"), dtype=torch.float32, padded_tables=True)
    assert missing_weights(model) == []
    return model


def pixels_of(tiny: Path, name: str) -> torch.Tensor:
    settings = CLIPImageSettings.load(tiny / "clip" / "preprocessor_config.json")
    image = LlavaTransform(settings, aspect_ratio="pad")(load_image(tiny / "images" / name))
    return normalize(image[None], settings)


def assert_answers(model: LlavaForCausalLM, tiny: Path, kind: str) -> None:
    questions = [json.loads(line) for line in (tiny / "questions.jsonl").read_text().splitlines()]
    expected = torch.load(tiny / "expected.pt", weights_only=True)["outputs"][kind]
    for question, answer in zip(questions, expected, strict=True):
        ids = torch.tensor([answer["input_ids"]])
        joined = model.join(ids, pixels_of(tiny, question["image"]), padding_side="left")
        with torch.no_grad():
            logits = model.lm_head(model.model.decode(joined.embeds).tokens[:, -1])
        assert_near(logits[0], answer["last_logits"])
        assert generate(model, joined, Decoding(max_new_tokens=16))[0].tolist() == answer["output_ids"]


def test_the_originals_layout(tiny):
    assert_answers(of_llava(tiny), tiny, "llava")


def test_the_layout_of_transformers(tiny):
    assert_answers(of_hf(tiny), tiny, "llava")


@pytest.mark.parametrize("generation", ["in memory 4", "in memory 5"])
def test_newer_names_of_transformers(tiny, tmp_path, generation):
    state = load_file(tiny / "llava-hf" / "model.safetensors")
    renamed = {}
    for name, value in state.items():
        new = name.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        )
        new = new.replace("multi_modal_projector", "model.multi_modal_projector")
        tower = "model.vision_tower." if generation.endswith("5") else "model.vision_tower.vision_model."
        renamed[new.replace("vision_tower.vision_model.", tower)] = value
    save_file(renamed, tmp_path / "model.safetensors")
    assert_answers(of_hf(tiny, tmp_path), tiny, "llava")


def test_an_adapter_merged_into_the_base(tiny):
    folder = tiny / "llava-lora"
    model = of_llava(tiny)
    add_adapters(model.model.layers, LoRAConfig.from_dict(read(folder / "adapter_config.json")))
    load_adapters(model, plain_names(read_state_dict(folder / "adapter_model.safetensors")))
    rest = read_state_dict(folder / "non_lora_trainables.bin")
    load_stream(model, ((name.removeprefix("base_model.model."), value) for name, value in rest.items()))
    merge_adapters(model)
    assert_answers(model, tiny, "lora")


# ---- what can be wrong ----


def test_a_plain_language_model_gets_a_new_projector_and_the_tower_of_clip(tiny):
    vision = CLIPVisionConfig.from_dict(read(tiny / "clip" / "config.json"))
    model = build(LlavaConfig.from_dict(read(tiny / "llava" / "config.json")), vision)
    plain = (entry for entry in stream_weights(tiny / "llava") if "mm_projector" not in entry[0])
    load_stream(model, plain, dtype=torch.bfloat16, skip=(TOWER,))
    load_stream(model, stream_weights(tiny / "clip"), dtype=torch.bfloat16)
    assert {name.split(".")[1] for name in missing_weights(model)} == {"mm_projector"}
    start_projector(model, torch.bfloat16)
    assert missing_weights(model) == []
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.tower.parameters())


def test_foreign_names_and_shapes_are_refused(tiny):
    model = of_llava(tiny)
    with pytest.raises(ModelError, match=r"bert\.x has no place in this model"):
        load_stream(model, [("bert.x", torch.zeros(1))])
    with pytest.raises(ModelError, match=r"lm_head.weight is \(3, 3\), the model's"):
        load_stream(model, [("lm_head.weight", torch.zeros(3, 3))])
    rows, width = model.lm_head.weight.shape
    longer = [("lm_head.weight", torch.ones(rows + 20, width))]
    with pytest.raises(ModelError, match=rf"lm_head.weight is \({rows + 20}, {width}\), the model's"):
        load_stream(model, longer)
    load_stream(model, longer, padded_tables=True)
    assert torch.equal(model.lm_head.weight, torch.ones(rows, width))


def test_missing_shards_and_tensors_are_named(tiny, tmp_path):
    for file in (tiny / "llava").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = tmp_path / "pytorch_model.bin.index.json"
    content = read(index)
    shard = sorted(set(content["weight_map"].values()))[0]
    content["weight_map"]["model.ghost.weight"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(EngineError, match=f"says that model.ghost.weight is in {shard}, where it is not"):
        list(stream_weights(tmp_path))
    (tmp_path / shard).unlink()
    with pytest.raises(EngineError, match=f"needs the shard {shard}, which is not in"):
        list(stream_weights(tmp_path))
