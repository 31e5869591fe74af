"""Place structures in the blocks and shards of a store.

Integer arithmetic only: no files, no codecs, no torch.
Invariant: a structure lies within one block, blocks are filled in store order, and the same counts
and capacities give the same plan on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kdcache.errors import StoreError
from kdcache.fields import Level
from kdcache.structures import IntArray

DEFAULT_ATOM_CAPACITY = 4096
# A block 16 times as large as the largest structure loses at most 1/16 to padding.
LARGEST_PER_BLOCK = 16
DEFAULT_BLOCKS_PER_SHARD = 16
# Row numbers stay far from the end of int64 whatever a field's rows are multiplied with.
MAX_ROWS = 2**40


@dataclass(frozen=True)
class BlockPlan:
    """Where every structure of a store lies.

    Rows are global: row r of a level is row r of each Zarr array of that level, and block b owns
    the rows [b * capacity, (b + 1) * capacity), of which the first `used` hold structures.

    Attributes:
        n_atoms: [n_structures] int64, store order.
        n_edges: [n_structures] int64; zeros where the store keeps no graph.
        block: [n_structures] int64, non-decreasing.
        structure_row: [n_structures] row of the structure in arrays of level "structure".
        atom_start: [n_structures] row of its first atom in arrays of level "atom".
        edge_start: [n_structures] row of its first edge in arrays of level "edge".
        n_blocks: blocks in every array.
        structure_capacity: rows per block, level "structure".
        atom_capacity: rows per block, level "atom".
        edge_capacity: rows per block, level "edge"; 1 where there are no edges.
        blocks_per_shard: blocks in one file; the last file may hold fewer.
    """

    n_atoms: IntArray
    n_edges: IntArray
    block: IntArray
    structure_row: IntArray
    atom_start: IntArray
    edge_start: IntArray
    n_blocks: int
    structure_capacity: int
    atom_capacity: int
    edge_capacity: int
    blocks_per_shard: int

    @property
    def n_structures(self) -> int:
        return len(self.n_atoms)

    @property
    def n_shards(self) -> int:
        return -(-self.n_blocks // self.blocks_per_shard)

    def capacity(self, level: Level) -> int:
        """Rows of one block."""
        if level == "structure":
            return self.structure_capacity
        return self.atom_capacity if level == "atom" else self.edge_capacity

    def counts(self, level: Level) -> IntArray:
        """[n_structures] rows of each structure."""
        if level == "structure":
            return np.ones_like(self.n_atoms)
        return self.n_atoms if level == "atom" else self.n_edges

    def used(self, level: Level) -> IntArray:
        """[n_blocks] int64, rows of each block that hold structures; the rest is padding."""
        # Cumulated whole numbers, not bincount's floats: exact however many rows there are.
        total = np.concatenate([[0], np.cumsum(self.counts(level))])
        return np.diff(total[self._block_bounds])

    def block_structures(self, block: int) -> slice:
        """Store rows of the structures in a block."""
        bounds = self._block_bounds
        return slice(int(bounds[block]), int(bounds[block + 1]))

    def shard_blocks(self, shard: int) -> range:
        """Blocks of a shard."""
        first = shard * self.blocks_per_shard
        return range(first, min(first + self.blocks_per_shard, self.n_blocks))

    def shard_structures(self, shard: int) -> slice:
        """Store rows of the structures in a shard."""
        blocks, bounds = self.shard_blocks(shard), self._block_bounds
        return slice(int(bounds[blocks.start]), int(bounds[blocks.stop]))

    @cached_property
    def _block_bounds(self) -> IntArray:
        return np.searchsorted(self.block, np.arange(self.n_blocks + 1)).astype(np.int64)


def plan_blocks(
    n_atoms: npt.ArrayLike,
    n_edges: npt.ArrayLike | None = None,
    *,
    atom_capacity: int | None = None,
    blocks_per_shard: int | None = None,
) -> BlockPlan:
    """Fill blocks greedily, in store order.

    Capacities are cut down to what the fullest block uses, which packs the same way again: the plan
    of a store follows from its counts and its recorded `atom_capacity`.

    Args:
        n_atoms: [n_structures], at least 1 each.
        n_edges: [n_structures], or None without a graph.
        atom_capacity: atoms per block at most; by default 4,096, or 16 times the largest structure.
        blocks_per_shard: by default 16.

    Raises:
        StoreError: no structures, a structure without atoms, negative edges, or a capacity below
            the largest structure.

    Example:
        >>> plan = plan_blocks([3, 2, 4], atom_capacity=5)
        >>> plan.block.tolist(), plan.atom_start.tolist(), plan.atom_capacity
        ([0, 0, 1], [0, 3, 5], 5)
    """
    atoms = np.array(n_atoms, np.int64)
    edges = np.zeros_like(atoms) if n_edges is None else np.array(n_edges, np.int64)
    per_shard = DEFAULT_BLOCKS_PER_SHARD if blocks_per_shard is None else int(blocks_per_shard)
    _check_counts(atoms, edges, per_shard)
    largest = int(atoms.max())
    if atom_capacity is None:
        atom_capacity = max(DEFAULT_ATOM_CAPACITY, LARGEST_PER_BLOCK * largest)
    if atom_capacity < largest:
        raise StoreError(
            f"atom_capacity is {atom_capacity}, the largest structure has {largest} atoms, and a "
            f"structure must lie within one block. Give at least {largest}, or leave it out."
        )
    starts = _block_starts(atoms, atom_capacity)
    n_blocks = len(starts)
    per_block = np.diff(np.append(starts, len(atoms)))
    block = np.repeat(np.arange(n_blocks), per_block)
    capacities = [1, 1, 1]
    rows = []
    for i, counts in enumerate((np.ones_like(atoms), atoms, edges)):
        before = np.cumsum(counts) - counts
        within = before - before[starts][block]
        capacities[i] = max(1, int((within + counts).max()))
        rows.append(block * capacities[i] + within)
    return BlockPlan(
        n_atoms=atoms,
        n_edges=edges,
        block=block,
        structure_row=rows[0],
        atom_start=rows[1],
        edge_start=rows[2],
        n_blocks=n_blocks,
        structure_capacity=capacities[0],
        atom_capacity=capacities[1],
        edge_capacity=capacities[2],
        blocks_per_shard=min(per_shard, n_blocks),
    )


def with_edges(plan: BlockPlan, n_edges: npt.ArrayLike) -> BlockPlan:
    """The same structures in the same blocks, each with another number of edges.

    Args:
        plan: of a store.
        n_edges: [n_structures].

    Raises:
        StoreError: counts of another number of structures, negative, or beyond all bounds.
    """
    return plan_blocks(
        plan.n_atoms,
        n_edges,
        atom_capacity=plan.atom_capacity,
        blocks_per_shard=plan.blocks_per_shard,
    )


def _check_counts(atoms: IntArray, edges: IntArray, blocks_per_shard: int) -> None:
    if atoms.ndim != 1 or atoms.shape != edges.shape:
        raise StoreError(
            f"n_atoms is {list(atoms.shape)} and n_edges {list(edges.shape)}; both must be "
            f"[n_structures]."
        )
    if len(atoms) == 0:
        raise StoreError("There are no structures, so there is nothing to lay out.")
    for name, counts, least in (("atoms", atoms, 1), ("edges", edges, 0)):
        if counts.min() < least:
            row = int(np.argmin(counts))
            raise StoreError(
                f"The structure in row {row} has {int(counts[row])} {name}; at least {least} "
                f"is needed."
            )
        # As floats first: the sum of hostile counts may not fit an int64.
        if float(counts.sum(dtype=np.float64)) > MAX_ROWS:
            raise StoreError(f"More than 2^40 {name} do not fit one store. Split the dataset.")
    if blocks_per_shard < 1:
        raise StoreError(f"blocks_per_shard must be at least 1, got {blocks_per_shard}.")


def _block_starts(atoms: IntArray, capacity: int) -> IntArray:
    """First structure of every block: one binary search per block, none per structure."""
    ends = np.cumsum(atoms)
    starts, first, filled = [], 0, 0
    while first < len(atoms):
        starts.append(first)
        first = int(np.searchsorted(ends, filled + capacity, side="right"))
        filled = int(ends[first - 1])
    return np.array(starts, np.int64)
