import itertools

import pytest

from data.errors import DataError
from data.samplers import EvalBatchSampler, SampleKey, TrainBatchSampler


def steps_of(num_samples, batch_size, *, accumulation=1, world_size=1, epoch=0, first_step=0, seed=5):
    """For each optimizer step the list, over ranks and micro-batches, of the indices read."""
    steps = None
    for rank in range(world_size):
        sampler = TrainBatchSampler(
            num_samples, batch_size, accumulation_steps=accumulation, rank=rank, world_size=world_size, seed=seed
        )
        sampler.set_position(epoch, first_step)
        batches = [[key.index for key in keys] for keys in sampler]
        assert len(batches) == len(sampler)
        assert all(len(batch) == batch_size for batch in batches)
        mine = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
        steps = mine if steps is None else [one + other for one, other in zip(steps, mine, strict=True)]
    return steps


def flat(step):
    return [index for batch in step for index in batch]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "world_size"),
    [(b, a, w) for b, a, w in itertools.product((1, 2, 3, 4, 6, 12), repeat=3) if b * a * w == 12],
)
def test_a_step_reads_the_same_samples_however_it_is_split(batch_size, accumulation, world_size):
    whole = steps_of(101, 12, epoch=3)
    split = steps_of(101, batch_size, accumulation=accumulation, world_size=world_size, epoch=3)
    assert [sorted(flat(step)) for step in split] == [sorted(flat(step)) for step in whole]


@pytest.mark.parametrize(("num_samples", "batch_size", "accumulation", "world_size"), [(7, 2, 1, 3), (50, 3, 2, 2)])
def test_an_epoch_reads_a_sample_at_most_once_and_leaves_out_less_than_a_step(
    num_samples, batch_size, accumulation, world_size
):
    steps = steps_of(num_samples, batch_size, accumulation=accumulation, world_size=world_size)
    read = [index for step in steps for index in flat(step)]
    assert len(set(read)) == len(read)
    assert set(read) <= set(range(num_samples))
    assert num_samples - len(read) < batch_size * accumulation * world_size


def test_over_the_epochs_every_sample_is_read():
    read = {index for epoch in range(6) for step in steps_of(7, 2, world_size=3, epoch=epoch) for index in flat(step)}
    assert read == set(range(7))


@pytest.mark.parametrize("first_step", [0, 1, 5, 8])
def test_a_position_continues_where_an_unbroken_epoch_would_be(first_step):
    assert (
        steps_of(64, 2, accumulation=2, world_size=2, epoch=2, first_step=first_step)
        == (steps_of(64, 2, accumulation=2, world_size=2, epoch=2)[first_step:])
    )


def test_the_position_holds_for_the_next_iteration_and_can_be_set_again():
    sampler = TrainBatchSampler(10, 2, seed=1)
    sampler.set_position(4, 3)
    assert len(list(sampler)) == len(sampler) == 2
    sampler.set_position(0)
    assert len(list(sampler)) == len(sampler) == 5


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    orders = {(seed, epoch): str(steps_of(40, 4, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    assert orders[1, 2] == str(steps_of(40, 4, seed=1, epoch=2))


def test_the_order_never_changes_since_resumed_runs_rely_on_it():
    assert flat(steps_of(10, 10, seed=42, epoch=1)[0]) == [0, 8, 7, 4, 3, 1, 2, 9, 6, 5]


def test_keys_carry_the_epoch_so_that_each_epoch_draws_anew():
    sampler = TrainBatchSampler(4, 2)
    sampler.set_position(7)
    assert {key.epoch for keys in sampler for key in keys} == {7}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(0, 1), (1, 0), (-2, 1)])
def test_sizes_below_one_are_refused(batch_size, accumulation):
    with pytest.raises(DataError, match="--batch_size and --update_freq must be at least 1"):
        TrainBatchSampler(4, batch_size, accumulation_steps=accumulation)


def test_fewer_samples_than_a_step_are_refused_with_the_product():
    with pytest.raises(
        DataError, match=r"11 training samples do not fill one step of 12 .*update_freq 3 x processes 2"
    ):
        TrainBatchSampler(11, 2, accumulation_steps=3, world_size=2)
    assert TrainBatchSampler(12, 2, accumulation_steps=3, world_size=2).steps_per_epoch == 1


@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 7, 20])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_an_evaluation_reads_every_sample_once_over_all_ranks(num_samples, world_size, batch_size):
    keys: list[SampleKey] = []
    for rank in range(world_size):
        sampler = EvalBatchSampler(num_samples, batch_size, rank=rank, world_size=world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        keys += [key for batch in batches for key in batch]
    assert sorted(key.index for key in keys) == list(range(num_samples))


def test_an_evaluation_batch_below_one_is_refused():
    with pytest.raises(DataError, match="--eval_batch_size must be at least 1, got 0"):
        EvalBatchSampler(4, 0)


def test_an_evaluation_that_goes_on_leaves_out_whole_batches_and_keeps_the_others_as_they_were():
    def batches(done=()):
        sampler = EvalBatchSampler(20, 3, rank=1, world_size=2, done=done)
        found = [[key.index for key in keys] for keys in sampler]
        assert len(sampler) == len(found)
        return found

    assert batches() == [[1, 3, 5], [7, 9, 11], [13, 15, 17], [19]]
    assert batches({7, 9, 11, 19}) == [[1, 3, 5], [13, 15, 17]]
    assert batches([1, 3, 5, 0, 2, 9, 13, 17]) == [[7, 9, 11], [13, 15, 17], [19]]
    assert batches(range(20)) == []


def test_fixed_batches_are_the_same_for_any_number_of_processes():
    for world_size in (1, 2, 3, 5):
        found = []
        for rank in range(world_size):
            sampler = EvalBatchSampler(10, 3, rank=rank, world_size=world_size, fixed_batches=True)
            found += [[key.index for key in keys] for keys in sampler]
        assert sorted(found) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    sampler = EvalBatchSampler(10, 3, rank=1, world_size=2, done={3, 4, 5, 9}, fixed_batches=True)
    assert list(sampler) == []


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(DataError, match="there is nothing to evaluate: the split has no samples"):
        EvalBatchSampler(0, 2)
