"""In which order a run sees the structures of a store, and where its batches are cut.

Arithmetic only: no files, no tensors. The order is a function of (seed, epoch), so the state of a
stream is one number, the step, and any step can be reached without replaying those before it.
Invariant: every epoch has the same number of batches and visits a selected structure at most once;
by structures it misses fewer than one batch, by atoms or edges none, and no batch is above a limit.
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True)
class Budget:
    """What a batch may hold, where it is not a number of structures.

    Attributes:
        cost: [n_structures] of every store row, whole numbers above 0.
        limit: largest sum of costs in a batch.
        name: of the limits, for errors.
    """

    cost: IntArray
    limit: int
    name: str

    @classmethod
    def of(
        cls,
        n_atoms: IntArray,
        n_edges: IntArray | None = None,
        *,
        max_atoms: int | None,
        max_edges: int | None = None,
        share: float = 1.0,
    ) -> Budget:
        """One cost for limits on atoms, on edges or on both.

        Of both, a structure costs what it takes of the scarcer: the sum stays within the limit only
        where atoms and edges do.

        Args:
            n_atoms, n_edges: [n_structures]; edges where they are limited.
            max_atoms, max_edges: in a batch; None for no limit, at least one given.
            share: of both limits, what one of several parts of a batch may take.

        Example:
            >>> budget = Budget.of(np.array([2, 3]), np.array([9, 4]), max_atoms=6, max_edges=12)
            >>> budget.cost.tolist(), budget.limit  # in twelfths
            ([9, 6], 12)
        """
        limits = [None if n is None else int(n * share) for n in (max_atoms, max_edges)]
        counts = (n_atoms, n_edges)
        wanted = [
            (np.asarray(count, np.int64), limit)
            for count, limit in zip(counts, limits, strict=True)
            if limit is not None and count is not None
        ]
        whole = math.lcm(*(max(limit, 1) for _, limit in wanted))
        cost = np.maximum.reduce([count * (whole // max(limit, 1)) for count, limit in wanted])
        said = {"training.max_atoms": max_atoms, "training.max_edges": max_edges}
        name = " and ".join(f"{key} {value}" for key, value in said.items() if value is not None)
        if share != 1.0:
            name = f"{share:.3g} of {name}"
        return cls(np.maximum(cost, 1), whole, name)


class BlockShuffle:
    """Blocks in random order, cut into windows, structures shuffled within each window.

    A store is written in random order, so a window of a few blocks is already a fair sample of the
    dataset; the shuffle here makes epochs differ.

    By structures, batches are `batch_size` rows each and what is left at the end of an epoch is not
    visited. By a budget, an epoch is cut where the running sum of costs passes equal parts of the
    whole. With a limit L, a largest cost m and a sum C, B = ceil(C / (L − m)) parts each cost less
    than C / B + m ≤ L, whatever the order: a fixed number of batches, of nearly equal cost, that
    leaves nothing out. Filling batches to the brim would need fewer of them (a share of m / L at
    most), but another number in every epoch, and the epoch of a step only by replaying all before.

    Args:
        block_of_row: [n_structures] block of every store row.
        rows: [n] store rows to visit, ascending.
        batch_size: structures in a batch of all processes; fewer when `rows` has fewer.
        budget: what a batch may hold instead.
        seed: seed of the order.
        window_blocks: blocks read together.

    Raises:
        TrainingError: no rows, or a structure that costs more than half the limit.
    """

    def __init__(
        self,
        block_of_row: IntArray,
        rows: IntArray,
        *,
        batch_size: int = 1,
        budget: Budget | None = None,
        seed: int,
        window_blocks: int = 16,
    ) -> None:
        if not len(rows):
            raise TrainingError(
                "0 structures are selected to train on. Check the split, labels and max_force "
                "settings."
            )
        self.rows = np.asarray(rows, np.int64)
        self.seed = seed
        self.window_blocks = window_blocks
        self._row_block = np.asarray(block_of_row, np.int64)[self.rows]
        self._blocks = np.unique(self._row_block)
        self._budget = budget
        self._batch_size = min(batch_size, len(rows))
        self._total = 0
        self.steps_per_epoch = len(self.rows) // self._batch_size
        """Batches in every epoch."""
        self.fewest = self._batch_size
        """No batch has fewer structures."""
        if budget is not None:
            self._plan(budget)

    def _plan(self, budget: Budget) -> None:
        costs = budget.cost[self.rows]
        self._total, largest = int(costs.sum()), int(costs.max())
        if 2 * largest > budget.limit:
            row = int(self.rows[costs.argmax()])
            raise TrainingError(
                f"The structure of row {row} takes {largest / budget.limit:.3g} of a batch by "
                f"{budget.name}, and batches cannot be made of equal size where one takes more "
                f"than half. Raise the limit {2 * largest / budget.limit:.3g}-fold, or leave the "
                f"structure out."
            )
        n_batches = 1
        if self._total > budget.limit:
            n_batches = -(-self._total // (budget.limit - largest))
        self.steps_per_epoch = n_batches
        # A part costs more than C / B − m, and none of its structures more than m.
        self.fewest = max(1, self._total // (n_batches * largest)) if n_batches > 1 else len(costs)

    @property
    def batch_size(self) -> float:
        """Structures in a batch; their mean where batches are cut by a budget."""
        if self._budget is None:
            return self._batch_size
        return len(self.rows) / self.steps_per_epoch

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

    def cuts(self, order: IntArray) -> IntArray:
        """[steps_per_epoch + 1] places in an epoch's order between which its batches lie."""
        n_batches = self.steps_per_epoch
        numbers = np.arange(n_batches + 1)
        if self._budget is None:
            return numbers * self._batch_size
        ends = np.cumsum(self._budget.cost[order])
        # k C // B without the product, which may be too long for 64 bits.
        whole, rest = divmod(self._total, n_batches)
        cuts = np.searchsorted(ends, numbers * whole + numbers * rest // n_batches, side="right")
        # A part of a small epoch may be empty: it takes the next structure, which fits alone, and
        # the last parts are left one each.
        cuts = np.maximum.accumulate(cuts - numbers) + numbers
        return np.minimum(cuts, len(order) - n_batches + numbers)

    def batch_rows(self, step: int) -> IntArray:
        """Store rows of the batch at `step`; what the loader is tested against."""
        epoch, batch = self.place(step)
        order = np.concatenate([window.rows for window in self.windows(epoch)])
        first, last = self.cuts(order)[batch : batch + 2]
        return order[first:last]


def deal(cost: IntArray, n_processes: int) -> IntArray:
    """Which process takes which structure of a batch, so that all have about the same to do.

    Dealt out by cost, the dearest first, and back and forth: numbers of structures differ by at
    most one, and sums of costs by at most the largest.

    Args:
        cost: [n], of any kind.
        n_processes: among which a batch is shared.

    Returns:
        [n] process of every structure.

    Example:
        >>> deal(np.array([5, 9, 1, 4]), 2).tolist()
        [1, 0, 0, 1]
    """
    round_, place = np.divmod(np.arange(len(cost)), n_processes)
    owner = np.empty(len(cost), np.int64)
    by_cost = np.argsort(-np.asarray(cost, np.int64), kind="stable")
    owner[by_cost] = np.where(round_ % 2 == 0, place, n_processes - 1 - place)
    return owner
