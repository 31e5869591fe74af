"""The walk through GemNet-OC, its heads, its initial weights, and where its features are.

Paths for taps (k counts from 0; nb is num_blocks):

| feature | tap | shape |
|---|---|---|
| atoms before the interactions, h^0 | node, `atom_emb` | [n_atoms, A] |
| edges before the interactions, m^0 | edge, `edge_emb` | [n_edges, M] |
| atoms after block k + 1, h^(k+1) | node, `int_blocks.k.h` | [n_atoms, A] |
| edges after block k + 1, m^(k+1) | edge, `int_blocks.k.m` | [n_edges, M] |
| energy features of output block k = 0…nb, x_E^k | node, `out_blocks.k.x_E` | [n_atoms, A] |
| force features of output block k = 0…nb, x_F^k | edge, `out_blocks.k.x_F` | [n_edges, M] |
| all output blocks aggregated | node, `out_mlp_E.0`; edge, `out_mlp_F.0` | [·, A], [·, M] |
| before the last linear layer, X_E and X_F | node, `x_E`; edge, `x_F` | [·, A], [·, M] |

The last row are the model's own features "node" and "edge". Output block 0 reads the embeddings.
With forces as gradients there is no x_F, and the feature "edge" is m after the last block.

Invariant: state-dict names and outputs are those of the published implementation. Unlike other
models this one waits for the device, a few times per forward pass: how many edges the busiest atom
has sets the shapes of tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdcache.errors import ConfigError, did_you_mean
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.models.gemnet_oc.bases import BasisEmbedding
from kdcache.models.gemnet_oc.blocks import InteractionBlock, OutputBlock
from kdcache.models.gemnet_oc.hyperparameters import GemNetOCHyperparameters
from kdcache.models.gemnet_oc.inputs import Edges, SharedInputs
from kdcache.models.gemnet_oc.layers import (
    SILU_SCALE,
    Dense,
    EdgeEmbedding,
    ScaleFactor,
    TapPoint,
    extend,
    he_orthogonal,
    linear,
    residuals,
    silu,
)
from kdcache.models.gemnet_oc.rows import Scaled, by_rows
from kdcache.models.geometry import gradient_forces, sum_structures
from kdcache.models.interface import (
    ATOMIC_ENERGY,
    ENERGY,
    FORCES,
    Hyperparameters,
    feature_spec,
)
from kdcache.models.painn_layers import AtomEmbedding
from kdcache.structures import Batch, Graph, ModelOutput


class GemNetOC(SharedInputs):
    """GemNet-OC.

    Features: node, atoms' energy features before the last linear layer; edge, the edges' force
    features before theirs, or the last edge features where forces are gradients.

    Args:
        hyperparameters: sizes.
        generator: source of the initial weights; torch's global one without.

    Raises:
        ConfigError: scale factors of other modules than the model has.

    Source: Gasteiger et al. 2022, "GemNet-OC: Developing graph neural networks for large and
    diverse molecular simulation datasets", as published by the Open Catalyst Project.
    """

    name: ClassVar[str] = "gemnet-oc"
    hyperparameter_type: ClassVar[type[Hyperparameters]] = GemNetOCHyperparameters
    compiles: ClassVar[bool] = False  # how many triplets there are is found in the edges

    def __init__(
        self, hyperparameters: GemNetOCHyperparameters, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(hyperparameters)
        sizes = hyperparameters
        atom, edge, n_blocks = sizes.emb_size_atom, sizes.emb_size_edge, sizes.num_blocks
        self.conservative = not sizes.direct_forces
        self.atom_emb = AtomEmbedding(sizes.num_elements, atom)
        self.edge_emb = EdgeEmbedding(atom, sizes.num_radial, edge)
        self.int_blocks = nn.ModuleList([InteractionBlock(sizes) for _ in range(n_blocks)])
        self.out_blocks = nn.ModuleList([OutputBlock(sizes) for _ in range(n_blocks + 1)])
        self.out_mlp_E = OutputLayers(atom, n_blocks + 1, sizes.num_global_out_layers)
        self.out_energy = Dense(atom, 1, activation=False)
        self.x_E = TapPoint()
        if sizes.direct_forces:
            self.out_mlp_F = OutputLayers(edge, n_blocks + 1, sizes.num_global_out_layers)
            self.out_forces = Dense(edge, 1, activation=False)
            self.x_F = TapPoint()
        self.reset_parameters(generator)
        if sizes.scale_factors is not None:
            self.set_scale_factors(sizes.scale_factors)
        for weight, times in self.shared_embeddings():
            # The published optimisation: every block would pull at these weights in full.
            divide = partial(torch.mul, other=1.0 / times)
            weight.register_hook(divide)  # type: ignore[no-untyped-call]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights: He-orthogonal, embeddings uniform in ±√3."""
        for module in self.modules():
            if isinstance(module, nn.Linear | BasisEmbedding):
                he_orthogonal(module.weight, generator)
        if self.hyperparameters.output_init == "zeros":
            nn.init.zeros_(self.out_energy.weight)
            if not self.conservative:
                nn.init.zeros_(self.out_forces.weight)
        bound = math.sqrt(3.0)  # unit variance
        nn.init.uniform_(self.atom_emb.embeddings.weight, -bound, bound, generator=generator)

    def scale_modules(self) -> dict[str, ScaleFactor]:
        """The modules with a scale factor, by name; of several names of one, the first."""
        return {n: m for n, m in self.named_modules() if isinstance(m, ScaleFactor)}

    def set_scale_factors(self, factors: Mapping[str, float]) -> None:
        """Give every scale factor its fitted value.

        Args:
            factors: by module name, as `scale_modules` names them.

        Raises:
            ConfigError: a name missing or unknown.
        """
        modules = self.scale_modules()
        for name in factors:
            if name not in modules:
                hint = did_you_mean(name, modules)
                raise ConfigError(
                    f"there is a scale factor for {name}, which this gemnet-oc has not: {hint}. "
                    "Fit the factors for a model of these sizes."
                )
        for name, module in modules.items():
            if name not in factors:
                raise ConfigError(
                    f"the scale factors lack {name}: they belong to a model of other sizes. "
                    "Fit them for this one."
                )
            module.scale_factor.fill_(factors[name])

    @property
    def graph_rule(self) -> GraphRule:
        return self.hyperparameters.main_graph

    @property
    def further_graphs(self) -> Mapping[str, GraphRule]:
        """Beside the main graph: a2a between atoms, aeaint between atoms and edges, qint."""
        sizes = self.hyperparameters
        rules = {}
        if sizes.atom_interaction:
            rules["a2a"] = sizes.atom_graph
        if sizes.atom_edge_interaction or sizes.edge_atom_interaction:
            rules["aeaint"] = sizes.atom_edge_graph
        if sizes.quad_interaction:
            rules["qint"] = sizes.quad_graph
        return rules

    @property
    def max_atomic_number(self) -> int:
        return self.hyperparameters.num_elements

    def field_specs(self) -> tuple[FieldSpec, ...]:
        sizes = self.hyperparameters
        edge = FieldSpec("edge", "edge", (sizes.emb_size_edge,), codec="half")
        return (ENERGY, FORCES, ATOMIC_ENERGY, feature_spec("node", sizes.emb_size_atom), edge)

    def forward(self, batch: Batch) -> ModelOutput:
        """Energies, forces and features; the batch must hold `further_graphs`.

        Raises:
            DataError: a further graph is missing, or the main graph is not symmetric.
        """
        if self.conservative:
            return gradient_forces(self._compute, batch)
        return self._compute(batch)

    def _compute(self, batch: Batch) -> ModelOutput:
        main = Edges.of(batch, Graph(batch.edge_index, batch.edge_shift))
        radial = self.radial_basis(main.distance)
        inputs = self.block_inputs(batch, main, radial)
        h: Tensor = self.atom_emb(batch.atomic_numbers)
        m: Tensor = self.edge_emb(h, radial, main.source, main.target)
        energies, forces = [], []
        for k, out_block in enumerate(self.out_blocks):
            if k:
                h, m = self.int_blocks[k - 1](h, m, inputs)
            energy_features, force_features = out_block(h, m, inputs)
            energies.append(energy_features)
            forces.append(force_features)
        node = self.x_E(self.out_mlp_E(energies))
        edge = m if self.conservative else self.x_F(self.out_mlp_F(forces))
        # bfloat16 would leave three digits to what is compared with labels.
        with torch.autocast(node.device.type, enabled=False):
            atomic_energy = self.out_energy(node.to(radial.dtype)).squeeze(-1)
            if not self.hyperparameters.extensive:
                atomic_energy = atomic_energy / _atoms_per_structure(atomic_energy, batch)
            energy = sum_structures(atomic_energy, batch)
            if self.conservative:
                force = torch.zeros_like(batch.positions)  # replaced by the gradient
            else:
                pull = self.out_forces(edge.to(radial.dtype))
                if self.hyperparameters.forces_coupled:
                    pull = (pull + pull.index_select(0, inputs.reverse)) * 0.5
                force = torch.zeros_like(batch.positions)
                force = force.index_add(0, main.target, pull * main.vector)
        return ModelOutput(energy, force, atomic_energy, {"node": node, "edge": edge})


