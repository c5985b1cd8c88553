"""Whatever a user can get wrong with LLaVA's training: exit code 2, one line that names it, nothing overwritten."""

import ast
import json
import re
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scripts.llava_args import build_parser
from tests.paths import ROOT
from tests.scripts.bad_inputs import BadInputs, failure
from tests.scripts.llava_run import BASE, IMAGES, TINY, TOWER, conversation, program, rows, train_flags, trained_run
from tests.scripts.vqa_run import tree


class Case:
    """Private copies of model, tower, images and training file, and an output folder that holds an older result."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp = tmp_path
        self.model = Path(shutil.copytree(BASE, tmp_path / "models" / "llava"))
        self.tower = Path(shutil.copytree(TOWER, tmp_path / "models" / "clip"))
        self.images = Path(shutil.copytree(IMAGES, tmp_path / "images"))
        self.data = tmp_path / "train.json"
        self.samples(rows())
        self.output = tmp_path / "output"
        self.output.mkdir()
        (self.output / "submission.npy").write_text("older")

    def samples(self, content: object) -> None:
        self.data.write_text(json.dumps(content))

    def sample(self, **values: object) -> list[str]:
        """The first sample is another one."""
        self.samples([rows()[0] | values, *rows()[1:]])
        return self.train()

    def say(self, question: str, answer: str) -> list[str]:
        return self.sample(conversations=[{"from": "human", "value": question}, {"from": "gpt", "value": answer}])

    def train(self, *more: object) -> list[str]:
        places = ("--image_folder", self.images)
        return train_flags(self.output, "--max_steps", 1, *places, *more, model=self.model, data=self.data)

    def resume(self, *more: object, written: dict[str, dict] | None = None) -> list[str]:
        """An epoch has been trained on this model; ``written`` is changed in its checkpoint's files."""
        checkpoint = Path(shutil.copytree(trained_run() / "checkpoint-0", self.output / "checkpoint-0"))
        (self.output / "latest").write_text("checkpoint-0\n")
        changed = {"adapter_config.json": {"base_model_name_or_path": str(self.model)}}
        for name, values in (written or {}).items():
            changed[name] = changed.get(name, {}) | values
        for name, values in changed.items():
            content = json.loads((checkpoint / name).read_text()) | values
            (checkpoint / name).write_text(json.dumps(content))
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            new = (checkpoint / name).read_bytes()
            manifest["files"][name] = {"bytes": len(new), "crc32": zlib.crc32(new)}
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        return self.train("--max_steps", -1, "--num_train_epochs", 2, *more)

    def config(self, **values: object) -> list[str]:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return self.train()


# what LLaVA's program has no flags for, or refuses before the engine sees it
NOT_OF_LLAVA = {"--model_ema", "--model_ema_decay", "--layer_decay", "--opt_betas", "--opt_eps"}
OF_OTHER_PROGRAMS = {"--nnodes", "--nproc_per_node", "--shm-size", "--ipc", "--upgrade", "--signal"}

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
MET_IN_A_STEP = ("an_image_that_is_none",)
BAD = BadInputs()
bad = BAD.register


# ---- the model's folder ----


@bad(r"no model folder at .*nowhere: give --model_name_or_path")
def no_model(case):
    return case.train("--model_name_or_path", case.tmp / "nowhere")


@bad(r"--output_dir .* is --model_name_or_path as well, which it would replace: give another folder")
def the_model_as_the_result(case):
    return case.train("--output_dir", case.model)


@bad(r"--output_dir .* is --image_folder as well, which it would replace: give another folder")
def the_images_as_the_result(case):
    return case.train("--image_folder", case.tmp, "--output_dir", case.tmp)


@bad(r"--image_aspect_ratio padd is unknown: give pad or square")
def a_misspelt_aspect_ratio(case):
    return case.train("--image_aspect_ratio", "padd")


@bad(r"needs the shard pytorch_model-00002-of-00002.bin, which is not in .*: download it")
def a_missing_shard(case):
    (case.model / "pytorch_model-00002-of-00002.bin").unlink()
    return case.train()


@bad(
    r"index\.json says that model\.layers\.9\.no\.weight is in pytorch_model-00001-of-00002\.bin, "
    r"where it is not: download both again"
)
def an_index_that_names_an_absent_tensor(case):
    path = case.model / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.no.weight"] = "pytorch_model-00001-of-00002.bin"
    path.write_text(json.dumps(index))
    return case.train()


