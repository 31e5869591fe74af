"""Sums over quadruplets d → b → a ← c into the edges c → a.

Two ways to the same numbers. Where the basis is a polynomial in the cosine of the dihedral, it is a
sum of cos m(α_c - α_d) with azimuths around the middle edge: sums over d are taken once per middle
edge, and quadruplets are never written down. Other bases take the list of all of them.
Invariant: messages of inner edges that must not count arrive as zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kdcache.models.gemnet_oc.bases import (
    BasisEmbedding,
    SphericalBasis,
    multiples,
    zonal_harmonics,
    zonal_harmonics_as_cosines,
)
from kdcache.models.gemnet_oc.mixing import QuadrupletAngles
from kdcache.models.gemnet_oc.paths import Slots
from kdcache.models.gemnet_oc.rows import by_rows


class QuadrupletMixing(Protocol):
    """Sums over quadruplets."""

    def __call__(self, u: Tensor, bilinear: Tensor) -> Tensor:
        """Sums over quadruplets, mapped.

        Args:
            u: [n_middle, width, C], messages of inner edges at each middle edge.
            bilinear: [D, B · C].

        Returns:
            [n_edges, D].
        """


def quadruplet_mixing(
    angles: QuadrupletAngles, basis: SphericalBasis, embedding: BasisEmbedding, radial: Tensor
) -> QuadrupletMixing:
    """The way that suits the basis.

    Args:
        angles: of the quadruplets.
        basis: their functions.
        embedding: maps the product of radial and spherical functions.
        radial: [n_edges, R], radial functions of the main edges.
    """
    if basis.kind == "legendre_outer":
        return AzimuthalMixing.of(angles, basis, embedding, radial)
    return ListedMixing.of(angles, basis, embedding, radial)


@dataclass(frozen=True)
class AzimuthalMixing:
    """Sums by Fourier series in the azimuth.

    Only atoms with a middle edge have rows here. There are 2S series: cosines, sines, and one for
    inner edges without azimuth, whose dihedral counts as π/2, as it does for such outer edges.

    Attributes:
        edge: [n_rows, width], the main edge in each slot; n_edges in empty ones.
        n_edges: of the main graph.
        middle: slots of middle edges.
        series: [n_middle, 2S, width], of every inner edge.
        weights: [n_rows, width, B, 2S, middle.width].
        closing_weights: [n_rows, width, B, middle.width], what `weights` make of the inner edge
            whose source is the outer edge's own.
        closing: [n_rows, width, middle.width], where that one stands among the inner edges; past
            the last where there is none.
    """

    edge: Tensor
    n_edges: int
    middle: Slots
    series: Tensor
    weights: Tensor
    closing_weights: Tensor
    closing: Tensor

    def __call__(self, u: Tensor, bilinear: Tensor) -> Tensor:
        """[n_middle, width, C] and [D, B · C] to [n_edges, D]."""
        channels = u.shape[-1]
        sums = self.middle.spread(torch.bmm(self.series.to(u.dtype), u))
        # Series before middle edges, as `weights` have them.
        sums = sums.transpose(1, 2).flatten(1, 2)
        inner = torch.cat([u.flatten(0, 1), u.new_zeros(1, channels)])

        def mix(
            sums: Tensor, weights: Tensor, closing_weights: Tensor, closing: Tensor
        ) -> tuple[Tensor]:
            n, width, n_bases = weights.shape[:3]
            mixed = torch.bmm(weights.flatten(3).flatten(1, 2).to(sums.dtype), sums)
            mixed = mixed.view(n * width, n_bases, channels)
            closing = closing.flatten(0, 1)
            own = inner.index_select(0, closing.flatten()).view(*closing.shape, channels)
            mixed.baddbmm_(closing_weights.flatten(0, 1).to(sums.dtype), own, alpha=-1.0)
            return (functional.linear(mixed.flatten(1), bilinear).view(n, width, len(bilinear)),)

        tables = (sums, self.weights, self.closing_weights, self.closing)
        (mapped,) = by_rows(mix, tables, self.edge.shape[1] * bilinear.shape[1])
        # The last row takes what empty slots give.
        whole = mapped.new_zeros(self.n_edges + 1, len(bilinear))
        return whole.index_copy_(0, self.edge.flatten(), mapped.flatten(0, 1))[:-1]

    @classmethod
    def of(
        cls,
        angles: QuadrupletAngles,
        basis: SphericalBasis,
        embedding: BasisEmbedding,
        radial: Tensor,
    ) -> AzimuthalMixing:
        """Arguments as of `quadruplet_mixing`."""
        slots, paths, degree = angles.slots, angles.paths, basis.num_spherical
        rows, atom_row = _active_atoms(angles.target, slots.n_rows)
        middle = Slots(atom_row.index_select(0, angles.target), len(rows))
        polar = zonal_harmonics(angles.outer_cosine, degree) * paths.outer.unsqueeze(-1)
        if basis.scale_sbf is not None:
            polar = basis.scale_sbf(polar)
        # Of each outer edge with the middle edges of its atom, [n_rows, width, ·, middle.width].
        cosine, sine, normal = angles.outer_azimuth
        cosines, sines = (t[..., 1:] for t in multiples(cosine, sine, degree))
        tables = (
            middle.spread(t).permute(0, 2, 3, 1)
            for t in (polar, cosines, sines, normal.unsqueeze(-1))
        )
        at_rows = slots.spread(radial).index_select(0, rows)
        embed = _series_embedding(embedding, degree, radial)
        n_bases = embedding.weight.shape[2]
        width = slots.width * n_bases * 2 * degree * middle.width
        weights, closing_weights = by_rows(
            partial(_azimuthal_weights, embed), (at_rows, *tables), width
        )
        return cls(
            edge=slots.edge.index_select(0, rows),
            n_edges=len(radial),
            middle=middle,
            series=_inner_series(angles, degree),
            weights=weights,
            closing_weights=closing_weights,
            closing=_closing_places(angles, middle),
        )


def _series_embedding(embedding: BasisEmbedding, degree: int, like: Tensor) -> Tensor:
    """[R, B · (S+1) · S]: the embedding with functions of the dihedral as series in its multiples.

    The last of S+1 is their value at a right angle.
    """
    harmonics = torch.as_tensor(
        zonal_harmonics_as_cosines(degree), dtype=like.dtype, device=like.device
    )
    n_radial, _, n_bases = embedding.weight.shape
    weight = embedding.effective_weight.view(n_radial, n_bases, degree, degree)
    return (weight @ harmonics).transpose(2, 3).reshape(n_radial, -1)


def _azimuthal_weights(
    embed: Tensor, radial: Tensor, polar: Tensor, cosines: Tensor, sines: Tensor, normal: Tensor
) -> tuple[Tensor, Tensor]:
    """`weights` and `closing_weights` of `AzimuthalMixing` for some rows.

    Args:
        embed: as `_series_embedding` gives it.
        radial: [n, width, R], of the outer edges.
        polar: [n, width, S, middle.width].
        cosines, sines: [n, width, S-1, middle.width], of multiples of the azimuth from 1.
        normal: [n, width, 1, middle.width] bool, where there is no azimuth.
    """
    n, width, degree, n_middle = polar.shape
    n_bases = embed.shape[1] // (degree * (degree + 1))
    outer_basis = functional.linear(radial.flatten(0, 1), embed.t())
    outer_basis = outer_basis.view(n * width, n_bases * (degree + 1), degree)
    by_order = torch.bmm(outer_basis, polar.flatten(0, 1).to(outer_basis.dtype))
    by_order = by_order.view(n, width, n_bases, degree + 1, n_middle)
    of_order, right_angle = by_order[:, :, :, :degree], by_order[:, :, :, degree:]
    normal = normal.unsqueeze(2)
    weights = torch.cat(
        [
            torch.where(normal, right_angle, of_order[:, :, :, :1]),
            of_order[:, :, :, 1:] * cosines.unsqueeze(2),
            of_order[:, :, :, 1:] * sines.unsqueeze(2),
            right_angle,
        ],
        dim=3,
    )
    closing = torch.where(normal, right_angle, of_order.sum(3, keepdim=True))
    return weights, closing.squeeze(3)


def _active_atoms(target: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Atoms with a middle edge, and for every atom its row among them."""
    active = torch.zeros(n_atoms, dtype=torch.bool, device=target.device)
    active[target] = True
    return active.nonzero().squeeze(-1), active.long().cumsum(0) - 1


