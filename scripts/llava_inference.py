"""Precision of LLaVA where it answers, one rule for every program, and adapters in that precision."""

import torch

from engine.log import say
from models.llava.llava import LlavaForCausalLM
from models.lora import merge_adapters


def inference_dtype(chosen: torch.dtype | None, device: torch.device) -> torch.dtype:
    """Of the weights: the chosen one; else float16 on CUDA, in which the original answers, and float32 on the CPU."""
    return chosen or (torch.float16 if device.type == "cuda" else torch.float32)


def settle_adapters(model: LlavaForCausalLM, dtype: torch.dtype) -> None:
    """Merge adapters, in float32 and rounded once; over bfloat16 they stay beside the weights.

    Its 8 bits of mantissa round most of what an adapter changes away.
    """
    if dtype is not torch.bfloat16:
        merge_adapters(model)
    elif any(".lora_" in name for name, _ in model.named_parameters()):
        say("note: in bfloat16 the adapter is not merged, as its changes would be rounded away; float16 is faster")
