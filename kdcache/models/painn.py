"""PaiNN: equivariant messages over a radius graph, in the Open Catalyst variant.

Owns the architecture and its initial weights; layers are in `painn_layers`, bases in `radial`.
Invariant: state-dict names and outputs are those of the published implementation.
"""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
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
from kdcache.models.painn_layers import (
    AtomEmbedding,
    EdgeInputs,
    ForceHead,
    Message,
    ScaledSiLU,
    ScaleFactor,
    Update,
)
from kdcache.models.pieces import edge_pieces
from kdcache.models.radial import EnvelopeName, RadialBasis, RadialName
from kdcache.structures import Batch, ModelOutput


class PaiNNHyperparameters(Hyperparameters):
    """Sizes and choices of a PaiNN. Defaults suit small molecules and materials.

    Attributes:
        hidden_channels: H, width of scalars and of vectors; even.
        num_layers: message and update layers.
        num_rbf: radial functions.
        cutoff: Å, how far an atom sees in one layer.
        max_neighbors: nearest neighbours kept per atom, made symmetric; None keeps all. Published
            models use 50. A limit makes energies jump where a neighbour leaves the list.
        rbf: radial basis.
        envelope: how the basis goes to zero at the cutoff.
        envelope_exponent: of the polynomial envelope.
        direct_forces: forces from a head of their own; False takes the energy's gradient, which
            costs about twice the time and conserves energy in dynamics. The filters' bias then
            fades with the envelope: in the published model, made for direct forces, it stays, and
            the energy jumps where a pair crosses the cutoff.
        num_elements: elements from hydrogen on that have an embedding. Published models: 83.
    """

    hidden_channels: int = Field(default=128, ge=2, le=8192, multiple_of=2)
    num_layers: int = Field(default=3, ge=1, le=64)
    num_rbf: int = Field(default=32, ge=2, le=4096)
    cutoff: float = Field(default=5.0, gt=0.0, le=100.0)
    max_neighbors: int | None = Field(default=None, ge=1)
    rbf: RadialName = "gaussian"
    envelope: EnvelopeName = "polynomial"
    envelope_exponent: int = Field(default=5, ge=3, le=32)
    direct_forces: bool = True
    num_elements: int = Field(default=100, ge=1, le=118)

    @model_validator(mode="after")
    def _bernstein_is_finite(self) -> Self:
        if self.rbf == "bernstein" and self.num_rbf > 128:
            # The binomial coefficients leave float32 at 130.
            raise ValueError(f"num_rbf is {self.num_rbf}, and bernstein takes at most 128")
        return self


class PaiNN(Model):
    """PaiNN.

    Features: node, scalars after the last update; vector, vectors after the last update.

    Args:
        hyperparameters: sizes.
        generator: source of the initial weights; torch's global one without.

    Source: Schütt et al. 2021, "Equivariant message passing for the prediction of tensorial
    properties and molecular spectra", as varied by the Open Catalyst Project.
    """

    name: ClassVar[str] = "painn"
    hyperparameter_type: ClassVar[type[Hyperparameters]] = PaiNNHyperparameters
    hyperparameters: PaiNNHyperparameters

    def __init__(
        self, hyperparameters: PaiNNHyperparameters, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(hyperparameters)
        sizes = hyperparameters
        channels = sizes.hidden_channels
        self.conservative = not sizes.direct_forces
        self.atom_emb = AtomEmbedding(sizes.num_elements, channels)
        self.radial_basis = RadialBasis(
            sizes.num_rbf, sizes.cutoff, sizes.rbf, sizes.envelope, sizes.envelope_exponent
        )
        layers = range(sizes.num_layers)
        self.message_layers = nn.ModuleList([Message(channels, sizes.num_rbf) for _ in layers])
        self.update_layers = nn.ModuleList([Update(channels) for _ in layers])
        for i in layers:
            self.add_module(f"upd_out_scalar_scale_{i}", ScaleFactor())
        self.out_energy = nn.Sequential(
            nn.Linear(channels, channels // 2), ScaledSiLU(), nn.Linear(channels // 2, 1)
        )
        self.out_forces = ForceHead(channels) if sizes.direct_forces else None
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights: Xavier-uniform, embeddings uniform in ±√3, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        bound = math.sqrt(3.0)  # unit variance
        nn.init.uniform_(self.atom_emb.embeddings.weight, -bound, bound, generator=generator)

    @property
    def graph_rule(self) -> GraphRule:
        sizes = self.hyperparameters
        return GraphRule(sizes.cutoff, sizes.max_neighbors, sizes.max_neighbors is not None)

    @property
    def max_atomic_number(self) -> int:
        return self.hyperparameters.num_elements

    def field_specs(self) -> tuple[FieldSpec, ...]:
        channels = self.hyperparameters.hidden_channels
        return (
            ENERGY,
            FORCES,
            ATOMIC_ENERGY,
            feature_spec("node", channels),
            feature_spec("vector", channels, vector=True),
        )

    def forward(self, batch: Batch) -> ModelOutput:
        if self.conservative:
            return gradient_forces(self._compute, batch)
        return self._compute(batch)

    def _compute(self, batch: Batch) -> ModelOutput:
        edges = self._edge_inputs(batch)
        x: Tensor = self.atom_emb(batch.atomic_numbers)
        vector: Tensor | None = None
        for i, (message, update) in enumerate(
            zip(self.message_layers, self.update_layers, strict=True)
        ):
            x, vector = message(x, vector, edges)
            x, vector = update(x, vector)
            x = getattr(self, f"upd_out_scalar_scale_{i}")(x)
        assert vector is not None  # num_layers is at least 1
        # bfloat16 would leave three digits to what is compared with labels.
        with torch.autocast(x.device.type, enabled=False):
            atomic_energy = self.out_energy(x).squeeze(-1)
            energy = sum_structures(atomic_energy, batch)
            if self.out_forces is None:
                forces = torch.zeros_like(batch.positions)  # replaced by the gradient
            else:
                forces = self.out_forces(x, vector)
        return ModelOutput(energy, forces, atomic_energy, {"node": x, "vector": vector})

    def _edge_inputs(self, batch: Batch) -> list[EdgeInputs]:
        source, target = batch.edge_index.unbind(0)
        width = 3 * self.hyperparameters.hidden_channels
        pieces = edge_pieces(width, batch.n_atoms, source, target, edge_vectors(batch))
        return [self._edge_piece(*piece) for piece in pieces]

    def _edge_piece(self, source: Tensor, target: Tensor, difference: Tensor) -> EdgeInputs:
        distance = torch.linalg.vector_norm(difference, dim=-1)
        norm = distance * math.sqrt(self.hyperparameters.hidden_channels)
        direction = (difference / norm.unsqueeze(-1)).t().contiguous().unsqueeze(-1)
        envelope: Tensor | None = None
        if self.conservative:
            envelope = self.radial_basis.envelope_at(distance).unsqueeze(-1)
        return EdgeInputs(source, target, direction, self.radial_basis(distance), envelope)