def _inner_series(angles: QuadrupletAngles, degree: int) -> Tensor:
    """[n_middle, 2 · degree, width]: cosines, sines, and where there is no azimuth."""
    cosine, sine, normal = angles.inner_azimuth
    cosines, sines = multiples(cosine, sine, degree)
    has_none = normal.to(cosines.dtype).unsqueeze(-1)
    constant = cosines[..., :1] - has_none
    series = torch.cat([constant, cosines[..., 1:], sines[..., 1:], has_none], dim=-1)
    return series.transpose(1, 2).contiguous()


def _closing_places(angles: QuadrupletAngles, middle: Slots) -> Tensor:
    """[n_rows, width, middle.width], rows of the flattened inner messages."""
    slots, closing = angles.slots, angles.paths.closing
    n_middle, n_edges = len(closing), len(slots.slot)
    past = n_middle * slots.width
    slot = torch.cat([slots.slot, slots.slot.new_zeros(1)])
    first = torch.arange(n_middle, device=closing.device).unsqueeze(-1) * slots.width
    places = torch.where(closing < n_edges, first + slot[closing], past)
    table = places.new_full((middle.n_rows * middle.width, slots.width), past)
    table.index_copy_(0, middle.place, places)
    table = table.view(middle.n_rows, middle.width, slots.width)
    return table.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class ListedMixing:
    """Sums over a list of all quadruplets, of any basis.

    Attributes:
        outer: slots of quadruplets, one row per main edge.
        inner: [n_quadruplets], rows of the flattened inner messages.
        functions: [n_edges, S², outer.width].
        radial: [n_edges, B, S²].
    """

    outer: Slots
    inner: Tensor
    functions: Tensor
    radial: Tensor

    def __call__(self, u: Tensor, bilinear: Tensor) -> Tensor:
        """[n_middle, width, C] and [D, B · C] to [n_edges, D]."""
        gathered = self.outer.spread(u.flatten(0, 1).index_select(0, self.inner))
        sums = torch.bmm(self.functions.to(u.dtype), gathered)
        mixed = torch.bmm(self.radial.to(u.dtype), sums)
        return functional.linear(mixed.flatten(1), bilinear)

    @classmethod
    def of(
        cls,
        angles: QuadrupletAngles,
        basis: SphericalBasis,
        embedding: BasisEmbedding,
        radial: Tensor,
    ) -> ListedMixing:
        """Arguments as of `quadruplet_mixing`."""
        slots = angles.slots
        partners = angles.paths.partners(slots.edge, angles.source)
        middle, outer_slot, inner_slot = partners.nonzero().unbind(-1)
        inner = middle * slots.width + inner_slot
        outer = middle * slots.width + outer_slot
        cosines, sines, _ = (t.flatten().index_select(0, outer) for t in angles.outer_azimuth)
        inner_cosines, inner_sines, _ = (
            t.flatten().index_select(0, inner) for t in angles.inner_azimuth
        )
        dihedral_cosine = cosines * inner_cosines + sines * inner_sines
        dihedral_sine = (sines * inner_cosines - cosines * inner_sines).abs()
        # Where either has no azimuth, both are 0, and the dihedral counts as π/2.
        flat = dihedral_cosine.square() + dihedral_sine.square() < 0.5
        dihedral_sine = torch.where(flat, 1.0, dihedral_sine)
        cosine = angles.outer_cosine.flatten().index_select(0, outer)
        functions = basis(cosine, (dihedral_cosine, dihedral_sine))
        edge = slots.edge[angles.target.index_select(0, middle), outer_slot]
        by_edge = Slots(edge, len(radial))
        table = by_edge.spread(functions).transpose(1, 2).contiguous()
        return cls(by_edge, inner, table, embedding(radial))
