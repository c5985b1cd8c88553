"""scripts/Dockerfile, as far as it can be looked at without Docker: instructions, commands, files that it copies."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import run_program
from tests.paths import ROOT
from tests.test_architecture import tracked
from tests.test_readme import check_command, commands_of

DOCKERFILE = ROOT / "scripts/Dockerfile"
PAGE = ROOT / "docs/installation.md"
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD"}
RUN_FLAGS = {"--rm": 0, "--user": 1, "--volume": 1, "--gpus": 1, "--shm-size": 1}  # words behind each


def instructions() -> list[tuple[str, str]]:
    """(name, the rest) of each instruction, continuation lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def rest_of(name: str) -> list[str]:
    return [rest for other, rest in instructions() if other == name]


def copied(target: Path) -> None:
    """Carry out the COPY instructions, from what git tracks, into a folder."""
    known = set(tracked("*"))
    for rest in rest_of("COPY"):
        *sources, place = shlex.split(rest)
        for source in sources:
            # a folder's content is copied, a file goes into the place by its name
            folder = ROOT / source if source.endswith("/") else None
            found = [p for p in (folder.rglob("*") if folder else ROOT.glob(source)) if p in known]
            assert found, f"COPY {source} finds nothing"
            for path in found:
                relative = path.relative_to(folder) if folder else Path(path.name)
                (target / place / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / place / relative)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """The work folder of the image."""
    target = tmp_path_factory.mktemp("image")
    copied(target)
    return target


def test_instructions_are_known_and_in_order():
    names = [name for name, _ in instructions()]
    assert set(names) == KNOWN
    assert names[:2] == ["ARG", "FROM"]
    assert rest_of("FROM") == ["${BASE}"]
    assert names[-1] == "CMD"


def test_no_registry_and_no_address_is_named():
    images = [rest_of("ARG")[0].removeprefix("BASE="), *re.findall(r"BASE=([\w./:-]+)", PAGE.read_text())]
    for image in images:
        assert "." not in image.split("/")[0] or "/" not in image, image  # a first part with a dot is a host
    assert "://" not in DOCKERFILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", rest_of("RUN"))
def test_commands_can_be_read_by_the_shell(command):
    assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0


def test_requirements_txt_is_the_one_list_of_packages():
    installs = [part for run in rest_of("RUN") for part in run.split("&&") if "pip install" in part]
    assert [shlex.split(install) for install in installs] == [
        ["pip", "install", "--no-cache-dir", "--requirement", "requirements.txt"]
    ]
    for command in commands_of(PAGE):
        if "pip install" in command:
            assert command == "pip install -r requirements.txt"
        if command.startswith("conda create"):
            assert shlex.split(command)[-2:] == ["python=3.12", "pip"]


def test_programs_run_as_a_user_that_is_made_and_is_not_root():
    users = rest_of("USER")
    assert users == ["plainvl"]
    (line,) = [run for run in rest_of("RUN") if "useradd" in run]
    assert shlex.split(line.split("&&")[0])[-1] == users[-1]
    names = [name for name, _ in instructions()]
    assert not {"RUN", "COPY"} & set(names[names.index("USER") :])


def test_all_code_that_runs_is_copied_and_nothing_else(image):
    there = {str(path.relative_to(image)) for path in image.rglob("*") if path.is_file()}
    rooms = ("data/*", "engine/*", "models/*", "scripts/*", "run_*.py")
    wanted = {str(path.relative_to(ROOT)) for pattern in rooms for path in tracked(pattern)}
    assert there == wanted | {"requirements.txt", "LICENSE", "NOTICE", "README.md"}


PROGRAMS = ("run_beit3_finetuning.py", "run_vle_vqa.py", "run_llava_lora.py", "scripts/vqa/train_end2end.py")


@pytest.mark.parametrize("program", [*PROGRAMS, "scripts/main.py", "scripts/model_vqa_loader.py", "scripts/ask.py"])
def test_programs_start_from_what_was_copied(image, program):
    ended = run_program(str(image / program), "--help", cwd=image)
    assert ended.returncode == 0, ended.stderr


def test_every_module_that_was_copied_imports(image):
    names = sorted(
        str(path.relative_to(image).with_suffix("")).replace("/", ".")
        for path in image.rglob("*.py")
        if path.name != "__init__.py"
    )
    assert len(names) > 150
    code = f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nimport engine, os\n"
    code += "assert os.path.dirname(engine.__file__).startswith(os.getcwd())"
    ended = run_program("-c", code, cwd=image, PYTHONPATH=str(image))
    assert ended.returncode == 0, ended.stderr


def docker_commands() -> list[str]:
    head = [line.removeprefix("#   ") for line in DOCKERFILE.read_text().splitlines() if line.startswith("#   ")]
    return sorted({*head, *(command for command in commands_of(PAGE) if command.startswith("docker "))})


@pytest.mark.parametrize("command", docker_commands())
def test_docker_commands_build_this_file_and_run_commands_of_ours(command):
    words = shlex.split(command.replace("$(id -u)", "1000"))
    assert words[0] == "docker"
    if words[1] == "build":
        assert words[2:4] == ["--file", str(DOCKERFILE.relative_to(ROOT))]
        assert words[-1] == "."
        given = [word.split("=")[0] for flag, word in zip(words, words[1:], strict=False) if flag == "--build-arg"]
        assert set(given) <= {arg.split("=")[0] for arg in rest_of("ARG")}
        return
    assert words[1] == "run"
    rest = words[2:]
    while rest[0].startswith("-"):
        rest = rest[1 + RUN_FLAGS[rest[0]] :]
    assert rest[0] in {"plainvl", "plainvl:cuda"}
    check_command(shlex.join(rest[1:]))


def test_folders_are_given_below_the_work_folder():
    (place,) = rest_of("WORKDIR")
    mounted = re.findall(r'--volume "\$PWD/([\w/]+):(/[\w/]+)"', PAGE.read_text(encoding="utf-8"))
    assert len(mounted) >= 3
    for here, there in mounted:
        assert there in (f"{place}/{here}", f"/{here}")
