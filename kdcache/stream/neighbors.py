"""Where the neighbour lists of a store's structures come from: kept, restricted or computed once.

The store's own list serves a student with the same rule, or a smaller cutoff where the list was
not cut by a neighbour limit. Every other rule is computed once, on threads, into flat files that
later runs map into memory. A training step never searches for neighbours.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kdcache.graphs import GraphRule, neighbor_list, restrict
from kdcache.progress import Progress, silent
from kdcache.store import Store
from kdcache.stream.buffers import FieldReads
from kdcache.structures import IntArray


@dataclass(frozen=True, slots=True)
class BlockEdges:
    """Neighbour lists of the structures of some blocks, in store order.

    Attributes:
        n_edges: [n_structures] int64.
        edge_index: [n_edges, 2] source and target, counted from each structure's first atom.
        edge_shift: [n_edges, 3] integer cell shift of the source image.
    """

    n_edges: IntArray
    edge_index: npt.NDArray[Any]
    edge_shift: npt.NDArray[Any]


class Neighbors(Protocol):
    """Neighbour lists by block."""

    def read(self, blocks: Sequence[int]) -> BlockEdges: ...


@dataclass(frozen=True)
class StoredNeighbors:
    """The list that was written with the store, or with the edges of a teacher."""

    store: Store
    group: str = "structures"
    _fields: FieldReads = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_fields", FieldReads(self.store))

    def read(self, blocks: Sequence[int]) -> BlockEdges:
        plan = self.store.plans[self.group]
        return BlockEdges(
            n_edges=plan.n_edges[block_rows(self.store, blocks)],
            edge_index=self._fields.read(f"{self.group}/edge_index", blocks),
            edge_shift=self._fields.read(f"{self.group}/edge_shift", blocks),
        )


@dataclass(frozen=True)
class RestrictedNeighbors:
    """A narrower list, cut out of a whole one as it is read."""

    store: Store
    whole: Neighbors
    rule: GraphRule

    def read(self, blocks: Sequence[int]) -> BlockEdges:
        return _cut(self.store, self.whole, [self.rule], blocks)[0]


def read_lists(lists: Mapping[str, Neighbors], blocks: Sequence[int]) -> dict[str, BlockEdges]:
    """Several neighbour lists of the same blocks, by name.

    Those that are cut out of one whole list are cut out of one reading of it.
    """
    found: dict[str, BlockEdges] = {}
    for name, neighbors in lists.items():
        if name in found:
            continue
        if not isinstance(neighbors, RestrictedNeighbors):
            found[name] = neighbors.read(blocks)
            continue
        whole = neighbors.whole
        alike = {
            other: each.rule
            for other, each in lists.items()
            if isinstance(each, RestrictedNeighbors) and each.whole == whole
        }
        cut = _cut(neighbors.store, whole, list(alike.values()), blocks)
        found |= dict(zip(alike, cut, strict=True))
    return found


def _cut(
    store: Store, neighbors: Neighbors, rules: Sequence[GraphRule], blocks: Sequence[int]
) -> list[BlockEdges]:
    whole = neighbors.read(blocks)
    n_atoms = store.index.n_atoms[block_rows(store, blocks)]
    first_atom = np.cumsum(n_atoms) - n_atoms
    owner = np.repeat(np.arange(len(n_atoms)), n_atoms)
    lists = restrict(
        whole.edge_index.T + np.repeat(first_atom, whole.n_edges),
        whole.edge_shift,
        store.read("structures/positions", blocks),
        store.read("structures/cell", blocks),
        owner,
        rules,
    )
    found = []
    for edges in lists:
        structure = owner[edges.edge_index[1]]
        found.append(
            BlockEdges(
                n_edges=np.bincount(structure, minlength=len(n_atoms)),
                edge_index=edges.edge_index.T - first_atom[structure, None],
                edge_shift=edges.edge_shift,
            )
        )
    return found


@dataclass(frozen=True, eq=False)
class MappedNeighbors:
    """Lists in flat files: edge_index.npy, edge_shift.npy, edge_start.npy in store order."""

    store: Store
    edge_start: IntArray
    edge_index: npt.NDArray[np.int32]
    edge_shift: npt.NDArray[np.int16]

    @classmethod
    def open(cls, store: Store, directory: Path) -> MappedNeighbors:
        index, shift = (
            np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("edge_index", "edge_shift")
        )
        return cls(store, np.load(directory / "edge_start.npy", allow_pickle=False), index, shift)

    def read(self, blocks: Sequence[int]) -> BlockEdges:
        slices = [self.store.plan.block_structures(int(block)) for block in blocks]
        bounds = [(self.edge_start[s.start], self.edge_start[s.stop]) for s in slices]
        counts = np.diff(self.edge_start)
        return BlockEdges(
            n_edges=np.concatenate([counts[s] for s in slices]),
            edge_index=np.concatenate([self.edge_index[lo:hi] for lo, hi in bounds]),
            edge_shift=np.concatenate([self.edge_shift[lo:hi] for lo, hi in bounds]),
        )


def block_rows(store: Store, blocks: Sequence[int]) -> IntArray:
    """Store rows of the structures in these blocks, in the order given."""
    slices = [store.plan.block_structures(int(block)) for block in blocks]
    return np.concatenate([np.arange(s.start, s.stop) for s in slices])


def stored_fields(neighbors: Neighbors) -> list[str]:
    """Fields of the store that a list is read from; none where it lies in files of its own."""
    while isinstance(neighbors, RestrictedNeighbors):
        neighbors = neighbors.whole
    if not isinstance(neighbors, StoredNeighbors):
        return []
    return [f"{neighbors.group}/edge_index", f"{neighbors.group}/edge_shift"]


def count_edges(store: Store, neighbors: Neighbors) -> IntArray:
    """[n_structures] edges of every structure, in store order; a list that is cut is read once."""
    if isinstance(neighbors, StoredNeighbors):
        return store.plans[neighbors.group].n_edges
    if isinstance(neighbors, MappedNeighbors):
        return np.diff(neighbors.edge_start)
    blocks = range(store.plan.n_blocks)
    return np.concatenate([neighbors.read([block]).n_edges for block in blocks]).astype(np.int64)


def kept_neighbors(store: Store, rule: GraphRule) -> Neighbors | None:
    """Lists under `rule` out of the list the store keeps; None where that does not hold them."""
    kept = store.manifest.graph
    if kept is not None and kept == rule:
        return StoredNeighbors(store)
    if kept is not None and kept.truncated is False and rule.cutoff <= kept.cutoff:
        return RestrictedNeighbors(store, StoredNeighbors(store), rule)
    return None


def neighbors_for(
    store: Store, rule: GraphRule, cache: Path, *, threads: int = 2, progress: Progress = silent
) -> Neighbors:
    """Neighbour lists of every structure of `store` under `rule`.

    Args:
        store: an open store.
        rule: the student's rule.
        cache: directory for lists that the store does not keep; one folder per store and rule, made
            once and shared by all runs that name the same directory.
        threads: for the search.
        progress: shows the search.
    """
    kept = kept_neighbors(store, rule)
    if kept is not None:
        return kept
    key = json.dumps([store.manifest.dataset.digest, rule.to_json()], sort_keys=True)
    # The order of a store is part of its files' layout, so it is part of the key as well.
    order = hashlib.sha256(store.index.source_index.astype("<i8").tobytes()).hexdigest()
    directory = cache / hashlib.sha256((key + order).encode()).hexdigest()[:16]
    if not directory.exists():
        _compute(store, rule, directory, threads, progress)
    return MappedNeighbors.open(store, directory)


def further_neighbors(
    store: Store,
    rules: Mapping[str, GraphRule],
    cache: Path,
    *,
    threads: int = 2,
    progress: Progress = silent,
) -> dict[str, Neighbors]:
    """Neighbour lists of several rules, all cut out of one list without a neighbour limit.

    Args:
        store: an open store.
        rules: by name.
        cache, threads, progress: as for `neighbors_for`.
    """
    if not rules:
        return {}
    widest = GraphRule(max(rule.cutoff for rule in rules.values()))
    whole = neighbors_for(store, widest, cache, threads=threads, progress=progress)
    if isinstance(whole, RestrictedNeighbors):
        whole = whole.whole  # cut once, not twice
    return {name: RestrictedNeighbors(store, whole, rule) for name, rule in rules.items()}


def search(
    store: Store, rule: GraphRule, blocks: Sequence[int], pool: ThreadPoolExecutor
) -> BlockEdges:
    """Neighbour lists of the structures of some blocks, found on the threads of a pool."""
    n_atoms = store.index.n_atoms[block_rows(store, blocks)]
    ends = np.cumsum(n_atoms)
    positions = np.split(store.read("structures/positions", blocks), ends[:-1])
    cells, pbcs = (store.read(f"structures/{name}", blocks) for name in ("cell", "pbc"))
    found = list(pool.map(lambda p, c, b: neighbor_list(p, c, b, rule), positions, cells, pbcs))
    return BlockEdges(
        n_edges=np.array([edges.n_edges for edges in found], np.int64),
        edge_index=np.concatenate([edges.edge_index.T for edges in found]),
        edge_shift=np.concatenate([edges.edge_shift for edges in found]),
    )


def _compute(
    store: Store, rule: GraphRule, directory: Path, threads: int, progress: Progress
) -> None:
    # A name of its own for each run: several may compute the same lists at once.
    partial = directory.with_name(f"{directory.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir(parents=True)
    n_edges = np.zeros(len(store.index), np.int64)
    plan = store.plan
    with (
        open(partial / "edge_index", "wb") as index_file,
        open(partial / "edge_shift", "wb") as shift_file,
        ThreadPoolExecutor(threads) as pool,
        progress("neighbour lists", len(store.index), "structures") as advance,
    ):
        for block in range(plan.n_blocks):
            found = search(store, rule, [block], pool)
            n_edges[plan.block_structures(block)] = found.n_edges
            np.ascontiguousarray(found.edge_index, "<i4").tofile(index_file)
            np.ascontiguousarray(found.edge_shift, "<i2").tofile(shift_file)
            advance(len(found.n_edges))
    total = int(n_edges.sum())
    np.save(partial / "edge_start.npy", np.concatenate([[0], np.cumsum(n_edges)]))
    _wrap(partial, "edge_index", (total, 2), "<i4")
    _wrap(partial, "edge_shift", (total, 3), "<i2")
    try:
        os.rename(partial, directory)
    except OSError:
        shutil.rmtree(partial)
        if not directory.is_dir():
            raise
        # Another run finished the same lists first: its files are the same.


def _wrap(directory: Path, name: str, shape: tuple[int, int], dtype: str) -> None:
    """Give a flat file the header that makes it a .npy file."""
    raw = directory / name
    target = np.lib.format.open_memmap(
        directory / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape
    )
    if shape[0]:
        target[:] = np.memmap(raw, dtype, "r", shape=shape)
    target.flush()
    raw.unlink()
