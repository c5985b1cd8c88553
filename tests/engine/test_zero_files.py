import shutil
from collections import OrderedDict

import pytest
import torch

from engine.errors import EngineError
from engine.zero_files import find_zero_folder, read_whole_weights, strip_wrappers
from tests.engine.zero_runs import RUNS
from tests.helpers import run_program

NAMES = [f"{stage}-{name}" for stage, name in RUNS]
FROZEN = "beit3.vision_embed.mask_token"


@pytest.fixture
def copied(saved, tmp_path):
    """A checkpoint of ``saved`` that may be damaged."""

    def copy(name):
        return shutil.copytree(saved[0] / name / "checkpoint-0", tmp_path / name)

    return copy


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("0")])
def test_the_merged_weights_are_those_of_deepspeeds_own_script(saved, name):
    ours = read_whole_weights(saved[0] / name / "checkpoint-0")
    theirs = torch.load(saved[0] / name / "theirs.pth", weights_only=True)
    # stage 1 leaves out what is frozen, which would then be missing in the model
    assert ours.keys() - theirs.keys() == ({FROZEN} if name.startswith("1") else set())
    assert theirs.keys() <= ours.keys()
    assert all(torch.equal(ours[key], value.float()) for key, value in theirs.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_merged_weights_round_to_those_of_the_model(saved, name):
    merged = read_whole_weights(saved[0] / name / "checkpoint-0")
    weights = torch.load(saved[0] / name / "checkpoint-0" / "model.pth", weights_only=True)["model"]
    assert merged.keys() == weights.keys()
    assert all(value.dtype == torch.float32 for value in merged.values())
    assert all(torch.equal(merged[key].to(value.dtype), value) for key, value in weights.items())
    has_more_digits = any(not torch.equal(merged[key], value.float()) for key, value in weights.items())
    assert has_more_digits == name.endswith("bf16")


@pytest.mark.parametrize("name", ["2-float32", "3-bf16"])
def test_names_of_wrapped_models_come_out_as_the_models_own(copied, name):
    folder = copied(name)
    expected = {name: value.clone() for name, value in read_whole_weights(folder).items()}  # the files are replaced
    for path in folder.glob("*_model_states.pt"):
        content = torch.load(path, weights_only=True)
        content["module"] = _wrapped(content["module"])
        content["buffer_names"] = [f"module.model.{name}" for name in content["buffer_names"]]
        content["param_shapes"] = [_wrapped(group) for group in content["param_shapes"]]
        for key in ("frozen_param_shapes", "frozen_param_fragments"):
            content[key] = _wrapped(content[key])
        torch.save(content, path)
    merged = strip_wrappers(read_whole_weights(folder))
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[key], expected[key]) for key in merged)


def _wrapped(entries):
    return OrderedDict((f"module.model.{name}", value) for name, value in entries.items())


def test_wrappers_are_stripped_once_and_only_where_all_names_have_them():
    value = torch.zeros(1)

    def stripped(*names):
        return list(strip_wrappers(dict.fromkeys(names, value)))

    assert stripped("module.a", "module.b") == ["a", "b"]
    assert stripped("module.model.model.a", "module.model.vision_model.a") == ["model.a", "vision_model.a"]
    assert stripped("model.a", "lm_head.a") == ["model.a", "lm_head.a"]
    assert stripped("module.model.a", "module.lm_head.a") == ["model.a", "lm_head.a"]


