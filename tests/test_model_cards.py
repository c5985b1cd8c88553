"""The sizes on docs/model_cards.md are those of our modules, and its list of files is what runs write."""

import re

import pytest
import torch

from models.beit3.config import beit3_config
from models.beit3.tasks import build_beit3
from models.clip_vision import CLIPVisionConfig
from models.llava.config import LlavaConfig
from models.llava.llava import LlavaForCausalLM
from models.lora import LoRAConfig, add_adapters
from models.vle.vle import VLEForVQA
from scripts.vlbert_args import parse_args
from scripts.vlbert_model import build_network
from tests.models.test_vle import published
from tests.paths import ROOT
from tests.scripts import caption_run, llava_run, vlbert_run, vqa_run

PAGE = (ROOT / "docs/model_cards.md").read_text(encoding="utf-8")
SIZES = {
    name: (int(count.replace(",", "")), int(entries.replace(",", "")) if entries else None)
    for name, count, entries in re.findall(r"^\| ([^|]+) \| ([\d,]+) \| ([\d,]*) ?\|$", PAGE, re.MULTILINE)
}
TOWER = CLIPVisionConfig(1024, 24, 16, 4096, image_size=336, patch_size=14)
DECODERS = {"7B": (4096, 32, 11008), "13B": (5120, 40, 13824)}  # width, layers and heads, inner width
VLBERT = {
    "VL-BERT base, regions with features, 3,129 answers": "base_4X16G_fp32",
    "VL-BERT large, regions with features, 3,129 answers": "large_4X16G_fp32",
    "VL-BERT base, image path (ResNet-101)": "base_image_path",
}


class Words:
    """The ids that a network asks its word pieces for."""

    cls_id, sep_id, mask_id = 101, 102, 103


def beit3(name: str, task: str) -> torch.nn.Module:
    return build_beit3(task, beit3_config(name, task), num_classes=3129 if task == "vqav2" else None)


def llava(size: str) -> LlavaForCausalLM:
    width, layers, inner = DECODERS[size]
    sizes = {"vocab_size": 32000, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": layers}
    sizes |= {"intermediate_size": inner, "mm_projector_type": "mlp2x_gelu"}
    return LlavaForCausalLM(LlavaConfig.from_dict(sizes), TOWER)


MODELS = {
    "BEiT-3 base, 480 pixels, VQA v2 (3,129 answers)": lambda: beit3("beit3_base_patch16_480", "vqav2"),
    "BEiT-3 large, 480 pixels, VQA v2": lambda: beit3("beit3_large_patch16_480", "vqav2"),
    "BEiT-3 large, 768 pixels, VQA v2": lambda: beit3("beit3_large_patch16_768", "vqav2"),
    "BEiT-3 base, 480 pixels, captions": lambda: beit3("beit3_base_patch16_480", "coco_captioning"),
    "BEiT-3 large, 480 pixels, captions": lambda: beit3("beit3_large_patch16_480", "coco_captioning"),
    "VLE base, 224 pixels, 3,129 answers": lambda: VLEForVQA(published("base"), 3129),
    "VLE large, 224 pixels, 3,129 answers": lambda: VLEForVQA(published("large"), 3129),
    "LLaVA-1.5 7B": lambda: llava("7B"),
    "LLaVA-1.5 13B": lambda: llava("13B"),
}


def size_of(model: torch.nn.Module) -> tuple[int, int]:
    return sum(parameter.numel() for parameter in model.parameters()), len(model.state_dict())


def test_every_row_is_counted():
    assert SIZES.keys() == {*MODELS, *VLBERT, *(f"adapters of rank 128 for {size}" for size in DECODERS)}


@pytest.mark.parametrize("name", MODELS)
def test_the_size_of_a_model(name):
    with torch.device("meta"):
        model = MODELS[name]()
    assert SIZES[name] == size_of(model)


@pytest.mark.parametrize("name", VLBERT)
def test_the_size_of_a_vlbert(name):
    config = parse_args([f"cfgs/vqa/{VLBERT[name]}.yaml"]).config
    with torch.device("meta"):
        model = build_network(config, 3129, Words(), reference=False)
    assert SIZES[name] == size_of(model)


@pytest.mark.parametrize("size", DECODERS)
def test_the_size_of_the_parts_and_adapters_of_a_llava(size):
    with torch.device("meta"):
        model = llava(size)
        parts = [sum(p.numel() for p in part.parameters()) for part in (model.tower, model.model.mm_projector)]
        add_adapters(model.model.layers, LoRAConfig(r=128, lora_alpha=256))
    for number in parts:
        assert f"{number:,}" in PAGE
    adapters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert SIZES[f"adapters of rank 128 for {size}"] == (adapters, None)


def files_of(family: str) -> tuple[set[str], set[str]]:
    """What is to be published, and what need not be, by the page."""
    row = re.search(rf"^\| {family} \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)
    return tuple({name for name in re.findall(r"`([\w.*-]+)`", cell) if "." in name} for cell in row.groups())


def test_the_files_to_publish_are_those_of_a_checkpoint():
    publish, keep = files_of("BEiT-3")
    vqa = {path.name for path in vqa_run.trained_checkpoint().iterdir()}
    captions = {path.name for path in next(caption_run.trained_captioner().glob("checkpoint-*")).iterdir()}
    at_home = {"training_state.pth", "rng-rank0.pth", "manifest.json"}
    assert vqa - {"amendment.json"} == publish - {"model_ema.pth"} | at_home
    assert captions - {"amendment.json"} == publish - {"model_ema.pth", "answer2label.txt"} | at_home
    assert {name.replace("*", "0") for name in keep} == at_home | {"amendment.json"}
    publish, _ = files_of("VL-BERT")
    vlbert = {path.name for path in next(vlbert_run.trained_run().glob("checkpoint-*")).iterdir()}
    assert vlbert - {"amendment.json"} == publish | at_home
    publish, _ = files_of("LLaVA")
    assert publish <= {path.name for path in llava_run.trained_run().iterdir()}
