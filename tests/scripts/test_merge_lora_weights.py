"""scripts/merge_lora_weights.py and scripts/llava_folder.py: every kind of folder read, merged and saved again."""

import errno
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from data.errors import DataError
from engine.errors import EngineError, RunError
from engine.weights import read_state_dict
from models.errors import ModelError
from scripts import ask, export_adapter, llava_saving, model_vqa_loader
from scripts.llava_folder import LlavaFolder, read_llava_folder
from scripts.llava_saving import checkpoint_format, save_full_model
from scripts.merge_lora_weights import main
from tests.parity.fixture_files import fixture_path
from tests.parity.test_llava_loading import assert_answers
from tests.scripts.llava_run import program, train_flags
from tests.scripts.vqa_run import read_lines


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
    for projector in (tiny / "mm_projector.bin", tiny):  # the file, or the folder that it lies in
        folder = read(tiny / "plain", vision_tower=tiny / "clip", projector=projector)
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


def write_adapter(output, folder: LlavaFolder) -> None:
    """As a training run does."""
    output.mkdir()
    checkpoint_format(folder, "lora").write(folder.model.state_dict(), output)


def test_an_adapter_comes_back_as_it_was(tiny):
    write_adapter(tiny / "again", read(tiny / "llava-lora"))
    assert_answers(read(tiny / "again").model, tiny, "lora")
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        first, second = (read_state_dict(tiny / place / name) for place in ("llava-lora", "again"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("cut", [len("base_model."), len("base_model.model.")])
def test_what_trained_beside_an_adapter_may_have_less_of_pefts_prefix(tiny, cut):
    path = tiny / "llava-lora/non_lora_trainables.bin"
    state = {name[cut:]: value.clone() for name, value in read_state_dict(path).items()}
    path.unlink()  # what has been read is mapped
    torch.save(state, path)
    assert_answers(read(tiny / "llava-lora").model, tiny, "lora")


def change_config(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_tower(tiny) -> None:
    """The base as LLaVA-1.6 is published: tiles, a fine-tuned tower and the end of an image's row in the checkpoint."""
    config = tiny / "llava/config.json"
    change_config(
        config, image_aspect_ratio="anyres", mm_patch_merge_type="spatial_unpad", unfreeze_mm_vision_tower=True
    )
    state = read_state_dict(tiny / "llava")
    tower = {f"model.vision_tower.vision_tower.{n}": v for n, v in read_state_dict(tiny / "clip").items()}
    state |= {name: value * 1.1 for name, value in tower.items() if ".vision_model." in name}
    for path in (tiny / "llava").glob("pytorch_model*"):
        path.unlink()
    torch.save(state | {"model.image_newline": torch.zeros(32)}, tiny / "llava/pytorch_model.bin")


def test_a_base_of_llava_1_6_is_read_with_whole_images(tiny, capsys):
    with_tower(tiny)
    folder = read(tiny / "llava")
    said = capsys.readouterr().err
    assert "asks for tiles of LLaVA-1.6 (image_aspect_ratio 'anyres', mm_patch_merge_type 'spatial_unpad')" in said
    assert said.count("warning") == 1
    assert (folder.values["image_aspect_ratio"], folder.values["mm_patch_merge_type"]) == ("pad", "flat")
    name = "pre_layrnorm.weight"
    own = read_state_dict(tiny / "clip")[f"vision_model.{name}"]
    assert torch.equal(folder.model.tower.state_dict()[name], own * 1.1)


def test_a_base_of_llava_1_6_trains_merges_and_answers_and_answers_alone(tiny, tmp_path, capsys):
    with_tower(tiny)
    run, merged, base = tmp_path / "run", tmp_path / "merged", tiny / "llava"
    fast = ("--max_steps", 4, "--learning_rate", 0.05, "--lr_scheduler_type", "constant")
    program(*train_flags(run, *fast, "--image_aspect_ratio", "pad", "--mm_patch_merge_type", "flat", model=base))
    values = json.loads((run / "config.json").read_text())
    assert (values["image_aspect_ratio"], values["mm_patch_merge_type"]) == ("pad", "flat")
    main(["--model-path", str(run), "--model-base", str(base), "--save-model-path", str(merged), "--dtype", "float32"])
    questions = ["--question-file", str(tiny / "questions.jsonl"), "--image-folder", str(tiny / "images")]
    more = ["--device", "cpu", "--num_workers", "0", "--max_new_tokens", "4"]
    texts, warnings = {}, {}
    for name, path in (("merged", merged), ("adapter", run), ("base", base)):
        capsys.readouterr()
        output = tmp_path / f"{name}.jsonl"
        model_vqa_loader.main(["--model-path", str(path), "--answers-file", str(output), *questions, *more])
        texts[name] = [row["text"] for row in read_lines(output)]
        warnings[name] = capsys.readouterr().err.count("asks for tiles of LLaVA-1.6")
    assert texts["merged"] == texts["adapter"] != texts["base"]
    assert warnings == {"merged": 0, "adapter": 0, "base": 1}
    image = ["--image", str(tiny / "images/valid_00000.png"), "--device", "cpu", "--max_new_tokens", "4"]
    ask.main(["--checkpoint", str(base), "--question", "what is this?", "--json", *image])
    assert json.loads(capsys.readouterr().out)["answer"]


# ---- what can be wrong ----


def test_another_tower_than_that_of_the_checkpoint_is_refused(tiny):
    shutil.copytree(tiny / "clip", tiny / "other_clip")
    assert read(tiny / "llava", vision_tower=tiny / "other_clip").model is not None
    with_tower(tiny)
    assert read(tiny / "llava", vision_tower=tiny / "clip").model is not None  # it has the sizes and image settings
    for folder in ("llava", "llava-hf"):
        with pytest.raises(ModelError, match="brings its own image tower, so .*other_clip would not be used: leave"):
            read(tiny / folder, vision_tower=tiny / "other_clip", tokenizer=tiny / "llava")


def test_a_projector_with_holes_is_refused_over_every_base(tiny):
    state = read_state_dict(tiny / "llava")
    torch.save({"model.mm_projector.0.weight": state["model.mm_projector.0.weight"]}, tiny / "mm_projector.bin")
    with pytest.raises(ModelError, match=r"mm_projector.bin lacks model.mm_projector.0.bias of a projector mlp2x_gelu"):
        read(tiny / "llava", projector=tiny / "mm_projector.bin")


def test_a_projector_as_the_model_is_named(tiny):
    (tiny / "stage1").mkdir()
    shutil.copy(tiny / "llava/config.json", tiny / "stage1")
    torch.save({}, tiny / "stage1/mm_projector.bin")
    with pytest.raises(
        DataError, match=r"stage1 holds a projector \(mm_projector.bin\), no model: .*--pretrain_mm_mlp"
    ):
        read(tiny / "stage1")


def test_longer_word_tables_are_cut_in_transformers_files_alone(tiny):
    state, name = read_state_dict(tiny / "llava"), "model.embed_tokens.weight"
    for path in (tiny / "llava").glob("pytorch_model*"):
        path.unlink()
    torch.save(state | {name: torch.cat([state[name], state[name][:20]])}, tiny / "llava/pytorch_model.bin")
    with pytest.raises(ModelError, match=r"embed_tokens.weight is \(640, 32\), the model's \(620, 32\): other sizes"):
        read(tiny / "llava")


def test_a_number_that_json_has_not_is_not_written(tiny):
    folder = read(tiny / "llava-lora")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_adapter(tiny / "again", replace(folder, adapter=replace(folder.adapter, lora_alpha=float("inf"))))
    assert not (tiny / "again" / "adapter_config.json").exists()


def test_a_missing_shard_is_named(tiny):
    (tiny / "llava/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(EngineError, match="needs the shard pytorch_model-00002-of-00002.bin"):
        read(tiny / "llava")


def test_an_adapter_for_another_base(tiny):
    values = json.loads((tiny / "llava-lora/config.json").read_text())
    (tiny / "llava-lora/config.json").write_text(json.dumps(values | {"hidden_size": 64}))
    with pytest.raises(ModelError, match="for a base of hidden_size 64, .* has 32"):
        read(tiny / "llava-lora")


WAYS = {
    "merge": (main, "--save-model-path", "config.json", "model.safetensors"),
    "export": (export_adapter.main, "--save-path", "adapter_config.json", "adapter_model.safetensors"),
}
FULL = r"could not write \S+out \(the disk is full\): free some space"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("writer", ["_write_json", "write_whole"])
@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunError, FULL),
        (SafetensorError("I/O error: no space left on device"), RunError, FULL),
        (KeyError("a bug"), KeyError, "a bug"),
    ],
)
def test_a_folder_that_cannot_be_written_whole_is_not_there(tiny, monkeypatch, way, writer, failure, kind, message):
    """The same command again needs no clearing up; a bug is not taken for a full disk."""
    start, flag, *files = WAYS[way]
    argv = ["--model-path", str(tiny / "llava-lora"), flag, str(tiny / "out")]
    before, write = sorted(tiny.iterdir()), getattr(llava_saving, writer)

    def fail(path, content):
        if path.name in files:
            raise failure
        write(path, content)

    monkeypatch.setattr(llava_saving, writer, fail)
    with pytest.raises(kind, match=message):
        start(argv)
    assert sorted(tiny.iterdir()) == before
    monkeypatch.undo()
    start(argv)
    assert set(files) <= {path.name for path in (tiny / "out").iterdir()}


def test_another_name_of_the_base_is_warned_of(tiny, capsys):
    (tiny / "llava").rename(tiny / "other")
    read(tiny / "llava-lora", base=tiny / "other")
    assert "was trained on llava, not on" in capsys.readouterr().err


def test_a_base_that_is_a_link_has_either_name(tiny, capsys):
    (tiny / "llava").rename(tiny / "snapshot")
    (tiny / "llava").symlink_to(tiny / "snapshot")
    read(tiny / "llava-lora", base=tiny / "llava")
    change_config(tiny / "llava-lora/adapter_config.json", base_model_name_or_path="somewhere/snapshot")
    read(tiny / "llava-lora", base=tiny / "llava")
    assert "was trained on" not in capsys.readouterr().err


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
