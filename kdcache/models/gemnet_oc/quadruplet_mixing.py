"""Sums over quadruplets d → b → a ← c into the edges c → a.

Every basis is a product of a function of the angle at a, which knows c and b, and one of the
dihedral, which knows d as well: sums over d are taken first, and what grows with the number of
quadruplets is numbers, never features.
Invariant: quadruplets that do not count are zeros in `dihedral`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.models.gemnet_oc.bases import BasisEmbedding, SphericalBasis
from kdcache.models.gemnet_oc.mixing import QuadrupletAngles
from kdcache.models.gemnet_oc.paths import Slots
from kdcache.models.gemnet_oc.rows import by_rows


@dataclass(frozen=True)
class QuadrupletMixing:
    """Sums over quadruplets. Only atoms with a middle edge have rows here.

    Attributes:
        edge: [n_rows, width], the main edge in each slot; n_edges in empty ones.
        n_edges: of the main graph.
        middle: slots of middle edges.
        polar: [n_rows, width, P, middle.width], functions of the angle of outer and middle edge.
        dihedral: [n_rows, middle.width, width · T, width], functions of the dihedral of outer and
            inner edge.
        radial: [n_rows, width, B, S²], the outer edge's embedded basis.
        columns: [P], which of T functions each of P = S² goes with; None where all P go with all
            T, in the order of P.
    """

    edge: Tensor
    n_edges: int
    middle: Slots
    polar: Tensor
    dihedral: Tensor
    radial: Tensor
    columns: Tensor | None

    def __call__(self, u: Tensor, bilinear: Tensor) -> Tensor:
        """Sums over quadruplets, mapped.

        Args:
            u: [n_middle, width, C], messages of inner edges at each middle edge.
            bilinear: [D, B · C].

        Returns:
            [n_edges, D].
        """
        channels = u.shape[-1]

        def mix(u: Tensor, polar: Tensor, dihedral: Tensor, radial: Tensor) -> tuple[Tensor]:
            n, width, _, n_middle = polar.shape
            inner = torch.bmm(dihedral.flatten(0, 1).to(u.dtype), u.flatten(0, 1))
            inner = inner.view(n, n_middle, width, dihedral.shape[2] // width * channels)
            inner = inner.transpose(1, 2).reshape(n * width, n_middle, inner.shape[3])
            polar = polar.flatten(0, 1).to(u.dtype)
            if self.columns is None:
                sums = torch.bmm(polar, inner).view(n * width, radial.shape[3], channels)
            else:
                inner = inner.view(n * width, n_middle, inner.shape[2] // channels, channels)
                inner = inner.index_select(2, self.columns)
                sums = (polar.transpose(1, 2).unsqueeze(-1) * inner).sum(1)
            mixed = torch.bmm(radial.flatten(0, 1).to(u.dtype), sums)
            return (functional.linear(mixed.flatten(1), bilinear).view(n, width, len(bilinear)),)

        tables = (self.middle.spread(u), self.polar, self.dihedral, self.radial)
        _, n_middle, n_functions, _ = self.dihedral.shape
        (mapped,) = by_rows(mix, tables, n_middle * n_functions * channels)
        # The last row takes what empty slots give.
        whole = mapped.new_zeros(self.n_edges + 1, len(bilinear))
        return whole.index_copy_(0, self.edge.flatten(), mapped.flatten(0, 1))[:-1]


def quadruplet_mixing(
    angles: QuadrupletAngles, basis: SphericalBasis, embedding: BasisEmbedding, radial: Tensor
) -> QuadrupletMixing:
    """Everything that the sums over quadruplets of all blocks share.

    Args:
        angles: of the quadruplets.
        basis: their functions.
        embedding: maps the product of radial and spherical functions.
        radial: [n_edges, R], radial functions of the main edges.
    """
    slots, paths = angles.slots, angles.paths
    rows, atom_row = _active_atoms(angles.target, slots.n_rows)
    middle = Slots(atom_row.index_select(0, angles.target), len(rows))
    polar = basis.polar(angles.outer_cosine) * paths.outer.unsqueeze(-1)
    inner_edge = slots.edge.index_select(0, angles.source)

    def functions(
        outer: Tensor, inner: Tensor, cosine: Tensor, sine: Tensor, c: Tensor, s: Tensor,
        closing: Tensor, edge: Tensor,
    ) -> tuple[Tensor]:  # fmt: skip
        values = basis.dihedral(
            cosine.unsqueeze(-1) * c.unsqueeze(-2) + sine.unsqueeze(-1) * s.unsqueeze(-2),
            sine.unsqueeze(-1) * c.unsqueeze(-2) - cosine.unsqueeze(-1) * s.unsqueeze(-2),
        )
        apart = closing.unsqueeze(-1) != edge.unsqueeze(-2)
        mask = outer.unsqueeze(-1) & inner.unsqueeze(-2) & apart
        return ((values * mask.unsqueeze(-2)).flatten(-3, -2),)

    # Spread while they are small: [n_rows, middle.width, width] each.
    tables = [
        middle.spread(table)
        for table in (
            paths.outer, paths.inner, *angles.outer_azimuth, *angles.inner_azimuth,
            paths.closing, inner_edge,
        )
    ]  # fmt: skip
    per_row = middle.width * slots.width**2 * basis.n_dihedral
    (dihedral,) = by_rows(functions, tables, per_row)
    embedded = embedding(slots.spread(radial).index_select(0, rows).flatten(0, 1))
    return QuadrupletMixing(
        edge=slots.edge.index_select(0, rows),
        n_edges=len(radial),
        middle=middle,
        polar=middle.spread(polar).permute(0, 2, 3, 1).contiguous(),
        dihedral=dihedral,
        radial=embedded.view(len(rows), slots.width, *embedded.shape[1:]),
        columns=basis.columns,
    )


def _active_atoms(target: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Atoms with a middle edge, and for every atom its row among them."""
    active = torch.zeros(n_atoms, dtype=torch.bool, device=target.device)
    active[target] = True
    return active.nonzero().squeeze(-1), active.long().cumsum(0) - 1
