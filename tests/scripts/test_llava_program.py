"""run_llava_lora.py: what is trained, what is written, stops, several processes, DeepSpeed."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import run_llava_lora
from data.errors import DataError
from data.llava_conversation import TEMPLATES
from engine.errors import EngineError, RunError
from engine.weights import read_state_dict
from models.lora import PEFT_PREFIX
from scripts import llava_saving
from scripts.llava_args import parse_args
from scripts.llava_folder import LlavaFolder, read_llava_folder
from scripts.llava_model import build_for_training
from scripts.llava_resume import check_resume
from tests.engine.test_folder_lock import Holder
from tests.engines import assert_same_result, assert_sound
from tests.helpers import run_in_processes
from tests.nursery import Nursery
from tests.scripts.bad_inputs import failure
from tests.scripts.llava_run import (
    BASE,
    IMAGES,
    TOWER,
    conversation,
    copy_of,
    program,
    rows,
    start,
    train_flags,
    trained_run,
)
from tests.scripts.vqa_run import differences, read_lines, tree

PUBLISHED = ("adapter_config.json", "adapter_model.safetensors", "config.json", "non_lora_trainables.bin")


def _run(rank: int, argv: list[str]) -> None:
    program(*argv)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery("run_llava_lora", "tests.fault_points", "deepspeed", environment={"DS_ACCELERATOR": "cpu"})
    yield nursery
    nursery.close()


def adapter_of(folder: Path) -> dict[str, Tensor]:
    """What training has moved, under the model's own names."""
    state = read_state_dict(folder / "adapter_model.safetensors") | read_state_dict(folder / "non_lora_trainables.bin")
    return {name.removeprefix(PEFT_PREFIX): value for name, value in state.items()}


def start_of(tmp_path: Path, *more: object, dtype: torch.dtype | None = None) -> LlavaFolder:
    """The model that a run of ``train_flags`` begins with."""
    args = parse_args(train_flags(tmp_path / "none", *more))
    torch.manual_seed(args.seed)
    return build_for_training(args, dtype, torch.device("cpu"))


# ---- what is trained ----


def test_every_checkpoint_and_the_output_folder_hold_an_adapter_to_be_used_as_it_is():
    run = trained_run()
    for folder in (run, run / "checkpoint-0"):
        read = read_llava_folder(folder, base=BASE, vision_tower=TOWER, dtype=torch.float32)
        assert read.adapter.r == 4
        assert read.values["image_aspect_ratio"] == "pad"
        assert read.values["tokenizer_model_max_length"] == 2048
    for name in PUBLISHED:
        assert (run / name).read_bytes() == (run / "checkpoint-0" / name).read_bytes()
        assert (run / name).stat().st_mode & 0o444 == 0o444
    # the frozen model is in none of its files
    assert max(path.stat().st_size for path in run.rglob("*.*")) < 100_000


def test_the_loss_falls_and_the_log_says_so(tmp_path):
    program(*train_flags(tmp_path, "--num_train_epochs", 6, "--lr_scheduler_type", "constant"))
    losses = [row["train_loss"] for row in read_lines(tmp_path / "log.txt")]
    assert losses[-1] < 0.8 * losses[0]


def test_adapters_that_have_not_trained_change_nothing_and_exactly_the_plan_moves(tmp_path):
    folder = start_of(tmp_path)
    before = {name: value.clone() for name, value in folder.model.state_dict().items()}
    base = read_llava_folder(BASE, dtype=torch.float32).model
    ids, pixels = torch.tensor([[1, 5, -200, 7, 9]]), torch.randn(1, 3, *[folder.vision.image_size] * 2)
    folder.model.eval()
    with torch.no_grad():
        assert torch.equal(folder.model(ids, pixels).logits, base(ids, pixels).logits)
    after = adapter_of(trained_run())
    names = {name for name, parameter in folder.model.named_parameters() if parameter.requires_grad}
    assert after.keys() == names
    assert all(".lora_" in name or "mm_projector" in name for name in names)
    assert not [name for name in names if torch.equal(before[name], after[name])]


