import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.backend import TorchBackend
from engine.checkpoint import find_newest
from engine.ema import ModelEMA
from engine.errors import EngineError, RunError
from engine.finite_weights import first_nonfinite
from engine.log import RunLog
from engine.loop import RunPlan, fit, resume_position
from engine.optim import build_adamw, parameter_groups
from engine.schedule import warmup_cosine
from engine.weights import load_torch_file, read_state_dict
from tests.helpers import run_in_processes


class Numbers:
    """Micro-batches of numbers that are a function of epoch, step and micro-batch."""

    def __init__(self, steps_per_epoch=4, accumulation=1, batch_size=2):
        self.steps_per_epoch, self._accumulation = steps_per_epoch, accumulation
        self.samples_per_step = batch_size * accumulation
        self.asked = []

    def batches(self, epoch, first_step):
        self.asked.append((epoch, first_step))
        for step in range(first_step, self.steps_per_epoch):
            for micro_batch in range(self._accumulation):
                generator = torch.Generator().manual_seed(1000 * epoch + 10 * step + micro_batch)
                yield {
                    "x": torch.randn(2, 3, generator=generator),
                    "sample_id": [
                        100 * epoch + 10 * step + 2 * micro_batch,
                        100 * epoch + 10 * step + 2 * micro_batch + 1,
                    ],
                    "place": (epoch, step),
                }


def loss_fn(model, batch, step):
    loss = (model(batch["x"]) - 1).square().mean()
    return {"loss": loss, "twice": 2 * loss.detach(), "lateness": step}


def nan_at(*steps):
    def spoiled(model, batch, step):
        losses = loss_fn(model, batch, step)
        return losses | {"loss": losses["loss"] * math.nan} if step in steps else losses

    return spoiled


def backend(accumulation=1):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1)
    groups[0]["lr_scale"] = 0.5
    optimizer = build_adamw(groups, lr=0.1)
    ema = ModelEMA(model, 0.9)
    return TorchBackend(model, optimizer, device=torch.device("cpu"), accumulation_steps=accumulation, ema=ema)


def train(folder, *, loss=loss_fn, loader=None, accumulation=1, resume_from=None, evaluate=None, epochs=3, **plan):
    """Run ``fit`` in a folder; returns backend, position and loader."""
    if folder is not None:
        folder.mkdir(exist_ok=True)
    loader = loader or Numbers(accumulation=accumulation)
    engine = backend(accumulation)
    schedule = warmup_cosine(0.1, 0.001, warmup_steps=2, total_steps=epochs * loader.steps_per_epoch)
    position = None if resume_from is None else resume_position(engine, loader, resume_from)
    position = fit(
        engine,
        loader,
        loss,
        schedule,
        RunPlan(epochs=epochs, output_dir=folder, **plan),
        RunLog(folder),
        evaluate=evaluate,
        position=position,
    )
    return engine, position, loader


def weights(engine):
    return torch.cat([value.flatten() for value in engine.unwrapped().state_dict().values()])


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores(*values):
    """An evaluation that gives these scores in turn."""
    left = list(values)
    return lambda model, loader, epoch: {"score": left.pop(0)}


# ---- steps ----


def test_each_step_has_the_rate_of_its_number_and_each_epoch_its_own_batches(tmp_path):
    _, position, loader = train(tmp_path, log_every=1)
    rates = [row["lr"] for row in rows(tmp_path / "metrics.jsonl")]
    schedule = warmup_cosine(0.1, 0.001, warmup_steps=2, total_steps=12)
    assert rates == [schedule(step) for step in range(12)]
    assert [row["min_lr"] for row in rows(tmp_path / "metrics.jsonl")] == [0.5 * rate for rate in rates]
    assert loader.asked == [(0, 0), (1, 0), (2, 0)]
    assert (position.epoch, position.global_step, position.step_in_epoch) == (3, 12, 0)


def test_the_epoch_s_means_do_not_depend_on_the_logging_interval(tmp_path):
    logs = []
    for every in (1, 3, 100):
        train(tmp_path / str(every), log_every=every, accumulation=2)
        logs.append((tmp_path / str(every) / "log.txt").read_text())
    assert logs[0] == logs[1] == logs[2]


