"""LLaVA and adapters beside current packages: transformers' model, peft's files in both directions.

Measured: logits at most 2e-6 of their largest value; ids equal.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.weights import stream_weights
from models.clip_vision import CLIPVisionConfig
from models.linear import Linear
from models.llava.config import LlamaConfig, LlavaConfig
from models.llava.generation import Decoding, generate
from models.llava.llama import LlamaModel
from models.llava.llava import LlavaForCausalLM
from models.llava.loading import load_stream, missing_weights
from models.llava.splice import IMAGE_PLACE
from models.loading import load_weights
from models.lora import LoRAConfig, adapter_state, add_adapters, load_adapters
from tests.parity.test_llava_model import assert_near

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXT = {
    "vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 20,
    "patch_size": 5, "hidden_act": "quick_gelu",
}  # fmt: skip
IMAGE_TOKEN = 64


class Decoder(nn.Module):
    """Our decoder as a whole language model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model.decode(self.model.embed_tokens(ids)).tokens)


def test_transformers_llava_saved_to_disk_gives_the_same_logits_and_answers(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT, pad_token_id=0),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    peer = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    peer.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    with torch.device("meta"):
        ours = LlavaForCausalLM(LlavaConfig.from_hf(values), CLIPVisionConfig.from_dict(values["vision_config"])).eval()
    load_stream(ours, stream_weights(tmp_path))
    assert missing_weights(ours) == []
    pixels, patches = torch.randn(2, 3, 20, 20), (20 // 5) ** 2
    ids = torch.tensor([[1, 5, IMAGE_PLACE, 9, 12, 30], [1, 7, 8, IMAGE_PLACE, 3, 4]])
    repeated = torch.stack(
        [
            torch.cat([row.new_full((patches,), IMAGE_TOKEN) if i == IMAGE_PLACE else i[None] for i in row])
            for row in ids
        ]
    )
    with torch.no_grad():
        expected = peer(input_ids=repeated, pixel_values=pixels, attention_mask=torch.ones_like(repeated)).logits
        found = ours(ids, pixels, with_logits=True).logits
    assert_near(found, expected[..., :IMAGE_TOKEN])
    # their model may also write the image token, which has no row here: keep it from doing so
    written = peer.generate(
        input_ids=repeated,
        pixel_values=pixels,
        attention_mask=torch.ones_like(repeated),
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=list(range(IMAGE_TOKEN, TEXT["vocab_size"])),
    )[:, repeated.shape[1] :]
    answers = generate(ours, ours.join(ids, pixels, padding_side="left"), Decoding(max_new_tokens=8))
    assert torch.equal(answers, written)


def language_models() -> tuple[nn.Module, Decoder]:
    torch.manual_seed(1)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, pad_token_id=0)).eval()
    ours = Decoder(LlamaConfig.from_dict(TEXT)).eval()
    load_weights(ours, peer.state_dict(), may_be_extra=("*rotary_emb*",))
    return peer, ours


def test_our_adapter_loads_in_peft(tmp_path):
    peer, ours = language_models()
    config = LoRAConfig(r=4, lora_alpha=12, lora_dropout=0.0, base_model_name_or_path="base")
    add_adapters(ours.model.layers, config)
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_file(adapter_state(ours.state_dict()), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config.as_dict()))
    adapted = peft.PeftModel.from_pretrained(peer, tmp_path).eval()
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert_near(ours(ids), adapted(ids).logits)


def test_an_adapter_of_pefts_loads_here(tmp_path):
    peer, ours = language_models()
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1)
    adapted = peft.get_peft_model(peer, settings).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path)
    config = LoRAConfig.from_dict(json.loads((Path(tmp_path) / "adapter_config.json").read_text()))
    assert set(config.target_modules) == set(targets)
    add_adapters(ours.model.layers, config)
    load_adapters(ours, load_file(tmp_path / "adapter_model.safetensors"))
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert_near(ours.eval()(ids), adapted(ids).logits)
