"""The demonstration in small, and its adapter in peft and transformers: the same answers to the same questions.

Measured: logits at most 3.2e-7 of their largest value; answers equal.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import run_llava_lora
from data.clip_images import normalize
from data.drawn_vizwiz import draw_rows, write_drawn_vizwiz
from data.files import read_jsonl
from data.llava_conversation import TEMPLATES, build_prompt
from data.llava_images import LlavaTransform
from data.tokenizers.llama import IMAGE_TOKEN_ID
from scripts import export_adapter, format_dataset_for_llava, make_tiny_llava, model_vqa_loader
from scripts.llava_folder import LlavaFolder, read_llava_folder
from tests.parity.test_llava_model import assert_near

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SIZES = ["--image_size", "32", "--patch_size", "16", "--vision_width", "32", "--vision_layers", "2"]
SIZES += ["--hidden_size", "64", "--layers", "2"]
MAX_NEW_TOKENS = 12
NUM_QUESTIONS = 12
# LLaVA's names -> those of the files on the hub (llava-hf/llava-1.5-7b-hf)
TO_HUB = (
    ("model.vision_tower.vision_tower.", "vision_tower."),
    ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
    ("model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)


@dataclass(frozen=True)
class Demo:
    """Folders of a run: the data, the model before, its adapter."""

    data: Path
    base: Path
    adapter: Path

    def answers(self, *flags: object) -> list[str]:
        """What the evaluation program writes for the questions of valid."""
        out = self.data / "answers.jsonl"
        argv = ["--question-file", self.data / "valid_for_llava.jsonl", "--image-folder", self.data / "valid"]
        argv += ["--answers-file", out, "--batch_size", 5, "--num_workers", 0, "--max_new_tokens", MAX_NEW_TOKENS]
        model_vqa_loader.main([str(word) for word in (*argv, "--device", "cpu", *flags)])
        return [line["text"] for line in read_jsonl(out)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    data, base, adapter = folder / "data", folder / "tiny-llava", folder / "tiny-llava-lora"
    write_drawn_vizwiz(data, draw_rows({"train": 200, "valid": NUM_QUESTIONS, "pretrain": 200}, seed=0), seed=0)
    make_tiny_llava.main(["--data", str(data), "--output", str(folder / "start"), *SIZES])
    format_dataset_for_llava.main(["--data_path", str(data)])
    train(folder / "start", base, data, "pretrain", "--lora_enable", "False", "--unfreeze_mm_vision_tower", "True")
    train(base, adapter, data, "train", "--lora_r", 8, "--lora_alpha", 16, "--mm_projector_lr", 4e-3)
    return Demo(data, base, adapter)


def train(model: Path, output: Path, data: Path, split: str, *flags: object) -> None:
    argv = ["--model_name_or_path", model, "--output_dir", output, "--data_path", data / f"{split}_for_llava.json"]
    argv += ["--image_folder", data / split, "--learning_rate", 3e-3, "--num_train_epochs", 8, "--bf16", "False"]
    argv += ["--device", "cpu", "--dataloader_num_workers", 0, "--gradient_checkpointing", "False"]
    run_llava_lora.main([str(word) for word in (*argv, *flags)])


def hub_folder(base: LlavaFolder, folder: Path) -> Path:
    """The model as transformers' conversion writes it, an image token behind the vocabulary."""
    folder.mkdir()
    text = {key: base.values[key] for key in TEXT_KEYS}
    image_token = text["vocab_size"]
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text | {"model_type": "llama", "vocab_size": image_token + 1},
        "vision_config": base.values["mm_vision_config"],
        "image_token_index": image_token,
        "vision_feature_layer": base.values["mm_vision_select_layer"],
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    state = {}
    for name, value in base.model.state_dict().items():
        old, new = next(pair for pair in TO_HUB if name.startswith(pair[0]))
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = torch.cat([value, value.new_zeros(1, value.shape[1])])
        state[new + name.removeprefix(old)] = value.clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


TEXT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def inputs_of(demo: Demo, folder: LlavaFolder) -> list[tuple[Tensor, Tensor]]:
    """(1, T) ids with a place for the image, and its (1, 3, S, S) pixels, of each question."""
    found = []
    for question in read_jsonl(demo.data / "valid_for_llava.jsonl"):
        turns = [("human", f"<image>\n{question['text']}"), ("gpt", None)]
        ids = folder.tokenizer.encode_with_images(build_prompt(turns, TEMPLATES["vicuna_v1"]))
        image = np.asarray(Image.open(demo.data / "valid" / question["image"]))
        pixels = LlavaTransform(folder.images, "pad")(image)
        found.append((torch.tensor([ids]), normalize(pixels[None], folder.images)))
    return found


def test_the_adapter_gives_the_same_answers_in_peft_and_transformers(demo, tmp_path):
    folder = read_llava_folder(demo.adapter, base=demo.base, dtype=torch.float32)
    base = read_llava_folder(demo.base, dtype=torch.float32)
    peer = transformers.LlavaForConditionalGeneration.from_pretrained(hub_folder(base, tmp_path / "hub")).eval()
    image_token, patches = peer.config.image_token_index, folder.vision.grid**2

    def repeated(ids: Tensor) -> Tensor:
        parts = [row.new_full((patches,), image_token) if row == IMAGE_TOKEN_ID else row[None] for row in ids[0]]
        return torch.cat(parts)[None]

    def logits(ids: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return peer(input_ids=repeated(ids), pixel_values=pixels).logits[..., :image_token]

    def answer(ids: Tensor, pixels: Tensor) -> str:
        words = peer.generate(
            input_ids=repeated(ids),
            pixel_values=pixels,
            attention_mask=torch.ones_like(repeated(ids)),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            suppress_tokens=[image_token],  # has no row here
        )[0, repeated(ids).shape[1] :]
        return folder.tokenizer.decode(words).strip()

    asked = inputs_of(demo, folder)
    frozen = demo.answers("--model-path", demo.base)
    for (ids, pixels), text in zip(asked, frozen, strict=True):
        assert answer(ids, pixels) == text
    exported = tmp_path / "exported"
    export_adapter.main(["--model-path", str(demo.adapter), "--save-path", str(exported)])
    peer = peft.PeftModel.from_pretrained(peer, exported).eval()
    assert (
        sum(".lora_A." in name for name, _ in peer.named_parameters()) == 7 * peer.config.text_config.num_hidden_layers
    )
    tuned = demo.answers("--model-path", demo.adapter, "--model-base", demo.base)
    for (ids, pixels), text in zip(asked, tuned, strict=True):
        with torch.no_grad():
            assert_near(folder.model(ids, pixels, with_logits=True).logits, logits(ids, pixels))
        assert answer(ids, pixels) == text
    assert demo.answers("--model-path", exported, "--model-base", demo.base) == tuned
    assert len(frozen) == NUM_QUESTIONS
    assert sum(before != after for before, after in zip(frozen, tuned, strict=True)) > NUM_QUESTIONS / 2
    assert len(set(tuned)) > 2
    assert max(len(text.split()) for text in tuned) < max(len(text.split()) for text in frozen)
