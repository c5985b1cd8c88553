import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.backend import TorchBackend
from engine.checkpoint import (
    amend_checkpoint,
    check_manifest,
    clear_leftovers,
    find_newest,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from engine.ema import ModelEMA
from engine.errors import EngineError, RunError
from engine.optim import build_adamw, parameter_groups
from tests.helpers import run_in_processes


def small_backend(seed=0, width=4, ema=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.3), nn.Linear(width, 1))
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    average = ModelEMA(model, 0.9) if ema else None
    return TorchBackend(model, build_adamw(groups, lr=0.1), device=torch.device("cpu"), ema=average)


def take_steps(backend, count):
    for _ in range(count):
        backend.backward(backend.model(torch.ones(2, 3)).square().mean())
        backend.step(0.1)


def save(backend, folder, name="checkpoint-0", step=1):
    return save_checkpoint(backend, folder, name, {"global_step": step}, copy_files={"config.json": b"{}"})


def test_a_checkpoint_restores_weights_optimizer_average_and_random_state(tmp_path):
    backend = small_backend(ema=True)
    take_steps(backend, 3)
    folder = save(backend, tmp_path)
    take_steps(backend, 3)  # dropout draws: only equal if the random state came back
    other = small_backend(seed=9, ema=True)
    assert load_checkpoint(other, folder)["global_step"] == 1
    take_steps(other, 3)
    for name, value in backend.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name])
        assert torch.equal(backend.ema.state_dict()[name], other.ema.state_dict()[name])


def test_the_weights_file_is_the_originals_layout(tmp_path):
    backend = small_backend()
    folder = save(backend, tmp_path)
    content = torch.load(folder / "model.pth", weights_only=True)
    assert list(content) == ["model"]
    assert list(content["model"]) == list(backend.model.state_dict())
    assert (folder / "config.json").read_bytes() == b"{}"


def test_no_temporary_is_left_and_the_pointer_names_the_newest(tmp_path):
    backend = small_backend()
    save(backend, tmp_path, "checkpoint-0", 5)
    save(backend, tmp_path, "checkpoint-1", 10)
    save(backend, tmp_path, "checkpoint-best", 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("checkpoint-0", "checkpoint-1", "checkpoint-best", "latest"),
    ]
    assert (tmp_path / "latest").read_text() == "checkpoint-1\n"


@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "manifest"])
def test_a_torn_checkpoint_is_named_and_passed_over(tmp_path, damage):
    backend = small_backend()
    sound = save(backend, tmp_path, "checkpoint-0", 5)
    torn = save(backend, tmp_path, "checkpoint-1", 10)
    weights = torn / "model.pth"
    content = bytearray(weights.read_bytes())
    if damage == "cut":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    else:
        (torn / "manifest.json").write_text('{"files"')
    newest, skipped = find_newest(tmp_path)
    assert newest == sound
    assert len(skipped) == 1
    assert "checkpoint-1" in skipped[0]
    with pytest.raises(EngineError, match="cannot resume"):
        load_checkpoint(backend, torn)


def test_the_newest_is_the_one_with_the_most_steps_not_the_last_by_name(tmp_path):
    backend = small_backend()
    save(backend, tmp_path, "checkpoint-9", 90)
    newest = save(backend, tmp_path, "checkpoint-10", 100)
    save(backend, tmp_path, "checkpoint-step95", 95)
    assert find_newest(tmp_path)[0] == newest


def test_the_best_counts_when_it_is_newer_and_stands_back_at_the_same_step(tmp_path):
    backend = small_backend()
    ordinary = save(backend, tmp_path, "checkpoint-0", 10)
    best = save(backend, tmp_path, "checkpoint-best", 10)
    assert find_newest(tmp_path)[0] == ordinary
    best = save(backend, tmp_path, "checkpoint-best", 20)
    assert find_newest(tmp_path)[0] == best


def test_replacing_a_checkpoint_keeps_a_sound_one_at_every_moment(tmp_path):
    backend = small_backend()
    folder = save(backend, tmp_path, "checkpoint-best", 1)
    take_steps(backend, 1)
    # a kill between the two renames leaves the old folder under its hidden name only
    shutil.copytree(folder, tmp_path / ".writing-old-checkpoint-best")
    shutil.rmtree(folder)
    clear_leftovers(tmp_path)
    assert check_manifest(folder) is None
    save(backend, tmp_path, "checkpoint-best", 2)
    assert json.loads((folder / "manifest.json").read_text())["global_step"] == 2