@pytest.mark.parametrize(
    ("flags", "moved"),
    [
        (("--freeze_mm_mlp_adapter", "True"), {"lora"}),
        (("--tune_mm_mlp_adapter", "True"), {"projector"}),
        (("--lora_enable", "False"), {"projector", "decoder"}),
        (("--lora_enable", "False", "--freeze_backbone", "True"), {"projector"}),
        (("--lora_enable", "False", "--unfreeze_mm_vision_tower"), {"projector", "decoder", "tower"}),
    ],
)
def test_after_three_steps_exactly_the_chosen_parts_have_moved(tmp_path, flags, moved):
    data = tmp_path / "train.json"
    data.write_text(json.dumps(rows(texts=False)))
    argv = train_flags(tmp_path / "run", *flags, "--max_steps", 3, data=data)
    before = {name: value.clone() for name, value in start_of(tmp_path, *flags).model.state_dict().items()}
    program(*argv)
    run = tmp_path / "run"
    if "lora" in moved:
        after = {**before, **adapter_of(run)}
    elif (run / "mm_projector.bin").exists():
        after = {**before, **read_state_dict(run / "mm_projector.bin")}
    else:
        after = read_llava_folder(run, dtype=torch.float32).model.state_dict()
    parts = {
        name: "lora" if ".lora_" in name else "projector" if "mm_projector" in name
        else "tower" if "vision_tower" in name else "decoder"
        for name in before
    }  # fmt: skip
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {parts[name] for name in changed} == moved
    # rows of words that no sample has get no gradient, but the table as a whole moves
    still = {name for name in before if parts[name] in moved} - changed
    assert not still


def test_a_fully_trained_checkpoint_is_a_model_folder_and_can_be_trained_on(tmp_path):
    program(*train_flags(tmp_path / "full", "--lora_enable", "False", "--max_steps", 1))
    folder = read_llava_folder(tmp_path / "full" / "checkpoint-step1", vision_tower=TOWER, dtype=None)
    assert folder.layout == "llava"
    program(*train_flags(tmp_path / "lora", "--max_steps", 1, model=tmp_path / "full", data=None))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "full"
    )


def test_a_pretrained_projector_is_taken(tmp_path):
    program(*train_flags(tmp_path / "first", "--tune_mm_mlp_adapter", "True", "--max_steps", 2))
    projector = tmp_path / "first" / "mm_projector.bin"
    places = (projector, tmp_path / "first", next((tmp_path / "first").glob("checkpoint-*")))
    for given, dtype in zip(places, (None, torch.bfloat16, torch.bfloat16), strict=True):
        state = start_of(tmp_path, "--pretrain_mm_mlp_adapter", given, dtype=dtype).model.state_dict()
        # to the last bit, also of a run in 16 bits
        assert all(torch.equal(state[name], value) for name, value in read_state_dict(projector).items())
    of_base = read_llava_folder(BASE, dtype=torch.float32).model.state_dict()
    alone = read_llava_folder(tmp_path / "first", base=BASE, dtype=torch.float32).model.state_dict()
    expected = of_base | read_state_dict(projector)
    assert all(torch.equal(alone[name], value) for name, value in expected.items())
    projector.unlink()
    with pytest.raises(EngineError, match=r"first is the folder of a run: give .*checkpoint-"):
        start_of(tmp_path, "--pretrain_mm_mlp_adapter", tmp_path / "first")


