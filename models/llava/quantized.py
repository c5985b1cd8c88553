"""What of LLaVA is quantized for training adapters over it (QLoRA)."""

from typing import Any

from models.llava.llava import LlavaForCausalLM
from models.quantized import QuantizationReport, quantize_layers


def quantize_decoder(model: LlavaForCausalLM, **options: Any) -> QuantizationReport:
    """Quantize all linear layers of the decoder's layers, but not embedding, head, projector and tower.

    Options and errors as ``quantize_layers``.
    """
    return quantize_layers(model, lambda name: name.startswith("model.layers."), **options)
