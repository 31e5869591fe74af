"""Interaction blocks, which update atoms and edges, and output blocks, which read them out.

Invariant: all interactions of a block read the features that came into it.

Source: Gasteiger et al. 2022 (GemNet-OC), Figure 2, in the Open Catalyst variant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from kdcache.models.gemnet_oc.hyperparameters import GemNetOCHyperparameters
from kdcache.models.gemnet_oc.interactions import (
    AtomTripletInputs,
    AtomTripletInteraction,
    EdgeTripletInputs,
    EdgeTripletInteraction,
    PairInteraction,
    QuadrupletInputs,
    QuadrupletInteraction,
)
from kdcache.models.gemnet_oc.layers import (
    INVERSE_SQRT_2,
    Dense,
    EdgeEmbedding,
    ScaleFactor,
    TapPoint,
    apply,
    extend,
    linear,
    mlp,
    residuals,
)
from kdcache.models.gemnet_oc.mixing import PairMixing
from kdcache.models.gemnet_oc.rows import Scaled, by_rows, row_parts


@dataclass(frozen=True)
class BlockInputs:
    """What blocks need beside features, the same for all of them.

    Attributes:
        source, target: [n_edges], of the main edges.
        reverse: [n_edges], the edge in the other direction.
        radial_atom, radial_out: [n_edges, Br], embedded radial basis for updates of atoms and for
            output blocks.
        edge_to_edge, atom_to_edge, edge_to_atom, quadruplets, pairs: of the interactions; None
            where there is none.
    """

    source: Tensor
    target: Tensor
    reverse: Tensor
    radial_atom: Tensor
    radial_out: Tensor
    edge_to_edge: EdgeTripletInputs
    atom_to_edge: EdgeTripletInputs | None
    edge_to_atom: AtomTripletInputs | None
    quadruplets: QuadrupletInputs | None
    pairs: PairMixing | None


class EdgeSum(nn.Module):
    """Edge features times radial filters, summed into their targets."""

    dense_rbf: Dense
    scale_sum: ScaleFactor

    def __init__(self, sizes: GemNetOCHyperparameters) -> None:
        super().__init__()
        self.dense_rbf = Dense(sizes.emb_size_rbf, sizes.emb_size_edge, activation=False)
        self.scale_sum = ScaleFactor()

    def sum_edges(self, m: Tensor, radial: Tensor, target: Tensor, n_atoms: int) -> Tensor:
        """[n_edges, M] and [n_edges, Br] to [n_atoms, M]."""
        sums = m.new_zeros(n_atoms, m.shape[1])
        for part in row_parts(len(m), m.shape[1], m, (self.dense_rbf,)):
            filtered = m[part] * self.dense_rbf(radial[part])
            sums = sums.index_add_(0, target[part], filtered.to(sums.dtype))
        scaled: Tensor = self.scale_sum(sums, lambda: (m, None))
        return scaled


class AtomUpdate(EdgeSum):
    """Edge features to features of atoms."""

    def __init__(self, sizes: GemNetOCHyperparameters) -> None:
        super().__init__(sizes)
        self.layers = mlp(sizes.emb_size_edge, sizes.emb_size_atom, sizes.num_atom)

    def forward(self, m: Tensor, inputs: BlockInputs, n_atoms: int) -> Tensor:
        """[n_edges, M] to [n_atoms, A]."""
        sums = self.sum_edges(m, inputs.radial_atom, inputs.target, n_atoms)
        return apply(self.layers, sums)


class InteractionBlock(nn.Module):
    """New features of atoms and edges from those of the block before."""

    def __init__(self, sizes: GemNetOCHyperparameters) -> None:
        super().__init__()
        atom, edge = sizes.emb_size_atom, sizes.emb_size_edge
        self.dense_ca = Dense(edge, edge)
        self.trip_interaction = EdgeTripletInteraction(sizes, edge)
        self.quad_interaction = QuadrupletInteraction(sizes) if sizes.quad_interaction else None
        self.atom_edge_interaction = (
            EdgeTripletInteraction(sizes, atom) if sizes.atom_edge_interaction else None
        )
        self.edge_atom_interaction = (
            AtomTripletInteraction(sizes) if sizes.edge_atom_interaction else None
        )
        self.atom_interaction = PairInteraction(sizes) if sizes.atom_interaction else None
        self.layers_before_skip = residuals(edge, sizes.num_before_skip)
        self.layers_after_skip = residuals(edge, sizes.num_after_skip)
        self.atom_emb_layers = residuals(atom, sizes.num_atom_emb_layers)
        self.atom_update = AtomUpdate(sizes)
        self.concat_layer = EdgeEmbedding(atom, edge, edge)
        self.residual_m = residuals(edge, sizes.num_concat)
        self.h = TapPoint()
        self.m = TapPoint()

    def forward(self, h: Tensor, m: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor]:
        """[n_atoms, A] and [n_edges, M] to the same."""
        interactions: list[EdgeTripletInteraction | QuadrupletInteraction] = []
        messages = []
        for interaction, features, its_inputs in (
            (self.trip_interaction, m, inputs.edge_to_edge),
            (self.quad_interaction, m, inputs.quadruplets),
            (self.atom_edge_interaction, h, inputs.atom_to_edge),
        ):
            if interaction is not None:
                interactions.append(interaction)
                messages.append(interaction(features, its_inputs))
        updates = [h]
        if self.edge_atom_interaction is not None:
            updates.append(self.edge_atom_interaction(m, inputs.edge_to_atom))
        if self.atom_interaction is not None:
            updates.append(self.atom_interaction(h, inputs.pairs))
        h = sum(updates[1:], updates[0]) * (1.0 / math.sqrt(len(updates)))

        def update_edges(m: Tensor, *messages: Tensor) -> tuple[Scaled]:
            x = self.dense_ca.extend(Scaled(m))
            n = len(interactions)
            for interaction, *both in zip(interactions, messages[:n], messages[n:], strict=True):
                x = interaction.update(x, *both)
            x = extend(self.layers_before_skip, x.times(1.0 / math.sqrt(n + 1)))
            return (extend(self.layers_after_skip, x.plus(m).times(INVERSE_SQRT_2)),)

        of_reverse = [message.index_select(0, inputs.reverse) for message in messages]
        (m,) = by_rows(update_edges, (m, *messages, *of_reverse), m.shape[1], (self,))
        h = apply(self.atom_emb_layers, h)
        h = (h + self.atom_update(m, inputs, len(h))) * INVERSE_SQRT_2
        atoms = self.concat_layer.atoms(h)

        def concatenate(m: Tensor, source: Tensor, target: Tensor) -> tuple[Scaled]:
            new = extend(self.residual_m, self.concat_layer.edges(m, source, target, atoms))
            return (new.plus(m).times(INVERSE_SQRT_2),)

        (m,) = by_rows(
            concatenate, (m, inputs.source, inputs.target), m.shape[1], (self.residual_m,)
        )
        return self.h(h), self.m(m)


class OutputBlock(EdgeSum):
    """Features for the energy and, with a force head, for forces."""

    def __init__(self, sizes: GemNetOCHyperparameters) -> None:
        super().__init__(sizes)
        atom, edge = sizes.emb_size_atom, sizes.emb_size_edge
        self.layers = mlp(edge, atom, sizes.num_atom)
        # One set of tensors under two names, as in the published state dicts.
        self.seq_energy_pre = self.layers
        self.seq_energy2 = (
            residuals(atom, sizes.num_output_afteratom) if sizes.num_output_afteratom else None
        )
        self.x_E = TapPoint()
        if sizes.direct_forces:
            self.scale_rbf_F = ScaleFactor()
            self.seq_forces = residuals(edge, sizes.num_atom)
            self.dense_rbf_F = Dense(sizes.emb_size_rbf, edge, activation=False)
            self.x_F = TapPoint()
        self.direct_forces = sizes.direct_forces

    def forward(self, h: Tensor, m: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor | None]:
        """x_E [n_atoms, A] and x_F [n_edges, M], or None without a force head."""
        sums = self.sum_edges(m, inputs.radial_out, inputs.target, len(h))
        energy = apply(self.layers, sums)
        if self.seq_energy2 is not None:
            energy = apply(self.seq_energy2, (energy + h) * INVERSE_SQRT_2)
        energy = self.x_E(energy)
        if not self.direct_forces:
            return energy, None

        def read_out(m: Tensor, radial: Tensor) -> tuple[Tensor]:
            y = extend(self.seq_forces, Scaled(m))
            weight = self.dense_rbf_F.weight * self.scale_rbf_F.factor
            filtered = y.values * linear(radial, weight, y.gain)
            self.scale_rbf_F.observe(filtered, lambda: (y.tensor(), None))
            return (filtered,)

        (forces,) = by_rows(read_out, (m, inputs.radial_out), m.shape[1], (self,))
        return energy, self.x_F(forces)