def test_bfloat16_keeps_frozen_weights_in_16_bits_and_trained_ones_in_32(tmp_path):
    args = parse_args(train_flags(tmp_path / "run", "--bf16", "True"))
    folder = build_for_training(args, torch.bfloat16, torch.device("cpu"))
    kinds = {parameter.requires_grad: parameter.dtype for parameter in folder.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    program(*train_flags(tmp_path / "run", "--bf16", "True", "--max_steps", 2))
    assert all(value.dtype == torch.float32 for value in adapter_of(tmp_path / "run").values())


@pytest.mark.parametrize("flags", [(), ("--lora_enable", "False")])
def test_deepspeed_gets_the_16_bits_that_it_would_round_to(tmp_path, flags, capsys):
    """It makes float32 masters of them by itself; whole weights in float32 would take twice the memory before."""
    more = ("--bf16", "True", *flags)
    plain, under = (
        start_of(tmp_path, *more, *deepspeed, dtype=torch.bfloat16).model
        for deepspeed in ((), ("--deepspeed", "scripts/zero3.json"))
    )
    assert {parameter.dtype for parameter in under.parameters()} == {torch.bfloat16}
    trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in under.named_parameters() if parameter.requires_grad}
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.bfloat16(), under.get_parameter(name))
    assert capsys.readouterr().err.count("every process holds the whole model on its device") == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_over_quantized_weights_train_go_on_and_load_over_the_dense_base(tmp_path, capsys, bits):
    argv = train_flags(tmp_path / "run", "--bits", bits, "--num_train_epochs", 4, "--lr_scheduler_type", "constant")
    program(*argv, "--max_steps", 5)
    program(*argv)
    assert "resumed from" in capsys.readouterr().err
    program(*train_flags(tmp_path / "whole", *argv[argv.index("--bits") :]))
    assert not differences(adapter_of(tmp_path / "run"), adapter_of(tmp_path / "whole"))
    losses = [row["train_loss"] for row in read_lines(tmp_path / "run" / "log.txt")]
    assert losses[-1] < 0.9 * losses[0]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    dense = sum(parameter.numel() for parameter in read_llava_folder(BASE, dtype=None).model.parameters())
    projector = sum(value.numel() for name, value in adapter_of(tmp_path / "run").items() if ".lora_" not in name)
    assert facts["parameters_frozen"] == dense - projector
    read_llava_folder(tmp_path / "run", base=BASE, vision_tower=TOWER, dtype=torch.float32)


def test_a_config_that_pads_with_the_end_token_trains_the_same(tmp_path):
    """Else no </s> would be learnt, and the model would never stop."""
    model = copy_of(BASE, tmp_path / "llava")
    copy_of(TOWER, tmp_path / "clip")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    for name, folder in (("usual", BASE), ("same", model)):
        program(*train_flags(tmp_path / name, "--max_steps", 2, model=folder))
    assert not differences(adapter_of(tmp_path / "usual"), adapter_of(tmp_path / "same"))


def test_recomputing_layers_changes_nothing(tmp_path):
    for name in ("True", "False"):
        program(*train_flags(tmp_path / name, "--gradient_checkpointing", name, "--max_steps", 3))
    assert not differences(adapter_of(tmp_path / "True"), adapter_of(tmp_path / "False"))


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    program(*train_flags(tmp_path / "none", "--dry_run"))
    assert not (tmp_path / "none").exists()
    assert "dry run: two steps taken" in capsys.readouterr().err


def test_a_run_says_that_it_draws_among_answers_and_only_of_our_own_key(tmp_path, capsys):
    data = tmp_path / "train.json"
    said = "4 samples with plainvl_answers: each epoch draws among their 8 answers"
    for key, expected in (("plainvl_answers", True), ("answers", False)):
        more = {key: ["a red mug", "no"]}
        data.write_text(json.dumps([row | (more if number < 4 else {}) for number, row in enumerate(rows())]))
        program(*train_flags(tmp_path / key, "--max_steps", 2, data=data))
        assert (said in capsys.readouterr().err) == expected
    program(*train_flags(tmp_path / "plain", "--max_steps", 2))
    assert not differences(adapter_of(tmp_path / "answers"), adapter_of(tmp_path / "plain"))
    assert differences(adapter_of(tmp_path / "plainvl_answers"), adapter_of(tmp_path / "plain"))


def test_a_part_of_an_epoch_and_one_and_a_half(tmp_path):
    program(*train_flags(tmp_path, "--num_train_epochs", 1.5))
    assert json.loads((tmp_path / "run.json").read_text())["total_steps"] == 6
    assert [row["epoch"] for row in read_lines(tmp_path / "log.txt")] == [0, 1]


