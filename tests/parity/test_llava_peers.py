"""LLaVA and adapters beside current packages: transformers' model, peft's files in both directions.

Measured: logits at most 2e-6 of their largest value; ids equal.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.weights import stream_weights
from models.clip_vision import CLIPVisionConfig
from models.errors import ModelError
from models.linear import Linear
from models.llava.config import LlamaConfig, LlavaConfig
from models.llava.generation import Decoding, generate
from models.llava.llama import LlamaModel
from models.llava.llava import IMAGE_PLACE, LlavaForCausalLM
from models.llava.loading import load_stream, missing_weights
from models.loading import load_weights
from models.lora import LoRAConfig, adapter_state, add_adapters, load_adapters, plain_names
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
    load_stream(ours, stream_weights(tmp_path), padded_tables=True)
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


def test_keys_that_a_config_leaves_out_are_transformers_defaults():
    """Older versions write what differs from the defaults alone; sizes small enough to run are given."""
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 70}
    vision = {"intermediate_size": 40, "num_hidden_layers": 1, "image_size": 64}
    values = {"text_config": text, "vision_config": vision, "image_token_index": IMAGE_TOKEN}
    kinds = {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
    peer = transformers.LlavaConfig.from_dict(values | {key: values[key] | kind for key, kind in kinds.items()})
    ours, tower = LlavaConfig.from_hf(values), CLIPVisionConfig.from_dict(vision)
    for config, theirs in ((ours.text, peer.text_config), (tower, peer.vision_config)):
        own = dataclasses.asdict(config)
        common = {key for key in own if hasattr(theirs, key)} - {"vocab_size", "pad_token_id"}
        assert len(common) >= 8
        assert {key: own[key] for key in common} == {key: getattr(theirs, key) for key in common}
    assert ours.mm_hidden_size == tower.hidden_size == 768
    # LLaVA's own layout, with sizes that have no default here
    assert LlamaConfig.from_dict(text | {"num_attention_heads": 32}) == dataclasses.replace(ours.text, vocab_size=70)

    torch.manual_seed(2)
    sizes = text | {"num_attention_heads": 4}
    language = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        language.model.embed_tokens.weight.mul_(0.05)  # so small that the norms' epsilon counts
    decoder = Decoder(LlamaConfig.from_dict(sizes)).eval()
    load_weights(decoder, language.state_dict(), may_be_extra=("*rotary_emb*",))
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert_near(decoder(ids), language(ids).logits)


@pytest.mark.parametrize("with_whole_clip", [True, False])
def test_the_tower_of_a_clip_saved_by_transformers(tmp_path, with_whole_clip):
    """Version 5 saves the tower alone without ``vision_model.`` in its names."""
    torch.manual_seed(3)
    vision = transformers.CLIPVisionConfig(**VISION)
    peer = transformers.CLIPVisionModel(vision).eval()
    peer.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("embeddings.") for name in state)
    if with_whole_clip:
        save_file({f"vision_model.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    config = LlavaConfig(LlamaConfig.from_dict(TEXT), mm_hidden_size=24, mm_vision_select_layer=-2)
    with torch.device("meta"):
        ours = LlavaForCausalLM(config, CLIPVisionConfig.from_dict(values)).eval()
    load_stream(ours, stream_weights(tmp_path))
    assert not [name for name in missing_weights(ours) if "vision_tower" in name]
    pixels = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        expected = peer(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert_near(ours.tower_features(pixels), expected)


def language_models() -> tuple[nn.Module, Decoder]:
    torch.manual_seed(1)
    peer = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, pad_token_id=0)).eval()
    ours = Decoder(LlamaConfig.from_dict(TEXT)).eval()
    load_weights(ours, peer.state_dict(), may_be_extra=("*rotary_emb*",))
    return peer, ours


@pytest.mark.parametrize(("window", "positions"), [(None, 256), (256, 256), (4, 256)])
def test_mistral_is_llama_without_a_window_and_refused_with_one(window, positions):
    torch.manual_seed(5)
    sizes = TEXT | {"max_position_embeddings": positions, "sliding_window": window}
    peer = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, pad_token_id=0)).eval()
    values = peer.config.to_dict()
    if window == 4:
        with pytest.raises(ModelError, match=r"a sliding_window of 4 among 256 positions \(Mistral\)"):
            LlamaConfig.from_dict(values)
        return
    ours = Decoder(LlamaConfig.from_dict(values)).eval()
    load_weights(ours, peer.state_dict(), may_be_extra=("*rotary_emb*",))
    ids = torch.randint(3, 60, (2, 19))
    with torch.no_grad():
        assert_near(ours(ids), peer(ids).logits)


def test_another_kind_of_language_model_is_refused_by_its_name():
    with pytest.raises(ModelError, match="model_type 'qwen2' is not implemented here, only 'llama'"):
        LlamaConfig.from_dict(TEXT | {"model_type": "qwen2"})
    with pytest.raises(ModelError, match="has no sliding_window, whose default in Mistral is not implemented"):
        LlamaConfig.from_dict(TEXT | {"model_type": "llava_mistral"})


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
    load_adapters(ours, plain_names(load_file(tmp_path / "adapter_model.safetensors")))
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert_near(ours.eval()(ids), adapted(ids).logits)


STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica", "olora", "pissa", "pissa_niter_2")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.filterwarnings("ignore")
def test_starts_of_pefts_that_change_the_base_are_refused_and_the_others_load(tmp_path, start):
    peer, ours = language_models()
    before = {name: value.clone() for name, value in peer.state_dict().items()}
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=start, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(peer, settings).eval()
    base = {name.replace(".base_layer", ""): value for name, value in adapted.base_model.model.state_dict().items()}
    keeps = all(torch.equal(base[name], value) for name, value in before.items())
    adapted.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    if not keeps:
        with pytest.raises(ModelError, match=f"init_lora_weights {start!r} is not implemented here"):
            LoRAConfig.from_dict(values)
        return
    add_adapters(ours.model.layers, LoRAConfig.from_dict(values))
    load_adapters(ours, plain_names(load_file(tmp_path / "adapter_model.safetensors")))
    ids = torch.randint(3, 60, (2, 9))
    with torch.no_grad():
        assert_near(ours.eval()(ids), adapted(ids).logits)
