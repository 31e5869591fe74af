"""In which order a run sees the structures of a store.

Arithmetic only: no files, no tensors. The order is a function of (seed, epoch), so the state of a
stream is one number, the step, and any step can be reached without replaying those before it.
Invariant: an epoch visits every selected structure at most once, and all but fewer than one batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdcache.errors import TrainingError
from kdcache.structures import IntArray


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """Blocks that are read together, and the batches cut from them.

    Attributes:
        blocks: [n] block numbers, ascending.
        rows: [m] selected store rows of these blocks, in the order they are visited.
    """

    blocks: IntArray
    rows: IntArray


class BlockShuffle:
    """Blocks in random order, cut into windows, structures shuffled within each window.

    A store is written in random order, so a window of a few blocks is already a fair sample of the
    dataset; the shuffle here makes epochs differ.

    Args:
        block_of_row: [n_structures] block of every store row.
        rows: [n] store rows to visit, ascending.
        batch_size: structures per batch and rank; smaller when `rows` has fewer.
        seed: seed of the order.
        window_blocks: blocks read together.
        rank, world_size: this process among those that share every batch.

    Raises:
        TrainingError: no rows, or fewer rows than ranks.
    """

    def __init__(
        self,
        block_of_row: IntArray,
        rows: IntArray,
        *,
        batch_size: int,
        seed: int,
        window_blocks: int = 16,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(rows) < world_size:
            raise TrainingError(
                f"{len(rows)} structures are selected for {world_size} process(es). Every process "
                f"needs at least one: check the split, labels and max_force settings."
            )
        self.rows = np.asarray(rows, np.int64)
        self.seed = seed
        self.window_blocks = window_blocks
        self.rank = rank
        self.world_size = world_size
        self.batch_size = min(batch_size, len(rows) // world_size)
        self._row_block = np.asarray(block_of_row, np.int64)[self.rows]
        self._blocks = np.unique(self._row_block)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one epoch, the same on every rank."""
        return len(self.rows) // (self.batch_size * self.world_size)

    def place(self, step: int) -> tuple[int, int]:
        """(epoch, batch within it) of a step.

        Example: with 3 batches an epoch, step 7 is batch 1 of epoch 2.
        """
        return divmod(step, self.steps_per_epoch)

    def windows(self, epoch: int) -> list[WindowPlan]:
        """The windows of an epoch, in order, with the rows each contributes."""
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        blocks = generator.permutation(self._blocks)
        by_block = np.argsort(self._row_block, kind="stable")
        starts = np.searchsorted(self._row_block[by_block], self._blocks, side="left")
        ends = np.searchsorted(self._row_block[by_block], self._blocks, side="right")
        place = {int(block): k for k, block in enumerate(self._blocks)}
        plans = []
        for first in range(0, len(blocks), self.window_blocks):
            chosen = np.sort(blocks[first : first + self.window_blocks])
            parts = [by_block[starts[place[int(b)]] : ends[place[int(b)]]] for b in chosen]
            plans.append(
                WindowPlan(chosen, generator.permutation(self.rows[np.concatenate(parts)]))
            )
        return plans

    def batch_rows(self, step: int) -> IntArray:
        """Store rows of this rank's batch at `step`; what the loader is tested against."""
        epoch, batch = self.place(step)
        order = np.concatenate([window.rows for window in self.windows(epoch)])
        return self.rank_share(order, batch)

    def rank_share(self, order: IntArray, batch: int) -> IntArray:
        """This rank's rows of global batch number `batch` of an epoch in `order`."""
        size = self.batch_size * self.world_size
        return order[batch * size : (batch + 1) * size][self.rank :: self.world_size]
