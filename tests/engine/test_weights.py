import argparse
import collections
import contextlib
import gzip
import json
import random
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.errors import EngineError
from engine.weight_files import FOLDER_FILES
from engine.weights import load_torch_file, read_state_dict

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(3, dtype=torch.float16)}


def assert_is_state(state):
    assert state.keys() == STATE.keys()
    for name, value in STATE.items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content", [STATE, {"model": STATE}, {"module": STATE}, {"model": STATE, "module": {}}])
def test_a_state_dict_is_found_bare_or_under_its_key_in_either_format(tmp_path, content, legacy):
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert_is_state(read_state_dict(tmp_path / "w.pth"))


@pytest.mark.parametrize("name", ["weights.zip", "weights", "weights.pth.download"])
def test_a_checkpoint_is_known_by_its_content_whatever_its_name(tmp_path, name):
    torch.save({"model": STATE}, tmp_path / name)
    assert_is_state(read_state_dict(tmp_path / name))


def test_another_key_can_be_given(tmp_path):
    torch.save({"model": {"x": torch.ones(1)}, "ema": STATE}, tmp_path / "w.pth")
    assert_is_state(read_state_dict(tmp_path / "w.pth", model_key="absent|ema|model"))


def test_safetensors_and_shards_of_both_kinds_are_read(tmp_path):
    save_file({"a.weight": STATE["a.weight"]}, tmp_path / "one.safetensors")
    torch.save({"a.bias": STATE["a.bias"]}, tmp_path / "two.bin")
    names = {"a.weight": "one.safetensors", "a.bias": "two.bin"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert_is_state(read_state_dict(tmp_path / "model.safetensors.index.json"))
    assert_is_state(read_state_dict(tmp_path))


def test_a_folder_gives_its_first_known_file(tmp_path):
    for name in reversed(FOLDER_FILES[:3]):
        state = {"from": torch.tensor([FOLDER_FILES.index(name)])}
        save_file(state, tmp_path / name) if name.endswith(".safetensors") else torch.save(state, tmp_path / name)
        assert read_state_dict(tmp_path)["from"].item() == FOLDER_FILES.index(name)


def test_the_harmless_objects_of_the_originals_load(tmp_path):
    content = {"model": STATE, "args": argparse.Namespace(lr=1.0), "best": np.float64(3.5), "ids": np.arange(3)}
    torch.save(content, tmp_path / "w.pth")
    assert_is_state(read_state_dict(tmp_path / "w.pth"))
    assert load_torch_file(tmp_path / "w.pth")["best"] == 3.5


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_scalars_and_arrays_pickled_by_either_numpy_load(tmp_path, core):
    content = {"model": STATE, "best": np.float64(3.5), "ids": np.arange(3)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    pickled = (tmp_path / "w.pth").read_bytes()
    renamed = re.sub(rb"numpy\._?core\.multiarray", b"numpy." + core + b".multiarray", pickled)
    assert renamed.count(b"numpy." + core + b".multiarray") == 2
    (tmp_path / "w.pth").write_bytes(renamed)
    loaded = load_torch_file(tmp_path / "w.pth")
    assert loaded["best"] == 3.5
    assert loaded["ids"].tolist() == [0, 1, 2]


def test_numpy_scalars_and_arrays_of_every_plain_type_load(tmp_path):
    values = [np.dtype(name).type(1) for name in ("bool", "int8", "uint16", "int64", "float16", "float64", "complex64")]
    torch.save({"model": STATE, "values": values, "names": np.array(["a", "bc"])}, tmp_path / "w.pth")
    loaded = load_torch_file(tmp_path / "w.pth")
    assert loaded["values"] == values
    assert loaded["names"].tolist() == ["a", "bc"]


class Note:
    """A class of somebody's own, as a training script pickles it."""


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Note(), "tests.engine.test_weights.Note"),
        (collections.defaultdict(list), "collections.defaultdict"),
        (Path("/data"), r"pathlib\.\w*\.?PosixPath|pathlib.PosixPath"),
        (np.array([None, "x"], dtype=object), "numpy.dtypes?.ObjectDType|numpy"),
    ],
    ids=["own class", "defaultdict", "path", "numpy objects"],
)
def test_what_is_refused_is_named_without_torch_s_advice_to_trust_the_file(tmp_path, value, name):
    torch.save({"model": STATE, "value": value}, tmp_path / "w.pth")
    with pytest.raises(EngineError, match=rf"w.pth is refused: .* beside tensors \((class )?({name})\); ") as caught:
        load_torch_file(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*quantiz")  # torch is about to give such tensors up
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.empty(2, device="meta"), "without content"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
    ],
    ids=["sparse", "meta", "quantised"],
)
def test_tensors_that_are_no_dense_numbers_are_refused_by_name(tmp_path, build, kind):
    torch.save({"model": STATE | {"odd.weight": build()}}, tmp_path / "w.pth")
    with pytest.raises(EngineError, match=f"w.pth is refused: its entry 'odd.weight' is a tensor that is {kind}; save"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"weights" * 99), "it is a compressed archive; unpack it"),
        (b"<html>404</html>", "it is a web page, .*; download it again"),
        (b"\x93NUMPY" + bytes(300), "it is damaged or of another format"),
        (bytes(4000), "it is damaged or of another format"),
    ],
    ids=["gzip", "page", "npy", "zeros"],
)
def test_a_file_that_is_no_checkpoint_is_told_by_its_first_bytes(tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(EngineError, match=f"w.pth cannot be read as a checkpoint: {message}"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize("compressed", [["data.pkl"], ["data/0"]])
def test_a_zip_with_any_compressed_entry_is_refused_unread(tmp_path, compressed):
    """Torch would map the compressed bytes of a tensor as its numbers, and unpack any amount of pickled text."""
    torch.save({"model": {"x": torch.zeros(1000)}}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "w.pth", "w") as again:
        for name in whole.namelist():
            squeeze = name.partition("/")[2] in compressed
            kind = zipfile.ZIP_DEFLATED if squeeze else zipfile.ZIP_STORED
            again.writestr(name, whole.read(name), compress_type=kind)
    with pytest.raises(EngineError, match="w.pth is refused: its entries are compressed"):
        read_state_dict(tmp_path / "w.pth")


def safetensors_file(path, header, *, length=None, content=bytes(24)):
    """A file whose header says whatever the test wants."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
    return path


def entry(shape=(2, 3), start=0, end=24, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_a_safetensors_file_of_that_layout_is_read(tmp_path):
    assert read_state_dict(safetensors_file(tmp_path / "w.safetensors", {"x": entry()}))["x"].shape == (2, 3)


@pytest.mark.parametrize(
    "damage",
    [
        {"header": {"x": entry((600,), 0, 2400)}},
        {"header": {"x": entry((200, 300))}},
        {"header": {"x": entry((2**40, 2**40))}},
        {"header": {"x": entry(), "y": entry()}},
        {"header": {"x": entry(start=24, end=0)}},
        {"header": {"x": entry(dtype="F99")}},
        {"header": {"x": 3}},
        {"header": {"x": entry()}, "length": 1 << 60},
        {"header": {"x": entry()}, "length": 99_000_000},
        {"header": {"x": entry()}, "content": bytes(40)},
        {"header": {"x": entry()}, "content": b""},
    ],
    ids=["beyond the end", "shape", "overflow", "overlap", "backwards", "dtype", "number", "huge header",
         "header beyond the end", "bytes left over", "no content"],
)  # fmt: skip
def test_a_safetensors_file_that_lies_about_itself_is_refused_in_one_line(tmp_path, damage):
    path = safetensors_file(tmp_path / "w.safetensors", **damage)
    with pytest.raises(EngineError, match=r"w.safetensors is not a sound safetensors file \(.+\): it is dam") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(EngineError, match=r"w.pth is refused: .*\(torch.nn.modules.linear.Linear\); .*state dict"):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        (
            {"epoch": 3, "lr": 0.1},
            r"holds no named tensors \(its keys: epoch, lr\): give a file of weights, or the key of the weights in it",
        ),
        ({}, "holds no named tensors .its keys: nothing"),
        ({"model": 3}, "holds a int, not a state dict"),
    ],
)
def test_a_file_without_named_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(EngineError, match=message):
        read_state_dict(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"x": "../secret.bin"}}, "shards must lie beside their index"),
        ({"weight_map": {"x": "/etc/passwd"}}, "shards must lie beside their index"),
        ({"weight_map": {"x": "absent.bin"}}, "needs the shard absent.bin, which is not in"),
        ({"weight_map": {"x": "list.bin"}}, "list.bin is no shard of weights"),
        ({"weights": {}}, "is not a shard index"),
        ([], "is not a shard index"),
    ],
)
def test_a_bad_shard_index_is_refused(tmp_path, index, message):
    torch.save([1], tmp_path / "list.bin")
    (tmp_path / "m.index.json").write_text(json.dumps(index))
    with pytest.raises(EngineError, match=message):
        read_state_dict(tmp_path / "m.index.json")


def test_a_missing_file_and_a_folder_without_weights_are_named(tmp_path):
    with pytest.raises(EngineError, match="no checkpoint at .*absent.pth"):
        read_state_dict(tmp_path / "absent.pth")
    with pytest.raises(EngineError, match="holds no weights: looked for model.pth"):
        read_state_dict(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_any_damage_is_an_error_of_ours_or_harmless(tmp_path, kind):
    """Cut off, bit-flipped and overwritten files: never a foreign exception, so never a traceback."""
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save({"model": STATE}, path, _use_new_zipfile_serialization=kind == "zip")
    whole, draw, harmless = path.read_bytes(), random.Random(1), 0
    for trial in range(200):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: draw.randrange(1, len(whole))]
        elif trial % 3 == 1:
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        else:
            start = draw.randrange(len(whole))
            damaged[start : start + 20] = draw.randbytes(20)
        path.write_bytes(damaged)
        with contextlib.suppress(EngineError):
            read_state_dict(path)
            harmless += 1
    assert harmless < 140
