"""scripts/merge_lora_weights.py and scripts/llava_folder.py: every kind of folder read, merged and saved again."""

import json
import shutil

import pytest
import torch

from data.errors import DataError
from engine.errors import EngineError
from engine.weights import read_state_dict
from models.errors import ModelError
from scripts.llava_folder import LlavaFolder, read_llava_folder
from scripts.llava_saving import save_adapter, save_full_model
from scripts.merge_lora_weights import main
from tests.parity.fixture_files import fixture_path
from tests.parity.test_llava_loading import assert_answers


@pytest.fixture
def tiny(tmp_path):
    return shutil.copytree(fixture_path("llava_tiny"), tmp_path / "tiny")


def read(path, **more) -> LlavaFolder:
    return read_llava_folder(path, dtype=torch.float32, **more)


def merge_into(tiny, name, *more):
    main(["--model-path", str(tiny / "llava-lora"), "--save-model-path", str(tiny / name), *more])
    return tiny / name


def test_each_layout_gives_the_recorded_answers(tiny):
    folder = read(tiny / "llava")
    assert folder.layout == "llava"
    assert_answers(folder.model, tiny, "llava")
    folder = read(tiny / "llava-hf", tokenizer=tiny / "llava")
    assert folder.layout == "transformers"
    assert_answers(folder.model, tiny, "llava")
    folder = read(tiny / "llava-lora")
    assert folder.adapter.r == 4
    assert_answers(folder.model, tiny, "lora")


def test_a_plain_language_model_gets_a_projector(tiny):
    values = json.loads((tiny / "llava/config.json").read_text())
    (tiny / "plain").mkdir()
    shutil.copy(tiny / "llava/tokenizer.model", tiny / "plain")
    plain = {key: value for key, value in values.items() if not key.startswith("mm_")}
    (tiny / "plain/config.json").write_text(json.dumps(plain))
    state = read_state_dict(tiny / "llava")
    torch.save({n: v for n, v in state.items() if "mm_projector" not in n}, tiny / "plain/pytorch_model.bin")
    torch.save({n: v for n, v in state.items() if "mm_projector" in n}, tiny / "mm_projector.bin")
    with pytest.raises(DataError, match="without an image tower"):
        read(tiny / "plain")
    assert read(tiny / "plain", vision_tower=tiny / "clip").layout == "llama"
    folder = read(tiny / "plain", vision_tower=tiny / "clip", projector=tiny / "mm_projector.bin")
    assert_answers(folder.model, tiny, "llava")


def test_a_merged_folder_loads_alone(tiny):
    merged = merge_into(tiny, "merged", "--dtype", "float32", "--max_shard_gb", "0.00005")
    assert (merged / "model.safetensors.index.json").exists()
    shutil.rmtree(tiny / "llava")
    assert_answers(read(merged).model, tiny, "lora")
    (tiny / "clip").rename(tiny / "elsewhere")
    assert "model.mm_projector.0.weight" in read(merged).model.state_dict()


def test_the_originals_arithmetic(tiny):
    merged = read_state_dict(merge_into(tiny, "half", "--float16_merge"))
    once = read_state_dict(merge_into(tiny, "once"))
    name = "model.layers.0.self_attn.q_proj"
    a, b = (
        read_state_dict(tiny / "llava-lora/adapter_model.safetensors")[f"base_model.model.{name}.lora_{x}.weight"]
        for x in "AB"
    )
    base = read_state_dict(tiny / "llava")[f"{name}.weight"]
    assert torch.equal(merged[f"{name}.weight"], base + ((b.half().float() @ a.half().float()) * 2).half())
    assert torch.equal(once[f"{name}.weight"], (base.float() + 2 * (b @ a)).half())


def test_an_adapter_comes_back_as_it_was(tiny):
    folder = read(tiny / "llava-lora")
    save_adapter(tiny / "again", folder)
    assert_answers(read(tiny / "again").model, tiny, "lora")
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        first, second = (read_state_dict(tiny / place / name) for place in ("llava-lora", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


# ---- what can be wrong ----


def test_a_missing_shard_is_named(tiny):
    (tiny / "llava/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(EngineError, match="needs the shard pytorch_model-00002-of-00002.bin"):
        read(tiny / "llava")


def test_an_adapter_for_another_base(tiny):
    values = json.loads((tiny / "llava-lora/config.json").read_text())
    (tiny / "llava-lora/config.json").write_text(json.dumps(values | {"hidden_size": 64}))
    with pytest.raises(ModelError, match="for a base of hidden_size 64, .* has 32"):
        read(tiny / "llava-lora")


def test_another_name_of_the_base_is_warned_of(tiny, capsys):
    (tiny / "llava").rename(tiny / "other")
    read(tiny / "llava-lora", base=tiny / "other")
    assert "was trained on llava, not on" in capsys.readouterr().err


def test_an_unfinished_adapter_is_refused(tiny):
    (tiny / "llava-lora/non_lora_trainables.bin").unlink()
    with pytest.raises(DataError, match=r"has no non_lora_trainables\.bin"):
        read(tiny / "llava-lora")


def test_existing_outputs(tiny):
    out = merge_into(tiny, "merged")
    with pytest.raises(DataError, match="exists: give another folder, or --overwrite"):
        merge_into(tiny, "merged")
    merge_into(tiny, "merged", "--overwrite")
    assert sorted(path.name for path in tiny.iterdir() if path.name.startswith(".")) == []
    (out / "config.json").unlink()
    with pytest.raises(DataError, match="is no model folder"):
        merge_into(tiny, "merged", "--overwrite")
    with pytest.raises(ModelError, match="adapters that are not merged"):
        save_full_model(tiny / "x", read(tiny / "llava-lora"))