def test_retention_keeps_the_newest_epochs_and_one_mid_epoch_checkpoint(tmp_path):
    backend = small_backend()
    for epoch in range(4):
        save(backend, tmp_path, f"checkpoint-{epoch}", 10 * (epoch + 1))
    save(backend, tmp_path, "checkpoint-step42", 42)
    save(backend, tmp_path, "checkpoint-step44", 44)
    save(backend, tmp_path, "checkpoint-best", 20)
    prune(tmp_path, keep=2, newest="checkpoint-step44")
    names = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-3", "checkpoint-step44", "checkpoint-best"}


def test_retention_trusts_the_name_just_written_and_reads_no_checkpoint(tmp_path):
    backend = small_backend()
    save(backend, tmp_path, "checkpoint-7", 80)  # of a run that was taken up again at an older place
    for name in ("checkpoint-step42", "checkpoint-step44"):
        save(backend, tmp_path, name, 40)
        (tmp_path / name / "manifest.json").unlink()
    prune(tmp_path, keep=1, newest="checkpoint-step44")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-7", "checkpoint-step44"}


def test_an_old_checkpoint_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-step1").mkdir()

    def refuse(path, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(RunError, match=r"checkpoint .*checkpoint-step1 \(Permission denied\)"):
        prune(tmp_path, keep=0, newest="checkpoint-0")


def _save_below_a_file(rank, folder):
    with pytest.raises(RunError, match="could not write .*checkpoint-0 .*choose another --output_dir"):
        save(small_backend(), Path(folder) / "file")


def test_a_folder_that_the_main_process_cannot_make_ends_all_processes(tmp_path):
    (tmp_path / "file").touch()
    run_in_processes(_save_below_a_file, 2, str(tmp_path))


def _load_torn(rank, folder):
    with pytest.raises(EngineError, match="cannot resume from .*model.pth is missing"):
        load_checkpoint(small_backend(), Path(folder))


def test_a_torn_checkpoint_is_refused_by_all_processes(tmp_path):
    folder = save(small_backend(), tmp_path)
    (folder / "model.pth").unlink()
    run_in_processes(_load_torn, 2, str(folder))


def test_the_main_process_alone_reads_the_checksums(tmp_path, monkeypatch):
    folder = save(small_backend(), tmp_path)
    monkeypatch.setattr("engine.distributed.is_main", lambda: False)
    monkeypatch.setattr("engine.checkpoint.check_manifest", lambda _: pytest.fail("read the checksums"))
    assert load_checkpoint(small_backend(), folder)["global_step"] == 1


def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(tmp_path):
    backend = small_backend(width=4096)
    older = save(backend, tmp_path, "checkpoint-0", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RunError, match="older checkpoints are untouched"):
            save(backend, tmp_path, "checkpoint-1", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert check_manifest(older) is None
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-0", "latest"}


@pytest.mark.parametrize("content", ["", '{"global_st', "[1]"])
def test_a_torn_amendment_is_named(tmp_path, content):
    folder = save(small_backend(), tmp_path)
    amend_checkpoint(folder, {"global_step": 7})
    assert load_checkpoint(small_backend(), folder)["global_step"] == 7
    (folder / "amendment.json").write_text(content)
    with pytest.raises(EngineError, match="checkpoint-0: amendment.json is cut off; remove the folder"):
        load_checkpoint(small_backend(), folder)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    folder = save(small_backend(), tmp_path)
    with pytest.raises(EngineError, match="another model or other parameter groups"):
        load_checkpoint(small_backend(width=5), folder)


def test_this_run_s_settings_win_over_those_of_the_checkpoint_and_the_change_is_said(tmp_path, capsys):
    backend = small_backend()
    take_steps(backend, 2)
    folder = save(backend, tmp_path)
    other = small_backend(seed=9)
    changed = {"weight_decay": 0.25, "lr_scale": 0.5, "betas": (0.8, 0.9), "eps": 1e-6}
    for group in other.optimizer.param_groups:
        group.update(changed)
    load_checkpoint(other, folder)
    for group in other.optimizer.param_groups:
        assert {key: group[key] for key in changed} == changed
    for index, state in backend.optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], other.optimizer.state_dict()["state"][index]["exp_avg"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "with this run's settings: weight_decay 0.25 instead of 0.1, lr_scale 0.5 instead of 1.0" in lines[0]


def test_the_same_settings_are_not_worth_a_line(tmp_path, capsys):
    folder = save(small_backend(), tmp_path)
    load_checkpoint(small_backend(), folder)
    assert capsys.readouterr().err == ""


def test_groups_of_other_names_are_refused(tmp_path):
    folder = save(small_backend(), tmp_path)
    other = small_backend()
    other.optimizer.param_groups[0]["name"] = "layer_3_decay"
    with pytest.raises(EngineError, match="layer_3_decay.*give the same flags"):
        load_checkpoint(other, folder)
