"""From a batch to what the blocks need: paths, angles, bases, and sums over paths.

Owns the basis layers and the embeddings that all blocks share, as a base of the model, whose state
dict has them at its top.
Invariant: no structure is treated by itself, and no edge order is presumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from kdcache.errors import DataError
from kdcache.models.gemnet_oc.bases import (
    BasisEmbedding,
    CircularBasis,
    ScaledRadialBasis,
    SphericalBasis,
)
from kdcache.models.gemnet_oc.blocks import BlockInputs
from kdcache.models.gemnet_oc.hyperparameters import GemNetOCHyperparameters
from kdcache.models.gemnet_oc.interactions import (
    AtomTripletInputs,
    EdgeTripletInputs,
    QuadrupletInputs,
)
from kdcache.models.gemnet_oc.layers import Dense
from kdcache.models.gemnet_oc.mixing import (
    EdgeMixing,
    PairMixing,
    atom_mixing,
    clamped_product,
    edge_mixing,
    pair_mixing,
    quadruplet_angles,
)
from kdcache.models.gemnet_oc.paths import (
    EdgeFinder,
    Slots,
    quadruplets,
    reverse_edges,
    triplets,
)
from kdcache.models.gemnet_oc.quadruplet_mixing import quadruplet_mixing
from kdcache.models.gemnet_oc.rows import by_rows
from kdcache.models.geometry import edge_vectors
from kdcache.models.interface import Model
from kdcache.structures import Batch, Graph


@dataclass(frozen=True)
class Edges:
    """A graph with its geometry.

    Attributes:
        source, target: [n_edges].
        shift: [n_edges, 3] int64, of the source's image.
        vector: [n_edges, 3], unit vectors from source to target.
        distance: [n_edges] Å.
        n_atoms: of the batch.
    """

    source: Tensor
    target: Tensor
    shift: Tensor
    vector: Tensor
    distance: Tensor
    n_atoms: int

    @classmethod
    def of(cls, batch: Batch, graph: Graph) -> Edges:
        """The edges of one graph of a batch."""
        between = edge_vectors(replace(batch, edge_index=graph[0], edge_shift=graph[1]))
        distance = torch.linalg.vector_norm(between, dim=-1)
        # Ours point from target to source, the published ones the other way.
        vector = -between / distance.unsqueeze(-1)
        source, target = graph[0].unbind(0)
        return cls(source, target, graph[1].round().long(), vector, distance, batch.n_atoms)

    @property
    def ends(self) -> tuple[Tensor, Tensor, Tensor]:
        """Source, target and shift."""
        return self.source, self.target, self.shift

    @cached_property
    def slots(self) -> Slots:
        """By target."""
        return Slots(self.target, self.n_atoms)

    @cached_property
    def finder(self) -> EdgeFinder:
        """By ends."""
        return EdgeFinder(*self.ends, self.n_atoms)


class SharedInputs(Model):
    """Basis layers and embeddings of a GemNet-OC, without its blocks.

    Args:
        sizes: of the model.
    """

    hyperparameters: GemNetOCHyperparameters

    def __init__(self, sizes: GemNetOCHyperparameters) -> None:
        super().__init__(sizes)
        spherical, radial = sizes.num_spherical, sizes.num_radial
        rbf, cbf, sbf = sizes.emb_size_rbf, sizes.emb_size_cbf, sizes.emb_size_sbf

        def distances(cutoff: float, *, angular: bool = False) -> ScaledRadialBasis:
            name = sizes.rbf_spherical if angular and sizes.rbf_spherical else sizes.rbf
            return ScaledRadialBasis(
                radial, cutoff, name, sizes.envelope, sizes.envelope_exponent,
                scaled=sizes.scale_basis,
            )  # fmt: skip

        def angles(of: ScaledRadialBasis) -> CircularBasis:
            return CircularBasis(spherical, sizes.cbf, of, scaled=sizes.scale_basis)

        self.radial_basis = distances(sizes.cutoff)
        # One module under up to three names, as in the published state dicts.
        main = distances(sizes.cutoff, angular=True)
        if sizes.quad_interaction:
            middle = distances(sizes.quad_graph.cutoff, angular=True)
            self.cbf_basis_qint = angles(middle)
            self.sbf_basis_qint = SphericalBasis(
                spherical, sizes.sbf, main, scaled=sizes.scale_basis
            )
            self.mlp_rbf_qint = Dense(radial, rbf, activation=False)
            self.mlp_cbf_qint = BasisEmbedding(radial, spherical, cbf)
            self.mlp_sbf_qint = BasisEmbedding(radial, spherical**2, sbf)
        if sizes.atom_edge_interaction or sizes.edge_atom_interaction:
            self.radial_basis_aeaint = distances(sizes.atom_edge_graph.cutoff)
        if sizes.atom_edge_interaction:
            self.cbf_basis_aeint = angles(main)
            self.mlp_rbf_aeint = Dense(radial, rbf, activation=False)
            self.mlp_cbf_aeint = BasisEmbedding(radial, spherical, cbf)
        if sizes.edge_atom_interaction:
            self.cbf_basis_eaint = angles(distances(sizes.atom_edge_graph.cutoff, angular=True))
            self.mlp_rbf_eaint = Dense(radial, rbf, activation=False)
            self.mlp_cbf_eaint = BasisEmbedding(radial, spherical, cbf)
        if sizes.atom_interaction:
            self.radial_basis_aint = distances(sizes.atom_graph.cutoff)
            self.mlp_rbf_aint = nn.Linear(radial, rbf, bias=False)
        self.cbf_basis_tint = angles(main)
        self.mlp_rbf_tint = Dense(radial, rbf, activation=False)
        self.mlp_cbf_tint = BasisEmbedding(radial, spherical, cbf)
        self.mlp_rbf_h = Dense(radial, rbf, activation=False)
        self.mlp_rbf_out = Dense(radial, rbf, activation=False)

    def shared_embeddings(self) -> Iterator[tuple[Tensor, int]]:
        """Weights that several blocks use, and how many of them."""
        n_blocks = self.hyperparameters.num_blocks
        for name, module in self.named_children():
            if name.startswith(("mlp_rbf_", "mlp_cbf_", "mlp_sbf_")):
                (weight,) = module.parameters()
                yield weight, n_blocks + 1 if name == "mlp_rbf_out" else n_blocks

    def block_inputs(self, batch: Batch, main: Edges, radial: Tensor) -> BlockInputs:
        """What all blocks share.

        Args:
            batch: with the further graphs of the model.
            main: its main graph.
            radial: [n_edges, R], functions of the main edges' distances.

        Raises:
            DataError: a further graph is missing.
        """
        sizes = self.hyperparameters
        radial_main = self.cbf_basis_tint.radial_basis(main.distance)
        wanted = sizes.atom_edge_interaction or sizes.edge_atom_interaction
        between = self._further(batch, "aeaint") if wanted else None
        return BlockInputs(
            source=main.source,
            target=main.target,
            reverse=reverse_edges(*main.ends, main.finder),
            radial_atom=self.mlp_rbf_h(radial),
            radial_out=self.mlp_rbf_out(radial),
            edge_to_edge=EdgeTripletInputs(
                self.mlp_rbf_tint(radial),
                self._edge_mixing(main, main, self.cbf_basis_tint, self.mlp_cbf_tint(radial_main)),
            ),
            atom_to_edge=(
                self._atom_to_edge(main, between, radial_main)
                if between is not None and sizes.atom_edge_interaction
                else None
            ),
            edge_to_atom=(
                self._edge_to_atom(main, between, radial)
                if between is not None and sizes.edge_atom_interaction
                else None
            ),
            quadruplets=(
                self._quadruplets(batch, main, radial, radial_main)
                if sizes.quad_interaction
                else None
            ),
            pairs=self._pairs(batch) if sizes.atom_interaction else None,
        )

    def _further(self, batch: Batch, name: str) -> Edges:
        if name not in batch.graphs:
            raise DataError(
                f"the batch has no neighbour list {name!r}, which gemnet-oc needs beside the main "
                f"one; it has {sorted(batch.graphs) or 'none'}. Make batches with the model's "
                "further_graphs."
            )
        return Edges.of(batch, batch.graphs[name])

    def _edge_mixing(
        self, inner: Edges, outer: Edges, basis: CircularBasis, embedded: Tensor
    ) -> EdgeMixing:
        mask, angular = self._triplets(inner, outer, basis)
        return edge_mixing(inner.slots, outer.slots, outer.target, mask, angular, embedded)

    def _triplets(self, inner: Edges, outer: Edges, basis: CircularBasis) -> tuple[Tensor, Tensor]:
        """Mask [n_out, width] and circular functions [n_out, width, S]."""
        twin = (
            torch.arange(len(outer.source), device=outer.source.device)
            if inner is outer
            else inner.finder.find(*outer.ends)
        )
        mask = triplets(outer.target, twin, inner.slots)
        vectors = inner.slots.spread(inner.vector).index_select(0, outer.target)
        return mask, basis(clamped_product(vectors, outer.vector.unsqueeze(1)))

    def _atom_to_edge(self, main: Edges, between: Edges, radial_main: Tensor) -> EdgeTripletInputs:
        embedded = self.mlp_cbf_aeint(radial_main)
        mixing = self._edge_mixing(between, main, self.cbf_basis_aeint, embedded)
        radial = self.mlp_rbf_aeint(self.radial_basis_aeaint(between.distance))
        return EdgeTripletInputs(radial, mixing, between.source)

    def _edge_to_atom(self, main: Edges, between: Edges, radial: Tensor) -> AtomTripletInputs:
        embedded = self.mlp_cbf_eaint(self.cbf_basis_eaint.radial_basis(between.distance))
        mask, angular = self._triplets(main, between, self.cbf_basis_eaint)
        mixing = atom_mixing(main.slots, between.target, mask, angular, embedded)
        return AtomTripletInputs(self.mlp_rbf_eaint(radial), mixing)

    def _quadruplets(
        self, batch: Batch, main: Edges, radial: Tensor, radial_main: Tensor
    ) -> QuadrupletInputs:
        middle = self._middle_edges(batch)
        paths = quadruplets(middle.ends, main.ends, main.slots, main.finder)
        angles = quadruplet_angles(
            paths, middle.source, middle.target, middle.vector, main.slots, main.vector
        )
        embedded = self.mlp_cbf_qint(self.cbf_basis_qint.radial_basis(middle.distance))
        functions = self.cbf_basis_qint(angles.inner_cosine) * paths.inner.unsqueeze(-1)
        return QuadrupletInputs(
            radial=self.mlp_rbf_qint(radial),
            circular=torch.bmm(functions, embedded.transpose(1, 2)),
            angles=angles,
            mixing=quadruplet_mixing(angles, self.sbf_basis_qint, self.mlp_sbf_qint, radial_main),
        )

    def _middle_edges(self, batch: Batch) -> Edges:
        """The edges that quadruplets go through: those with an atom of the chosen tags."""
        edges = self._further(batch, "qint")
        if batch.tags is None:
            if 2 in self.hyperparameters.qint_tags:
                return edges
            kept = torch.zeros_like(edges.source, dtype=torch.bool)
        else:
            chosen = torch.zeros_like(batch.tags, dtype=torch.bool)
            for tag in self.hyperparameters.qint_tags:
                chosen |= batch.tags == tag
            kept = chosen[edges.source] | chosen[edges.target]
        rows = kept.nonzero().squeeze(-1)
        return replace(
            edges,
            **{
                name: getattr(edges, name).index_select(0, rows)
                for name in ("source", "target", "shift", "vector", "distance")
            },
        )

    def _pairs(self, batch: Batch) -> PairMixing:
        edges = self._further(batch, "a2a")
        (radial,) = by_rows(
            lambda distance: (self.mlp_rbf_aint(self.radial_basis_aint(distance)),),
            (edges.distance,),
            self.hyperparameters.num_radial,
            (self.mlp_rbf_aint, self.radial_basis_aint),
        )
        return pair_mixing(edges.source, edges.target, radial, batch.n_atoms)
