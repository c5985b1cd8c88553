import numpy as np
import pytest
import torch

from data.errors import DataError
from data.loader import build_eval_loader, build_train_loader


class Draws:
    """Samples that are nothing but what they drew."""

    def __init__(self, size, broken=()):
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def sample(self, index, rng):
        if index in self.broken:
            raise DataError(f"sample {index} is broken")
        return index, rng.random(3)


def collate(samples):
    return {
        "sample_id": [index for index, _ in samples],
        "draws": torch.tensor(np.stack([draw for _, draw in samples])),
    }


def drawn(*, epoch=1, first_step=0, num_workers=0, world_size=1, batch_size=4, seed=3, size=24):
    """Index → draws, over all ranks."""
    found = {}
    for rank in range(world_size):
        loader = build_train_loader(
            Draws(size), collate, batch_size, rank=rank, world_size=world_size, seed=seed, num_workers=num_workers
        )
        for batch in loader.batches(epoch, first_step):
            found.update(zip(batch["sample_id"], batch["draws"].tolist(), strict=True))
    return found


@pytest.mark.parametrize(
    "options",
    [{"num_workers": 2}, {"num_workers": 3, "batch_size": 2}, {"world_size": 2, "batch_size": 2}, {"world_size": 3}],
)
def test_the_draws_of_a_sample_do_not_depend_on_workers_ranks_or_batches(options):
    assert drawn(**options) == drawn()


def test_the_draws_of_a_sample_do_not_depend_on_where_the_epoch_was_entered():
    whole, rest = drawn(), drawn(first_step=4)
    assert len(rest) == 8
    assert rest.items() <= whole.items()


def test_the_draws_differ_between_samples_epochs_and_seeds():
    everything = [*drawn().values(), *drawn(epoch=2).values(), *drawn(seed=4).values()]
    assert len({tuple(draws) for draws in everything}) == 3 * 24


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_after_another_gives_what_a_fresh_loader_gives(num_workers):
    loader = build_train_loader(Draws(12), collate, 4, num_workers=num_workers)
    next(loader.batches(0))  # left in the middle, as a run that reaches its limit does
    later = [batch["sample_id"] for batch in loader.batches(5, 1)]
    fresh = build_train_loader(Draws(12), collate, 4)
    assert later == [batch["sample_id"] for batch in fresh.batches(5, 1)]
    assert (loader.steps_per_epoch, loader.samples_per_step) == (3, 4)


def test_reading_an_epoch_leaves_the_model_s_random_state_alone():
    before = torch.get_rng_state()
    loader = build_train_loader(Draws(12), collate, 4, num_workers=2)
    assert len(list(loader.batches(0))) == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_evaluation_loader_gives_every_sample_once_each_time_it_is_read(num_workers, world_size):
    for size in (1, 2, 7):
        loaders = [
            build_eval_loader(Draws(size), collate, 2, rank=rank, world_size=world_size, num_workers=num_workers)
            for rank in range(world_size)
        ]
        for _ in range(2):
            batches = [batch for loader in loaders for batch in loader]
            assert sum(map(len, loaders)) == len(batches)
            assert sorted(index for batch in batches for index in batch["sample_id"]) == list(range(size))
        assert {loader.num_samples for loader in loaders} == {size}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_evaluation_loader_passes_over_batches_that_are_done(num_workers):
    loader = build_eval_loader(Draws(7), collate, 2, num_workers=num_workers, done={0, 1, 2, 4, 5})
    whole = build_eval_loader(Draws(7), collate, 2)
    kept = [batch for batch in whole if batch["sample_id"] in ([2, 3], [6])]
    found = list(loader)
    assert [batch["sample_id"] for batch in found] == [[2, 3], [6]]
    assert all(torch.equal(one["draws"], other["draws"]) for one, other in zip(found, kept, strict=True))
    assert (len(loader), loader.num_samples) == (2, 7)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_data_error_arrives_as_it_was_raised_not_wrapped_by_the_worker(num_workers):
    loader = build_eval_loader(Draws(6, broken={3}), collate, 2, num_workers=num_workers)
    with pytest.raises(DataError, match="^sample 3 is broken$"):
        list(loader)


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(DataError, match="--num_workers must not be negative, got -1"):
        build_eval_loader(Draws(6), collate, 2, num_workers=-1)


def failure_of(loader):
    """What reading a loader ends with, without the traceback, which would keep the loader's processes."""
    try:
        list(loader)
    except RuntimeError as error:
        return str(error)
    return None


def test_a_lack_of_shared_memory_reaches_the_main_process(monkeypatch):
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    assert "unable to allocate shared memory" in failure_of(build_eval_loader(Draws(6), collate, 2, num_workers=1))


def collate_to_what_cannot_travel(samples):
    return {"text": lambda: samples}


def test_a_batch_that_a_loader_process_cannot_pass_on_ends_it_and_is_noticed(capfd):
    failure = failure_of(build_eval_loader(Draws(6), collate_to_what_cannot_travel, 2, num_workers=1))
    assert "exited unexpectedly" in failure
    said = capfd.readouterr().err
    assert "loader process" in said
    assert "cannot pass its batch on" in said
    assert "Traceback" not in said
