"""The five kinds of messages of GemNet-OC, each from the features before the block.

Triplets serve three of them: edge to edge, atom to edge and edge to atom.
Invariant: state-dict names are the Open Catalyst ones; what does not change from block to block
comes in as inputs.

Source: Gasteiger et al. 2022, "GemNet-OC: Developing graph neural networks for large and diverse
molecular simulation datasets", section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kdcache.models.gemnet_oc.hyperparameters import GemNetOCHyperparameters
from kdcache.models.gemnet_oc.layers import INVERSE_SQRT_2, Dense, ScaleFactor, linear
from kdcache.models.gemnet_oc.mixing import AtomMixing, EdgeMixing, PairMixing, QuadrupletAngles
from kdcache.models.gemnet_oc.quadruplet_mixing import QuadrupletMixing
from kdcache.models.gemnet_oc.rows import Scaled, by_rows


@dataclass(frozen=True)
class EdgeTripletInputs:
    """What triplets into edges need beside features.

    Attributes:
        radial: [n_in, Br], embedded radial basis of the ingoing edges.
        mixing: sums over triplets.
        source: [n_in], the atoms whose features ingoing edges carry; None where they have their
            own.
    """

    radial: Tensor
    mixing: EdgeMixing
    source: Tensor | None = None


@dataclass(frozen=True)
class AtomTripletInputs:
    """What triplets into atoms need beside features.

    Attributes:
        radial: [n_in, Br], embedded radial basis of the ingoing edges.
        mixing: sums over triplets.
    """

    radial: Tensor
    mixing: AtomMixing


@dataclass(frozen=True)
class QuadrupletInputs:
    """What quadruplets need beside features.

    Attributes:
        radial: [n_edges, Br], embedded radial basis of the main edges.
        circular: [n_middle, width, Bc], embedded basis of inner and middle edges, zeros for those
            that do not count.
        angles: of the quadruplets.
        mixing: sums over quadruplets.
    """

    radial: Tensor
    circular: Tensor
    angles: QuadrupletAngles
    mixing: QuadrupletMixing

    def times(self) -> Tensor:
        """[n_middle · width], how many quadruplets each inner edge of a middle edge is part of."""
        angles = self.angles
        return angles.paths.partners(angles.slots.edge, angles.source).sum(1).flatten()


class Bilinear(nn.Module):
    """The map of products of bases and messages, after their sum."""

    def __init__(self, n_bases: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.bilinear = Dense(n_bases * n_in, n_out, activation=False)

    @property
    def weight(self) -> Tensor:
        """[n_out, n_bases · n_in]."""
        return self.bilinear.weight


class _Filtered(nn.Module):
    """Edge messages, filtered by distance and made narrow."""

    def __init__(self, sizes: GemNetOCHyperparameters, width: int, n_in: int) -> None:
        super().__init__()
        self.mlp_rbf = Dense(sizes.emb_size_rbf, width, activation=False)
        self.scale_rbf = ScaleFactor()
        self.down_projection = Dense(width, n_in)

    def filtered(self, u: Scaled, radial: Tensor) -> Scaled:
        """[n_in, width] and [n_in, Br] to [n_in, narrow]."""
        # Factors go into the filters' weight, the smallest of what is multiplied.
        filters = linear(radial, self.mlp_rbf.weight * self.scale_rbf.factor, u.gain)
        product = u.values * filters
        self.scale_rbf.observe(product, lambda: (u.tensor(), None))
        return self.down_projection.extend(Scaled(product))

    def narrow(self, m: Tensor, radial: Tensor, dense: Dense) -> Tensor:
        """[n_in, width] and [n_in, Br] to [n_in, narrow], with a dense layer before."""

        def step(m: Tensor, radial: Tensor) -> tuple[Scaled]:
            return (self.filtered(dense.extend(Scaled(m)), radial),)

        (narrow,) = by_rows(step, (m, radial), m.shape[1], (self,))
        return narrow


class _BothDirections(_Filtered):
    """An interaction whose message updates an edge and its reverse."""

    def __init__(self, sizes: GemNetOCHyperparameters, width: int, n_in: int, n_out: int) -> None:
        super().__init__(sizes, width, n_in)
        self.up_projection_ca = Dense(n_out, sizes.emb_size_edge)
        self.up_projection_ac = Dense(n_out, sizes.emb_size_edge)

    def update(self, x: Scaled, message: Tensor, of_reverse: Tensor) -> Scaled:
        """x plus what the messages of edges and of their reverses make of it; x is used up.

        Args:
            x: [n_edges, M].
            message, of_reverse: [n_edges, n_out].
        """
        for dense, narrow in (
            (self.up_projection_ca, message),
            (self.up_projection_ac, of_reverse),
        ):
            y = dense.extend(Scaled(narrow))
            x = x.plus(y.values, y.gain * INVERSE_SQRT_2)
        return x


class EdgeTripletInteraction(_BothDirections):
    """Messages over triplets into edges, from edges or from atoms.

    Args:
        sizes: of the model.
        width: of the features that messages are made of.
    """

    def __init__(self, sizes: GemNetOCHyperparameters, width: int) -> None:
        n_in, n_out = sizes.emb_size_trip_in, sizes.emb_size_trip_out
        super().__init__(sizes, width, n_in, n_out)
        self.dense_ba = Dense(width, width)
        self.mlp_cbf = Bilinear(sizes.emb_size_cbf, n_in, n_out)
        self.scale_cbf_sum = ScaleFactor()

    def forward(self, features: Tensor, inputs: EdgeTripletInputs) -> Tensor:
        """[n_in or n_atoms, width] to [n_edges, n_out]."""
        if inputs.source is None:
            u = self.narrow(features, inputs.radial, self.dense_ba)
        else:
            atoms = self.dense_ba(features).index_select(0, inputs.source)
            u = self.filtered(Scaled(atoms), inputs.radial).tensor()
        mixing = inputs.mixing
        message = mixing(u, self.mlp_cbf.weight)
        scaled: Tensor = self.scale_cbf_sum(message, lambda: (u, mixing.times()))
        return scaled


class AtomTripletInteraction(_Filtered):
    """Messages over triplets of edges into atoms."""

    def __init__(self, sizes: GemNetOCHyperparameters) -> None:
        width, n_in, n_out = sizes.emb_size_edge, sizes.emb_size_trip_in, sizes.emb_size_trip_out
        super().__init__(sizes, width, n_in)
        self.dense_ba = Dense(width, width)
        self.mlp_cbf = Bilinear(sizes.emb_size_cbf, n_in, n_out)
        self.scale_cbf_sum = ScaleFactor()
        self.up_projection_ca = Dense(n_out, sizes.emb_size_atom)

    def forward(self, m: Tensor, inputs: AtomTripletInputs) -> Tensor:
        """[n_edges, M] to [n_atoms, A]."""
        u = self.narrow(m, inputs.radial, self.dense_ba)
        mixing = inputs.mixing
        message = mixing(u, self.mlp_cbf.weight)
        message = self.scale_cbf_sum(message, lambda: (u, mixing.times()))
        out: Tensor = self.up_projection_ca(message)
        return out


class QuadrupletInteraction(_BothDirections):
    """Messages over quadruplets of edges into edges."""

    def __init__(self, sizes: GemNetOCHyperparameters) -> None:
        width, n_in, n_out = sizes.emb_size_edge, sizes.emb_size_quad_in, sizes.emb_size_quad_out
        super().__init__(sizes, width, n_in, n_out)
        self.dense_db = Dense(width, width)
        self.mlp_cbf = Dense(sizes.emb_size_cbf, n_in, activation=False)
        self.scale_cbf = ScaleFactor()
        self.mlp_sbf = Bilinear(sizes.emb_size_sbf, n_in, n_out)
        self.scale_sbf_sum = ScaleFactor()

    def forward(self, m: Tensor, inputs: QuadrupletInputs) -> Tensor:
        """[n_edges, M] to [n_edges, n_out]."""
        u = self.narrow(m, inputs.radial, self.dense_db)
        angles = inputs.angles
        at_middle = angles.slots.spread(u).index_select(0, angles.source).flatten(0, 1)
        inner = angles.paths.inner.flatten()
        circular = self.mlp_cbf(inputs.circular.flatten(0, 1))
        u = self.scale_cbf(at_middle * circular, lambda: (at_middle, inner), inner)
        table = u.view(*inputs.circular.shape[:2], u.shape[-1])
        message = inputs.mixing(table, self.mlp_sbf.weight)
        scaled: Tensor = self.scale_sbf_sum(message, lambda: (u, inputs.times()))
        return scaled


class PairInteraction(nn.Module):
    """Messages from atom to atom."""

    def __init__(self, sizes: GemNetOCHyperparameters) -> None:
        super().__init__()
        width, n_in, n_out = sizes.emb_size_atom, sizes.emb_size_aint_in, sizes.emb_size_aint_out
        self.bilinear = Dense(sizes.emb_size_rbf * n_in, n_out, activation=False)
        self.scale_rbf_sum = ScaleFactor()
        self.down_projection = Dense(width, n_in)
        self.up_projection = Dense(n_out, width)

    def forward(self, h: Tensor, mixing: PairMixing) -> Tensor:
        """[n_atoms, A] to [n_atoms, A]."""
        p = self.down_projection(h)
        message = mixing(p, self.bilinear.weight)
        message = self.scale_rbf_sum(message, lambda: (p, mixing.times()))
        out: Tensor = self.up_projection(message)
        return out
