"""Batches cut from windows: every atom keeps its place, its features and its edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.graphs import GraphRule
from kdcache.stream.window import (
    atom_bounded,
    collate,
    make_batch,
    range_rows,
    reference_table,
    reference_totals,
    window_of,
)
from kdcache.structures import Structure

RULE = GraphRule(cutoff=2.5)


def structure(number: int, n_atoms: int, *, labelled: bool = True) -> Structure:
    """Atom k of structure s stands at x = 1.5 k and carries force (s, k, 0)."""
    positions = np.zeros((n_atoms, 3))
    positions[:, 0] = 1.5 * np.arange(n_atoms)
    forces = np.zeros((n_atoms, 3))
    forces[:, 0], forces[:, 1] = number, np.arange(n_atoms)
    return Structure(
        structure_id=str(number),
        atomic_numbers=np.arange(1, n_atoms + 1),
        positions=positions,
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        energy=float(number) if labelled else None,
        forces=forces if labelled else None,
    )


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=10))
def test_range_rows_is_the_concatenation_of_ranges(pairs: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in pairs], np.int64)
    counts = np.array([count for _, count in pairs], np.int64)
    expected = [row for start, count in pairs for row in range(start, start + count)]
    assert range_rows(starts, counts).tolist() == expected


def test_batch_in_any_order_keeps_every_atom_with_its_structure() -> None:
    sizes = [3, 1, 5, 2, 4]
    window = window_of([structure(s, n) for s, n in enumerate(sizes)], RULE)
    order = np.array([2, 0, 4, 1])  # not its own inverse
    batch = make_batch([window.gather(order)])
    assert batch.n_structures == 4
    assert batch.rows is not None
    assert batch.rows.tolist() == order.tolist()
    assert batch.forces is not None
    assert batch.energy is not None
    owner = order[batch.structure_index.numpy()]
    assert batch.forces[:, 0].tolist() == owner.tolist()
    assert batch.forces[:, 1].tolist() == [k for s in order for k in range(sizes[s])]
    assert batch.energy.tolist() == order.tolist()


def test_edges_join_neighbours_within_one_structure() -> None:
    window = window_of([structure(s, n) for s, n in enumerate([3, 1, 4])], RULE)
    batch = make_batch([window.gather(np.array([2, 1, 0]))])
    source, target = batch.edge_index
    assert (batch.structure_index[source] == batch.structure_index[target]).all()
    distance = (batch.positions[source] - batch.positions[target]).norm(dim=1)
    assert distance.numpy() == pytest.approx(1.5)
    assert batch.n_edges == 2 * (3 + 0 + 2)


def test_batch_of_two_windows_equals_batch_of_one() -> None:
    all_of_them = [structure(s, n) for s, n in enumerate([3, 1, 4, 2])]
    whole = window_of(all_of_them, RULE)
    first, second = window_of(all_of_them[:2], RULE), window_of(all_of_them[2:], RULE)
    one = make_batch([whole.gather(np.array([1, 0, 3]))])
    two = make_batch([first.gather(np.array([1, 0])), second.gather(np.array([1]))])
    for name in ("atomic_numbers", "positions", "edge_index", "structure_index", "forces"):
        assert getattr(one, name).tolist() == getattr(two, name).tolist(), name


def test_lone_atom_and_missing_labels() -> None:
    batch = collate([structure(0, 1, labelled=False)], RULE)
    assert batch.n_edges == 0
    assert batch.energy is not None
    assert batch.energy.isnan().all()
    assert batch.forces is not None
    assert batch.forces.isnan().all()


def test_periodic_image_of_an_atom_with_itself_is_an_edge() -> None:
    lone = structure(0, 1)
    lone.cell, lone.pbc = 2.0 * np.eye(3), np.array([True, False, False])
    batch = collate([lone], RULE)
    assert batch.edge_index.tolist() == [[0, 0], [0, 0]]
    assert sorted(batch.edge_shift[:, 0].tolist()) == [-1.0, 1.0]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=15), st.integers(1, 20))
def test_atom_bounded_covers_all_and_exceeds_only_alone(sizes: list[int], limit: int) -> None:
    runs = atom_bounded(np.array(sizes), limit)
    assert [k for run in runs for k in range(run.start, run.stop)] == list(range(len(sizes)))
    for run in runs:
        assert sum(sizes[run]) <= limit or run.stop - run.start == 1


def test_reference_totals_are_sums_over_each_structure() -> None:
    table = reference_table({1: -13.5, 8: -2000.25})
    totals = reference_totals(np.array([8, 1, 1, 1, 6]), np.array([3, 1, 1]), table)
    assert totals.tolist() == [-2027.25, -13.5, 0.0]
