"""A model of 1 GB in sharded files needs its own memory and that of one shard, no more."""

import json

import pytest

from tests.helpers import run_program

_MAKE = """
import json, sys, torch
from safetensors.torch import save_file
from models.llava.config import LlamaConfig
from models.llava.llama import LlamaModel
config = LlamaConfig.from_dict(json.loads(sys.argv[2]))
with torch.device("meta"):
    shapes = {name: value.shape for name, value in LlamaModel(config).state_dict().items()}
shards, places = {}, {}
for name, shape in shapes.items():
    layer = name.split(".")[1] if name.startswith("layers") else "0"
    shards.setdefault(int(layer) // 4, {})[f"model.{name}"] = shape
for number, content in shards.items():
    file = f"model-{number}.safetensors"
    tensors = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in content.items()}
    save_file(tensors, f"{sys.argv[1]}/{file}")
    places |= {name: file for name in content}
json.dump({"weight_map": places}, open(f"{sys.argv[1]}/model.safetensors.index.json", "w"))
"""

_LOAD = """
import json, os, resource, sys, torch
from pathlib import Path
from engine.weights import stream_weights
from models.clip_vision import CLIPVisionConfig
from models.llava.config import LlavaConfig
from models.llava.llava import LlavaForCausalLM
from models.llava.loading import load_stream
vision = CLIPVisionConfig(32, 2, 2, 32, image_size=32, patch_size=16)
with torch.device("meta"):
    model = LlavaForCausalLM(LlavaConfig.from_dict(json.loads(sys.argv[2]) | {"mm_hidden_size": 32}), vision)

def anonymous():  # mapped files are the page cache's, not ours
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "RssAnon" in line).split()[1])

before, peak = anonymous(), 0
def watched():
    global peak
    for entry in stream_weights(sys.argv[1]):
        peak = max(peak, anonymous())
        yield entry
load_stream(model, watched())
size = sum(p.numel() * p.element_size() for p in model.model.layers.parameters()) // 1024
print(json.dumps({"peak": max(peak, anonymous()) - before, "layers": size}))
"""
SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16}


@pytest.mark.slow
def test_the_peak_is_the_model_and_one_shard(tmp_path):
    values = json.dumps(SIZES | {"vocab_size": 32000})
    made = run_program("-c", _MAKE, str(tmp_path), values)
    assert made.returncode == 0, made.stderr
    largest = max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) // 1024
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) // 1024
    assert total > 900_000  # kB
    loaded = run_program("-c", _LOAD, str(tmp_path), values)
    assert loaded.returncode == 0, loaded.stderr
    found = json.loads(loaded.stdout)
    assert found["peak"] <= total + largest + 50_000, (found, total, largest)