def test_the_flags_of_the_originals_script_are_taken(tmp_path):
    """scripts/v1_5/finetune_task_lora.sh of the original, with this machine's places."""
    given = (
        "--lora_enable True --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False "
        "--mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 True "
        "--num_train_epochs 1 --per_device_eval_batch_size 4 --evaluation_strategy no --save_strategy steps "
        "--save_steps 50000 --save_total_limit 1 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine "
        "--logging_steps 1 --tf32 True --model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True "
        "--report_to wandb"
    )
    args = parse_args(
        train_flags(tmp_path, "--vision_tower", TOWER, "--deepspeed", "scripts/zero3.json", *given.split())
    )
    assert (args.mode, args.amp, args.batch_size, args.clip_grad) == ("lora", "bf16", 2, 1.0)
    assert {note.split()[0] for note in args.notes} == {"--per_device_eval_batch_size", "--report_to"}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--tune_mm_mlp_adapter", "True", "--lora_enable", "True"), ["--lora_r", "--lora_alpha", "--lora_enable"]),
        (("--lora_enable", "False", "--lora_dropout", "0.1"), ["--lora_r", "--lora_alpha", "--lora_dropout"]),
        (("--lora_enable", "True"), []),
        (("--save_steps", "7", "--max_new_tokens", "5"), ["--save_steps", "--max_new_tokens"]),
        (("--save_steps", "7", "--save_strategy", "steps"), []),
    ],
)
def test_a_flag_without_effect_is_reported(tmp_path, flags, named):
    assert [note.split()[0] for note in parse_args(train_flags(tmp_path, *flags)).notes] == named


def test_loader_processes_are_four_or_as_many_as_cores(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(run_llava_lora, "build_for_training", lambda args, *_: chosen.append(args.num_workers) or 1 / 0)
    argv = train_flags(tmp_path / "none", "--dry_run")
    given = argv.index("--dataloader_num_workers")
    for cores, flags in ((2, []), (16, []), (2, ["--dataloader_num_workers", "7"])):
        monkeypatch.setattr(run_llava_lora.distributed, "cores_per_process", lambda cores=cores: cores)
        with pytest.raises(ZeroDivisionError):
            program(*argv[:given], *argv[given + 2 :], *flags)
    assert chosen == [2, 4, 7]


def test_every_template_has_a_version():
    from scripts.llava_args import VERSIONS

    assert set(VERSIONS) == set(TEMPLATES)


# ---- the folder of a run ----


def test_what_is_edited_in_the_result_is_no_damage_but_what_is_edited_in_the_checkpoint_ends_the_same_command(
    tmp_path, capsys
):
    argv = train_flags(tmp_path, "--max_steps", 1)
    program(*argv)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with (tmp_path / name).open("r+b") as file:  # in place, as editors do
            file.write(b"?")
    capsys.readouterr()
    program(*argv)
    assert "done after 1 steps" in capsys.readouterr().err
    assert_sound(tmp_path)
    assert (
        read_llava_folder(tmp_path, base=BASE, vision_tower=TOWER, dtype=torch.float32).adapter.r == 4
    )  # the result is written anew
    (tmp_path / "checkpoint-step1" / "adapter_config.json").write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(EngineError, match="holds no sound checkpoint to go on from.*adapter_config.json has 2 bytes"):
        program(*argv)
    assert tree(tmp_path) == before


def test_a_large_file_of_the_result_is_on_the_disk_once(tmp_path, monkeypatch):
    checkpoint = trained_run() / "checkpoint-0"
    size = (checkpoint / "adapter_model.safetensors").stat().st_size
    monkeypatch.setattr(llava_saving, "MIN_LINKED_BYTES", size)
    for _ in range(2):  # the second time over the first result
        llava_saving.publish(checkpoint, tmp_path)
    for name in PUBLISHED:
        linked = (checkpoint / name).stat().st_size >= size
        assert (tmp_path / name).samefile(checkpoint / name) == linked, name
        assert (tmp_path / name).read_bytes() == (checkpoint / name).read_bytes()
    assert (tmp_path / "adapter_model.safetensors").samefile(checkpoint / "adapter_model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PUBLISHED)


def test_a_second_run_into_the_folder_of_one_under_way_is_refused_and_neither_is_disturbed(tmp_path):
    argv = train_flags(tmp_path, "--max_steps", 1)
    holder = Holder(tmp_path)
    try:
        before = tree(tmp_path)
        with pytest.raises(EngineError, match=rf"another run \(process {holder.process.pid} on .*choose another"):
            program(*argv)
        assert tree(tmp_path) == before
        program(*argv, "--dry_run")
        assert tree(tmp_path) == before
    finally:
        holder.end()
    program(*argv)  # the folder is free again
    assert not list(tmp_path.glob(".*"))


def test_a_rate_that_ends_in_weights_without_a_finite_value_saves_nothing_and_leaves_with_1(tmp_path, capsys):
    argv = train_flags(tmp_path, "--learning_rate", "1e38", "--warmup_ratio", 0, "--max_steps", 1)
    with pytest.raises(RunError, match=r"after step 1 the weights are not finite \(the first: .*lora_.*lower learning"):
        program(*argv)
    assert "loss nan" not in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "run.json"]


# ---- stops ----


def test_a_run_that_goes_on_names_other_settings_and_takes_a_base_that_has_moved(tmp_path, capsys):
    model = copy_of(BASE, tmp_path / "first" / "llava")
    copy_of(TOWER, tmp_path / "first" / "clip")
    program(*train_flags(tmp_path / "run", "--max_steps", 1, model=model))
    model.parent.rename(tmp_path / "second")
    argv = train_flags(tmp_path / "run", "--max_steps", 2, model=tmp_path / "second" / "llava")
    capsys.readouterr()
    program(*argv, "--lora_dropout", "0.5", "--seed", 7, "--image_aspect_ratio", "square")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "other settings" in line]
    assert "--seed 7 instead of 42" in line
    assert "--image_aspect_ratio square instead of pad" in line
    assert "--lora_dropout 0.5 instead of 0.05" in line
    assert line.count("instead of") == 3