def test_aligned_parameters_of_two_ranks_are_cut_at_the_right_places(tmp_path):
    a, b = torch.arange(3.0), torch.arange(10.0, 14.0)
    flat = torch.cat([a, torch.zeros(1), b])  # one number of padding behind the first parameter
    shapes = [OrderedDict(a=torch.Size([3]), b=torch.Size([2, 2]))]
    model = {"module": {"a": a, "b": b.view(2, 2), "count": torch.tensor([7])}, "buffer_names": ["count"]}
    torch.save(model | {"param_shapes": shapes, "shared_params": {"c": "a"}}, tmp_path / "mp_rank_00_model_states.pt")
    for rank in (0, 1):
        state = {"zero_stage": 1, "partition_count": [2], "param_alignment_paddings": [[1, 0]]}
        state["single_partition_of_fp32_groups"] = [flat[4 * rank : 4 * rank + 4]]
        torch.save({"optimizer_state_dict": state}, tmp_path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    merged = read_whole_weights(tmp_path)
    assert torch.equal(merged["a"], a)
    assert torch.equal(merged["b"], b.view(2, 2))
    assert torch.equal(merged["c"], a)
    assert merged["count"].dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("2-float32", "last share", "needs the *_optim_states.pt of 2 ranks and has 1"),
        ("3-float32", "first share", "lacks the *_optim_states.pt of rank 0"),
        ("2-bf16", "all shares", "has no *_optim_states.pt"),
        ("2-float32", "model file", "has no mp_rank_00_model_states.pt"),
        ("3-float32", "model file", "has no zero_pp_rank_1_mp_rank_00_model_states.pt"),
        ("2-float32", "cut share", "cut off"),
        ("2-float32", "other share", "has no 'optimizer_state_dict'"),
        ("2-float32", "two kinds", "two shares of rank 0"),
        ("2-float32", "model parallel", "model-parallel run"),
        ("1-float32", "shares of another stage", "has no 'fp32_flat_groups'|has no zero_pp_rank_0"),
    ],
)
def test_missing_broken_and_mixed_files_are_named(copied, name, damage, words):
    folder = copied(name)
    shares = sorted(folder.glob("*_optim_states.pt"))
    models = sorted(folder.glob("*_model_states.pt"))
    if damage in ("last share", "first share", "all shares"):
        for path in {"last share": shares[1:], "first share": shares[:1], "all shares": shares}[damage]:
            path.unlink()
    elif damage == "model file":
        models[-1].unlink()
    elif damage == "cut share":
        shares[0].write_bytes(shares[0].read_bytes()[:-200])
    elif damage == "other share":
        shutil.copy(folder / "model.pth", shares[0])
    elif damage == "two kinds":
        shutil.copy(shares[0], folder / f"bf16_{shares[0].name}")
    elif damage == "model parallel":
        shares[0].rename(folder / shares[0].name.replace("mp_rank_00", "mp_rank_01"))
    else:
        other = copied("3-float32")
        for path in shares:
            shutil.copy(other / path.name, path)
    with pytest.raises(EngineError) as raised:
        read_whole_weights(folder)
    assert any(word in str(raised.value) for word in words.split("|")), raised.value
    assert "\n" not in str(raised.value)


def test_the_folder_is_found_by_its_tag_or_by_latest(saved, tmp_path):
    parent = saved[0] / "1-float32"
    assert find_zero_folder(parent, None) == parent / "checkpoint-0"
    assert find_zero_folder(parent, "checkpoint-0") == parent / "checkpoint-0"
    assert find_zero_folder(parent / "checkpoint-0", None) == parent / "checkpoint-0"
    with pytest.raises(EngineError, match="no folder 'checkpoint-9'"):
        find_zero_folder(parent, "checkpoint-9")
    with pytest.raises(EngineError, match="no readable file 'latest'"):
        find_zero_folder(tmp_path, None)
    with pytest.raises(EngineError, match="is no folder"):
        find_zero_folder(tmp_path / "absent", None)


def test_reading_needs_no_deepspeed(saved):
    code = (
        "import sys; sys.modules['deepspeed'] = None; from pathlib import Path; from engine.zero_files import *;"
        "print(len(read_whole_weights(Path(sys.argv[1]))))"
    )
    result = run_program("-c", code, str(saved[0] / "3-bf16" / "checkpoint-0"))
    assert result.stdout.strip() == "97", result.stderr
