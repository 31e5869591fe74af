"""Neighbour lists searched as they are read, for whoever reads every structure once.

A student reads a structure a hundred times and keeps its lists (`neighbors`); a dump reads it once.
Invariant: the lists are those `neighbors` would keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from kdcache.graphs import GraphRule
from kdcache.store import Store
from kdcache.stream.neighbors import (
    BlockEdges,
    Neighbors,
    RestrictedNeighbors,
    kept_neighbors,
    search,
)


@dataclass(frozen=True)
class SearchedNeighbors:
    """Lists that nothing keeps, found on threads.

    Attributes:
        store: an open store.
        rule: what makes two atoms neighbours.
        threads: for the search.
    """

    store: Store
    rule: GraphRule
    threads: int = 1
    _pool: ThreadPoolExecutor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="kdcache-neighbors")
        object.__setattr__(self, "_pool", pool)

    def read(self, blocks: Sequence[int]) -> BlockEdges:
        """As `Neighbors.read`."""
        return search(self.store, self.rule, blocks, self._pool)


def lists_read_once(
    store: Store, rule: GraphRule, further: Mapping[str, GraphRule], threads: int
) -> tuple[Neighbors, dict[str, Neighbors]]:
    """Neighbour lists of a rule and of further ones by name: kept, cut from what is kept, or found.

    Further lists are cut out of one without a neighbour limit.
    """

    def lists(wanted: GraphRule) -> Neighbors:
        return kept_neighbors(store, wanted) or SearchedNeighbors(store, wanted, threads)

    if not further:
        return lists(rule), {}
    whole = lists(GraphRule(max(rule.cutoff, *(each.cutoff for each in further.values()))))
    if isinstance(whole, RestrictedNeighbors):
        whole = whole.whole  # cut once, not twice
    # One search, out of which every list is cut; the store's own is faster still.
    cut: dict[str, Neighbors] = {
        name: RestrictedNeighbors(store, whole, each) for name, each in further.items()
    }
    return kept_neighbors(store, rule) or RestrictedNeighbors(store, whole, rule), cut
