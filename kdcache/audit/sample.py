"""Sampled structures of a store: what the teacher is shown, and what is stored of them.

Reads each block once, whatever the level of a field. Invariant: stored rows stand in the order of
the batch's, edges by identity, -1 where an edge is not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.fields import FieldSpec, Level
from kdcache.store import Store
from kdcache.store.codecs import INT8_MAX, channels
from kdcache.stream.edges import match_block_edges, teacher_edges
from kdcache.stream.neighbors import BlockEdges
from kdcache.stream.reader import WindowReader
from kdcache.stream.window import (
    Window,
    atom_bounded,
    range_rows,
    reference_table,
    reference_totals,
)
from kdcache.structures import FloatArray, IntArray

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows of one field that belong to the sampled structures of one block.

    Attributes:
        values: [n_rows, *shape], references of energies taken off.
        half_step: [channels] what the codec "compact" may have moved a value by, else empty.
        mean_squares: [n] of every structure of the block that has finite values.
    """

    values: Array
    half_step: Array
    mean_squares: FloatArray


@dataclass(frozen=True, slots=True)
class Piece:
    """Sampled structures of one block.

    Attributes:
        rows: [n] store rows, ascending.
        inputs: as `Window.gather` gives them.
        counts: [n] rows of each structure, by level.
        references: eV, what is taken off energies, by level.
        stored: fields by name, without those that say which edges there are.
        match: [n_edges] stored row of every edge the teacher sees, -1 where there is none.
        n_unseen: [n] stored edges that the teacher does not see.
    """

    rows: IntArray
    inputs: dict[str, Array]
    counts: Mapping[Level, IntArray]
    references: Mapping[Level, FloatArray]
    stored: Mapping[str, Stored]
    match: IntArray
    n_unseen: IntArray


@dataclass(frozen=True)
class SampleReader:
    """Reads pieces.

    Attributes:
        store: an open store.
        teacher: name of the group.
        references: eV by atomic number, the teacher's own.
        specs: floating and other fields to compare, without those that say which edges there are.
        reader: of what the teacher is shown.
        max_atoms: atoms in one piece; a structure too large stands alone.
    """

    store: Store
    teacher: str
    references: Mapping[int, float]
    specs: Sequence[FieldSpec]
    reader: WindowReader
    max_atoms: int

    def pieces(self, rows: IntArray) -> Iterator[Piece]:
        """The structures at `rows` (ascending), a piece or more from each block.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        blocks = self.store.index.block[rows]
        names = [f"teachers/{self.teacher}/{spec.name}" for spec in self.specs]
        for block in np.unique(blocks).tolist():
            window = self.reader.read(np.array([block]))
            chosen = rows[blocks == block]
            with self.store.fetched(names, [block]):
                for run in atom_bounded(self.store.index.n_atoms[chosen], self.max_atoms):
                    yield self._piece(window, block, chosen[run])

    def _piece(self, window: Window, block: int, rows: IntArray) -> Piece:
        index = window.place(rows)
        table = reference_table(self.references)
        numbers = window.arrays["atomic_numbers"]
        references: dict[Level, FloatArray] = {
            "atom": table[numbers],
            "structure": reference_totals(numbers, window.n_atoms, table),
        }
        known: dict[Level, IntArray] = {
            "atom": window.n_atoms,
            "structure": np.ones(len(window.rows), np.int64),
        }
        match, unseen = np.zeros(0, np.int64), np.zeros(len(index), np.int64)
        if any(spec.level == "edge" for spec in self.specs):
            kept = teacher_edges(self.store, self.teacher).read([block])
            known["edge"] = kept.n_edges
            match, unseen = _matched(window, kept, index)
        places = {
            level: range_rows((np.cumsum(n) - n)[index], n[index]) for level, n in known.items()
        }
        return Piece(
            rows=rows,
            inputs=window.gather(index),
            counts={
                "atom": window.n_atoms[index],
                "structure": np.ones(len(index), np.int64),
                "edge": window.n_edges[index],
            },
            references={level: energies[places[level]] for level, energies in references.items()},
            stored={
                spec.name: self._stored(
                    spec, block, places[spec.level], known[spec.level], references
                )
                for spec in self.specs
            },
            match=match,
            n_unseen=unseen,
        )

    def _stored(
        self,
        spec: FieldSpec,
        block: int,
        places: IntArray,
        counts: IntArray,
        references: Mapping[Level, FloatArray],
    ) -> Stored:
        values = self.store.read(f"teachers/{self.teacher}/{spec.name}", [block])
        half_step = np.zeros(0)
        if spec.codec == "compact":
            n_channels = channels(spec)
            flat = np.abs(values.reshape(-1, n_channels))
            # The largest value of a channel is ±127 steps, so the scale need not be read.
            half_step = flat.max(axis=0, initial=0.0) / INT8_MAX / 2
        if spec.unit == "eV" and spec.level in references:
            values = values - references[spec.level]
        return Stored(values[places], half_step, _mean_squares(values, counts))


def _mean_squares(values: Array, counts: IntArray) -> FloatArray:
    """Mean square of the values of each structure; of those the teacher failed on it is NaN."""
    rows = values.reshape(len(values), int(np.prod(values.shape[1:], dtype=np.int64)))
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.square(rows, dtype=np.float64).mean(axis=1)
        sums = np.bincount(np.repeat(np.arange(len(counts)), counts), squares, len(counts))
        means = sums[counts > 0] / counts[counts > 0]
    found: FloatArray = means[np.isfinite(means)]
    return found


def _matched(window: Window, kept: BlockEdges, index: IntArray) -> tuple[IntArray, IntArray]:
    """Stored row of each edge of the structures at `index`, counted among their stored rows; and
    how many stored edges of each have no such edge.
    """
    seen = BlockEdges(window.n_edges, window.arrays["edge_index"], window.arrays["edge_shift"])
    match = match_block_edges(seen, kept, window.n_atoms)
    ends = np.cumsum(window.n_edges)
    ours = range_rows((ends - window.n_edges)[index], window.n_edges[index])
    kept_start = np.cumsum(kept.n_edges) - kept.n_edges
    own_start = np.cumsum(kept.n_edges[index]) - kept.n_edges[index]
    offset = np.repeat(own_start - kept_start[index], window.n_edges[index])
    chosen = match[ours]
    found = np.repeat(np.arange(len(index)), window.n_edges[index])[chosen >= 0]
    n_unseen = kept.n_edges[index] - np.bincount(found, minlength=len(index))
    return np.where(chosen >= 0, chosen + offset, -1), n_unseen
