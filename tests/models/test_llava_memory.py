"""A model of 1 GB in sharded files needs its own memory and that of one shard, no more."""

import json
import shutil

import pytest

from tests.helpers import run_program
from tests.scripts.llava_run import BASE, TOWER, train_flags

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


_MAKE_PUBLISHED = """
import json, sys, torch
from models.clip_vision import CLIPVisionConfig
from models.llava.config import LlavaConfig
from models.llava.llava import LlavaForCausalLM
values = json.load(open(f"{sys.argv[1]}/config.json"))
tower = CLIPVisionConfig(values["mm_hidden_size"], 2, 2, 32, image_size=32, patch_size=16)  # is not written
with torch.device("meta"):
    model = LlavaForCausalLM(LlavaConfig.from_dict(values), tower)
shards, places = {}, {}
for name, value in model.state_dict().items():
    if "vision_tower" in name:
        continue
    number = int(name.split(".")[2]) // 4 if ".layers." in name else 0
    shards.setdefault(number, {})[name] = value.shape
for number, content in shards.items():
    file = f"pytorch_model-{number}.bin"
    torch.save({name: torch.full(shape, 0.01, dtype=torch.float16) for name, shape in content.items()},
               f"{sys.argv[1]}/{file}")
    places |= {name: file for name in content}
json.dump({"weight_map": places}, open(f"{sys.argv[1]}/pytorch_model.bin.index.json", "w"))
"""

_BUILD = """
import json, sys, threading, time, torch
from pathlib import Path
from scripts.llava_args import parse_args
from scripts.llava_model import build_for_training

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "RssAnon" in line).split()[1])

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

args = parse_args(sys.argv[1:])
before, watcher = anonymous(), threading.Thread(target=watch)
watcher.start()
folder = build_for_training(args, torch.bfloat16, torch.device("cpu"))
done.set()
watcher.join()
sizes = {kind: 0 for kind in (torch.float32, torch.bfloat16)}
for parameter in folder.model.parameters():
    sizes[parameter.dtype] += parameter.numel() * parameter.element_size() // 1024
print(json.dumps({"peak": peak - before, "frozen": sizes[torch.bfloat16], "trained": sizes[torch.float32]}))
"""


@pytest.mark.slow
def test_the_peak_of_a_training_on_published_files_is_the_model_and_one_shard(tmp_path):
    """Shards of float16 in torch's own format, read as bfloat16: every weight is converted."""
    model = tmp_path / "llava"
    shutil.copytree(TOWER, tmp_path / "clip")
    shutil.copytree(BASE, model, ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
    config = json.loads((model / "config.json").read_text()) | SIZES | {"vocab_size": 32000, "num_key_value_heads": 16}
    (model / "config.json").write_text(json.dumps(config))
    made = run_program("-c", _MAKE_PUBLISHED, str(model))
    assert made.returncode == 0, made.stderr
    largest = max(path.stat().st_size for path in model.glob("*.bin")) // 1024
    (tmp_path / "train.json").write_text("[]")
    flags = train_flags(tmp_path / "none", "--bf16", "True", model=model, data=tmp_path / "train.json")
    built = run_program("-c", _BUILD, *flags)
    assert built.returncode == 0, built.stderr
    found = json.loads(built.stdout)
    assert found["frozen"] > 900_000  # kB
    # measured: 1.14 GB where 1.37 are allowed; 1.59 with a second block beside each weight
    assert found["peak"] <= found["frozen"] + found["trained"] + largest + 50_000, (found, largest)
