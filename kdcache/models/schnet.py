"""SchNet: torch-geometric's layers on our own graph, forces by gradient.

Owns the walk through the layers, the sum over neighbours and the initial weights; the layers and
what they are called are torch-geometric's.
Invariant: state-dict names and outputs are those of the published implementation, whose filter
networks appear under two names (`interactions.k.mlp` and `interactions.k.conv.nn`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.models.geometry import edge_vectors, gradient_forces, sum_structures
from kdcache.models.interface import (
    ATOMIC_ENERGY,
    ENERGY,
    FORCES,
    Hyperparameters,
    Model,
    feature_spec,
)
from kdcache.models.pieces import edge_pieces
from kdcache.models.radial import SMALLEST_EXPONENT
from kdcache.structures import Batch, ModelOutput

with warnings.catch_warnings():
    # torch-geometric compiles with torch.jit on import, which torch has deprecated.
    warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
    from torch_geometric.nn.models.schnet import (
        CFConv,
        GaussianSmearing,
        InteractionBlock,
        ShiftedSoftplus,
    )

# Row 0 stands for no atom, as in torch-geometric.
EMBEDDING_ROWS = 100


class SchNetHyperparameters(Hyperparameters):
    """Sizes of a SchNet. Defaults suit small molecules and materials.

    Attributes:
        hidden_channels: width of the atoms' features.
        num_filters: width of the continuous filters.
        num_interactions: interaction blocks.
        num_gaussians: Gaussians that a distance is expanded in, from 0 to cutoff.
        cutoff: Å.
        max_neighbors: nearest neighbours kept per atom; None keeps all. Published periodic models
            use 50. A limit makes energies jump where a neighbour leaves the list.
    """

    hidden_channels: int = Field(default=128, ge=2, le=8192)
    num_filters: int = Field(default=128, ge=1, le=8192)
    num_interactions: int = Field(default=4, ge=1, le=64)
    num_gaussians: int = Field(default=50, ge=2, le=4096)
    cutoff: float = Field(default=6.0, gt=0.0, le=100.0)
    max_neighbors: int | None = Field(default=None, ge=1)


class DistanceExpansion(GaussianSmearing):  # type: ignore[misc]  # torch-geometric is not typed
    """torch-geometric's Gaussians of a distance, none so small that it slows what follows."""

    def forward(self, distance: Tensor) -> Tensor:
        """[n_edges] Å to [n_edges, num_gaussians]."""
        difference = distance.unsqueeze(-1) - self.offset
        exponent: Tensor = self.coeff * (difference * difference)
        return torch.exp(exponent.clamp(min=SMALLEST_EXPONENT))


class EdgeInputs(NamedTuple):
    """What every interaction needs of a piece of the edges, computed once per forward pass.

    Attributes:
        source, target: [n_edges] int64.
        envelope: [n_edges, 1], 1 at an atom and 0 at the cutoff.
        expanded: [n_edges, num_gaussians].
    """

    source: Tensor
    target: Tensor
    envelope: Tensor
    expanded: Tensor


class Convolution(CFConv):  # type: ignore[misc]  # torch-geometric is not typed
    """Sum over neighbours of their features times a filter of the distance."""

    def forward(self, x: Tensor, edges: Sequence[EdgeInputs]) -> Tensor:
        """[n_atoms, hidden_channels], of features of that shape and the edges in pieces."""
        x = self.lin1(x)
        # In the wider type: bfloat16 would round every addition.
        wider = torch.promote_types(x.dtype, edges[0].envelope.dtype)
        total = x.new_zeros(x.shape, dtype=wider)
        for piece in edges:
            filters = self.nn(piece.expanded) * piece.envelope
            total.index_add_(0, piece.target, x.index_select(0, piece.source) * filters)
        out: Tensor = self.lin2(total)
        return out


class Interaction(InteractionBlock):  # type: ignore[misc]
    """A convolution and two layers on atoms, which give an increment of their features."""

    def __init__(
        self, hidden_channels: int, num_gaussians: int, num_filters: int, cutoff: float
    ) -> None:
        super().__init__(hidden_channels, num_gaussians, num_filters, cutoff)
        self.conv = Convolution(hidden_channels, hidden_channels, num_filters, self.mlp, cutoff)

    def forward(self, x: Tensor, edges: Sequence[EdgeInputs]) -> Tensor:
        """[n_atoms, hidden_channels], of features of that shape and the edges in pieces."""
        out: Tensor = self.lin(self.act(self.conv(x, edges)))
        return out


