"""Adapters between here and peft over transformers' LLaVA, in both directions: the same logits and the same answers.

Measured: logits at most 8e-7 of their largest value; ids equal.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import DataError
from engine.weights import read_state_dict
from models.errors import ModelError
from models.llava.generation import Decoding, generate
from models.llava.llava import IMAGE_PLACE, LlavaForCausalLM
from models.lora import LoRAConfig
from scripts import export_adapter, merge_lora_weights
from scripts.llava_folder import LlavaFolder, read_llava_folder
from tests.parity.fixture_files import fixture_path
from tests.parity.test_llava_model import assert_near

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

DECODER = r".*language_model.*\.(q_proj|down_proj)"
# what users write, by peft's rules for names
KINDS: dict[str, dict[str, Any]] = {
    "names, which the tower has too": {"target_modules": ["q_proj", "v_proj"]},
    "pattern and projector": {
        "target_modules": DECODER, "modules_to_save": ["multi_modal_projector"], "task_type": "CAUSAL_LM",
    },
    "all-linear": {"target_modules": "all-linear"},
    "the tower alone": {"target_modules": r".*vision_tower.*\.(q_proj|v_proj)"},
    "without the tower": {"target_modules": ["q_proj", "linear_1"], "exclude_modules": ".*vision_tower.*"},
    "tables and half of the projector": {
        "target_modules": ["o_proj"], "modules_to_save": ["linear_2", "lm_head", "embed_tokens"],
    },
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path) -> Path:
    return shutil.copytree(fixture_path("llava_tiny"), tmp_path / "tiny")


def read(path: Path, tiny: Path, base: str = "llava-hf") -> LlavaFolder:
    return read_llava_folder(path, base=tiny / base, tokenizer=tiny / "llava", dtype=torch.float32)


def transformers_llava(tiny: Path) -> Any:
    return transformers.LlavaForConditionalGeneration.from_pretrained(tiny / "llava-hf", dtype=torch.float32).eval()


def written_by_peft(tiny: Path, kind: str) -> tuple[Path, Any]:
    """A folder with an adapter of this kind whose numbers all count, and the model that wrote it."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(transformers_llava(tiny), peft.LoraConfig(r=3, lora_alpha=6, **KINDS[kind])).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tiny / "peft")
    return tiny / "peft", adapted


def assert_the_same(ours: LlavaForCausalLM, theirs: Any) -> None:
    """Logits of two questions about two images, and what is answered to them."""
    torch.manual_seed(1)
    image_token, vision = theirs.config.image_token_index, theirs.config.vision_config
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    ids = torch.tensor([[1, 5, IMAGE_PLACE, 9, 12, 30], [1, 7, 8, IMAGE_PLACE, 3, 4]])
    repeated = torch.stack([_with_image_tokens(row, image_token, ours.image_rows) for row in ids])
    inputs = {"input_ids": repeated, "pixel_values": pixels, "attention_mask": torch.ones_like(repeated)}
    with torch.no_grad():
        expected = theirs(**inputs).logits[..., :image_token]
        assert_near(ours(ids, pixels, with_logits=True).logits, expected)
    rows = theirs.get_output_embeddings().weight.shape[0]
    suppressed = list(range(image_token, rows))  # they have rows behind the vocabulary, which are not here
    written = theirs.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=suppressed)
    answers = generate(ours, ours.join(ids, pixels, padding_side="left"), Decoding(max_new_tokens=8))
    assert torch.equal(answers, written[:, repeated.shape[1] :])


def _with_image_tokens(row: Tensor, image_token: int, count: int) -> Tensor:
    return torch.cat([row.new_full((count,), image_token) if i == IMAGE_PLACE else i[None] for i in row])


def export(adapter: Path, output: Path) -> Path:
    base = str(adapter.parent / "llava-hf")
    export_adapter.main(["--model-path", str(adapter), "--save-path", str(output), "--base-name", base])
    return output


