"""Which structures of which stores become a new store, in which order.

Integer arithmetic only: no files, no codecs. Reading and writing them is the business of `rewrite`.
Invariant: every place of the new store has one structure of one source, and the same choice and
seed give the same places on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kdcache.errors import StoreError
from kdcache.fields import Level
from kdcache.store.layout import BlockPlan
from kdcache.structures import IntArray

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class Pick:
    """Where every structure of a new store comes from.

    Attributes:
        source: [n_structures] number of the source, in the order of the new store.
        row: [n_structures] store row within that source.
    """

    source: IntArray
    row: IntArray

    def __len__(self) -> int:
        return len(self.row)

    def rows_of(self, source: int) -> IntArray:
        """Rows taken from a source, in the order of the new store."""
        rows: IntArray = self.row[self.source == source]
        return rows


@dataclass(frozen=True, eq=False)
class Run:
    """Rows that are copied together: a few blocks of one source, some rows of one shard.

    Attributes:
        source: number of the source.
        blocks: [k] blocks to read, ascending.
        start: [m] first row of each structure among the rows of these blocks.
        target: [m] first row of each structure among the rows of the new shard.
        count: [m] rows of each structure.
    """

    source: int
    blocks: IntArray
    start: IntArray
    target: IntArray
    count: IntArray


def pick_rows(rows: npt.ArrayLike) -> Pick:
    """Some rows of a single store, in the order given."""
    row = np.array(rows, np.int64)
    return Pick(np.zeros_like(row), row)


def riffle(rows: Sequence[npt.ArrayLike], seed: int) -> Pick:
    """Rows of several stores in one random order, those of each source in its own order.

    At every place the source is drawn in proportion to what is left of it, which is the same as
    one random permutation of the sources' numbers. Where each source is in a uniformly random
    order already, as stores are, so is the result: of the orders of n = Σ n_k structures, n!/Π n_k!
    riffles times Π n_k! orders of the sources are equally likely, and each order arises once. Every
    source is read from its first row to its last.

    Args:
        rows: of each source, ascending.
        seed: of the draw (numpy PCG64).

    Source: ours; the inverse of a riffle shuffle with as many piles as sources.

    Example:
        >>> pick = riffle([[0, 1, 4], [2, 3]], seed=1)
        >>> pick.source.tolist(), pick.row.tolist()
        ([1, 0, 0, 0, 1], [2, 0, 1, 4, 3])
    """
    parts = [np.array(part, np.int64) for part in rows]
    labels = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    source = np.random.Generator(np.random.PCG64(seed)).permutation(labels).astype(np.int64)
    row = np.empty(len(source), np.int64)
    for number, part in enumerate(parts):
        row[source == number] = part
    return Pick(source, row)


def dataset_places(pick: Pick, source_index: Sequence[IntArray]) -> IntArray:
    """Dataset order of the new store: one source after another, each in its own dataset's order.

    Args:
        pick: structures in the order of the new store.
        source_index: [n_structures of the source] dataset place of every row, of each source.

    Returns:
        [n_structures] place in the new dataset, a permutation.

    Example:
        >>> pick = Pick(np.array([1, 0, 1]), np.array([0, 2, 1]))
        >>> dataset_places(pick, [np.array([2, 0, 1]), np.array([1, 0])]).tolist()
        [2, 0, 1]
    """
    old = np.zeros(len(pick), np.int64)
    for number, places in enumerate(source_index):
        mine = pick.source == number
        old[mine] = places[pick.row[mine]]
    places = np.empty(len(pick), np.int64)
    places[np.lexsort((old, pick.source))] = np.arange(len(pick))
    return places


def gathered(pick: Pick, columns: Sequence[npt.NDArray[Scalar]]) -> npt.NDArray[Scalar]:
    """A column of the new store, from those of the sources.

    Example:
        >>> pick = Pick(np.array([1, 0]), np.array([0, 2]))
        >>> gathered(pick, [np.array([10, 11, 12]), np.array([20])]).tolist()
        [20, 12]
    """
    column = np.empty((len(pick), *columns[0].shape[1:]), columns[0].dtype)
    for number, theirs in enumerate(columns):
        mine = pick.source == number
        column[mine] = theirs[pick.row[mine]]
    return column


def shard_runs(
    pick: Pick,
    plan: BlockPlan,
    sources: Sequence[BlockPlan],
    level: Level,
    shard: int,
    blocks_at_once: int,
) -> Iterator[Run]:
    """What one shard of the new store is copied from, in bounded steps.

    Args:
        pick: of the whole new store.
        plan: its layout.
        sources: layouts of the sources' groups.
        level: of the field that is copied.
        shard: of the new store.
        blocks_at_once: of a source, read together.

    Raises:
        StoreError: a structure has another number of rows in its source.

    Example:
        >>> from kdcache.store.layout import plan_blocks
        >>> source = plan_blocks([3, 2, 4, 1], atom_capacity=5, blocks_per_shard=1)
        >>> source.block.tolist()
        [0, 0, 1, 1]
        >>> target = plan_blocks([2, 1], atom_capacity=5)
        >>> (run,) = shard_runs(pick_rows([1, 3]), target, [source], "atom", 0, 8)
        >>> run.blocks.tolist(), run.start.tolist(), run.target.tolist(), run.count.tolist()
        ([0, 1], [3, 9], [0, 2], [2, 1])
    """
    here = plan.shard_structures(shard)
    counts = plan.counts(level)[here]
    target = np.cumsum(counts) - counts
    for number, source in enumerate(sources):
        mine = np.flatnonzero(pick.source[here] == number)
        rows = pick.row[here][mine]
        theirs = source.counts(level)
        if not np.array_equal(theirs[rows], counts[mine]):
            k = int(np.argmax(theirs[rows] != counts[mine]))
            raise StoreError(
                f"Row {int(rows[k])} of source {number} has {int(theirs[rows[k]])} rows of level "
                f"{level}, the new store is laid out for {int(counts[mine[k]])}. Rows would belong "
                f"to other structures."
            )
        needed = np.unique(source.block[rows])
        for first in range(0, len(needed), blocks_at_once):
            blocks = needed[first : first + blocks_at_once]
            wanted = (source.block[rows] >= blocks[0]) & (source.block[rows] <= blocks[-1])
            chosen = rows[wanted]
            yield Run(
                number,
                blocks,
                _starts(source, level, blocks, chosen),
                target[mine[wanted]],
                theirs[chosen],
            )


def row_numbers(start: IntArray, count: IntArray) -> IntArray:
    """Rows start, start + 1, … of every structure, one structure after another.

    Example:
        >>> row_numbers(np.array([7, 2]), np.array([2, 3])).tolist()
        [7, 8, 2, 3, 4]
    """
    before = np.cumsum(count) - count
    return np.repeat(start - before, count) + np.arange(int(count.sum()))


def _starts(plan: BlockPlan, level: Level, blocks: IntArray, rows: IntArray) -> IntArray:
    """First row of structures among the used rows of some blocks that are read together."""
    counts = plan.counts(level)
    before = np.cumsum(counts) - counts
    used = plan.used(level)[blocks]
    first = np.array([plan.block_structures(int(block)).start for block in blocks], np.int64)
    # Rows before a block among those read, less the rows before it in the whole store.
    shift = np.cumsum(used) - used - before[first]
    moved: IntArray = before[rows] + shift[np.searchsorted(blocks, plan.block[rows])]
    return moved