@bad(
    r"llava/model\.safetensors is not a sound safetensors file .*header too large.*: it is damaged .*; download or copy"
)
def a_corrupt_safetensors_header(case):
    for path in case.model.glob("pytorch_model*"):
        path.unlink()
    (case.model / "model.safetensors").write_bytes(b"\xff" * 64)
    return case.train()


@bad(r"00001-of-00002\.bin cannot be read as a checkpoint: it is cut off at 1000 bytes; download or copy it again")
def a_torn_shard(case):
    path = case.model / "pytorch_model-00001-of-00002.bin"
    path.write_bytes(path.read_bytes()[:1000])
    return case.train()


@bad(r"llava lacks 24 weights, the first: model\.embed_tokens\.weight; download it again")
def a_model_without_some_weights(case):
    for path in case.model.glob("pytorch_model*"):
        path.unlink()
    save_file({"lm_head.weight": torch.zeros(json.loads((BASE / "config.json").read_text())["vocab_size"], 32)},
              case.model / "model.safetensors")  # fmt: skip
    return case.train()


@bad(r"no image tower at .*, nor beside .*: download it and give it as --vision_tower")
def no_tower(case):
    shutil.rmtree(case.tower)
    return case.config(mm_vision_tower="openai/clip-of-nobody")


@bad(r"features are 24 wide, mm_hidden_size of the model's config says 999: give the tower that the model was trained")
def a_tower_of_another_width(case):
    return case.config(mm_hidden_size=999)


@bad(r"llava/config\.json:1: not JSON \(.* at column 2\): the file is cut off, copy or download it again")
def a_config_that_is_no_json(case):
    (case.model / "config.json").write_text("{")
    return case.train()


@bad(r"llava/config\.json: hidden_act 'gelu' is not implemented here, only 'silu'")
def an_activation_that_is_not_offered(case):
    return case.config(hidden_act="gelu")


@bad(r"no sentencepiece model at .*llava/tokenizer\.model \(.*\): give the folder of a LLaVA or Vicuna model")
def no_tokenizer(case):
    (case.model / "tokenizer.model").unlink()
    return case.train()


@bad(r"is an adapter: merge it first \(scripts/merge_lora_weights.py\)")
def an_adapter_as_the_model(case):
    folder = Path(shutil.copytree(TINY / "llava-lora", case.tmp / "models" / "llava-lora"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(case.model)}))
    return case.train("--model_name_or_path", folder)


@bad(r"--mm_projector_type linear: .*llava was trained with mlp2x_gelu: leave it out")
def another_projector_than_the_models(case):
    return case.train("--mm_projector_type", "linear")


@bad(r"other\.bin holds x, which is no weight of a projector: give mm_projector\.bin")
def a_projector_file_of_something_else(case):
    torch.save({"x": torch.zeros(2)}, case.tmp / "other.bin")
    return case.train("--pretrain_mm_mlp_adapter", case.tmp / "other.bin")


@bad(r"checkpoint-0 is of another run \(--lora_r 8 instead of 4\): give the same flags, or another --output_dir")
def a_checkpoint_of_another_rank(case):
    return case.resume("--lora_r", 8)


@bad(r"is of another run \(--lora_alpha 800.0 instead of 8.0\): give the same flags, or another --output_dir")
def a_checkpoint_of_another_scale(case):
    return case.resume("--lora_alpha", 800, "--lora_dropout", 0.5)


@bad(r"is of another run \(--model_name_or_path .*other instead of .*llava\)")
def a_checkpoint_of_another_base(case):
    shutil.copytree(BASE, case.model.with_name("other"))
    return case.resume("--model_name_or_path", case.model.with_name("other"))


@bad(r"is of another run \(target_modules \[.*'v_proj'\] instead of \['q_proj', 'v_proj'\]\)")
def a_checkpoint_of_other_adapted_layers(case):
    return case.resume(written={"adapter_config.json": {"target_modules": ["v_proj", "q_proj"]}})


@bad(r"is of another run \(mm_vision_select_layer -1 instead of -2\)")
def a_checkpoint_of_another_layer_of_the_tower(case):
    path = case.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mm_vision_select_layer": -1}))
    return case.resume()


