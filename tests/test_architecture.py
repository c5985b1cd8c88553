"""The rules that keep the rooms apart: who may import whom, who sees flags, the environment, processes."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

ROOMS = ("models", "data", "engine")
PACKAGES = {
    "models": {"torch", "torchvision"},
    "data": {"torch", "torchvision", "numpy", "PIL", "sentencepiece", "tqdm", "pyarrow"},
    "engine": {"torch", "numpy", "tqdm", "safetensors", "deepspeed"},
}
FAMILIES = ("beit3", "vle", "vlbert", "llava")
ENVIRONMENT_READERS = {"engine/distributed.py", "engine/deepspeed_backend.py"}


def tracked(pattern: str) -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [ROOT / name for name in names if (ROOT / name).exists()]


def python_files(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in tracked(f"{room}/*.py")]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def importers_of(prefix: str, files: list[Path]) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in files
        if any(name == prefix or name.startswith(prefix + ".") for name in imports(path))
    }


def test_the_rooms_are_there():
    assert all(python_files(room) for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_none_of_the_others_nor_the_programs(room):
    for other in (*(name for name in ROOMS if name != room), "scripts", "benchmarks", "tests"):
        assert importers_of(other, python_files(room)) == set()


@pytest.mark.parametrize(("room", "allowed"), PACKAGES.items())
def test_a_room_uses_only_its_packages(room, allowed):
    import sys

    for path in python_files(room):
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - allowed - {room}
        assert not foreign, f"{path} imports {foreign}"


def test_families_do_not_import_each_other():
    for family in FAMILIES:
        for other in set(FAMILIES) - {family}:
            assert importers_of(f"models.{other}", python_files(f"models/{family}")) == set()


def test_the_engine_knows_no_family():
    for path in python_files("engine"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not [name for name in names if any(family in name.lower() for family in FAMILIES)], path


def test_processes_are_started_and_talked_to_in_the_engine_only():
    outside = importers_of("torch.distributed", tracked("*.py"))
    assert {name for name in outside if not name.startswith(("engine/", "tests/"))} == set()


def test_deepspeed_is_imported_in_its_backend_only():
    assert importers_of("deepspeed", tracked("*.py")) <= {"engine/deepspeed_backend.py"}


def test_flags_stay_above_the_rooms():
    assert importers_of("argparse", python_files(*ROOMS)) <= {"engine/weights.py"}  # an allow-listed class, no flags
    for path in python_files(*ROOMS):
        assert "Namespace" not in path.read_text(encoding="utf-8") or path.name == "weights.py"


def test_the_environment_is_read_in_one_place():
    for path in python_files(*ROOMS):
        text = path.read_text(encoding="utf-8")
        assert not ("os.environ" in text or "getenv" in text) or str(path.relative_to(ROOT)) in ENVIRONMENT_READERS, (
            path
        )


def test_checkpoints_are_unpickled_in_one_place_and_safely():
    callers = set()
    for path in tracked("*.py"):
        if "tests" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            module, _, function = ast.unparse(node.func).rpartition(".")
            if module in ("torch", "pickle") and function in ("load", "loads"):
                callers.add(str(path.relative_to(ROOT)))
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
    assert callers == {"engine/weights.py"}


def test_nobody_imports_a_run_script_but_tests():
    for script in ("run_beit3_finetuning", "run_vle_vqa", "run_llava_lora"):
        assert {name for name in importers_of(script, tracked("*.py")) if not name.startswith("tests/")} == set()


def test_the_top_level_holds_nothing_beyond_the_agreed_list():
    agreed = {
        *("data", "models", "engine", "scripts", "tests", "benchmarks", "docs", ".ci", ".github"),
        *("run_beit3_finetuning.py", "run_vle_vqa.py", "run_llava_lora.py", "requirements.txt", "README.md"),
        *("pyproject.toml", "requirements-dev.txt", "LICENSE", "NOTICE", "CONTRIBUTING.md", "CHANGELOG.md"),
        ".gitignore",
    }
    assert {path.relative_to(ROOT).parts[0] for path in tracked("*")} <= agreed
