"""Weights over time are pure functions of the step."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.config import WeightSchedule
from kdcache.distill import schedules
from kdcache.distill.schedules import Clock, constant, ramp, scaled, weight_at
from kdcache.errors import ConfigError


def test_docstring_example_holds() -> None:
    assert doctest.testmod(schedules).failed == 0


def test_steps_hold_each_value_until_the_next_position() -> None:
    steps = WeightSchedule(kind="steps", points=((0.0, 5.0), (0.7, 2.0), (1.0, 9.0)))
    weights = [weight_at(steps, step, Clock(10)) for step in range(10)]
    assert weights == [5.0] * 7 + [2.0] * 3


@given(steps=st.integers(1, 5000), data=st.data())
def test_a_stage_begins_on_the_step_its_fraction_names(steps: int, data: st.DataObject) -> None:
    step = data.draw(st.integers(1, steps))
    schedule = WeightSchedule(kind="steps", points=((0.0, 1.0), (step / steps, 2.0)))
    assert weight_at(schedule, step - 1, Clock(steps)) == 1.0
    assert weight_at(schedule, step, Clock(steps)) == 2.0
    assert weight_at(WeightSchedule(kind="steps", points=((0, 1), (0.07, 2))), 7, Clock(100)) == 2


def test_first_value_holds_before_the_first_position_and_last_after_the_last() -> None:
    late = WeightSchedule(kind="linear", points=((0.4, 1.0), (0.6, 3.0)))
    assert [weight_at(late, step, Clock(10)) for step in (0, 4, 5, 6, 9)] == [1, 1, 2, 3, 3]


@pytest.mark.parametrize(("unit", "length"), [("fraction", 300), ("step", 1), ("epoch", 20)])
def test_units_measure_the_same_ramp(unit: str, length: int) -> None:
    points = ((60 / length, 0.0), (180 / length, 12.0))
    unit_ramp = WeightSchedule.model_validate({"kind": "linear", "points": points, "unit": unit})
    clock = Clock(max_steps=300, steps_per_epoch=20)
    assert weight_at(unit_ramp, 90, clock) == pytest.approx(3.0)


def test_epochs_of_unknown_length_are_refused() -> None:
    epochs = WeightSchedule(points=((0.0, 1.0),), unit="epoch")
    with pytest.raises(ConfigError, match="epochs, but the steps of an epoch are not known"):
        weight_at(epochs, 0, Clock(10))


@given(
    step=st.integers(0, 999),
    start=st.floats(0, 100),
    stop=st.floats(0, 100),
    until=st.floats(0.01, 1.0),
    factor=st.floats(0, 10),
)
def test_ramps_stay_between_their_ends_and_scale(
    step: int, start: float, stop: float, until: float, factor: float
) -> None:
    weight = weight_at(ramp(start, stop, until), step, Clock(1000))
    low, high = sorted((start, stop))
    assert low - 1e-9 <= weight <= high + 1e-9
    rescaled = weight_at(scaled(ramp(start, stop, until), factor), step, Clock(1000))
    assert rescaled == pytest.approx(factor * weight, abs=1e-9)


def test_constant_never_changes() -> None:
    assert {weight_at(constant(7.0), step, Clock(5)) for step in range(9)} == {7.0}
