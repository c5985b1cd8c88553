"""The trust boundary of docs/faults.md, held against the sources: nothing from a file or the network is ever executed.

That checkpoints are unpickled in one place, with the safe loader, is checked in tests/test_architecture.py.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.test_architecture import imports, tracked

PROGRAMS = [path for path in tracked("*.py") if path.relative_to(ROOT).parts[0] != "tests"]
SHELL_SCRIPTS = [path for path in tracked("*.sh") if path.relative_to(ROOT).parts[0] != "tests"]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name of what is called, the call) for each call of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def users_of(*names: str) -> set[str]:
    return {f"{path.relative_to(ROOT)}: {name}" for path in PROGRAMS for name, _ in calls(path) if name in names}


def importers_of(*modules: str) -> set[str]:
    """Files that import one of the modules or something in it."""
    return {
        f"{path.relative_to(ROOT)}: {name}"
        for path in PROGRAMS
        for name in imports(path)
        if any(name == module or name.startswith(f"{module}.") for module in modules)
    }


def test_no_text_is_run_as_a_program():
    assert users_of("eval", "exec", "compile", "__import__", "os.system", "os.popen") == set()


def test_nothing_is_unpickled_but_by_the_safe_loader():
    assert importers_of("dill", "cloudpickle", "joblib", "marshal", "shelve") == set()
    assert importers_of("pickle") == {"engine/weights.py: pickle"}  # for the name of its error
    unpicklers = {"pickle": ("load", "loads", "Unpickler"), "torch.jit": ("load",), "torch.hub": ("load",)}
    assert users_of(*(f"{module}.{name}" for module, names in unpicklers.items() for name in names)) == set()
    for path in PROGRAMS:
        values = [k.value for _, call in calls(path) for k in call.keywords if k.arg == "allow_pickle"]
        assert all(ast.unparse(value) == "False" for value in values), path


def test_yaml_is_read_with_the_safe_loader_only():
    assert users_of("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load") == set()


def test_programs_are_started_from_lists_of_words_without_a_shell():
    starters = {"run", "Popen", "call", "check_call", "check_output"}
    for path in PROGRAMS:
        for name, call in calls(path):
            module, _, function = name.rpartition(".")
            if module != "subprocess" or function not in starters:
                continue
            assert not any(k.arg == "shell" for k in call.keywords), f"{path}: {ast.unparse(call)}"
            assert call.args, f"{path}: {ast.unparse(call)}"
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp), f"{path}: a string"


def test_nothing_is_fetched_from_the_network():
    """``pip`` in scripts/environment.sh installs packages, scripts/download_images.py fetches images; that is all."""
    clients = ("urllib.request", "http.client", "requests", "httpx", "aiohttp", "ftplib", "huggingface_hub", "wget")
    assert {place.partition(":")[0] for place in importers_of(*clients)} == {"data/image_fetching.py"}
    assert {place.partition(":")[0] for place in importers_of("data.image_fetching")} == {"scripts/download_images.py"}
    assert users_of("torch.hub.download_url_to_file", "torch.hub.load_state_dict_from_url") == set()
    for path in SHELL_SCRIPTS:
        words = path.read_text(encoding="utf-8").split()
        assert not {"curl", "wget", "scp", "rsync"} & set(words), path


FEATURES = "data/box_features.py"


@pytest.mark.parametrize("what", ["archives", "encoded features"])
def test_nothing_is_unpacked(what):
    """So that no member of an archive can lie outside, be a link, or be larger than it says."""
    if what == "archives":
        assert importers_of("tarfile", "gzip", "bz2", "lzma", "patoolib", "rarfile", "py7zr") == set()
        # the first looks at the list of entries alone, the second reads single files by name, of a bounded size
        assert importers_of("zipfile") <= {"engine/weights.py: zipfile", "data/zip_folder.py: zipfile"}
        for path in PROGRAMS:
            unpackers = {"extract", "extractall", "unpack_archive"}
            assert not [name for name, _ in calls(path) if name.rpartition(".")[2] in unpackers], path
    else:
        # in one place, which compares lengths before it looks at a number, and maps arrays without pickles
        assert {place.partition(":")[0] for place in importers_of("binascii", "h5py", "lmdb")} == {FEATURES}
        # the baseline's dictionaries hold a sentencepiece model as text; sentencepiece parses it as it would a file
        decoders = {place.partition(":")[0] for place in users_of("base64.b64decode", "base64.decodebytes")}
        assert decoders == {FEATURES, "data/baseline_dictionaries.py"}
        mapped = users_of("np.load", "numpy.load", "np.memmap", "numpy.memmap")
        assert {place.partition(":")[0] for place in mapped} == {FEATURES}
