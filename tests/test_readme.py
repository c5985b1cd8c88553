"""What the documents say is held against the code: commands, links, file names, tests that are cited, tables.

Commands stand in fenced ``sh`` blocks of the documents and in the heads of the launchers. Each is parsed by the real
parser of its program; launchers are asked with ``PLAINVL_PRINT`` which command they would run.
"""

import importlib
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.files import read_json
from models.beit3.config import beit3_config, model_names
from models.errors import ModelError
from scripts.beit3_args import OFFERED_TASKS, RECIPES, parse_args
from scripts.beit3_args import build_parser as build_beit3_parser
from scripts.llava_args import build_parser as build_llava_parser
from scripts.model_vqa_loader import build_parser as build_evaluation_parser
from scripts.vlbert_config import CONFIG_ROOT, SCHEMA, Key, find_config, read_config
from scripts.vle_args import CONFIG_FOLDER, DEFAULT_CONFIG
from scripts.vle_config import CONFIG_KEYS
from tests.citations import absent, citations_in
from tests.paths import ROOT
from tests.test_architecture import PACKAGES

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LAUNCHERS = sorted(
    path
    for path in (ROOT / "scripts").glob("*.sh")
    if re.search(r"^ *\(?launch ", path.read_text(encoding="utf-8"), re.MULTILINE)
)
DIST_RUN = sorted((ROOT / "scripts").glob("*dist_run*.sh"))  # these are told the program
BATCH_SCRIPTS = sorted((ROOT / "scripts").glob("*.sbatch"))
PARSERS = {
    "run_beit3_finetuning.py": "scripts.beit3_args:build_parser",
    "run_llava_lora.py": "scripts.llava_args:build_parser",
    "run_vle_vqa.py": "scripts.vle_args:build_parser",
    "scripts/convert_checkpoint_after_ft.py": "scripts.convert_checkpoint_after_ft:build_parser",
    "scripts/convert_vizwiz_for_submission.py": "scripts.convert_vizwiz_for_submission:build_parser",
    "scripts/write_vqa.py": "scripts.write_vqa:build_parser",
    "scripts/ask.py": "scripts.ask:build_parser",
    "scripts/download_images.py": "scripts.download_images:build_parser",
    "scripts/draw_scenes.py": "scripts.draw_scenes:build_parser",
    "scripts/export_adapter.py": "scripts.export_adapter:build_parser",
    "scripts/forecast.py": "scripts.forecast:build_parser",
    "scripts/format_dataset_for_llava.py": "scripts.format_dataset_for_llava:build_parser",
    "scripts/format_result_for_submission.py": "scripts.format_result_for_submission:build_parser",
    "scripts/main.py": "scripts.baseline_args:build_parser",
    "scripts/merge_lora_weights.py": "scripts.merge_lora_weights:build_parser",
    "scripts/model_vqa_loader.py": "scripts.model_vqa_loader:build_parser",
    "scripts/make_caption_report.py": "scripts.make_caption_report:build_parser",
    "scripts/make_index.py": "scripts.make_index:build_parser",
    "scripts/make_model_card.py": "scripts.make_model_card:build_parser",
    "scripts/make_report.py": "scripts.make_report:build_parser",
    "scripts/make_tiny_llava.py": "scripts.make_tiny_llava:build_parser",
    "scripts/make_vizwiz_report.py": "scripts.make_vizwiz_report:build_parser",
    "scripts/pack_box_features.py": "scripts.pack_box_features:build_parser",
    "scripts/score_captions.py": "scripts.score_captions:build_parser",
    "scripts/train_sentencepiece.py": "scripts.train_sentencepiece:build_parser",
    "scripts/compare_strategies.py": "scripts.compare_strategies:build_parser",
    "scripts/vqa/test.py": "scripts.vlbert_args:build_test_parser",
    "scripts/vqa/train_end2end.py": "scripts.vlbert_args:build_parser",
    "scripts/zero_to_fp32.py": "scripts.zero_to_fp32:build_parser",
}
# not ours; their flags are not looked at (docker's are in tests/scripts/test_dockerfile.py)
OTHER_PROGRAMS = {"pip", "ruff", "tensorboard", "export", "conda", "docker"}
# flags of the launchers of others that the documents use, up to the program
LAUNCHER_FLAGS = {
    "torchrun": r"--(nproc_per_node|nnodes|node_rank|master_addr|master_port|rdzv_\w+)=\S+|--standalone|--use_env",
    "deepspeed": r"--(num_gpus|hostfile|node_rank|master_addr|master_port) \S+|--no_ssh",
    "mpirun": r"(-np|--hostfile|--bind-to|-x) \S+",
    "srun": r"--(ntasks-per-node|cpus-per-task|gpus-per-node)=\S+",
    "sbatch": r"--(nodes|partition|time)=\S+",
}
ORIGINAL_FLAGS = """
    model task input_size drop_path checkpoint_activations sentencepiece_model vocab_size num_max_bpe_tokens
    model_ema model_ema_decay model_ema_force_cpu opt opt_eps opt_betas clip_grad momentum weight_decay lr
    layer_decay task_head_lr_weight warmup_lr min_lr warmup_epochs warmup_steps batch_size eval_batch_size
    epochs update_freq save_ckpt_freq randaug train_interpolation finetune model_key model_prefix data_path
    output_dir log_dir device seed resume auto_resume no_auto_resume save_ckpt no_save_ckpt start_epoch eval
    dist_eval num_workers pin_mem no_pin_mem world_size local_rank local-rank dist_on_itp dist_url
    task_cache_path nb_classes mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob mixup_mode color_jitter
    aa reprob remode recount crop_pct smoothing resplit captioning_mask_prob drop_worst_ratio drop_worst_after
    num_beams length_penalty label_smoothing enable_deepspeed initial_scale_power zero_stage
""".split()