def test_an_interval_s_values_are_means_over_its_steps_and_micro_batches(tmp_path):
    _, _, _ = train(tmp_path / "single", log_every=1, epochs=1, accumulation=2)
    train(tmp_path / "joined", log_every=4, epochs=1, accumulation=2)
    single, (joined,) = rows(tmp_path / "single" / "metrics.jsonl"), rows(tmp_path / "joined" / "metrics.jsonl")
    for key in ("loss", "twice", "grad_norm", "lr"):
        assert joined[key] == pytest.approx(sum(row[key] for row in single) / 4, rel=1e-6)
    assert joined["twice"] == pytest.approx(2 * joined["loss"], rel=1e-6)
    assert [row["step"] for row in single] == [1, 2, 3, 4]
    assert rows(tmp_path / "joined" / "log.txt")[0]["train_loss"] == joined["loss"]


def test_max_steps_ends_the_run_without_changing_the_schedule(tmp_path):
    whole, _, _ = train(tmp_path / "whole", log_every=1)
    _, position, _ = train(tmp_path / "cut", log_every=1, max_steps=6)
    assert position.global_step == 6
    cut = [row["loss"] for row in rows(tmp_path / "cut" / "metrics.jsonl")]
    assert cut == [row["loss"] for row in rows(tmp_path / "whole" / "metrics.jsonl")][:6]
    assert (tmp_path / "cut" / "checkpoint-step6").is_dir()


def test_without_an_output_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(None, save_every_steps=1, evaluate=scores(1.0, 2.0, 3.0))
    assert not list(tmp_path.iterdir())