@bad(
    r"checkpoint-0 is of another run \(it trained adapters, this one trains the projector alone "
    r"\(--tune_mm_mlp_adapter True\)\): give the same flags, or another --output_dir"
)
def a_checkpoint_of_another_kind(case):
    return case.resume("--tune_mm_mlp_adapter", "True")


@bad(r"is of another run \(--model_name_or_path .*other instead of .*llava\)")
def a_projectors_checkpoint_of_another_base(case):
    shutil.copytree(BASE, case.model.with_name("other"))
    program(*case.train("--tune_mm_mlp_adapter", "True"))
    return case.train("--tune_mm_mlp_adapter", "True", "--model_name_or_path", case.model.with_name("other"))


@bad(r"checkpoint-0 is of another run \(no --deepspeed, with which it was trained\): give the same flags, or another")
def a_checkpoint_of_deepspeed(case):
    argv = case.resume()
    (case.output / "checkpoint-0" / "deepspeed_run.pth").write_bytes(b"")
    return argv


# ---- the data ----


@bad(r"no file .*nothing.json: run python scripts/format_dataset_for_llava.py first")
def no_training_file(case):
    return case.train("--data_path", case.tmp / "nothing.json")


@bad(r"train\.json must hold a list of samples, such as \[\{.id.: .*.conversations.:")
def a_training_file_of_columns(case):
    case.samples({"image": {"0": "a.png"}})
    return case.train()


@bad(r"sample 0 \(counted from 0\) has an image but no <image> in its text: mend the sample")
def an_image_without_its_place(case):
    return case.say("What is this?", "a cup")


@bad(r"sample 0 .* has <image> in 2 turns and one image: keep it in one turn")
def an_image_place_in_the_answer(case):
    return case.say("<image>\nWhat is this?", "an <image>")


@bad(r"sample 0 \(counted from 0\) has <image> but no image: mend the sample")
def a_place_without_an_image(case):
    return case.sample(image=None)


@bad(r"1 of \d+ images are not in .*images, the first: gone.png; check --image_folder")
def an_image_that_is_not_there(case):
    return case.sample(image="gone.png")


@bad(r"sample 0 .*: '\.\./escape\.png' contains '\.\.'; paths in data files must stay inside the data folder")
def an_image_outside_its_folder(case):
    return case.sample(image="../escape.png")


@bad(
    r"sample \d \(s\d\): cannot read image .*broken\.png: it holds text, not an image; "
    r"replace the file or remove its entry"
)
def an_image_that_is_none(case):
    (case.images / "broken.png").write_text("no image")
    case.samples([conversation(n, "a cup", "broken.png") for n in range(4)])
    return case.train()


@bad(r"sample 0 \(s0\): no token of an answer .* so nothing can be learned: give answers that are not empty")
def an_empty_answer(case):
    return case.say("<image>\nWhat is this?", "")


@bad(r"sample 0 \(s0\): its answer begins at row \d+, behind --model_max_length 12: raise it or shorten the sample")
def an_answer_behind_the_longest_length(case):
    case.samples([conversation(n, "a cup", sorted(p.name for p in IMAGES.iterdir())[0]) for n in range(8)])
    return case.train("--model_max_length", 12, "--version", "plain")


@bad(r"sample 0 \(s0\): turn 2 is from 'human', must be from 'gpt', because the two take turns: mend the sample")
def two_questions_in_a_row(case):
    turn = {"from": "human", "value": "<image>\nWhat?"}
    return case.sample(conversations=[turn, turn | {"value": "again?"}])


@bad(r"sample 0 \(s0\): no turn of 'gpt' follows one of 'human', so nothing .*: put the question before its answer")
def an_answer_before_its_question(case):
    return case.sample(conversations=rows()[0]["conversations"][::-1])


@bad(r"3 training samples do not fill one step of 4 \(per_device_train_batch_size 2 x gradient_.*lower the batch size")
def fewer_samples_than_a_step(case):
    return case.train("--limit_samples", 3)


@bad(r"no file .*questions\.jsonl: give --val_questions")
def a_validation_without_questions(case):
    (case.tmp / "rows.json").write_text("[]")
    return case.train("--val_annotations", case.tmp / "rows.json", "--val_questions", case.tmp / "questions.jsonl")


