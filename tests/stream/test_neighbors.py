"""Neighbour lists by block: kept, cut or computed, they are those of each structure alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from kdcache.graphs import GraphRule, neighbor_list
from kdcache.progress import Advance, silent
from kdcache.store import Store
from kdcache.stream.neighbors import (
    BlockEdges,
    MappedNeighbors,
    Neighbors,
    RestrictedNeighbors,
    StoredNeighbors,
    block_rows,
    count_edges,
    further_neighbors,
    neighbors_for,
    read_lists,
)
from tests.chain import make_store, structures

WIDE = GraphRule(4.0)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("stored"), graph=WIDE)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("bare"))


def assert_lists(found: Neighbors, store: Store, rule: GraphRule) -> None:
    """Block by block, and several blocks at once in an order that is not its own inverse."""
    n = store.plan.n_blocks
    alone = 0
    for blocks in [*([b] for b in range(n)), [n - 1, 0, 2]]:
        edges = found.read(blocks)
        ends = np.cumsum(edges.n_edges)
        rows = block_rows(store, blocks)
        assert len(rows) == len(ends)
        assert len(edges.edge_index) == len(edges.edge_shift) == ends[-1]
        for row, end, count in zip(rows, ends, edges.n_edges, strict=True):
            structure = store.structure(int(row))
            expected = neighbor_list(structure.positions, structure.cell, structure.pbc, rule)
            here = slice(end - count, end)
            np.testing.assert_array_equal(edges.edge_index[here].T, expected.edge_index)
            np.testing.assert_array_equal(edges.edge_shift[here], expected.edge_shift)
            alone += expected.n_edges == 0
    assert alone > 0


def test_a_stored_list_serves_its_own_rule(stored: Store, tmp_path: Path) -> None:
    found = neighbors_for(stored, WIDE, tmp_path)
    assert isinstance(found, StoredNeighbors)
    assert_lists(found, stored, WIDE)


@pytest.mark.parametrize(
    "rule", [GraphRule(2.5), GraphRule(3.0, 3), GraphRule(3.5, 4, symmetric=True), GraphRule(0.1)]
)
def test_a_stored_list_is_cut_to_a_narrower_rule(
    rule: GraphRule, stored: Store, tmp_path: Path
) -> None:
    found = neighbors_for(stored, rule, tmp_path)
    assert isinstance(found, RestrictedNeighbors)
    assert_lists(found, stored, rule)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rule", [GraphRule(4.5), GraphRule(4.5, 5, symmetric=True)])
def test_a_wider_rule_is_computed(rule: GraphRule, stored: Store, tmp_path: Path) -> None:
    found = neighbors_for(stored, rule, tmp_path)
    assert isinstance(found, MappedNeighbors)
    assert_lists(found, stored, rule)


def test_edges_are_counted_wherever_lists_come_from(stored: Store, tmp_path: Path) -> None:
    for rule in (WIDE, GraphRule(3.0, 3), GraphRule(4.5)):
        lists = [
            neighbor_list(s.positions, s.cell, s.pbc, rule) for s in stored.structures("store")
        ]
        found = count_edges(stored, neighbors_for(stored, rule, tmp_path))
        assert found.tolist() == [edges.n_edges for edges in lists]


def test_a_truncated_list_is_never_cut(tmp_path: Path) -> None:
    store = make_store(tmp_path, graph=GraphRule(4.0, 3))
    assert store.manifest.graph is not None
    assert store.manifest.graph.truncated
    found = neighbors_for(store, GraphRule(3.0), tmp_path / "graph")
    assert isinstance(found, MappedNeighbors)
    assert_lists(found, store, GraphRule(3.0))


def test_a_limit_that_cut_nothing_leaves_a_whole_list(tmp_path: Path) -> None:
    store = make_store(tmp_path, graph=GraphRule(4.0, 500))
    found = neighbors_for(store, GraphRule(3.0, 2), tmp_path / "graph")
    assert isinstance(found, RestrictedNeighbors)
    assert_lists(found, store, GraphRule(3.0, 2))


class Counting:
    """Bars, counted."""

    def __init__(self) -> None:
        self.bars: list[str] = []

    @contextmanager
    def __call__(self, label: str, total: int | None, unit: str) -> Iterator[Advance]:
        self.bars.append(label)
        with silent(label, total, unit) as advance:
            yield advance


def test_lists_are_computed_once_for_each_rule(bare: Store, tmp_path: Path) -> None:
    progress = Counting()
    for rule in (GraphRule(3.0), GraphRule(3.0), GraphRule(2.0), GraphRule(3.0, 4)):
        assert_lists(neighbors_for(bare, rule, tmp_path, progress=progress), bare, rule)
    assert len(progress.bars) == len(list(tmp_path.iterdir())) == 3


def test_stores_of_one_dataset_in_another_order_share_no_files(bare: Store, tmp_path: Path) -> None:
    other = make_store(tmp_path, found=list(reversed(structures(40))))
    for store in (bare, other):
        assert_lists(
            neighbors_for(store, GraphRule(3.0), tmp_path / "graph"), store, GraphRule(3.0)
        )
    assert len(list((tmp_path / "graph").iterdir())) == 2


def test_a_search_that_failed_leaves_nothing_to_be_taken_for_lists(
    bare: Store, tmp_path: Path
) -> None:
    @contextmanager
    def failing(label: str, total: int | None, unit: str) -> Iterator[Advance]:
        def advance(n: int = 1, /, note: str = "") -> None:
            raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        neighbors_for(bare, GraphRule(3.0), tmp_path, progress=failing)
    assert_lists(neighbors_for(bare, GraphRule(3.0), tmp_path), bare, GraphRule(3.0))


def test_runs_that_compute_at_once_all_get_whole_lists(bare: Store, tmp_path: Path) -> None:
    rule = GraphRule(3.0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: neighbors_for(bare, rule, tmp_path), range(4)):
            assert_lists(found, bare, rule)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_store_without_a_single_edge_has_empty_lists(bare: Store, tmp_path: Path) -> None:
    found = neighbors_for(bare, GraphRule(0.05), tmp_path)
    edges = found.read([0, 1])
    assert edges.edge_index.shape == (0, 2)
    assert edges.edge_shift.shape == (0, 3)
    assert not edges.n_edges.any()


class Counted:
    """A whole list that counts how often it is read."""

    def __init__(self, whole: Neighbors) -> None:
        self.whole = whole
        self.reads = 0

    def read(self, blocks: Sequence[int]) -> BlockEdges:
        self.reads += 1
        return self.whole.read(blocks)


def test_lists_cut_out_of_one_whole_list_read_it_once(stored: Store) -> None:
    rules = {"": GraphRule(2.5), "limited": GraphRule(3.0, 3), "wide": GraphRule(3.5, 4, True)}
    whole = Counted(StoredNeighbors(stored))
    lists: dict[str, Neighbors] = {
        name: RestrictedNeighbors(stored, whole, rule) for name, rule in rules.items()
    }
    lists["kept"] = StoredNeighbors(stored)
    found = read_lists(lists, [2, 0])
    assert whole.reads == 1
    assert found.keys() == lists.keys()
    for name, neighbors in lists.items():
        alone = neighbors.read([2, 0])
        for part in ("n_edges", "edge_index", "edge_shift"):
            np.testing.assert_array_equal(getattr(found[name], part), getattr(alone, part))


def test_further_lists_and_the_main_one_come_out_of_the_stored_list(
    stored: Store, tmp_path: Path
) -> None:
    rules = {"a": GraphRule(3.0), "b": GraphRule(3.5, 4)}
    lists = further_neighbors(stored, rules, tmp_path)
    lists["main"] = neighbors_for(stored, GraphRule(2.5), tmp_path)
    for name, rule in (*rules.items(), ("main", GraphRule(2.5))):
        found = lists[name]
        assert isinstance(found, RestrictedNeighbors)
        assert found.whole == StoredNeighbors(stored)
        assert_lists(found, stored, rule)
