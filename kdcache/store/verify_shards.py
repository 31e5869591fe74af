"""What is checked of one shard of every field: values, edges, contents.

Done in whatever process reads the shard; `verify` puts the findings together. Invariant: a finding
carries its place, so that those of many processes have one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kdcache.errors import StoreError
from kdcache.fields import EDGE_INDEX, EDGE_SHIFT, FieldSpec
from kdcache.store.codecs import FLOATS
from kdcache.store.edges import check_edges, check_lengths
from kdcache.store.reader import Store
from kdcache.store.records import iterate_structures
from kdcache.store.scan import StoreReference, check_elements, opened

FETCHED_AT_ONCE = 8  # blocks of one field
# Ground truth of a structure without labels is NaN; whatever a teacher says is finite.
LABELS = ("energy", "forces")

# Number of the field or teacher, block, what is wrong.
Finding = tuple[int, int, str]


class ShardFindings(NamedTuple):
    """Blocks that are in order, and what is wrong with values and with teachers' own edges."""

    n_blocks: int
    values: list[Finding]
    edges: list[Finding]


class ContentFindings(NamedTuple):
    """Structures read, labelled and wrong; the first wrong one; why not all were read."""

    n_structures: int
    n_labelled: int
    n_wrong: int
    first_wrong: str
    problem: str


@dataclass(frozen=True)
class CheckShards:
    """Checks every field of a shard of a store."""

    store: StoreReference

    def __call__(self) -> Callable[[int], ShardFindings]:
        store = opened(self.store)
        return lambda shard: _check_shard(store, shard)


@dataclass(frozen=True)
class CheckContent:
    """Compares the structures of a shard with their content hashes."""

    store: StoreReference

    def __call__(self) -> Callable[[int], ContentFindings]:
        store = opened(self.store)
        return lambda shard: _check_structures(store, shard)


def _check_shard(store: Store, shard: int) -> ShardFindings:
    names = [
        (f"{group}/{name}", spec)
        for group in ("structures", *(f"teachers/{t}" for t in store.teachers))
        for name, spec in store.fields(group).items()
    ]
    n_blocks = 0
    values: list[Finding] = []
    all_blocks = store.plan.shard_blocks(shard)
    for number, (name, spec) in enumerate(names):
        for start in range(all_blocks.start, all_blocks.stop, FETCHED_AT_ONCE):
            blocks = range(start, min(start + FETCHED_AT_ONCE, all_blocks.stop))
            with _fetched(store, name, blocks):
                for block in blocks:
                    try:
                        _check_block(store, name, spec, block)
                        n_blocks += 1
                    except StoreError as error:
                        values.append((number, block, str(error)))
    edges = [
        (number, block, problem)
        for number, teacher in enumerate(store.teachers)
        if store.teachers[teacher].has_own_edges
        for block in all_blocks
        if (problem := _own_edges_problem(store, teacher, block))
    ]
    return ShardFindings(n_blocks, values, edges)


@contextmanager
def _fetched(store: Store, name: str, blocks: range) -> Iterator[None]:
    """As `Store.fetched`; what it cannot fetch is found again, and said, block by block."""
    with ExitStack() as stack:
        with suppress(StoreError):
            stack.enter_context(store.fetched([name], blocks))
        yield


def _check_block(store: Store, name: str, spec: FieldSpec, block: int) -> None:
    values = store.read(name, [block])
    group = name.rpartition("/")[0]
    may_be_nan = group == "structures" and spec.name in LABELS
    if spec.dtype in FLOATS and len(values):
        wrong = np.isinf(values) if may_be_nan else ~np.isfinite(values)
        if wrong.any():
            failed = store.failed_rows(group, spec.level, store.plan.block_structures(block))
            wrong &= ~failed.reshape(-1, *(1,) * (wrong.ndim - 1))
        if wrong.any():
            raise StoreError(f"{name}, block {block}: {int(wrong.sum())} values are not finite")
    # numpy counts another byte than 1 as several.
    if spec.dtype == "bool" and (values.view(np.uint8) > 1).any():
        raise StoreError(f"{name}, block {block}: a flag is neither 0 nor 1")
    if name == "structures/atomic_numbers":
        check_elements(values, f"{name}, block {block}")
    if name == f"structures/{EDGE_INDEX.name}":
        rows = store.plan.block_structures(block)
        counts = store.plan.n_atoms[rows], store.plan.n_edges[rows]
        shift = store.read(f"structures/{EDGE_SHIFT.name}", [block])
        check_edges(values, shift, *counts, f"{name}, block {block}")


def _own_edges_problem(store: Store, teacher: str, block: int) -> str:
    """Features are matched by these edges, so each is one of its structure, in order, in reach."""
    group = f"teachers/{teacher}"
    plan, graph = store.plans[group], store.teachers[teacher].graph
    where, rows = f"{group}, block {block}", plan.block_structures(block)
    try:
        index = store.read(f"{group}/{EDGE_INDEX.name}", [block])
        shift = store.read(f"{group}/{EDGE_SHIFT.name}", [block])
        check_edges(index, shift, plan.n_atoms[rows], plan.n_edges[rows], where)
        if graph is not None and {"positions", "cell"} <= set(store.fields("structures")):
            check_lengths(
                index,
                shift,
                plan.n_atoms[rows],
                plan.n_edges[rows],
                store.read("structures/positions", [block]),
                store.read("structures/cell", [block]),
                graph.cutoff,
                where,
            )
    except StoreError as error:
        return str(error)
    return ""


def _check_structures(store: Store, shard: int) -> ContentFindings:
    rows = store.plan.shard_structures(shard)
    n_structures = n_labelled = n_wrong = 0
    first, problem = "", ""
    try:
        structures = iterate_structures(store, np.arange(rows.start, rows.stop))
        for row, structure in enumerate(structures, rows.start):
            n_structures += 1
            n_labelled += structure.energy is not None and structure.forces is not None
            if structure.content_hash() != store.index.content_hash[row].tobytes():
                first = first or f"{structure.structure_id!r} (row {row})"
                n_wrong += 1
    except StoreError as error:
        problem = str(error)
    return ContentFindings(n_structures, n_labelled, n_wrong, first, problem)