def with_other_answers(folder: Path) -> Path:
    path = folder / "other.json"
    path.write_text(json.dumps([conversation(n, "a jug", None) for n in range(16)]))
    return path


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: {"data": with_other_answers(folder)}, "but other questions, prompts, answers or images: 16)"),
        (lambda folder: {"more": ("--limit_samples", 8)}, r"(16 samples, this file has 8)"),
        (lambda folder: {"more": ("--version", "llava_v1")}, "another template (--version llava_v1 instead of v1)"),
    ],
    ids=["answers", "number", "template"],
)
def test_a_run_that_has_ended_does_not_stand_for_other_data(tmp_path, capsys, change, what):
    """Going on by itself it would say that it is done, and answer new prompts with the old adapter."""
    run = copy_of(trained_run(), tmp_path / "run")
    before = tree(run)
    changed = change(tmp_path)
    argv = train_flags(run, *changed.pop("more", ()), **changed)
    code, line = failure(capsys, argv, program)
    assert (code, tree(run)) == (2, before)
    assert what in line
    assert "another --output_dir to train anew; --resume_from_checkpoint latest goes on with the new data" in line
    program(*argv, "--resume_from_checkpoint", "latest", "--num_train_epochs", 2)
    assert f"warning: goes on from {run / 'checkpoint-0'}, which was trained on" in capsys.readouterr().err
    program(*argv, "--num_train_epochs", 2)  # by now it is of this data
    assert "warning: goes on from" not in capsys.readouterr().err


def test_a_run_without_deepspeed_does_not_go_on_with_it(tmp_path):
    flags = ("--deepspeed", "scripts/zero2.json")
    args = parse_args(train_flags(tmp_path / "none", *flags))
    with pytest.raises(DataError, match=r"of another run \(--deepspeed, which it was trained without\): give the same"):
        check_resume(trained_run() / "checkpoint-0", start_of(tmp_path, *flags), args)


def test_the_same_data_in_another_file_is_the_same(tmp_path, capsys):
    run = copy_of(trained_run(), tmp_path / "run")
    path = tmp_path / "moved.json"
    path.write_text(json.dumps(rows(), indent=4))
    program(*train_flags(run, "--version", "vicuna_v1", data=path))
    assert "warning" not in capsys.readouterr().err


