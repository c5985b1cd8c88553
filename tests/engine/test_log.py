import errno
import io
import json
import re

import pytest
import torch

from engine.errors import EngineError, RunError
from engine.log import RunLog, peak_mib, say

ROW = {"epoch": 0, "step": 10, "loss": 2.5, "lr": 1e-4, "grad_norm": 3.0, "samples_per_s": 8.0}
ROW |= {"data_wait": 0.25, "peak_mib": 100.0}


def write(log, **changes):
    log.interval(ROW | changes, steps_left=50, seconds_per_step=2.0, position="epoch 0 [10/60]")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interval_is_one_line_for_people_and_one_for_programs(tmp_path, capsys):
    write(RunLog(tmp_path))
    shown = capsys.readouterr().err
    assert shown == (
        "epoch 0 [10/60]  loss 2.5000  lr 1.000e-04  grad_norm 3.000  8.0 samples/s  data 25 %  peak 100 MiB  "
        "eta 0:01:40\n"
    )
    assert rows(tmp_path / "metrics.jsonl") == [ROW]


def test_a_value_that_is_no_number_is_null_in_the_file_and_said_on_the_terminal(tmp_path, capsys):
    log = RunLog(tmp_path)
    write(log, loss=float("nan"), grad_norm=float("inf"))
    log.epoch({"train_loss": float("nan"), "epoch": 0})
    assert "loss nan" in capsys.readouterr().err
    text = (tmp_path / "metrics.jsonl").read_text() + (tmp_path / "log.txt").read_text()
    assert not re.search("NaN|Infinity", text)
    assert rows(tmp_path / "metrics.jsonl")[0] == ROW | {"loss": None, "grad_norm": None}
    assert rows(tmp_path / "log.txt") == [{"train_loss": None, "epoch": 0}]


def test_the_order_of_an_epoch_s_keys_is_kept(tmp_path):
    log = RunLog(tmp_path)
    log.epoch({"train_lr": 1.0, "val_score": 2.0, "epoch": 0})
    log.epoch({"train_lr": 1.0, "val_score": 2.0, "epoch": 1})
    assert [list(row) for row in rows(tmp_path / "log.txt")] == [["train_lr", "val_score", "epoch"]] * 2


def test_a_resume_drops_later_lines_and_a_line_that_was_cut_off(tmp_path):
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.epoch({"epoch": epoch})
        write(log, step=10 * epoch + 10)
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"epoch": 1, "train_lo')
    log.rewind(epoch=2, global_step=20)
    assert [row["epoch"] for row in rows(tmp_path / "log.txt")] == [0, 1]
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [10, 20]


def test_a_new_run_sets_the_lines_of_an_older_one_aside(tmp_path):
    RunLog(tmp_path).epoch({"epoch": 0})
    RunLog(tmp_path).set_aside()
    assert rows(tmp_path / "log.txt.old") == [{"epoch": 0}]
    assert not (tmp_path / "log.txt").exists()
    RunLog(tmp_path).set_aside()
    assert rows(tmp_path / "log.txt.old") == [{"epoch": 0}]


def test_run_json_records_command_arguments_versions_and_facts(tmp_path):
    RunLog(tmp_path).write_run({"lr": 0.1, "path": tmp_path}, {"answers": 5})
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["arguments"] == {"lr": 0.1, "path": str(tmp_path)}
    assert record["answers"] == 5
    assert record["torch"] == torch.__version__
    assert record["world_size"] == 1
    assert isinstance(record["command"], list)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    log = RunLog(None, tmp_path / "tb")
    log.write_run({}, {})
    write(log)
    log.epoch({"epoch": 0})
    log.rewind(epoch=0, global_step=0)
    log.set_aside()
    log.close()
    assert not list(tmp_path.iterdir())
    assert "loss 2.5" in capsys.readouterr().err


def test_tensorboard_gets_the_original_s_tags(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, tmp_path / "tb")
    write(log, loss_scale=1.0, min_lr=1e-5, weight_decay=0.05)
    log.epoch({"train_loss": 2.0, "val_score": 61.5, "epoch": 0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = {"train/loss", "opt/lr", "opt/min_lr", "opt/weight_decay", "opt/loss_scale", "opt/grad_norm", "perf/score"}
    assert set(events.Tags()["scalars"]) >= tags
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.5)]
    assert events.Scalars("perf/score")[0].value == 61.5


def test_a_full_disk_is_told_with_tensorboard_s_folder(tmp_path, monkeypatch):
    log = RunLog(tmp_path, tmp_path / "tb")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log._tensorboard, "add_scalar", full)
    with pytest.raises(RunError, match=r"could not write .*tb \(the disk is full\): free some space"):
        write(log)
    log.close()


def test_a_tensorboard_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"--log_dir .*file/tb is not writable \(.*\): choose another folder"):
        RunLog(tmp_path, tmp_path / "file" / "tb")


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_progress_bar_is_shown_on_a_terminal_only(tmp_path, monkeypatch):
    for stream, shown in ((_Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        log = RunLog(tmp_path)
        log.start_epoch(3, first_step=0, steps=7)
        log.advance()
        log.close()
        assert ("epoch 3" in stream.getvalue()) == shown


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    for name in ("log.txt", "metrics.jsonl", "run.json"):
        (tmp_path / name).mkdir()
    log = RunLog(tmp_path)
    with pytest.raises(RunError, match=r"could not write .*log\.txt \(Is a directory\)"):
        log.epoch({"epoch": 0})
    with pytest.raises(RunError, match=r"could not write .*metrics\.jsonl"):
        write(log)
    with pytest.raises(RunError, match=r"could not write .*run\.json"):
        log.write_run({}, {})
    with pytest.raises(RunError, match=r"could not write .*log\.txt"):
        log.rewind(epoch=0, global_step=0)


def test_say_is_one_line_on_stderr(capsys):
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_peak_memory_of_the_process_is_in_mib():
    assert 50 < peak_mib(torch.device("cpu")) < 100_000