class SchNet(Model):
    """SchNet.

    Features: node, atoms' features after the last interaction.

    Args:
        hyperparameters: sizes.
        generator: source of the initial weights; torch's global one without.

    Source: Schütt et al. 2017, "SchNet: A continuous-filter convolutional neural network for
    modeling quantum interactions".
    """

    name: ClassVar[str] = "schnet"
    hyperparameter_type: ClassVar[type[Hyperparameters]] = SchNetHyperparameters
    hyperparameters: SchNetHyperparameters

    def __init__(
        self, hyperparameters: SchNetHyperparameters, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(hyperparameters)
        sizes = hyperparameters
        self.conservative = True
        self.embedding = nn.Embedding(EMBEDDING_ROWS, sizes.hidden_channels, padding_idx=0)
        self.distance_expansion = DistanceExpansion(0.0, sizes.cutoff, sizes.num_gaussians)
        # In double precision: torch-geometric takes the spacing from float32 centres.
        self.distance_expansion.coeff = -0.5 * ((sizes.num_gaussians - 1) / sizes.cutoff) ** 2
        self.interactions = nn.ModuleList(
            Interaction(sizes.hidden_channels, sizes.num_gaussians, sizes.num_filters, sizes.cutoff)
            for _ in range(sizes.num_interactions)
        )
        # What an interaction returns is an increment; here the features after it can be tapped.
        self.states = nn.ModuleList(nn.Identity() for _ in range(sizes.num_interactions))
        self.lin1 = nn.Linear(sizes.hidden_channels, sizes.hidden_channels // 2)
        self.act = ShiftedSoftplus()
        self.lin2 = nn.Linear(sizes.hidden_channels // 2, 1)
        for module in self.modules():
            if isinstance(module, ShiftedSoftplus):
                module.shift = math.log(2.0)  # likewise in double precision
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights: Xavier-uniform, embeddings normal, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embedding.weight, generator=generator)
        with torch.no_grad():
            self.embedding.weight[0].zero_()

    @property
    def graph_rule(self) -> GraphRule:
        return GraphRule(self.hyperparameters.cutoff, self.hyperparameters.max_neighbors)

    @property
    def max_atomic_number(self) -> int:
        return EMBEDDING_ROWS - 1

    def field_specs(self) -> tuple[FieldSpec, ...]:
        node = feature_spec("node", self.hyperparameters.hidden_channels)
        return (ENERGY, FORCES, ATOMIC_ENERGY, node)

    def forward(self, batch: Batch) -> ModelOutput:
        return gradient_forces(self._compute, batch)

    def _compute(self, batch: Batch) -> ModelOutput:
        edges = self._edge_inputs(batch)
        x: Tensor = self.embedding(batch.atomic_numbers)
        for interaction, state in zip(self.interactions, self.states, strict=True):
            x = state(x + interaction(x, edges))
        # bfloat16 would leave three digits to what is compared with labels.
        with torch.autocast(x.device.type, enabled=False):
            atomic_energy = self.lin2(self.act(self.lin1(x))).squeeze(-1)
            energy = sum_structures(atomic_energy, batch)
        forces = torch.zeros_like(batch.positions)  # replaced by the gradient
        return ModelOutput(energy, forces, atomic_energy, {"node": x})

    def _edge_inputs(self, batch: Batch) -> list[EdgeInputs]:
        source, target = batch.edge_index.unbind(0)
        width = max(self.hyperparameters.num_filters, self.hyperparameters.num_gaussians)
        pieces = edge_pieces(width, batch.n_atoms, source, target, edge_vectors(batch))
        return [self._edge_piece(*piece) for piece in pieces]

    def _edge_piece(self, source: Tensor, target: Tensor, difference: Tensor) -> EdgeInputs:
        distance = torch.linalg.vector_norm(difference, dim=-1)
        envelope = 0.5 * (torch.cos(distance * (math.pi / self.hyperparameters.cutoff)) + 1.0)
        return EdgeInputs(source, target, envelope.unsqueeze(-1), self.distance_expansion(distance))
