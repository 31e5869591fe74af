from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.neighborlist import primitive_neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import ConfigError, DataError
from kdcache.graphs import Edges, GraphRule, neighbor_list, restrict

NO_CELL = np.zeros((3, 3))
NO_PBC = np.zeros(3, dtype=bool)
# 0 -> 2 -> 1 -> 3 -> 0: not its own inverse.
CYCLE = np.array([2, 3, 1, 0])


def rows(edges: Edges) -> list[tuple[int, ...]]:
    """(target, source, shift) of every edge, in the order of the list."""
    columns = (edges.edge_index[1], edges.edge_index[0], *edges.edge_shift.T)
    return [tuple(int(v) for v in row) for row in zip(*columns, strict=True)]


def distances(edges: Edges, positions: np.ndarray, cell: np.ndarray) -> np.ndarray:
    source, target = edges.edge_index
    return np.linalg.norm(positions[source] + edges.edge_shift @ cell - positions[target], axis=1)


def random_structure(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms strewn over several cells of a skew box, periodic along any of its axes."""
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(1.5, 5.0, 3)) + rng.normal(scale=0.9, size=(3, 3))
    while abs(np.linalg.det(cell)) < 2.0:
        cell = cell + np.diag(rng.uniform(0.5, 1.0, 3))
    positions = rng.uniform(-1.0, 2.0, size=(rng.integers(1, 7), 3)) @ cell
    return positions, cell, rng.random(3) < 0.5


@given(seed=st.integers(0, 2**32 - 1), cutoff=st.floats(0.5, 6.0))
@settings(max_examples=150, deadline=None)
def test_finds_what_ase_finds_in_skew_cells_with_any_pbc(seed: int, cutoff: float) -> None:
    positions, cell, pbc = random_structure(seed)
    found = rows(neighbor_list(positions, cell, pbc, GraphRule(cutoff)))
    i, j, shift, d = primitive_neighbor_list("ijSd", pbc, cell, positions, cutoff)
    clear = np.abs(d - cutoff) > 1e-9
    expected = {
        (int(a), int(b), *(int(n) for n in s))
        for a, b, s, near in zip(i, j, shift, d > 0.01, strict=True)
        if near
    }
    assert len(found) == len(set(found))
    if clear.all():
        assert set(found) == expected


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_order_is_target_source_shift_and_every_edge_has_its_reverse(seed: int) -> None:
    positions, cell, pbc = random_structure(seed)
    found = rows(neighbor_list(positions, cell, pbc, GraphRule(4.0)))
    assert found == sorted(found)
    assert {(j, i, -a, -b, -c) for i, j, a, b, c in found} == set(found)


def test_an_atom_neighbours_its_own_images() -> None:
    cell = np.diag([2.0, 3.0, 9.0])
    edges = neighbor_list(np.array([[0.3, 0.1, 0.2]]), cell, np.array([True] * 3), GraphRule(3.7))
    assert rows(edges) == sorted(
        (0, 0, a, b, 0)
        for a in (-1, 0, 1)
        for b in (-1, 0, 1)
        if 0 < np.hypot(2.0 * a, 3.0 * b) <= 3.7
    )
    assert edges.n_edges == 8


@pytest.mark.parametrize("n_atoms", [1, 2])
def test_atoms_out_of_reach_have_no_edges(n_atoms: int) -> None:
    positions = np.array([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])[:n_atoms]
    edges = neighbor_list(positions, NO_CELL, NO_PBC, GraphRule(5.0, 3, True))
    assert edges.edge_index.shape == (2, 0)
    assert edges.edge_shift.shape == (0, 3)
    assert edges.edge_index.dtype == np.int32
    assert edges.edge_shift.dtype == np.int16
    assert not edges.truncated


def test_cutoff_is_inclusive_and_atoms_on_one_spot_are_no_neighbours() -> None:
    positions = np.array([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0], [0.005, 0.0, 0.0], [3.0, 4.0, 0.0]])
    edges = neighbor_list(positions, NO_CELL, NO_PBC, GraphRule(5.0))
    pairs = {row[:2] for row in rows(edges)}
    assert (0, 3) in pairs  # 3, 4, 5: exactly the cutoff
    assert (0, 2) not in pairs
    just_below = neighbor_list(positions, NO_CELL, NO_PBC, GraphRule(np.nextafter(5.0, 0.0)))
    assert (0, 3) not in {row[:2] for row in rows(just_below)}


@pytest.mark.parametrize("third", [[0.0, 0.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
def test_what_the_cell_says_along_an_open_axis_is_ignored(third: list[float]) -> None:
    cell = np.array([[3.0, 0.0, 0.0], [1.0, 3.0, 0.0], third])
    pbc = np.array([True, True, False])
    positions = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.8], [0.5, 2.0, -4.0]])
    far = cell.copy()
    far[2] = [0.0, 0.0, 100.0]
    edges = neighbor_list(positions, cell, pbc, GraphRule(5.0))
    assert rows(edges) == rows(neighbor_list(positions, far, pbc, GraphRule(5.0)))
    assert (edges.edge_shift[:, 2] == 0).all()
    assert edges.n_edges > 30


def test_permuting_atoms_permutes_the_list() -> None:
    rng = np.random.default_rng(5)
    cell = np.array([[3.0, 0.3, 0.0], [1.2, 2.8, 0.0], [0.1, 0.4, 3.3]])
    positions = rng.uniform(size=(4, 3)) @ cell
    pbc = np.array([True, False, True])
    edges = rows(neighbor_list(positions, cell, pbc, GraphRule(4.0)))
    permuted = rows(neighbor_list(positions[CYCLE], cell, pbc, GraphRule(4.0)))
    assert sorted((int(CYCLE[i]), int(CYCLE[j]), *s) for i, j, *s in permuted) == edges


@given(seed=st.integers(0, 2**32 - 1), max_neighbors=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_max_neighbors_keeps_the_nearest(seed: int, max_neighbors: int) -> None:
    positions, cell, pbc = random_structure(seed)
    whole = neighbor_list(positions, cell, pbc, GraphRule(4.5))
    cut = neighbor_list(positions, cell, pbc, GraphRule(4.5, max_neighbors))
    d_whole, d_cut = distances(whole, positions, cell), distances(cut, positions, cell)
    assert rows(cut) == sorted(rows(cut))
    assert set(rows(cut)) <= set(rows(whole))
    assert cut.truncated == (cut.n_edges < whole.n_edges)
    for atom in range(len(positions)):
        expected = np.sort(d_whole[whole.edge_index[1] == atom])[:max_neighbors]
        found = np.sort(d_cut[cut.edge_index[1] == atom])
        np.testing.assert_allclose(found, expected, atol=1e-8)


def test_ties_in_a_perfect_crystal_go_to_the_earlier_edge_whatever_the_rounding() -> None:
    # 12 neighbours at 2.55 Å, 6 at 3.61 Å: a limit of 15 cuts three out of six tied ones.
    crystal = bulk("Cu", cubic=True)
    positions, cell, pbc = crystal.positions, crystal.cell.array, np.ones(3, dtype=bool)
    rule = GraphRule(3.9, 15)
    edges = neighbor_list(positions, cell, pbc, rule)
    assert edges.truncated
    for atom in range(4):
        of_atom = [row for row in rows(edges) if row[0] == atom]
        second = [r for r in of_atom if r[1] == atom]  # the second shell is an atom's own images
        assert len(of_atom) == 15
        assert second == [(atom, atom, -1, 0, 0), (atom, atom, 0, -1, 0), (atom, atom, 0, 0, -1)]
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    turned = neighbor_list(positions @ turn, cell @ turn, pbc, rule)
    assert rows(turned) == rows(edges)
    permuted = neighbor_list(positions[CYCLE], cell, pbc, rule)
    shells = np.round(distances(edges, positions, cell), 6)
    permuted_shells = np.round(distances(permuted, positions[CYCLE], cell), 6)
    for new, old in enumerate(CYCLE):
        assert sorted(permuted_shells[permuted.edge_index[1] == new]) == sorted(
            shells[edges.edge_index[1] == old]
        )


@given(seed=st.integers(0, 2**32 - 1), max_neighbors=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_symmetric_list_follows_the_higher_numbered_atom(seed: int, max_neighbors: int) -> None:
    positions, cell, pbc = random_structure(seed)
    cut = rows(neighbor_list(positions, cell, pbc, GraphRule(4.0, max_neighbors)))
    expected = set()
    for target, source, *shift in cut:
        leading = next((s for s in shift if s != 0), 0)
        if source < target or (source == target and leading < 0):
            expected |= {(target, source, *shift), (source, target, *(-s for s in shift))}
    found = neighbor_list(positions, cell, pbc, GraphRule(4.0, max_neighbors, True))
    assert rows(found) == sorted(expected)


@given(seed=st.integers(0, 2**32 - 1), rule=st.sampled_from([(2.5, None, False), (3.0, 4, True)]))
@settings(max_examples=40, deadline=None)
def test_restrict_gives_what_a_search_gives(
    seed: int, rule: tuple[float, int | None, bool]
) -> None:
    structures = [random_structure(seed), random_structure(seed + 1)]
    stored = [neighbor_list(*s, GraphRule(5.0)) for s in structures]
    narrow = GraphRule(*rule)
    searched = [neighbor_list(*s, narrow) for s in structures]
    first = len(structures[0][0])
    (restricted,) = restrict(
        np.concatenate([stored[0].edge_index, stored[1].edge_index + first], axis=1),
        np.concatenate([e.edge_shift for e in stored]),
        np.concatenate([s[0] for s in structures]),
        np.stack([s[1] for s in structures]),
        np.repeat([0, 1], [len(s[0]) for s in structures]),
        [narrow],
    )
    moved = [(i + first, j + first, *s) for i, j, *s in rows(searched[1])]
    assert rows(restricted) == rows(searched[0]) + moved
    assert restricted.truncated == any(e.truncated for e in searched)


def test_threads_do_not_share_buffers() -> None:
    structures = [random_structure(seed) for seed in range(40)]
    alone = [rows(neighbor_list(*s, GraphRule(4.0))) for s in structures]
    found: dict[int, list[list[tuple[int, ...]]]] = {}

    def search(thread: int) -> None:
        found[thread] = [rows(neighbor_list(*s, GraphRule(4.0))) for s in structures]

    threads = [threading.Thread(target=search, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[k] == alone for k in range(4))


def test_positions_too_many_cells_apart_are_refused() -> None:
    positions = np.array([[0.0, 0.0, 0.0], [40_000.5, 0.0, 0.0]])
    with pytest.raises(DataError, match="Wrap the positions"):
        neighbor_list(positions, np.identity(3) * 1.0, np.array([True, False, False]), GraphRule(2))


@pytest.mark.proof
@pytest.mark.parametrize("case", ["painn/slab", "painn/batch3", "schnet/slab", "schnet/batch3"])
def test_search_reproduces_published_graphs(shared: Path, case: str) -> None:
    directory = shared / "golden" / case
    inputs, graph = np.load(directory / "inputs.npz"), np.load(directory / "graph_float64.npz")
    painn = case.startswith("painn")
    rule = GraphRule(12.0, 50, True) if painn else GraphRule(6.0, 50)
    found: list[tuple[int, ...]] = []
    first = 0
    for n_atoms, cell, pbc in zip(inputs["natoms"], inputs["cell"], inputs["pbc"], strict=True):
        positions = inputs["pos"][first : first + n_atoms].astype(np.float64)
        edges = neighbor_list(positions, cell.astype(np.float64), pbc, rule)
        found += [(i + first, j + first, *s) for i, j, *s in rows(edges)]
        first += int(n_atoms)
    source, target = graph["edge_index"]
    shift = graph["cell_offsets"].astype(int)
    published = zip(target, source, *shift.T, strict=True)
    assert found == sorted(tuple(int(v) for v in row) for row in published)


@pytest.mark.parametrize("rule", [GraphRule(5.0), GraphRule(12.0, 50, True)])
def test_rule_survives_json(rule: GraphRule) -> None:
    assert GraphRule.from_json(rule.to_json()) == rule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cutof": 5.0}, "did you mean cutoff"),
        ({"cutoff": "5"}, "must be a number"),
        ({"cutoff": -1.0}, "positive"),
        ({"cutoff": float("nan")}, "positive"),
        ({"cutoff": 5.0, "max_neighbors": 0}, "at least 1"),
        ({"cutoff": 5.0, "max_neighbors": 2.5}, "whole number"),
        ({"cutoff": 5.0, "symmetric": 1}, "true or false"),
        ({}, "must be a number"),
    ],
)
def test_rule_refuses_what_it_is_not(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GraphRule.from_json(values)