# ---- flags ----


@bad(r"did you mean --lora_alpha\?")
def a_misspelt_flag(case):
    return case.train("--lora_alfa", 8)


@bad(r"--lora_enable: must be True or False, got 'maybe'")
def a_truth_that_is_none(case):
    return case.train("--lora_enable", "maybe")


@bad(r"--mm_use_im_patch_token True is not offered: give False")
def an_option_of_old_models(case):
    return case.train("--mm_use_im_patch_token", "True")


@bad(r"--image_aspect_ratio anyres .* is not offered: give pad")
def tiles(case):
    return case.train("--image_aspect_ratio", "anyres")


@bad(r"--bits 4 is for frozen weights: train adapters, or leave it out")
def four_bits_to_be_trained(case):
    return case.train("--bits", 4, "--lora_enable", "False")


@bad(r"--bits 4 does not go with --deepspeed: leave one of them out")
def four_bits_under_deepspeed(case):
    return case.train("--bits", 4, "--deepspeed", "scripts/zero2.json")


@bad(r"--tune_mm_mlp_adapter and --freeze_mm_mlp_adapter contradict each other: leave one out")
def a_projector_trained_and_frozen(case):
    return case.train("--tune_mm_mlp_adapter", "True", "--freeze_mm_mlp_adapter", "True")


@bad(r"--unfreeze_mm_vision_tower goes with --lora_enable False: an adapter has no tower")
def a_tower_beside_adapters(case):
    return case.train("--unfreeze_mm_vision_tower", "True")


@bad(r"--fp16 needs a CUDA device: on the CPU leave it out")
def float16_on_the_cpu(case):
    return case.train("--fp16", "True")


@bad(r"no such file: .*zero9\.json: give DeepSpeed's settings as --deepspeed")
def no_deepspeed_file(case):
    return case.train("--deepspeed", case.tmp / "zero9.json")


@bad(r"zero3\.json is of stage 3, .*: take stage 2, or leave --val_annotations out")
def a_validation_under_stage_3(case):
    from tests.scripts.test_llava_program import labelled_questions

    return case.train("--deepspeed", "scripts/zero3.json", *labelled_questions(case.tmp), "--val_image_folder", IMAGES)


@bad(r"--lora_dropout: must be below 1, got 1")
def a_dropout_that_leaves_nothing(case):
    return case.train("--lora_dropout", 1)


@bad(r"--lora_alpha: must be a finite number, got 1e400")
def an_infinite_scale(case):
    return case.train("--lora_alpha", "1e400")


@bad(r"--num_train_epochs: must be at most 1e\+06, got inf")
def endless_training(case):
    return case.train("--num_train_epochs", "inf")


@bad(r"--seed: must be below 2\*\*63, got 99999999999999999999999")
def a_seed_that_no_generator_takes(case):
    return case.train("--seed", "99999999999999999999999")


@bad(r"2 training samples do not fill one step of 4 \(per_device_train_batch_size 2 x gradient_.*lower the batch size")
def fewer_samples_than_a_step_in_any_order(case):
    return case.train("--limit_samples", 2, "--group_by_modality_length", "False")


@bad(r"--resume .*nothing: no checkpoint folder of a run there .*; give one, or 'latest'")
def nothing_to_resume(case):
    return case.train("--resume_from_checkpoint", case.tmp / "nothing")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys, name):
    spoil, message = BAD[name]
    case = Case(tmp_path)
    argv = spoil(case)
    before = tree(tmp_path)
    code, line = failure(capsys, argv, program)
    assert code == 2, line
    assert re.search(message, line), line
    after = tree(tmp_path)
    if name in MET_IN_A_STEP:  # by then the run has begun
        after.pop(str(case.output / "run.json"))
    assert after == before


def test_the_engine_names_no_flag_that_llavas_program_lacks():
    known = {name for action in build_parser()._actions for name in action.option_strings}
    named = {}
    for path in sorted((ROOT / "engine").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)}
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", "\n".join(texts - docstrings)):
            named.setdefault(flag, path.name)
    assert len(named) > 10
    assert {f: place for f, place in named.items() if f not in known | NOT_OF_LLAVA | OF_OTHER_PROGRAMS} == {}
