"""Which edges meet: reverse edges, triplets and quadruplets, found on the device.

Edges of a graph stand in a table with one row of slots per target atom. A triplet is a pair of
slots, so no list of triplets is written down: only the few pairs that must not count are.
Index arithmetic only, no distances. Invariant: edges may come in any order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdcache.errors import DataError


class Slots:
    """A graph's edges in a table, one row per target, as many slots as the busiest target has.

    Args:
        target: [n_edges] rows of the table, in any order.
        n_rows: of the table.

    Attributes:
        width: slots per row, at least 1.
        place: [n_edges], target * width + the edge's slot.
        slot: [n_edges].
        filled: [n_rows, width] bool.
        edge: [n_rows, width], the edge in each slot; n_edges in empty ones.
    """

    def __init__(self, target: Tensor, n_rows: int) -> None:
        n_edges = len(target)
        counts = torch.zeros(n_rows, dtype=torch.int64, device=target.device)
        counts.index_add_(0, target, torch.ones_like(target))
        # Waits for the device: shapes of the tables follow from it.
        self.width = max(1, int(counts.max())) if n_edges else 1
        order = torch.argsort(target, stable=True)
        first = counts.cumsum(0) - counts
        ranks = torch.arange(n_edges, device=target.device)
        self.slot = torch.empty_like(target)
        self.slot[order] = ranks - first.index_select(0, target.index_select(0, order))
        self.place = target * self.width + self.slot
        numbers = torch.arange(self.width, device=target.device)
        self.filled = numbers < counts.unsqueeze(-1)
        self.n_rows = n_rows
        self.edge = torch.full((n_rows * self.width,), n_edges, device=target.device)
        self.edge[self.place] = ranks
        self.edge = self.edge.view(n_rows, self.width)

    def spread(self, rows: Tensor) -> Tensor:
        """[n_edges, …] to [n_rows, width, …], zeros in empty slots."""
        table = rows.new_zeros(self.n_rows * self.width, *rows.shape[1:])
        table.index_copy_(0, self.place, rows)
        return table.view(self.n_rows, self.width, *rows.shape[1:])

    def collect(self, table: Tensor) -> Tensor:
        """[n_rows, width, …] to [n_edges, …]."""
        return table.reshape(-1, *table.shape[2:]).index_select(0, self.place)


class EdgeFinder:
    """Looks up edges of a graph by source, target and shift.

    Args:
        source, target: [n_edges].
        shift: [n_edges, 3] integers, of the source's image.
        n_atoms: that source and target count.
    """

    def __init__(self, source: Tensor, target: Tensor, shift: Tensor, n_atoms: int) -> None:
        self.n_edges, self.n_atoms = len(source), n_atoms
        if self.n_edges:
            self.lowest, self.highest = shift.amin(0), shift.amax(0)
            self.keys, self.order = torch.sort(self._key(source, target, shift))

    def find(self, source: Tensor, target: Tensor, shift: Tensor) -> Tensor:
        """The edge with these ends; n_edges where there is none.

        Args:
            source, target: [n].
            shift: [n, 3].

        Returns:
            [n] int64.
        """
        if not self.n_edges or not len(source):
            return torch.full_like(source, self.n_edges)
        key = self._key(source, target, shift)
        place = torch.searchsorted(self.keys, key).clamp(max=self.n_edges - 1)
        inside = ((shift >= self.lowest) & (shift <= self.highest)).all(-1)
        found = inside & (self.keys.index_select(0, place) == key)
        return torch.where(found, self.order.index_select(0, place), self.n_edges)

    def _key(self, source: Tensor, target: Tensor, shift: Tensor) -> Tensor:
        key = target * self.n_atoms + source
        extent = self.highest - self.lowest + 1
        for axis in range(3):
            key = key * extent[axis] + (shift[:, axis] - self.lowest[axis])
        return key


def reverse_edges(source: Tensor, target: Tensor, shift: Tensor, finder: EdgeFinder) -> Tensor:
    """[n_edges], for each edge its reverse: target to source, shift negated.

    Raises:
        DataError: an edge has none.
    """
    reverse = finder.find(target, source, -shift)
    if bool((reverse == finder.n_edges).any()):
        edge = int((reverse == finder.n_edges).nonzero()[0])
        raise DataError(
            f"the edge from atom {int(source[edge])} to {int(target[edge])} has no reverse, and "
            "GemNet-OC exchanges messages between the two. Make batches by the model's graph_rule."
        )
    return reverse


def triplets(target: Tensor, twin: Tensor, inner: Slots) -> Tensor:
    """Which slots of its target's row an edge forms triplets with: all but its own.

    Args:
        target: [n_out], of the outgoing edges.
        twin: [n_out], the edge of the inner graph with the same ends and shift; its number of edges
            where there is none.
        inner: graph of the ingoing edges.

    Returns:
        [n_out, inner.width] bool.
    """
    mask = inner.filled.index_select(0, target)
    return _without(mask, twin, inner)


class Quadruplets(NamedTuple):
    """Paths d → b → a ← c: an edge into b, the middle edge from b to a, an edge into a.

    All but the middle edge belong to the main graph. A middle edge forms quadruplets of each of its
    outer with each of its inner edges, but for the one pair where d is c.

    Attributes:
        outer: [n_middle, width] bool, slots of a's row: edges c → a other than the middle edge.
        inner: [n_middle, width] bool, slots of b's row: edges d → b that do not come back from a.
        closing: [n_middle, width], the main edge c → b that closes the triangle with the edge in a
            slot of a's row, and is no partner of it; the number of main edges where there is none.
    """

    outer: Tensor
    inner: Tensor
    closing: Tensor

    def partners(self, edge_table: Tensor, source: Tensor) -> Tensor:
        """[n_middle, width, width] bool, which outer and inner edges form a quadruplet.

        Args:
            edge_table: [n_atoms, width], the main edge in every slot.
            source: [n_middle], of the middle edges.
        """
        inner_edges = edge_table.index_select(0, source)
        apart = self.closing.unsqueeze(-1) != inner_edges.unsqueeze(1)
        return self.outer.unsqueeze(-1) & self.inner.unsqueeze(1) & apart


def quadruplets(
    middle: tuple[Tensor, Tensor, Tensor],
    main: tuple[Tensor, Tensor, Tensor],
    slots: Slots,
    finder: EdgeFinder,
) -> Quadruplets:
    """The quadruplets through the middle edges.

    Args:
        middle, main: source, target and shift of the edges.
        slots, finder: of the main graph.
    """
    source, target, shift = middle
    main_source, _, main_shift = main
    outer = _without(slots.filled.index_select(0, target), finder.find(*middle), slots)
    back = finder.find(target, source, -shift)
    inner = _without(slots.filled.index_select(0, source), back, slots)
    row = slots.edge.index_select(0, target)
    if finder.n_edges:
        edge = row.clamp(max=finder.n_edges - 1).flatten()
        wanted = main_shift.index_select(0, edge).view(*row.shape, 3) - shift.unsqueeze(1)
        closing = finder.find(
            main_source.index_select(0, edge),
            source.repeat_interleave(slots.width),
            wanted.flatten(0, 1),
        ).view_as(row)
    else:
        closing = row
    return Quadruplets(outer, inner, torch.where(outer, closing, finder.n_edges))


def _without(mask: Tensor, edge: Tensor, slots: Slots) -> Tensor:
    """A copy of `mask` [n, width] where row k is False at the slot of edge[k], if it is an edge."""
    outside = torch.cat([slots.slot, slots.slot.new_full((1,), slots.width)])
    slot = outside.index_select(0, edge)
    numbers = torch.arange(slots.width, device=mask.device)
    return mask & (numbers != slot.unsqueeze(-1))
