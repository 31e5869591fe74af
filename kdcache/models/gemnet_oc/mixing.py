"""Sums over triplets, quadruplets and pairs, with all that does not change from block to block.

A sum over the edges that enter an atom is a matrix product per atom, over a table of their slots.
Whatever stands beside the features in that product is computed once per forward pass.
Invariant: empty slots and paths that must not count are zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.models.gemnet_oc.bases import azimuth, frame
from kdcache.models.gemnet_oc.paths import Quadruplets, Slots
from kdcache.models.gemnet_oc.rows import by_rows


@dataclass(frozen=True)
class TripletMixing:
    """Sums over triplets.

    Attributes:
        inner: slots of the ingoing edges.
        mask: [n_out, inner.width] bool, the triplets.
        target: [n_out], of the outgoing edges.
    """

    inner: Slots
    mask: Tensor
    target: Tensor

    def times(self) -> Tensor:
        """[n_in], how many triplets each ingoing edge is part of."""
        counts = torch.zeros_like(self.inner.filled, dtype=torch.int64)
        counts = counts.index_add(0, self.target, self.mask.long())
        return self.inner.collect(counts)


@dataclass(frozen=True)
class EdgeMixing(TripletMixing):
    """Sums over triplets into each outgoing edge.

    Attributes:
        outer: slots of the outgoing edges.
        weights: [n_atoms, outer.width, inner.width · B], angular functions contracted with the
            outgoing edge's basis.
    """

    outer: Slots
    weights: Tensor

    def __call__(self, y: Tensor, bilinear: Tensor) -> Tensor:
        """Sums of ingoing messages, mapped.

        Args:
            y: [n_in, C].
            bilinear: [D, B · C].

        Returns:
            [n_out, D].

        Source: Gasteiger et al. 2022 (GemNet-OC), after GemNet's efficient bilinear layer.
        """
        n_out, channels = len(bilinear), y.shape[1]
        by_basis = bilinear.view(n_out, -1, channels).transpose(0, 1).reshape(-1, channels)

        def mix(table: Tensor, weights: Tensor) -> tuple[Tensor]:
            # Mapped before the sum: the product is then long, and its result narrow.
            mapped = functional.linear(table, by_basis)
            mapped = mapped.view(len(table), -1, n_out)
            return (torch.bmm(weights.to(mapped.dtype), mapped),)

        width = self.inner.width * len(by_basis)
        (sums,) = by_rows(mix, (self.inner.spread(y), self.weights), width)
        return self.outer.collect(sums)


@dataclass(frozen=True)
class AtomMixing(TripletMixing):
    """Sums over triplets, and then over the outgoing edges of each atom.

    Attributes:
        weights: [n_atoms, B, inner.width], already summed over the outgoing edges.
    """

    weights: Tensor

    def __call__(self, y: Tensor, bilinear: Tensor) -> Tensor:
        """[n_in, C] and [D, B · C] to [n_atoms, D]."""
        sums = torch.bmm(self.weights.to(y.dtype), self.inner.spread(y))
        return functional.linear(sums.flatten(1), bilinear)


def edge_mixing(
    inner: Slots, outer: Slots, target: Tensor, mask: Tensor, angular: Tensor, radial: Tensor
) -> EdgeMixing:
    """Sums into outgoing edges.

    Args:
        inner, outer, target, mask: as of `EdgeMixing`.
        angular: [n_out, inner.width, S], functions of the angle with every ingoing edge.
        radial: [n_out, B, S], the outgoing edge's embedded basis.
    """
    weights = _contract(mask, angular, radial)
    return EdgeMixing(inner, mask, target, outer, outer.spread(weights.flatten(1)))


def atom_mixing(
    inner: Slots, target: Tensor, mask: Tensor, angular: Tensor, radial: Tensor
) -> AtomMixing:
    """Sums into atoms; arguments as of `edge_mixing`."""
    weights = _contract(mask, angular, radial)
    sums = weights.new_zeros(inner.n_rows, *weights.shape[1:]).index_add(0, target, weights)
    return AtomMixing(inner, mask, target, sums.transpose(1, 2).contiguous())


def _contract(mask: Tensor, angular: Tensor, radial: Tensor) -> Tensor:
    """[n_out, inner.width, B]."""
    return torch.bmm(angular * mask.unsqueeze(-1), radial.transpose(1, 2))


@dataclass(frozen=True)
class PairMixing:
    """Sums over neighbours of each atom, with the images of a neighbour taken together.

    Attributes:
        slots: of pairs of atoms.
        source: [n_pairs].
        weights: [n_atoms, B, slots.width].
        n_edges: [n_pairs], images in each.
    """

    slots: Slots
    source: Tensor
    weights: Tensor
    n_edges: Tensor

    def __call__(self, p: Tensor, bilinear: Tensor) -> Tensor:
        """[n_atoms, C] and [D, B · C] to [n_atoms, D]."""
        gathered = self.slots.spread(p.index_select(0, self.source))
        sums = torch.bmm(self.weights.to(p.dtype), gathered)
        return functional.linear(sums.flatten(1), bilinear)

    def times(self) -> Tensor:
        """[n_atoms], how many neighbours each atom is a source for."""
        counts = self.n_edges.new_zeros(self.slots.n_rows)
        return counts.index_add(0, self.source, self.n_edges)


def pair_mixing(source: Tensor, target: Tensor, radial: Tensor, n_atoms: int) -> PairMixing:
    """Sums over a graph's edges.

    Args:
        source, target: [n_edges].
        radial: [n_edges, B].
        n_atoms: of the batch.
    """
    # Features are the same for every image of a neighbour: five times fewer pairs than edges in a
    # slab of 80 atoms.
    key, pair, n_edges = torch.unique(
        target * n_atoms + source, return_inverse=True, return_counts=True
    )
    sums = radial.new_zeros(len(key), radial.shape[1]).index_add(0, pair, radial)
    slots = Slots(key // max(n_atoms, 1), n_atoms)
    weights = slots.spread(sums).transpose(1, 2).contiguous()
    return PairMixing(slots, key % max(n_atoms, 1), weights, n_edges)


@dataclass(frozen=True)
class QuadrupletAngles:
    """What the bases of quadruplets are functions of.

    The dihedral is the difference of two azimuths around the middle edge.

    Attributes:
        paths: the quadruplets.
        source, target: [n_middle], of the middle edges.
        slots: of the main graph.
        outer_cosine: [n_middle, width], of the angle between outer and middle edge.
        inner_cosine: [n_middle, width], of inner and middle edge, head to tail.
        outer_azimuth, inner_azimuth: cosine and sine, [n_middle, width] each; both 0 where there is
            none.
    """

    paths: Quadruplets
    source: Tensor
    target: Tensor
    slots: Slots
    outer_cosine: Tensor
    inner_cosine: Tensor
    outer_azimuth: tuple[Tensor, Tensor]
    inner_azimuth: tuple[Tensor, Tensor]


def quadruplet_angles(
    paths: Quadruplets, source: Tensor, target: Tensor, middle: Tensor, slots: Slots, main: Tensor
) -> QuadrupletAngles:
    """Angles of quadruplets.

    Args:
        paths, source, target, slots: as of `QuadrupletAngles`.
        middle: [n_middle, 3], unit vectors of middle edges, source to target.
        main: [n_edges, 3], of main edges.
    """
    table = slots.spread(main)
    outer, inner = table.index_select(0, target), table.index_select(0, source)
    first, second = frame(middle)
    return QuadrupletAngles(
        paths,
        source,
        target,
        slots,
        clamped_product(outer, middle.unsqueeze(1)),
        clamped_product(inner, middle.unsqueeze(1)),
        azimuth(outer, first, second),
        azimuth(inner, first, second),
    )


def clamped_product(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of unit vectors, within [-1, 1]."""
    # A product and a sum, not a matrix product: autocast would round that to bfloat16.
    return (left * right).sum(-1).clamp(-1.0, 1.0)