# ---- checkpoints and resume ----


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_ends_bitwise_like_an_unbroken_one(tmp_path, stop, accumulation):
    options = {"accumulation": accumulation, "save_every_steps": 3, "log_every": 2}
    whole, _, _ = train(tmp_path / "whole", **options)
    train(tmp_path / "cut", max_steps=stop, **options)
    name = (tmp_path / "cut" / "latest").read_text().strip()
    resumed, position, _ = train(tmp_path / "cut", resume_from=tmp_path / "cut" / name, **options)
    assert torch.equal(weights(whole), weights(resumed))
    assert position.global_step == 12
    for file in ("model.pth", "model_ema.pth"):
        one, other = (read_state_dict(tmp_path / run / "checkpoint-2" / file) for run in ("whole", "cut"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (tmp_path / "whole" / "log.txt").read_text() == (tmp_path / "cut" / "log.txt").read_text()


def test_a_run_stopped_before_its_validation_validates_first_when_it_goes_on(tmp_path):
    def stopped(model, loader, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, evaluate=stopped)
    _, position, loader = train(
        tmp_path, evaluate=scores(5.0, 7.0, 6.0), resume_from=tmp_path / "checkpoint-0", log_every=100
    )
    assert [row["val_score"] for row in rows(tmp_path / "log.txt")] == [5.0, 7.0, 6.0]
    assert loader.asked == [(1, 0), (2, 0)]
    assert position.best == 7.0


def test_the_best_checkpoint_is_the_first_of_the_highest_score(tmp_path):
    train(tmp_path, evaluate=scores(3.0, 9.0, 9.0))
    extra = load_torch_file(tmp_path / "checkpoint-best" / "training_state.pth")["extra"]
    assert extra["position"]["best"] == 9.0
    assert extra["global_step"] == 8


def test_the_best_score_survives_a_resume(tmp_path):
    train(tmp_path, evaluate=scores(9.0), max_steps=4)
    _, position, _ = train(tmp_path, evaluate=scores(9.0, 1.0, 2.0), resume_from=tmp_path / "checkpoint-0")
    assert position.best == 9.0
    assert load_torch_file(tmp_path / "checkpoint-best" / "training_state.pth")["extra"]["global_step"] == 4


def test_a_good_score_at_a_stop_inside_an_epoch_is_not_replaced_by_a_worse_one(tmp_path):
    train(tmp_path, evaluate=scores(9.0), max_steps=2)
    train(tmp_path, evaluate=scores(1.0, 2.0, 3.0), resume_from=tmp_path / "checkpoint-step2")
    assert load_torch_file(tmp_path / "checkpoint-best" / "training_state.pth")["extra"]["global_step"] == 2


def test_a_run_killed_between_rare_checkpoints_goes_on_from_its_best_one(tmp_path):
    def killed(model, batch, step):
        if step == 10:
            raise KeyboardInterrupt
        return loss_fn(model, batch, step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss=killed, evaluate=scores(3.0, 9.0), epochs=5, save_every_epochs=5)
    newest, _ = find_newest(tmp_path)
    assert newest == tmp_path / "checkpoint-best"
    _, position, loader = train(
        tmp_path, evaluate=scores(1.0, 2.0, 3.0), epochs=5, save_every_epochs=5, resume_from=newest
    )
    assert loader.asked[0] == (2, 0)
    assert position.best == 9.0
    assert [row["epoch"] for row in rows(tmp_path / "log.txt")] == [0, 1, 2, 3, 4]
    assert load_torch_file(tmp_path / "checkpoint-best" / "training_state.pth")["extra"]["global_step"] == 8


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    train(tmp_path, epochs=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = nn.Linear(3, 1)
    groups = parameter_groups(other.named_parameters(), weight_decay=0.1)
    stranger = TorchBackend(other, build_adamw(groups, lr=0.1), device=torch.device("cpu"))
    with pytest.raises(EngineError, match="another model"):
        resume_position(stranger, Numbers(), tmp_path / "checkpoint-0")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_time_per_step_is_that_of_a_later_interval_than_the_first(monkeypatch):
    log = RunLog(None)
    taken = []
    interval = log.interval

    def noted(row, **how):
        taken.append(how["seconds_per_step"])
        interval(row, **how)

    monkeypatch.setattr(log, "interval", noted)
    plan = RunPlan(epochs=1, output_dir=None, max_steps=2, log_every=1)
    fit(backend(), Numbers(), loss_fn, warmup_cosine(0.1, 0.0, warmup_steps=0, total_steps=4), plan, log)
    assert len(taken) == 2
    assert log.seconds_per_step == taken[1] > 0


def test_checkpoints_come_every_n_epochs_and_at_the_end(tmp_path):
    train(tmp_path, epochs=5, save_every_epochs=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]


def test_only_the_newest_checkpoint_inside_an_epoch_stays(tmp_path):
    def stopped(model, batch, step):
        if step == 7:
            raise KeyboardInterrupt
        return loss_fn(model, batch, step)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, loss=stopped, save_every_steps=1, save_every_epochs=5)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-step7"]


def test_another_batch_size_goes_on_at_the_same_sample_with_a_warning(tmp_path, capsys):
    train(tmp_path, max_steps=6)  # 2 of 4 steps of the second epoch, 2 samples each
    loader = Numbers(steps_per_epoch=2, batch_size=4)
    _, position, _ = train(tmp_path, loader=loader, resume_from=tmp_path / "checkpoint-step6")
    assert "warning: resuming with 1 processes, 4 samples per step and 2 steps per epoch instead of 1, 2 and 4" in (
        capsys.readouterr().err
    )
    assert loader.asked == [(1, 1), (2, 0)]
    assert position.global_step == 6


def test_fewer_data_than_before_end_the_epoch_at_once(tmp_path):
    train(tmp_path, max_steps=7)
    loader = Numbers(steps_per_epoch=2)
    _, position, _ = train(tmp_path, loader=loader, resume_from=tmp_path / "checkpoint-step7")
    assert position.epoch == 3
    assert loader.asked[-1] == (2, 0)


def test_a_new_run_keeps_the_lines_of_an_older_one_aside(tmp_path):
    train(tmp_path, epochs=1, save_every_epochs=0)
    before = (tmp_path / "log.txt").read_text()
    train(tmp_path, epochs=2, save_every_epochs=0)
    assert (tmp_path / "log.txt.old").read_text() == before
    assert [row["epoch"] for row in rows(tmp_path / "log.txt")] == [0, 1]


# ---- numbers that are not finite ----


def test_a_bad_step_leaves_weights_and_moments_as_they_were(tmp_path):
    before, _, _ = train(tmp_path / "before", max_steps=5)
    after, position, _ = train(tmp_path / "after", loss=nan_at(5), max_steps=6)
    assert torch.equal(weights(before), weights(after))
    one, other = (engine.optimizer.state_dict()["state"] for engine in (before, after))
    assert all(torch.equal(one[index]["exp_avg"], other[index]["exp_avg"]) for index in one)
    assert position.failed_in_a_row == 1


def test_bad_steps_are_named_with_their_samples_and_do_not_spoil_the_means(tmp_path, capsys):
    train(tmp_path, loss=nan_at(1, 2), log_every=4, epochs=1)
    err = capsys.readouterr().err
    assert "step 1: loss or gradients are not finite, the weights were left as they were; samples [10, 11]" in err
    assert "step 2: loss or gradients are not finite" in err
    (row,) = rows(tmp_path / "log.txt")
    assert 0 < row["train_loss"] < 100
    assert 0 < row["train_grad_norm"] < 100


def test_an_interval_of_bad_steps_alone_has_null_not_a_number(tmp_path):
    train(tmp_path, loss=nan_at(0, 1), log_every=2, epochs=1)
    values = [row["loss"] for row in rows(tmp_path / "metrics.jsonl")]
    assert values[0] is None
    assert values[1] > 0


def test_too_many_bad_steps_in_a_row_end_the_run_with_a_checkpoint_to_go_on_from(tmp_path):
    with pytest.raises(
        RunError, match=r"3 steps in a row .* step 4 with samples \[100, 101\]: .*saved .*checkpoint-step5"
    ):
        train(tmp_path, loss=nan_at(2, 3, 4, 5, 6), log_every=5, max_nonfinite=3)
    _, position, loader = train(tmp_path, resume_from=tmp_path / "checkpoint-step5")
    assert loader.asked[0] == (1, 1)
    assert position.global_step == 12


def test_the_count_of_bad_steps_goes_on_over_intervals_and_starts_again_after_a_good_one(tmp_path):
    train(tmp_path / "apart", loss=nan_at(0, 1, 3, 4, 6, 7), log_every=1, max_nonfinite=3)
    with pytest.raises(RunError, match="3 steps in a row"):
        train(tmp_path / "together", loss=nan_at(3, 4, 5), log_every=2, max_nonfinite=3)


@pytest.mark.parametrize("step", [3, 11])
def test_weights_that_are_no_longer_finite_are_not_saved_and_older_checkpoints_stand(tmp_path, step):
    plan = RunPlan(epochs=3, output_dir=tmp_path, log_every=1)
    engine = backend()
    with pytest.raises(
        RunError, match=rf"after step {step + 1} the weights are not finite \(the first: 0.weight\)"
    ) as e:
        # the loss of the step itself is finite
        fit(engine, Numbers(), loss_fn, lambda now: 1e39 if now == step else 0.1, plan, RunLog(tmp_path))
    assert all(row["loss"] > 0 for row in rows(tmp_path / "metrics.jsonl"))
    names = sorted(path.name for path in tmp_path.glob("*checkpoint-*"))
    if step == 3:
        assert names == []
        assert str(e.value).endswith("and were not saved; start again with a lower learning rate")
    else:
        assert names == ["checkpoint-0", "checkpoint-1"]
        assert "older checkpoints stand (checkpoint-1 is the newest): go on from there with a lower" in str(e.value)
        _, position, _ = train(tmp_path, resume_from=tmp_path / "checkpoint-1")
        assert position.global_step == 12


def test_every_kind_of_number_is_looked_at_and_the_first_weight_is_named():
    large = torch.full((3,), 3e38)  # its sum of squares is not finite
    entries = {
        "empty": torch.empty(0),
        "large": large,
        "half": torch.full((2, 2), 6e4, dtype=torch.float16),
        "bfloat": torch.ones(2, dtype=torch.bfloat16),
        "whole": torch.ones(2, dtype=torch.int8),
        "scalar": torch.tensor(1.0),
    }
    assert first_nonfinite(entries.items()) is None
    for name in reversed(["large", "half", "bfloat", "scalar"]):
        for bad in (math.nan, -math.inf):
            entries[name].view(-1)[-1] = bad
            assert first_nonfinite(entries.items()) == name
    assert first_nonfinite([]) is None


def test_frozen_weights_are_not_looked_at():
    engine = backend()
    first = engine.unwrapped()[0].weight
    first.requires_grad_(False).fill_(math.nan)
    assert engine.nonfinite_weight() is None


def _one_rank_with_a_bad_weight(rank: int) -> None:
    engine = backend()
    assert engine.nonfinite_weight() is None
    if rank == 1:
        engine.unwrapped()[2].bias.data.fill_(math.nan)
    assert engine.nonfinite_weight() == "2.bias"


def test_a_bad_weight_of_one_process_is_named_by_all():
    run_in_processes(_one_rank_with_a_bad_weight, 2)


def _one_bad_rank(rank: int, folder: str) -> None:
    def spoiled(model, batch, step):
        losses = loss_fn(model, batch, step)
        if rank == 1 and step == 1:
            losses["loss"] = losses["loss"] * math.nan
        if rank == 1 and step == 2:
            losses["loss"] = losses["loss"] + math.inf  # its gradients are finite
        return losses

    engine, _, _ = train(Path(folder), loss=spoiled, epochs=1, log_every=1)
    torch.save(weights(engine), Path(folder) / f"rank{rank}.pt")


def test_a_bad_loss_on_one_process_skips_the_step_on_all(tmp_path):
    run_in_processes(_one_bad_rank, 2, str(tmp_path))
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(one, two)
    assert torch.isfinite(one).all()
    assert [row["loss"] is None for row in rows(tmp_path / "metrics.jsonl")] == [False, True, True, False]
