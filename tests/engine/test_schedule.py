import pytest

from engine.errors import EngineError
from engine.schedule import warmup_cosine, warmup_decay


def test_warm_up_starts_at_zero_and_the_peak_occurs_twice():
    rate = warmup_cosine(1.0, 0.1, warmup_steps=5, total_steps=20)
    assert [rate(step) for step in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_cosine_falls_towards_the_floor_and_steps_past_the_end_keep_the_last_rate():
    rate = warmup_cosine(1.0, 0.1, warmup_steps=0, total_steps=100)
    values = [rate(step) for step in range(100)]
    assert values == sorted(values, reverse=True)
    assert values[50] == pytest.approx(0.55)
    assert 0.1 < values[-1] < 0.101
    assert rate(100) == rate(1000) == values[-1]


def test_a_warm_up_longer_than_the_run_is_cut():
    rate = warmup_cosine(1.0, 0.0, warmup_steps=10, total_steps=4)
    assert [rate(step) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_a_warm_up_of_one_step_has_rate_zero():
    assert warmup_cosine(1.0, 0.0, warmup_steps=1, total_steps=4)(0) == 0.0


def test_a_run_without_steps_is_refused():
    with pytest.raises(EngineError, match="at least one step"):
        warmup_cosine(1.0, 0.0, warmup_steps=0, total_steps=0)


def test_a_decay_has_its_peak_once_right_after_the_warm_up_and_ends_at_its_end():
    rate = warmup_decay(1.0, 0.1, warmup_steps=4, total_steps=10)
    assert [rate(step) for step in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rate(7) == pytest.approx(0.55)
    assert (rate(10), rate(11), rate(99)) == (pytest.approx(0.1), 0.1, 0.1)


def test_a_decay_of_power_two_and_a_cosine():
    assert warmup_decay(1.0, 0.0, warmup_steps=0, total_steps=4, power=2.0)(2) == pytest.approx(0.25)
    cosine = warmup_decay(1.0, 0.0, warmup_steps=0, total_steps=4, power=None)
    assert [cosine(step) for step in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"total_steps": 0}, "at least one step"),
        ({"end": 2.0}, "the end must not be above the peak"),
        ({"power": 0.0}, "power of the schedule must be above 0"),
    ],
)
def test_a_decay_that_cannot_be_is_refused(values, message):
    values = {"end": 0.0, "warmup_steps": 1, "total_steps": 5, "power": 1.0} | values
    with pytest.raises(EngineError, match=message):
        warmup_decay(1.0, values.pop("end"), **values)
