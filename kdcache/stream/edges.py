"""A teacher's edges on a student's own graph: which row belongs to which edge, and how many match.

Edges are the same when atoms and periodic image are the same, never by their place in a list.
Invariant: an edge of the student that the teacher lacks has no row, and teaches nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from kdcache.errors import ConfigError
from kdcache.matching import match_edges
from kdcache.store import GraphEntry, Store
from kdcache.store.codecs import FLOATS
from kdcache.stream.neighbors import BlockEdges, Neighbors, StoredNeighbors, block_rows
from kdcache.structures import IntArray

log = logging.getLogger(__name__)

# A store is in random order, so its first structures are a fair sample: this many edges make the
# share good to a percent.
SAMPLED_EDGES = 100_000


def teacher_edges(store: Store, teacher: str) -> StoredNeighbors:
    """The edges that rows of level edge of a teacher belong to: its own, or the store's."""
    own = store.teachers[teacher].has_own_edges
    return StoredNeighbors(store, f"teachers/{teacher}" if own else "structures")


def match_block_edges(student: BlockEdges, teacher: BlockEdges, n_atoms: IntArray) -> IntArray:
    """The teacher's row for every edge of the student.

    Args:
        student, teacher: edges of the same structures in the same order.
        n_atoms: [n_structures].

    Returns:
        [n_edges of the student] rows of the teacher's edges, -1 where it has no such edge.
    """
    first = np.cumsum(n_atoms) - n_atoms

    def counted_over_all(edges: BlockEdges) -> IntArray:
        return edges.edge_index.T.astype(np.int64) + np.repeat(first, edges.n_edges)

    return match_edges(
        counted_over_all(student),
        student.edge_shift,
        counted_over_all(teacher),
        teacher.edge_shift,
    )


def check_edge_coverage(
    store: Store, neighbors: Neighbors, teacher_fields: Sequence[str], least: float
) -> dict[str, float]:
    """The share of a student's edges that each of its teachers has, reported and bounded.

    Args:
        store: an open store.
        neighbors: the student's edges.
        teacher_fields: "teacher/field" names it learns; those of other levels count for nothing.
        least: smallest share that is accepted.

    Returns:
        By teacher, of those with edge fields among the names; 1 where the student has no edges.

    Raises:
        ConfigError: a share below `least`, or a field that says which edges there are.
    """
    by_edge = [name for name in teacher_fields if store.spec(f"teachers/{name}").level == "edge"]
    for name in by_edge:
        if store.spec(f"teachers/{name}").dtype not in FLOATS:
            raise ConfigError(
                f"{name} names the edges, it says nothing about them that a student could learn. "
                "Name a feature of edges as a term's teacher, such as edge."
            )
    shares: dict[str, float] = {}
    for teacher in dict.fromkeys(name.rpartition("/")[0] for name in by_edge):
        n_edges, n_matched = _count_matched(store, neighbors, teacher_edges(store, teacher))
        share = n_matched / n_edges if n_edges else 1.0
        log.info("teacher %s has %.1f %% of the student's edges", teacher, 100 * share)
        if share < least:
            raise ConfigError(
                f"Teacher {teacher} (graph: {_rule(store, teacher)}) has {100 * share:.1f} % of "
                f"the student's edges, {n_matched} of {n_edges} in the first structures; at least "
                f"{100 * least:g} % is asked for. The others would learn nothing. Give the student "
                f"a cutoff and max_neighbors nearer the teacher's, or lower data.min_edge_coverage."
            )
        shares[teacher] = share
    return shares


def _count_matched(store: Store, student: Neighbors, teacher: Neighbors) -> tuple[int, int]:
    n_edges = n_matched = 0
    for block in range(store.plan.n_blocks):
        ours = student.read([block])
        n_atoms = store.index.n_atoms[block_rows(store, [block])]
        matched = match_block_edges(ours, teacher.read([block]), n_atoms)
        n_edges += len(matched)
        n_matched += int((matched >= 0).sum())
        if n_edges >= SAMPLED_EDGES:
            break
    return n_edges, n_matched


def _rule(store: Store, teacher: str) -> str:
    rule: GraphEntry | None = store.teachers[teacher].graph
    if rule is None:
        return "not recorded"
    limit = "" if rule.max_neighbors is None else f", at most {rule.max_neighbors} neighbours"
    return f"cutoff {rule.cutoff:g} Å{limit}"
