"""What a codec and rounding explain is no difference, and nothing more is explained."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdcache.audit.difference import AT_REST, Difference
from kdcache.audit.sample import Stored
from kdcache.audit.symmetry import rotations
from kdcache.fields import Codec, FieldSpec
from kdcache.store import FieldError

TINY = 1e-12


def difference(
    stored: Any,
    computed: Any,
    *,
    codec: Codec = "exact",
    tolerance: float = TINY,
    half_step: float = 0.0,
    mean_squares: tuple[float, ...] = (),
    match: tuple[int, ...] = (),
) -> Difference:
    """Of rows of two values, one to a structure."""
    spec = FieldSpec("x", "atom", (2,), "float64", codec=codec)
    found = Difference(spec, FieldError(), tolerance)
    values, said = np.array(stored, np.float64), np.array(computed, np.float64)
    steps = np.full(2, half_step) if codec == "compact" else np.zeros(0)
    rows = np.arange(len(said))
    places = np.array(match) if match else rows
    found.add(Stored(values, steps, np.array(mean_squares)), said, rows, places)
    return found


@pytest.mark.parametrize("value", [1.0, 1.5, 1023 / 512])
def test_half_a_step_of_float16_is_rounding_and_a_whole_one_is_not(value: float) -> None:
    step = 2.0**-10
    near = value + 0.49 * step
    assert difference([[value, 0]], [[near, 0]], codec="half").n_outside == 0
    assert difference([[1.0, 0]], [[1.0 + step, 0]], codec="half").n_outside == 1
    # The same in exact values.
    assert difference([[value, 0]], [[near, 0]]).n_outside == 1


def test_half_a_step_of_int8_is_rounding_and_a_whole_one_is_not() -> None:
    given = {"codec": "compact", "half_step": 0.5}
    assert difference([[3, 4]], [[3.49, 3.51]], **given).n_outside == 0  # type: ignore[arg-type]
    assert difference([[3, 4]], [[3, 4.6]], **given).n_outside == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_outside(value: float) -> None:
    found = difference([[1, value], [1, 2]], [[1, 2], [1, 2]], tolerance=0.5)
    assert found.n_outside == 1
    assert found.worst() == (0, np.inf)
    assert difference([[1, 2]], [[1, value]], tolerance=0.5).n_outside == 1


def test_a_row_that_is_not_stored_is_outside_even_where_it_is_zero() -> None:
    found = difference([[1, 2]], [[0, 0], [1, 2]], match=(-1, 0), tolerance=0.5)
    assert found.n_outside == 1
    assert found.worst()[0] == 0


def test_rounding_at_rest_is_measured_by_what_is_stored_elsewhere() -> None:
    stored, computed = [[1e-9, 0]], [[2e-9, 0]]
    assert difference(stored, computed, tolerance=1e-4).n_outside == 1
    elsewhere = (1.0, 1.0, 1e12)
    found = difference(stored, computed, tolerance=1e-4, mean_squares=elsewhere)
    assert found.n_outside == 0
    # One wild structure does not count, nor do most values where the sample has its own.
    assert found.typical == pytest.approx(AT_REST)
    own = difference([[2, 2]], [[2, 2]], mean_squares=elsewhere)
    assert own.typical == pytest.approx(2.0)


def test_no_rotation_is_a_reflection() -> None:
    turns = rotations(64, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.det(turns), 1.0, atol=1e-12)
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.tile(np.eye(3), (64, 1, 1)),
                               atol=1e-12)  # fmt: skip