_TWO_EPOCHS = ("--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "3")


@pytest.mark.parametrize(
    ("world_size", "flags", "place", "occasion"),
    [
        (1, (), "after optimizer step", 4),
        (1, (), "mid file", 10),
        (2, (), "after optimizer step", 4),
        (2, ("--deepspeed", "scripts/zero2.json"), "after optimizer step", 4),
        pytest.param(2, ("--deepspeed", "scripts/zero3.json"), "after optimizer step", 4, marks=pytest.mark.slow),
        pytest.param(1, ("--lora_enable", "False"), "after optimizer step", 4, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_and_started_again_ends_like_an_unbroken_one(
    nursery, tmp_path, world_size, flags, place, occasion
):
    """With dropout, so that the draws go on as well."""

    def argv(name: str) -> list[str]:
        return train_flags(tmp_path / name, *_TWO_EPOCHS, "--gradient_accumulation_steps", 2 // world_size, *flags)

    whole = start(nursery, world_size, argv("whole"), tmp_path / "stderr")
    assert whole.codes == [0] * world_size, whole.describe()
    killed = start(nursery, world_size, argv("killed"), tmp_path / "killed_stderr", place, 0, occasion)
    assert killed.codes[0] == -signal.SIGKILL, killed.describe()
    assert not killed.hung
    assert_sound(tmp_path / "killed")
    resumed = start(nursery, world_size, argv("killed"), tmp_path / "resumed_stderr")
    assert resumed.codes == [0] * world_size, resumed.describe()
    assert_same_result(tmp_path / "killed", tmp_path / "whole")
    names = [path.name for path in (tmp_path / "whole").iterdir() if path.suffix in (".bin", ".safetensors")]
    assert names
    for name in names:
        assert not differences(*(read_state_dict(tmp_path / run / name) for run in ("killed", "whole"))), name


def test_a_signal_saves_and_the_same_command_goes_on(nursery, tmp_path):
    argv = train_flags(tmp_path / "run", *_TWO_EPOCHS)
    stopped = start(nursery, 1, argv, tmp_path / "stderr", "after optimizer step", 0, 2, "SIGTERM")
    assert stopped.codes == [143], stopped.describe()
    assert "the same command goes on from it" in stopped.stderr[0]
    # what was saved is an adapter that answers
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    read_llava_folder(checkpoint, base=BASE, vision_tower=TOWER, dtype=torch.float32)
    resumed = start(nursery, 1, argv, tmp_path / "resumed")
    assert resumed.codes == [0], resumed.describe()


# ---- several processes ----


@pytest.mark.parametrize("flags", [(), ("--deepspeed", "scripts/zero2.json"), ("--deepspeed", "scripts/zero3.json")])
def test_two_processes_end_where_one_does(tmp_path, flags):
    """Clipping and dropout off; the mean over two processes is that over two micro-batches."""
    plain = ("--lora_dropout", 0, "--learning_rate", 1e-3, "--max_grad_norm", 0)
    program(*train_flags(tmp_path / "one", *plain))
    argv = train_flags(tmp_path / "two", *plain, "--gradient_accumulation_steps", 1, *flags)
    run_in_processes(_run, 2, argv)
    one, two = (adapter_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    # measured: 0, with ZeRO-3 6e-8; the steps move weights by up to 2e-3
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 2e-5


def test_only_the_output_folder_is_written(tmp_path):
    before = tree(BASE) | tree(IMAGES)
    program(*train_flags(tmp_path / "run", "--max_steps", 1))
    assert tree(BASE) | tree(IMAGES) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- validation ----


def labelled_questions(folder: Path, answer: str = "a cup") -> list[object]:
    """Flags for a validation of three questions."""
    names = sorted(path.name for path in IMAGES.iterdir())
    asked = [{"question_id": Path(n).stem, "image": n, "text": "what is this"} for n in names]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    given = [{"image": n, "question": "what is this", "answers": [{"answer": answer}] * 10} for n in names]
    (folder / "rows.json").write_text(json.dumps(given))
    flags = ["--val_annotations", folder / "rows.json", "--val_questions", folder / "questions.jsonl"]
    return [*flags, "--max_new_tokens", 6]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_validation_answers_every_question_and_keeps_the_best(tmp_path, world_size):
    data = tmp_path / "train.json"
    data.write_text(json.dumps([row | {"conversations": [row["conversations"][0], {"from": "gpt", "value": "a cup"}]}
                                for row in rows(12, texts=False)]))  # fmt: skip
    argv = train_flags(
        tmp_path / "run", *labelled_questions(tmp_path), "--num_train_epochs", 8, "--learning_rate", 0.03, data=data
    )
    if world_size == 1:
        program(*argv)
    else:
        run_in_processes(_run, world_size, [*argv, "--gradient_accumulation_steps", "1"])
    scores = [row["val_accuracy"] for row in read_lines(tmp_path / "run" / "log.txt")]
    assert scores[0] == 0  # a random model says nothing like it
    assert max(scores) == 100
    best = json.loads((tmp_path / "run" / "checkpoint-best" / "manifest.json").read_text())["global_step"]
    assert best == 3 * (scores.index(100) + 1)
    for name in PUBLISHED:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "run" / "checkpoint-best" / name).read_bytes()
