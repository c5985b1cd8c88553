"""Prints what the forecast says of a training step and what the process really takes, in MiB; a process for each.

python tests/scripts/forecast_beside_process.py beit3

Give it MALLOC_MMAP_THRESHOLD_=65536: then the C library hands freed tensors back, and the process's size is what lives.
"""

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.measure import PeakMemory
from models.recompute import Recompute, set_recompute
from scripts import drawn_policy
from scripts import forecast_models as steps
from scripts.forecast import step_memory
from tests.paths import ROOT

LLAMA = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
TOWER = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512, "image_size": 112,
    "patch_size": 14,
}  # fmt: skip


def vlbert_config(folder: Path, strategy: str) -> str:
    """A smaller network over the shipped config, in a file."""
    sizes = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    sizes |= {"visual_size": 256}
    shutil.copy(ROOT / "scripts" / "cfgs" / "vqa" / "base_4X16G_fp32.yaml", folder / "base.yaml")
    config = {"EXTENDS": "base.yaml", "FINETUNE_STRATEGY": strategy, "NETWORK": {"VLBERT": sizes}}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def build(name: str, folder: Path):
    """A step of a family at a small size, and the samples of its batch."""
    if name == "beit3":
        return steps.beit3_step("beit3_tiny_patch32_96", task="vqav2", words=20, drop_path=0.1), 256
    if name == "captioning":
        step = steps.beit3_step("beit3_tiny_patch32_96", task="coco_captioning", words=20, drop_path=0.1)
        set_recompute(step.model, Recompute(1))
        return step, 64
    if name == "vle":
        steps.VLE_MODELS["small"] = steps._vle_values(128, 3, 16)
        return steps.vle_step("small", words=20, image_size=128), 16
    if name == "llava":
        steps.LLAVA_MODELS["small"], steps._TOWER = LLAMA, TOWER
        return steps.llava_step("small", words=80, rank=16, dropout=0.05, dtype=None), 16
    return steps.vlbert_step(vlbert_config(folder, name), words=14, boxes=36), 32


def main(name: str, folder: Path) -> None:
    """Predict, then build the same with values and take three steps."""
    _, predicted = step_memory(*build(name, folder), "no")
    steps.SHAPES_ONLY = drawn_policy.SHAPES_ONLY = nullcontext()
    measured = PeakMemory()
    step, batch_size = build(name, folder)
    compute = step.batch(batch_size)
    trained = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    for _ in range(3):
        compute().backward()
        assert not any(isinstance(parameter.grad, FakeTensor) for parameter in trained)
        torch.nn.utils.get_total_norm([parameter.grad for parameter in trained], foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    print(json.dumps({"predicted": predicted / 2**20, "measured": measured.mib()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