# --- reading the documents --------------------------------------------------------------------------------------------


def commands_of(path: Path) -> Iterator[str]:
    """Command lines of a document's ``sh`` blocks, continuation lines joined, comments left out."""
    for block in re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE):
        yield from (line.strip() for line in block.replace("\\\n", " ").splitlines() if line.strip(" #"))


def commands_in_head_of(script: Path) -> Iterator[str]:
    """Commands in the comment at the top of a launcher: lines such as ``#   NAME=value bash scripts/x.sh --flag``."""
    for line in script.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if line.startswith("#   ") and re.search(rf"(bash|sbatch .*)\bscripts/{re.escape(script.name)}", text):
            yield text


def inline_commands_of(path: Path) -> Iterator[str]:
    """Commands in back-quotes that name a program of ours with its flags, without an ellipsis."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.match(r"(python3?|torchrun|bash|source) [\w/]+\.(py|sh)|torchrun \S", code) and "..." not in code:
            yield code


def all_commands() -> list[str]:
    found = [command for path in DOCUMENTS for command in (*commands_of(path), *inline_commands_of(path))]
    scripts = [*LAUNCHERS, *DIST_RUN, *BATCH_SCRIPTS]
    return sorted({*found, *(command for script in scripts for command in commands_in_head_of(script))})


def text_outside_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def slugs_of(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text_outside_blocks(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- parsing commands -------------------------------------------------------------------------------------------------


def check_command(command: str) -> None:
    """Parse one command line with the parser of its program; raises AssertionError for anything unknown."""
    words = shlex.split(re.sub(r" > \S+ 2>&1$", "", command), comments=True)
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    assert words, f"no program in {command!r}"
    program, *rest = words
    if program in OTHER_PROGRAMS:
        return
    if program == "source":  # into the user's own shell: only the script that is made for it
        if rest == [".venv/bin/activate"]:
            return
        assert rest[:1] == ["scripts/main.sh"], f"{command!r} sources something else"
    if program in ("bash", "source"):
        check_script(rest, environment)
        return
    if program.startswith("./scripts/"):
        check_script([program.removeprefix("./"), *rest], environment)
        return
    if program == "sbatch":
        check_batch_script(without_launcher_flags(program, rest), command)
        return
    if program in LAUNCHER_FLAGS:
        rest = without_launcher_flags(program, rest)
        if rest[:1] == ["python"]:
            rest = rest[1:]
    elif Path(program).name.startswith("python"):
        if rest[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in rest[2:] if not word.startswith("-")), command
            return
        if rest[:2] == ["-m", "venv"]:
            return
        if rest[:1] == ["-m"]:
            assert rest[1] in ("torch.distributed.launch", "torch.distributed.run"), f"unknown module in {command!r}"
            rest = without_launcher_flags("torchrun", rest[2:])
    else:
        raise AssertionError(f"unknown program {program!r} in {command!r}")
    parse_with_real_parser(rest, command)


def without_launcher_flags(launcher: str, words: list[str]) -> list[str]:
    while words and words[0].startswith("-"):
        flag = next((n for n in (1, 2) if re.fullmatch(LAUNCHER_FLAGS[launcher], " ".join(words[:n]))), None)
        assert flag, f"{launcher} is given an unknown flag: {words[0]}"
        words = words[flag:]
    return words


def parse_with_real_parser(words: list[str], command: str) -> None:
    assert words, f"no program in {command!r}"
    path = words[0].removeprefix(f"{ROOT}/")
    assert path in PARSERS, f"{command!r} calls {path!r}, which has no row in PARSERS"
    assert (ROOT / path).is_file(), f"{command!r} calls {path!r}, which is not there"
    module, function = PARSERS[path].split(":")
    parser = getattr(importlib.import_module(module), function)()
    if words[1:] == ["--help"]:
        return
    try:
        args = parser.parse_args(words[1:])
    except SystemExit:
        raise AssertionError(f"the parser of {path} refuses {command!r}") from None
    if path == "run_beit3_finetuning.py":
        assert args.task in OFFERED_TASKS, f"{command!r} asks for a task that is not offered"
    if getattr(args, "model", None) and getattr(args, "family", "beit3") == "beit3":
        beit3_config(args.model, getattr(args, "task", None) or "vqav2", image_size=getattr(args, "input_size", None))


def check_script(words: list[str], environment: dict[str, str]) -> None:
    """A shell script of ours: launchers print what they would run, the others take the arguments in their heads."""
    script, *arguments = words
    path = ROOT / script
    assert path.is_file(), f"{script} is not there"
    if path in (*LAUNCHERS, *DIST_RUN):
        assert_variables_are_read(environment, path)
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "VIRTUAL_ENV") if name in os.environ}
        printed = subprocess.run(
            ["bash", str(path), *arguments],
            cwd=ROOT,
            env={**inherited, **environment, "PLAINVL_PRINT": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert printed.returncode == 0, printed.stderr
        commands = printed.stdout.splitlines()
        assert commands, f"{script} would run nothing"
        for command in commands:
            check_command(command)
    elif arguments:
        head = path.read_text(encoding="utf-8").split("\nset -", 1)[0]
        assert arguments[0] in head or script == "scripts/test.sh", f"{script} does not document {arguments[0]}"


def check_batch_script(words: list[str], command: str) -> None:
    """A batch script of ours finds the program and its files as dist_run_single.sh does, and passes them on."""
    assert ROOT / "".join(words[:1]) in BATCH_SCRIPTS, f"{command!r} submits something else"
    assert words[1:], f"no program in {command!r}"
    check_script(["scripts/dist_run_single.sh", "2", *words[1:]], {})


def assert_variables_are_read(environment: dict[str, str], script: Path) -> None:
    text = script.read_text(encoding="utf-8") + (ROOT / "scripts/launch.sh").read_text(encoding="utf-8")
    unread = [name for name in environment if not re.search(rf"\${{?{name}\b", text)]
    assert not unread, f"{script.name} reads no variable {unread}"


# --- commands ---------------------------------------------------------------------------------------------------------


def test_there_are_commands_of_every_kind_to_check():
    text = "\n".join(all_commands())
    kinds = ("torchrun", "torch.distributed.launch", "bash scripts/", "bash scripts/dist_run_", "sbatch ", "srun ")
    for kind in (*kinds, "deepspeed --", "mpirun ", *PARSERS):
        assert kind in text, f"no document shows {kind}"


@pytest.mark.parametrize("command", all_commands())
def test_a_documented_command_is_taken_by_its_program(command):
    check_command(command)


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_a_launcher_without_arguments_runs_a_command_that_parses(script):
    check_command(f"bash scripts/{script.name}")


@pytest.mark.parametrize(
    "wrong",
    [
        "python run_beit3_finetuning.py --task vqav2 --no_such_flag",
        "python run_beit3_finetuning.py --task nlvr2",
        "torchrun --nproc_per_node=8 run_other.py --task vqav2",
        "python scripts/no_such_program.py",
        "bash scripts/prediction.sh --no_such_flag",
        "NO_SUCH_VARIABLE=1 bash scripts/prediction.sh",
        "bash scripts/quickstart.sh --no_such_flag",
        "bash scripts/dist_run_multi.sh 2 2 first 8 run_beit3_finetuning.py --task vqav2",
        "./scripts/dist_run_multi.sh 2 0 first 8 run_beit3_finetuning.py --task vqav2 --no_such_flag",
        "bash scripts/dist_run_single.sh 8 no_such_program.py",
        "bash scripts/main.sh --no_such_flag",
        "source scripts/main.sh --no_such_flag",
        "EVAL_FLAGS=--no_such_flag bash scripts/main.sh",
        "MERGED_DIR=merged FORMAT_FLAGS=--no_such_flag bash scripts/main.sh",
        "source scripts/prediction.sh",
        "python run_llava_lora.py --lora_alfa 16",
        "sbatch scripts/slurm_train.sbatch run_beit3_finetuning.py --task vqav2 --no_such_flag",
        "sbatch --no-such-option=1 scripts/slurm_train.sbatch run_beit3_finetuning.py --task vqav2",
        "sbatch scripts/slurm_train.sbatch",
        "deepspeed --no_such_flag run_beit3_finetuning.py --task vqav2",
        "mpirun -np 2 python run_beit3_finetuning.py --task vqav2 --no_such_flag",
        "python run_beit3_finetuning.py --task vqav2 --model beit3_small_patch16_480",
        "curl somewhere",
    ],
)
def test_a_wrong_command_would_be_noticed(wrong, capsys):
    with pytest.raises((AssertionError, ModelError)):
        check_command(wrong)


# --- flags ------------------------------------------------------------------------------------------------------------


def visible_actions() -> list:
    return [action for action in build_beit3_parser()._actions if action.option_strings]


def test_every_flag_has_a_help_text():
    for action in visible_actions():
        assert action.help, action.option_strings


def test_every_flag_of_the_original_is_accepted():
    known = {name for action in visible_actions() for name in action.option_strings}
    assert [name for name in ORIGINAL_FLAGS if f"--{name}" not in known] == []


def test_the_flag_table_of_the_family_page_is_complete_and_true():
    page = (ROOT / "docs/beit3.md").read_text(encoding="utf-8")
    table = page.split("\n## Flags\n", 1)[1].split("\n\n`--", 1)[0]
    documented = re.findall(r"`(--[\w-]+)`", table)
    assert len(documented) == len(set(documented))
    assert {*documented, "-h", "--help"} == {name for action in visible_actions() for name in action.option_strings}


def test_the_tables_of_llavas_page_hold_every_flag_once_and_the_defaults():
    page = (ROOT / "docs/llava.md").read_text(encoding="utf-8").split("\n## Flags\n", 1)[1].split("\n## ", 1)[0]
    recipe, groups = page.split("\n| group | flags |\n", 1)
    actions = [action for action in build_llava_parser()._actions if action.option_strings]
    documented = re.findall(r"`(--[\w-]+)`", groups.split("\n\n", 1)[0])
    assert len(documented) == len(set(documented))
    assert {*documented, "-h", "--help"} == {name for action in actions for name in action.option_strings}
    shown = dict(re.findall(r"^\| `--(\w+)` \| `(.*?)` \|", recipe, re.MULTILINE))
    assert len(shown) > 10
    defaults = {action.dest: action.default for action in actions}
    assert {name: str(defaults[name]) for name in shown} == shown


def test_the_flag_table_of_llavas_evaluation_is_complete_and_true():
    page = (ROOT / "docs/llava.md").read_text(encoding="utf-8").split("\n## Evaluation\n", 1)[1].split("\n## ", 1)[0]
    rows = dict(re.findall(r"^\| `--([\w-]+)` \| (.*?) ?\|", page, re.MULTILINE))
    actions = [action for action in build_evaluation_parser()._actions if action.option_strings]
    flags = {action.option_strings[0].removeprefix("--"): action.default for action in actions}
    assert rows.keys() == flags.keys() - {"-h", "local_rank", "no_auto_resume"}
    for name, cell in rows.items():
        assert cell == ("" if flags[name] is None or flags[name] is False else f"`{flags[name]}`"), name


def test_a_flag_without_effect_is_reported(tmp_path):
    (tmp_path / "beit3.spm").touch()
    always = ["--task", "vqav2", "--finetune", "", "--data_path", str(tmp_path)]
    always += ["--sentencepiece_model", str(tmp_path / "beit3.spm")]
    assert parse_args(always).notes == []
    notes = parse_args([*always, "--momentum", "0.8", "--dist_eval", "--resplit"]).notes
    for name in ("--momentum", "--dist_eval", "--resplit"):
        assert any(note.startswith(name) for note in notes), name


def test_a_zero_stage_or_a_settings_file_implies_deepspeed(tmp_path):
    (tmp_path / "beit3.spm").touch()
    (tmp_path / "ds.json").touch()
    always = ["--task", "vqav2", "--finetune", "", "--data_path", str(tmp_path)]
    always += ["--sentencepiece_model", str(tmp_path / "beit3.spm")]
    asked = parse_args([*always, "--enable_deepspeed", "--zero_stage", "2"])
    assert (asked.enable_deepspeed, asked.notes) == (True, [])
    for flags in (["--zero_stage", "2"], ["--deepspeed_config", str(tmp_path / "ds.json")]):
        args = parse_args([*always, *flags])
        assert args.enable_deepspeed
        assert any("implies --enable_deepspeed" in note for note in args.notes)
    assert not parse_args([*always, "--zero_stage", "0"]).enable_deepspeed


def test_addresses_are_refused_as_weights(tmp_path, capsys):
    (tmp_path / "beit3.spm").touch()
    with pytest.raises(SystemExit) as stopped:
        parse_args(
            ["--task", "vqav2", "--data_path", str(tmp_path), "--finetune", "https://example.org/a.pth"]
            + ["--sentencepiece_model", str(tmp_path / "beit3.spm")]
        )
    assert stopped.value.code == 2
    assert "nothing is downloaded" in capsys.readouterr().err


@pytest.mark.parametrize(("page", "task"), [("beit3.md", "vqav2"), ("beit3_captioning.md", "coco_captioning")])
def test_the_recipe_table_holds_the_defaults(tmp_path, page, task):
    (tmp_path / "beit3.spm").touch()
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n## Recipes\n", 1)[1].split("\n## ", 1)[0]
    table = re.findall(r"^\| `--(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    rows = {name: cells for name, *cells in table}
    models = ["beit3_base_patch16_480", "beit3_large_patch16_480", "beit3_tiny_patch32_96"]
    sizes = [model.split("_")[1] for model in models]
    assert rows.keys() == set().union(*(RECIPES[task, size] for size in sizes)) - {"model"}
    always = ["--task", task, "--finetune", "", "--data_path", str(tmp_path)]
    always += ["--sentencepiece_model", str(tmp_path / "beit3.spm")]
    for column, (size, model) in enumerate(zip(sizes, models, strict=True)):
        args = parse_args([*always, "--model", model])
        for name, cells in rows.items():
            value = getattr(args, name)
            if isinstance(value, bool):
                shown = "yes" if value else "no"
            elif value is None:
                shown = "off"
            else:
                shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            assert cells[column] == shown, (size, name)
    assert parse_args(always).model.startswith("beit3_base_patch16_480")


def test_nocaps_has_the_recipe_of_coco_captions_but_for_the_rate_of_base():
    for size, changed in (("base", {"lr": 1e-5}), ("large", {}), ("tiny", {})):
        assert RECIPES["nocaps", size] == RECIPES["coco_captioning", size] | changed


def test_captions_are_as_long_as_the_published_commands_let_them_be(tmp_path):
    """In training 32 tokens; the published evaluations leave the flag out, whose default was 64."""
    (tmp_path / "beit3.spm").touch()
    always = ["--task", "coco_captioning", "--data_path", str(tmp_path)]
    always += ["--sentencepiece_model", str(tmp_path / "beit3.spm")]
    weights = tmp_path / "weights.pth"
    weights.touch()
    assert parse_args([*always, "--finetune", ""]).num_max_bpe_tokens == 32
    assert parse_args([*always, "--eval", "--finetune", str(weights)]).num_max_bpe_tokens == 64
    asked = parse_args([*always, "--eval", "--finetune", str(weights), "--num_max_bpe_tokens", "20"])
    assert asked.num_max_bpe_tokens == 20


def test_the_start_values_of_the_family_page_are_those_of_the_code():
    page = (ROOT / "docs/beit3.md").read_text(encoding="utf-8").split("| standard deviation at the start |", 1)[1]
    rows = re.findall(r"^\| ([a-z ]+?) \| (.*?) \| (.*?) \|$", page.split("\n\n", 1)[0], re.MULTILINE)
    original, tiny = (beit3_config(name, "vqav2").start for name in ("beit3_base_patch16_480", "beit3_tiny_patch32_96"))
    names = {"linear layers": "linear", "image positions": "image_positions", "text positions": "text_positions"}
    names["words"] = "words"
    assert [row[0] for row in rows] == list(names)
    for row, *cells in rows:
        values = [getattr(start, names[row]) for start in (original, tiny)]
        assert cells == ["width^-0.5" if value is None else str(value) for value in values], row


def test_models_that_are_named_exist():
    page = (ROOT / "docs/beit3.md").read_text(encoding="utf-8")
    for name in re.findall(r"\bbeit3_[a-z]+_patch\d+_\d+\b(?![._])", page):
        beit3_config(name, "vqav2")
    for name in model_names("vqav2"):
        assert f"`{name}`" in page, name


# --- links, files, tests ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_outside_blocks(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name) if name else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in slugs_of(linked), f"{path.name} links to {target}, a heading that is not there"


def test_every_page_is_in_the_index_of_the_readme():
    (row,) = re.findall(r"^\| `docs/` \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\]\((docs/\w+\.md)\)", row)) == {f"docs/{path.name}" for path in (ROOT / "docs").iterdir()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_source_files_that_are_named_exist(path):
    rooms = r"(?<![\w/<])((?:models|data|engine|scripts|tests|benchmarks|docs|\.ci)/[\w/.-]*)"
    for name in re.findall(rooms, path.read_text(encoding="utf-8")):
        name = name.rstrip(".")
        if name.endswith((".py", ".md", ".sh", ".sbatch")) or (
            name.endswith("/")
            and not name.startswith(
                ("data/vqav2", "data/coco", "data/train/", "data/valid/", "data/val/", "data/test/")
            )
        ):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_cited_exist(path):
    assert absent(citations_in(path.read_text(encoding="utf-8"))) == []


def test_index_and_split_names_of_the_data_page_are_those_of_the_readers():
    from data import caption_index, vqa_index
    from data.vqav2_files import ANNOTATION_PLACES

    page = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")
    names = {vqa_index.ANSWER_FILE, *vqa_index.MAY_BE_EMPTY}
    names |= {name for names in vqa_index.SPLIT_FILES.values() for name in names}
    names |= {name for files in caption_index.SPLIT_FILES.values() for name in files.values()}
    for name in names:
        assert f"`{name}`" in page, name
    for split in vqa_index.SPLIT_FILES.keys() - {"train"}:
        assert f"`{split}`" in page, split
    for place in filter(None, ANNOTATION_PLACES):
        assert f"`{place}/`" in page, place


def test_default_places_are_the_documented_ones():
    from scripts.beit3_args import DEFAULT_DATA_FOLDERS, DEFAULT_WEIGHTS

    page = (ROOT / "docs/datasets.md").read_text(encoding="utf-8")
    weights = {name for names in DEFAULT_WEIGHTS.values() for name in names}
    for place in {*(folder for folders in DEFAULT_DATA_FOLDERS.values() for folder in folders), *weights}:
        assert f"`{place}`" in page, place


def test_the_tasks_that_the_flags_offer_are_those_of_the_program():
    from run_beit3_finetuning import TASKS
    from scripts.beit3_args import OFFERED_TASKS

    assert tuple(TASKS) == OFFERED_TASKS


def test_the_contributing_page_says_what_a_task_of_beit3_has():
    from run_beit3_finetuning import TASKS

    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    row = re.search(r"^\| a task of BEiT-3 \| (.*?);", page, re.MULTILINE).group(1)
    named = set(re.findall(r"`(\w+)`", row))
    used = set(re.findall(r"\btask\.(\w+)", (ROOT / "run_beit3_finetuning.py").read_text(encoding="utf-8")))
    assert named == used
    assert all(hasattr(task, name) for task in TASKS.values() for name in named)


@pytest.mark.parametrize("room", PACKAGES)
def test_the_contributing_page_says_which_packages_a_room_may_use(room):
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    cell = re.search(rf"^\| `{room}/` \| [^|]* \| ([^|]*) \|$", page, re.MULTILINE).group(1)
    assert {re.split(r"[ `]+", word.strip())[0] for word in cell.split(",") if "`" not in word} == PACKAGES[room]


def test_the_settings_table_of_vle_holds_every_key_with_its_shipped_value():
    page = (ROOT / "docs/vle.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, flags=re.MULTILINE))
    shipped = read_json(CONFIG_FOLDER / DEFAULT_CONFIG)
    assert list(shipped) == list(CONFIG_KEYS)
    assert rows["deepspeed_config"] == "see the file"
    for key in CONFIG_KEYS.keys() - {"deepspeed_config"}:
        assert rows[key] == f"`{json.dumps(shipped[key])}`", key


def test_the_settings_table_of_vlbert_holds_every_key_that_has_an_effect_with_its_shipped_value():
    page = (ROOT / "docs/vlbert.md").read_text(encoding="utf-8")
    shipped = read_config(find_config("cfgs/vqa/base_4X16G_fp32.yaml"))
    rows = dict(re.findall(r"^\| `([A-Za-z0-9_.]+)` \| (.*?) \| .* \|$", page, flags=re.MULTILINE))

    def keys(schema: dict, values: dict, section: str = "") -> Iterator[tuple[str, Key, object]]:
        for name, entry in schema.items():
            if isinstance(entry, Key):
                yield section + name, entry, values[name]
            else:
                yield from keys(entry, values[name], f"{section}{name}.")

    for name, entry, value in keys(SCHEMA, shipped):
        if entry.meaning == "without effect" or entry.meaning.startswith("nothing else"):
            twin = name.startswith("POLICY.") and name != "POLICY.OUTPUT_SIZE"
            assert f"`{name}`" in page or twin, name
        elif not name.startswith("POLICY.") or name == "POLICY.OUTPUT_SIZE":
            assert rows.get(name) in (f"`{json.dumps(value)}`", "see the file"), name


def test_the_strategy_table_names_the_shipped_configs():
    page = (ROOT / "docs/vlbert.md").read_text(encoding="utf-8")
    for path in (CONFIG_ROOT / "cfgs" / "vqa").glob("*.yaml"):
        assert f"`{path.stem}`" in page or f"cfgs/vqa/{path.name}" in page, path
