"""Edges are matched by what they are, in any list: atoms and image, never place or length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import DataError
from kdcache.graphs import Edges, GraphRule, neighbor_list
from kdcache.matching import match_edges
from tests.test_graphs import random_structure

Row = tuple[int, ...]


def rows(edges: Edges) -> list[Row]:
    """(source, target, shift) of every edge."""
    return [
        (int(s), int(t), *(int(n) for n in shift))
        for s, t, shift in zip(*edges.edge_index, edges.edge_shift, strict=True)
    ]


def by_dictionary(edges: list[Row], other: list[Row]) -> list[int]:
    """The judge: a dictionary, edge by edge."""
    place = {row: k for k, row in enumerate(other)}
    return [place.get(row, -1) for row in edges]


def match(edges: Edges, other: Edges) -> list[int]:
    found = match_edges(edges.edge_index, edges.edge_shift, other.edge_index, other.edge_shift)
    assert found.dtype == np.int64
    return found.tolist()


def taken(edges: Edges, order: np.ndarray) -> Edges:
    return Edges(edges.edge_index[:, order], edges.edge_shift[order], edges.truncated)


def concatenated(parts: list[Edges], sizes: list[int]) -> Edges:
    """Several structures as one, atoms counted on."""
    first = np.cumsum([0, *sizes])
    index = [edges.edge_index + start for edges, start in zip(parts, first, strict=False)]
    return Edges(np.concatenate(index, axis=1), np.concatenate([e.edge_shift for e in parts]), True)


@pytest.mark.proof
@given(
    seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4),
    cutoffs=st.tuples(st.floats(0.5, 5.0), st.floats(0.5, 5.0)),
    limits=st.tuples(st.none() | st.integers(1, 9), st.none() | st.integers(1, 9)),
)
@settings(max_examples=80, deadline=None)
def test_two_graphs_of_any_rules_are_matched_as_by_a_dictionary(
    seeds: list[int], cutoffs: tuple[float, float], limits: tuple[int | None, int | None]
) -> None:
    structures = [random_structure(seed) for seed in seeds]
    sizes = [len(positions) for positions, _, _ in structures]
    lists = [
        concatenated(
            [neighbor_list(*s, GraphRule(cutoff, limit, limit is not None)) for s in structures],
            sizes,
        )
        for cutoff, limit in zip(cutoffs, limits, strict=True)
    ]
    student, teacher = lists
    assert match(student, teacher) == by_dictionary(rows(student), rows(teacher))


@pytest.fixture(scope="module")
def crystal() -> tuple[Edges, Edges]:
    """Two atoms in a cell so small that each sees images of itself; a wide and a narrow graph."""
    cell, pbc = np.diag([2.1, 2.4, 2.9]) + 0.2 * np.eye(3, k=1), np.ones(3, bool)
    positions = np.array([[0.1, 0.2, 0.0], [1.1, 1.0, 1.5]])
    wide, narrow = (neighbor_list(positions, cell, pbc, GraphRule(r)) for r in (4.5, 2.6))
    assert (narrow.edge_index[0] == narrow.edge_index[1]).sum() >= 4
    assert narrow.n_edges < wide.n_edges
    return wide, narrow


@pytest.mark.proof
def test_a_subset_finds_all_its_edges_and_a_superset_leaves_the_rest(
    crystal: tuple[Edges, Edges],
) -> None:
    wide, narrow = crystal
    found = match(narrow, wide)
    assert -1 not in found
    assert [rows(wide)[k] for k in found] == rows(narrow)
    back = match(wide, narrow)
    assert [k for k in back if k >= 0] == list(range(narrow.n_edges))
    assert back.count(-1) == wide.n_edges - narrow.n_edges


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_either_list_finds_the_same_edges(
    crystal: tuple[Edges, Edges], seed: int
) -> None:
    wide, narrow = crystal
    generator = np.random.default_rng(seed)
    ours = taken(narrow, generator.permutation(narrow.n_edges))
    theirs = taken(wide, generator.permutation(wide.n_edges))
    assert [rows(theirs)[k] for k in match(ours, theirs)] == rows(ours)


@pytest.mark.proof
def test_images_of_an_atom_with_itself_are_told_apart(crystal: tuple[Edges, Edges]) -> None:
    wide, _ = crystal
    own = taken(wide, np.flatnonzero(wide.edge_index[0] == wide.edge_index[1]))
    turned = Edges(own.edge_index, -own.edge_shift, True)
    found = match(turned, own)
    assert -1 not in found
    assert all(rows(own)[k] == row for k, row in zip(found, rows(turned), strict=True))
    assert found != list(range(len(found)))
    far = Edges(own.edge_index, own.edge_shift + np.int16(40), True)
    assert set(match(far, own)) == {-1}


def test_an_edge_is_not_its_reverse() -> None:
    index, shift = np.array([[0, 1], [1, 2]]), np.zeros((2, 3), int)
    assert match_edges(index, shift, index[::-1], shift).tolist() == [-1, -1]


def test_a_list_without_edges_matches_nothing() -> None:
    none, some = np.zeros((2, 0), int), np.array([[0], [1]])
    assert match_edges(some, np.zeros((1, 3)), none, np.zeros((0, 3))).tolist() == [-1]
    assert match_edges(none, np.zeros((0, 3)), some, np.zeros((1, 3))).tolist() == []


def test_shifts_too_far_apart_for_one_box_are_matched_all_the_same() -> None:
    generator = np.random.default_rng(0)
    index = generator.integers(0, 5000, (2, 60))
    shift = generator.integers(-32768, 32767, (60, 3))
    order = generator.permutation(60)
    assert (
        match_edges(index, shift, index[:, order], shift[order]).tolist()
        == np.argsort(order).tolist()
    )


def test_an_edge_named_twice_is_refused() -> None:
    index, shift = np.array([[3, 1, 3], [0, 2, 0]]), np.zeros((3, 3), int)
    with pytest.raises(DataError, match=r"edges 0 and 2 are both from atom 3 to atom 0"):
        match_edges(index, shift, index, shift)
