"""A model with edge features, small enough to read: what stands on an edge makes everything else.

It is another package's, as far as kdcache knows: its name is found by an entry point.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.models.edges import edge_to_node, edge_to_vector
from kdcache.models.geometry import edge_vectors, sum_structures
from kdcache.models.interface import (
    ATOMIC_ENERGY,
    ENERGY,
    FORCES,
    Hyperparameters,
    Model,
    feature_spec,
)
from kdcache.structures import Batch, ModelOutput

EDGENET = {"name": "edgenet", "channels": 6, "cutoff": 3.0}


class EdgeNetHyperparameters(Hyperparameters):
    channels: int = 6
    cutoff: float = 3.0
    max_neighbors: int | None = None


class EdgeNet(Model):
    """Features "edge" of both atoms and their distance, "node" their sum, direct forces."""

    name: ClassVar[str] = "edgenet"
    hyperparameter_type: ClassVar[type[Hyperparameters]] = EdgeNetHyperparameters
    hyperparameters: EdgeNetHyperparameters

    def __init__(
        self, hyperparameters: EdgeNetHyperparameters, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(hyperparameters)
        channels = hyperparameters.channels
        self.embedding = nn.Embedding(101, channels)
        self.message = nn.Sequential(
            nn.Linear(2 * channels + 1, channels), nn.SiLU(), nn.Linear(channels, channels)
        )
        self.energy = nn.Linear(channels, 1)
        self.force = nn.Linear(channels, 1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)

    @property
    def graph_rule(self) -> GraphRule:
        limit = self.hyperparameters.max_neighbors
        return GraphRule(self.hyperparameters.cutoff, limit, limit is not None)

    @property
    def max_atomic_number(self) -> int:
        return 100

    def field_specs(self) -> tuple[FieldSpec, ...]:
        channels = self.hyperparameters.channels
        edge = FieldSpec("edge", "edge", (channels,), codec="half")
        return (ENERGY, FORCES, ATOMIC_ENERGY, feature_spec("node", channels), edge)

    def forward(self, batch: Batch) -> ModelOutput:
        x: Tensor = self.embedding(batch.atomic_numbers)
        source, target = batch.edge_index
        distance = torch.linalg.vector_norm(edge_vectors(batch), dim=1, keepdim=True)
        edge = self.message(torch.cat([x[source], x[target], distance], dim=1))
        node = x + edge_to_node(edge, batch)
        atomic_energy = self.energy(node).squeeze(-1)
        return ModelOutput(
            energy=sum_structures(atomic_energy, batch),
            forces=edge_to_vector(self.force(edge), batch).squeeze(-1),
            atomic_energy=atomic_energy,
            features={"node": node, "edge": edge},
        )


def install(directory: Path) -> Path:
    """What an installer would leave of the package that has this model; goes onto sys.path."""
    metadata = directory / "edgenet-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: edgenet\nVersion: 1.0\n")
    entry = "[kdcache.models]\nedgenet = tests.edge_model:EdgeNet\n"
    (metadata / "entry_points.txt").write_text(entry)
    return directory
