"""Every family's training step with tensors that have shapes but no values, at published sizes: for the forecast.

The models and losses are those of the programs. Weights and images have no values; ids, masks and boxes do, since the
models look at them on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import DataError
from engine.without_values import SHAPES_ONLY
from models.beit3.config import TASK_SUFFIXES, beit3_config
from models.beit3.tasks import build_beit3, captioning_loss
from models.clip_vision import CLIPVisionConfig
from models.llava.config import LlamaConfig, LlavaConfig
from models.llava.llama import IGNORED
from models.llava.llava import IMAGE_PLACE, LlavaForCausalLM
from models.lora import LoRAConfig, add_adapters
from models.losses import vqa_loss
from models.vle.config import VLEConfig
from models.vle.vle import VLEForVQA
from scripts.drawn_policy import DrawnPolicy
from scripts.vlbert_config import find_config, read_config
from scripts.vlbert_model import build_network

NUM_ANSWERS = 3129


@dataclass(frozen=True)
class Step:
    """A model with the weights that train marked, and what makes a batch of a size: its loss, when it is called."""

    model: nn.Module
    batch: Callable[[int], Callable[[], Tensor]]


# -------------------------------------------------------------------------------------------------------------- BEiT-3
def beit3_step(name: str, *, task: str, words: int, drop_path: float) -> Step:
    """BEiT-3 as ``run_beit3_finetuning.py`` trains it; captions have seven of ten words masked."""
    config = beit3_config(name, task, drop_path=drop_path)
    captioning = TASK_SUFFIXES[task] == "captioning"
    side = config.image_size
    with SHAPES_ONLY:
        model = build_beit3(task, config, num_classes=None if captioning else NUM_ANSWERS)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name not in model.unused_in_finetuning())

    def batch(batch_size: int) -> Callable[[], Tensor]:
        with SHAPES_ONLY:
            image, targets = torch.empty(batch_size, 3, side, side), torch.empty(batch_size, NUM_ANSWERS)
        ids, padding = torch.full((batch_size, words), 7), torch.zeros(batch_size, words, dtype=torch.long)
        padding[0, -1] = 1  # a batch without padding takes no mask
        if not captioning:
            return lambda: vqa_loss(model(image, ids, padding), targets)
        masked = (torch.arange(words) % 10 < 7).expand(batch_size, -1)
        return lambda: captioning_loss(model(image, ids, padding, masked), ids[masked])

    return Step(model, batch)


# ----------------------------------------------------------------------------------------------------------------- VLE
def _vle_values(width: int, layers: int, patch_size: int) -> dict[str, Any]:
    """What decides sizes in the ``config.json`` of hfl/vle-base or hfl/vle-large."""
    sizes = {"hidden_size": width, "num_attention_heads": width // 64, "intermediate_size": 4 * width}
    text = {
        "model_type": "deberta-v2", "vocab_size": 128100, "max_position_embeddings": 512, "position_buckets": 256,
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "type_vocab_size": 0,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False, "num_hidden_layers": layers, **sizes,
    }  # fmt: skip
    vision = {"image_size": 224, "patch_size": patch_size, "num_hidden_layers": layers - 1, **sizes}
    return {"model_type": "vle", "num_hidden_layers": 6, **sizes, "text_config": text, "vision_config": vision}


VLE_MODELS = {"vle-base": _vle_values(768, 12, 16), "vle-large": _vle_values(1024, 24, 14)}


def vle_step(name: str, *, words: int, image_size: int) -> Step:
    """VLE as ``run_vle_vqa.py`` trains it."""
    config = VLEConfig.from_dict(VLE_MODELS[name])
    config = replace(config, vision=replace(config.vision, image_size=image_size))
    with SHAPES_ONLY:
        model = VLEForVQA(config, NUM_ANSWERS)

    def batch(batch_size: int) -> Callable[[], Tensor]:
        with SHAPES_ONLY:
            pixels, targets = torch.empty(batch_size, 3, image_size, image_size), torch.empty(batch_size, NUM_ANSWERS)
        ids, mask = torch.full((batch_size, words), 7), torch.ones(batch_size, words, dtype=torch.long)
        mask[0, -1] = 0
        return lambda: vqa_loss(model(pixels, ids, mask), targets)

    return Step(model, batch)


# ------------------------------------------------------------------------------------------------------------- VL-BERT
class _Words:
    """Stands for BERT's vocabulary, of which the model asks for three ids only."""

    cls_id, sep_id, mask_id = 101, 102, 103


def vlbert_step(config_file: str, *, words: int, boxes: int) -> Step:
    """VL-BERT as ``scripts/vqa/train_end2end.py`` trains it over precomputed features.

    Raises:
        DataError: no such config, or one that looks at the images themselves.
    """
    config = read_config(find_config(config_file))
    if not config["NETWORK"]["IMAGE_FEAT_PRECOMPUTED"]:
        raise DataError(f"--cfg {config_file} looks at the images themselves: only precomputed features are predicted")
    with SHAPES_ONLY:
        model = build_network(config, NUM_ANSWERS, _Words, reference=False)
    if model.policy is not None:
        model.policy = DrawnPolicy(model.policy)

    def batch(batch_size: int) -> Callable[[], Tensor]:
        with SHAPES_ONLY:
            targets = torch.empty(batch_size, NUM_ANSWERS)
        regions = torch.rand(batch_size, boxes, 4 + 2048)
        sizes = torch.tensor([[640.0, 480.0]]).expand(batch_size, -1)
        question = torch.full((batch_size, words), 7)
        return lambda: vqa_loss(model(regions, sizes, question).logits, targets)

    return Step(model, batch)


# --------------------------------------------------------------------------------------------------------------- LLaVA
LLAVA_MODELS = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
_TOWER = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip


def llava_step(name: str, *, words: int, rank: int, dropout: float, dtype: torch.dtype | None) -> Step:
    """LLaVA-1.5 as ``run_llava_lora.py`` trains it: frozen weights in the run's precision, trained ones in float32.

    A sample is an image and ``words`` tokens, of which the last five are its answer.
    """
    text = LlamaConfig.from_dict({"vocab_size": 32000, **LLAVA_MODELS[name]})
    with SHAPES_ONLY:
        model = LlavaForCausalLM(LlavaConfig(text, mm_hidden_size=_TOWER["hidden_size"]), CLIPVisionConfig(**_TOWER))
        add_adapters(model.model.layers, LoRAConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout))
        for part_name, parameter in model.named_parameters():
            is_trained = ".lora_" in part_name or "mm_projector" in part_name
            parameter.requires_grad_(is_trained)
            if not is_trained:
                parameter.data = parameter.data.to(dtype or torch.float32)

    def batch(batch_size: int) -> Callable[[], Tensor]:
        with SHAPES_ONLY:
            pixels = torch.empty(batch_size, 3, _TOWER["image_size"], _TOWER["image_size"])
        ids = torch.full((batch_size, words), 7)
        ids[:, 1] = IMAGE_PLACE
        labels = torch.full((batch_size, words), IGNORED)
        labels[:, -5:] = 7
        return lambda: model(ids, pixels, labels=labels).loss

    return Step(model, batch)
