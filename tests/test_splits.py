"""Who is held out, and that it depends on nothing but contents and the seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import ConfigError, DataError
from kdcache.splits import check_fractions, choose_splits

UNITS = [f"unit-{i}".encode() for i in range(200)]


def test_shares_are_exact_and_the_rest_trains() -> None:
    chosen = choose_splits([""] * 200, UNITS, {"val": 0.05, "test": 0.1}, seed=3)
    names, counts = np.unique(chosen, return_counts=True)
    assert dict(zip(names.tolist(), counts.tolist(), strict=True)) == {
        "test": 20,
        "train": 170,
        "val": 10,
    }
    other = choose_splits([""] * 200, UNITS, {"val": 0.05, "test": 0.1}, seed=4)
    assert (chosen != other).any()


@given(st.permutations(range(200)), st.integers(-(2**63), 2**63))
def test_the_order_of_the_files_changes_nothing(order: list[int], seed: int) -> None:
    straight = choose_splits([""] * 200, UNITS, {"test": 0.3}, seed)
    shuffled = choose_splits([""] * 200, [UNITS[i] for i in order], {"test": 0.3}, seed)
    np.testing.assert_array_equal(shuffled, straight[list(order)])


@given(st.lists(st.integers(0, 12), min_size=40, max_size=80), st.integers(0, 99))
def test_equal_units_stay_together(owners: list[int], seed: int) -> None:
    owners += range(13)
    units = [bytes([owner]) for owner in owners]
    chosen = choose_splits([""] * len(units), units, {"val": 0.2}, seed)
    sides = {unit: {chosen[i] for i, u in enumerate(units) if u == unit} for unit in set(units)}
    assert all(len(side) == 1 for side in sides.values())
    largest = max(units.count(unit) for unit in set(units))
    wanted = round(0.2 * len(units))
    assert wanted <= (chosen == "val").sum() < wanted + largest


def test_what_the_dataset_holds_out_stays_out() -> None:
    said = ["train", "test", "", "test"] * 50
    chosen = choose_splits(said, UNITS, {"val": 0.1}, seed=0)
    assert [a for a, b in zip(chosen, said, strict=True) if b == "test"] == ["test"] * 100
    assert (chosen == "val").sum() == 10
    with pytest.raises(DataError, match="already names 100 structures 'test'"):
        choose_splits(said, UNITS, {"test": 0.1}, seed=0)


def test_splits_that_leave_a_side_empty_are_refused() -> None:
    with pytest.raises(DataError, match=r"val=0.001 of 200 structures is none"):
        choose_splits([""] * 200, UNITS, {"val": 0.001}, seed=0)
    with pytest.raises(DataError, match="in 1 groups: nothing would be left"):
        choose_splits([""] * 200, [b"one"] * 200, {"val": 0.1}, seed=0)


@pytest.mark.parametrize(
    ("fractions", "said"),
    [
        ({"valid": 0.1}, "neither val nor test"),
        ({"val": 0.0}, "between 0 and 1"),
        ({"val": float("nan")}, "between 0 and 1"),
        ({"val": 0.5, "test": 0.5}, "sum to 1.0"),
    ],
)
def test_fractions_that_cannot_be_meant(fractions: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_fractions(fractions)