def test_an_exported_adapter_gives_the_same_in_peft_over_transformers_llava(tiny, recwarn, capsys):
    ours = read_llava_folder(tiny / "llava-lora", dtype=torch.float32).model
    exported = export(tiny / "llava-lora", tiny / "exported")
    assert "wrote 14 layers and the projector" in capsys.readouterr().out
    plain = transformers_llava(tiny)
    recwarn.clear()
    theirs = peft.PeftModel.from_pretrained(plain, exported).eval()
    assert not [warning for warning in recwarn if "adapter" in str(warning.message)]  # keys that it does not find
    adapted = [name for name, _ in theirs.named_parameters() if ".lora_A." in name]
    assert len(adapted) == 14
    assert not [name for name in adapted if "vision_tower" in name]
    assert_the_same(ours, theirs)
    base = read_llava_folder(tiny / "llava", dtype=torch.float32).model
    with pytest.raises(AssertionError):
        assert_the_same(base, theirs)
    assert_the_same(ours, peft.AutoPeftModel.from_pretrained(exported, dtype=torch.float32).eval())


def test_an_exported_adapter_is_read_here_as_it_was(tiny):
    before = read_llava_folder(tiny / "llava-lora", dtype=torch.float32)
    after = read(export(tiny / "llava-lora", tiny / "exported"), tiny)
    states = (before.model.state_dict(), after.model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert after.adapter.scale == before.adapter.scale


def test_adapters_of_the_originals_on_a_tower_are_left_out(tiny):
    before = read_llava_folder(tiny / "llava-lora", dtype=torch.float32).model.state_dict()
    path = tiny / "llava-lora/adapter_model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}
    tower = "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.lora"
    path.unlink()
    save_file(state | {f"{tower}_{part}.weight": torch.ones(3, 3) for part in "AB"}, path)
    after = read_llava_folder(tiny / "llava-lora", dtype=torch.float32).model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_wrote_over_transformers_llava_is_read_and_merged(tiny, kind):
    adapter, theirs = written_by_peft(tiny, kind)
    # the base in either layout, since its numbers are the same
    for base in ("llava-hf", "llava"):
        assert_the_same(read(adapter, tiny, base).model, theirs)
    flags = ["--model-path", adapter, "--model-base", tiny / "llava", "--save-model-path", tiny / "merged"]
    merge_lora_weights.main([str(word) for word in (*flags, "--dtype", "float32")])
    assert_the_same(read_llava_folder(tiny / "merged", dtype=torch.float32).model, theirs)


# ours of today -> as transformers before 4.52 had them
OLD = (
    ("model.language_model.", "language_model.model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("lm_head.", "language_model.lm_head."),
)


def rename(adapter: Path, pairs: tuple[tuple[str, str], ...]) -> None:
    state = {name: value.clone() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    renamed = {}
    for name, value in state.items():
        plain = name.removeprefix("base_model.model.")
        old, new = next(((old, new) for old, new in pairs if plain.startswith(old)), ("", ""))
        renamed["base_model.model." + new + plain.removeprefix(old)] = value
    (adapter / "adapter_model.safetensors").unlink()
    save_file(renamed, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_older_versions_of_transformers_are_read(tiny, kind):
    adapter, theirs = written_by_peft(tiny, kind)
    rename(adapter, OLD)
    assert_the_same(read(adapter, tiny).model, theirs)


@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize(
    ("kind", "lost", "message"),
    [
        ("names, which the tower has too", "layers.1.self_attn.q_proj.", r"lacks model\..*layers.1.self_attn.q_proj"),
        ("pattern and projector", "layers.0.mlp.down_proj.", r"lacks model.layers.0.mlp.down_proj.lora_A"),
        ("pattern and projector", "multi_modal_projector.", "lacks multi_modal_projector, which is among its modules"),
        ("without the tower", "layers.1.self_attn.q_proj.lora_B", r"lacks model.layers.1.self_attn.q_proj.lora_B"),
        ("without the tower", "linear_1.", r"lacks model.mm_projector.0.lora_A"),
    ],
)
def test_an_adapter_that_lacks_what_its_config_speaks_of_is_refused(tiny, kind, lost, message, is_old):
    adapter, _ = written_by_peft(tiny, kind)
    if is_old:
        rename(adapter, OLD)
    state = {n: v.clone() for n, v in load_file(adapter / "adapter_model.safetensors").items() if lost not in n}
    (adapter / "adapter_model.safetensors").unlink()
    save_file(state, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        read(adapter, tiny)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("model.language_model.layers.9.mlp.down_proj.lora_A.weight", "no linear layer is called model.layers.9.mlp"),
        ("model.language_model.layers.0.mlp.down_proj.lora_magnitude_vector", "lora_magnitude_vector has no place"),
        ("model.language_model.embed_tokens.lora_embedding_A", "lora_embedding_A has no place"),
        ("model.language_model.layers.0.input_layernorm.lora_A.weight", "no linear layer is called model.layers.0.inp"),
    ],
)
def test_names_that_fit_nothing_are_refused(tiny, extra, message):
    adapter, _ = written_by_peft(tiny, "pattern and projector")
    state = {name: value.clone() for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    (adapter / "adapter_model.safetensors").unlink()
    save_file(state | {f"base_model.model.{extra}": torch.zeros(3, 3)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=message):
        read(adapter, tiny)


def test_what_does_not_fit_transformers_model_is_not_exported(tiny, tmp_path):
    exported = export(tiny / "llava-lora", tiny / "exported")
    with pytest.raises(ModelError, match="has the names of transformers' model already"):
        export(exported, tmp_path / "again")
    rest = tiny / "llava-lora/non_lora_trainables.bin"
    state = {name: value.clone() for name, value in read_state_dict(rest).items() if ".2." not in name}
    rest.unlink()
    torch.save(state, rest)
    with pytest.raises(ModelError, match=r"the adapter \(model.mm_projector.2.bias\) does not fit transformers' LLaVA"):
        export(tiny / "llava-lora", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("what", ["no adapter", "something there"])
def test_an_export_that_cannot_be_is_refused_before_anything_is_written(tiny, what):
    source, output = tiny / ("llava" if what == "no adapter" else "llava-lora"), tiny / "exported"
    if what == "something there":
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    message = "has no adapter_config.json" if what == "no adapter" else "exported exists: give another folder"
    with pytest.raises(DataError, match=message):
        export(source, output)
    assert sorted(path.name for path in output.glob("*")) == (["notes.txt"] if output.exists() else [])


def test_a_config_says_what_it_means_by_pefts_rules():
    values = json.loads((fixture_path("llava_tiny") / "llava-lora/adapter_config.json").read_text())
    assert LoRAConfig.from_dict(values | {"modules_to_save": ["lm_head"]}).modules_to_save == ("lm_head",)
    for key in ("target_modules", "exclude_modules"):
        with pytest.raises(ModelError, match=f"{key} must be names or a pattern of names"):
            LoRAConfig.from_dict(values | {key: "(unfinished"})
    for kind in KINDS.values():
        settings = peft.LoraConfig(**kind)
        if kind["target_modules"] == "all-linear":
            continue
        ours = LoRAConfig.from_dict(json.loads(json.dumps(settings.to_dict(), default=list)))
        for name in ("model.language_model.layers.0.self_attn.q_proj", "q_proj", "model.vision_tower.encoder.x.q_proj",
                     "model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2", "lm_head",
                     "model.language_model.layers.0.self_attn.eq_proj"):  # fmt: skip
            theirs = peft.tuners.tuners_utils.check_target_module_exists(settings, name)
            excluded = type(theirs).__name__ == "_ExcludedModule"
            assert ours.adapts(name) == (bool(theirs) and not excluded), name
