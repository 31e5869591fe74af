"""Batches cut from windows: every atom keeps its place, its features and its edges."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdcache.graphs import GraphRule
from kdcache.stream.window import (
    CACHED_VALUES,
    atom_bounded,
    collate,
    counted_over_all,
    make_batch,
    range_rows,
    reference_table,
    reference_totals,
    take_rows,
    take_runs,
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


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=10))
def test_runs_are_the_concatenation_of_ranges(pairs: list[tuple[int, int]]) -> None:
    array = np.arange(3 * 56, dtype=np.int16).reshape(56, 3) - 70
    starts = np.array([start for start, _ in pairs], np.int64)
    counts = np.array([count for _, count in pairs], np.int64)
    expected = [array[row].tolist() for n, c in pairs for row in range(n, n + c)]
    for dtype in (np.int16, np.float32):
        taken = take_runs(array, starts, counts, dtype)
        assert taken.dtype == dtype
        assert taken.shape == (len(expected), 3)
        assert taken.tolist() == expected
    column = take_runs(array[:, 0].copy(), starts, counts, np.int64)
    assert column.tolist() == [row[0] for row in expected]


def test_rows_that_are_not_there_are_refused() -> None:
    halves = np.zeros((4, 2), np.float16)
    with pytest.raises(IndexError, match="row 4 is asked for, the array has 4"):
        take_rows(halves, np.array([0, 4]), np.float32)
    with pytest.raises(IndexError, match="rows up to 5 are asked for, the array has 4"):
        take_runs(halves, np.array([0, 3]), np.array([2, 2]), np.float32)


@pytest.fixture(params=[1, 2])
def torch_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize("shape", [(), (2,), (3, 512), (2 * CACHED_VALUES,)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_halves_are_widened_piece_by_piece_as_a_whole(
    shape: tuple[int, ...], dtype: type[np.floating]
) -> None:
    generator = np.random.default_rng(0)
    array = generator.standard_normal((40, *shape)).astype(np.float16)
    rows = generator.integers(len(array), size=300 if len(shape) > 1 else 5)
    taken = take_rows(array, rows, dtype)
    assert taken.dtype == dtype
    np.testing.assert_array_equal(taken, array[rows].astype(dtype))
    assert take_rows(array, rows[:0], dtype).shape == (0, *shape)


@given(st.lists(st.tuples(st.integers(1, 2**30), st.integers(0, 4)), max_size=8), st.data())
def test_edges_count_atoms_over_all_structures(
    sizes: list[tuple[int, int]], data: st.DataObject
) -> None:
    edges, expected, first = [], [], 0
    for n_atoms, n_edges in sizes[:3]:  # of 2^30 atoms, so that no half spills into the other
        for _ in range(n_edges):
            ends = [data.draw(st.integers(0, n_atoms - 1)) for _ in range(2)]
            edges.append(ends)
            expected.append([first + end for end in ends])
        first += n_atoms
    n_atoms = np.array([n for n, _ in sizes[:3]], np.int64)
    counted = counted_over_all(
        np.array(edges, np.int64).reshape(-1, 2),
        np.cumsum(n_atoms) - n_atoms,
        np.array([n for _, n in sizes[:3]], np.int64),
    )
    assert counted.T.tolist() == expected
    assert counted.flags.c_contiguous


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