class OutputLayers(nn.ModuleList):
    """Features of all output blocks to one: a dense layer of all side by side, then residuals.

    Args:
        width: of each block's features and of the result.
        n_blocks: output blocks.
        n_residual: residual layers.
    """

    def __init__(self, width: int, n_blocks: int, n_residual: int) -> None:
        super().__init__([SideBySide(width, n_blocks), *residuals(width, n_residual)])

    def forward(self, blocks: list[Tensor]) -> Tensor:
        """[n, width] of each block to [n, width]."""

        def whole(*blocks: Tensor) -> tuple[Scaled]:
            first, *others = self
            return (extend(others, Scaled(first(blocks))),)

        (x,) = by_rows(whole, blocks, blocks[0].shape[1], (self,))
        return x


class SideBySide(Dense):
    """A dense layer of several tensors side by side, which are not copied together."""

    def __init__(self, width: int, n_parts: int) -> None:
        super().__init__(width * n_parts, width)

    def forward(self, parts: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """[n, width] each to [n, width]."""
        weights = torch.split(self.weight, parts[0].shape[1], dim=1)
        y = linear(parts[0], weights[0])
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            y = torch.addmm(y, part, weight.t())
        return Scaled(silu(y), SILU_SCALE).tensor()


def _atoms_per_structure(atomic: Tensor, batch: Batch) -> Tensor:
    """[n_atoms], how many atoms the structure of each has."""
    counts = sum_structures(torch.ones_like(atomic), batch)
    return counts.index_select(0, batch.structure_index)
