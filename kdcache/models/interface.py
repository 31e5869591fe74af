"""What a model is: hyperparameters, a graph rule, named outputs, and a forward pass over a batch.

Units, normalisation and references belong to `kdcache.models.potential`.
Invariant: a model never searches neighbours and never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.structures import Batch, ModelOutput

ENERGY = FieldSpec("energy", "structure", unit="eV")
FORCES = FieldSpec("forces", "atom", (3,), unit="eV/Å", symmetry="vector")
ATOMIC_ENERGY = FieldSpec("atomic_energy", "atom", unit="eV")


class Hyperparameters(BaseModel):
    """Base of a model's hyperparameters: frozen, unknown names refused, plain JSON values."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(nn.Module):
    """Base of all models.

    A subclass sets `name` and `hyperparameter_type`, and takes hyperparameters and a generator of
    initial weights. Its `state_dict` names are part of its contract: published weights load by
    them.

    Attributes:
        name: its name in the entry-point group kdcache.models.
        hyperparameter_type: the class of its hyperparameters.
        hyperparameters: its own.
        compiles: its operations depend on the sizes of a batch, not on values in it, so that
            `kdcache.models.traced` can compile it.
        conservative: forces are the energy's negative gradient, so a forward pass needs autograd.
    """

    name: ClassVar[str]
    hyperparameter_type: ClassVar[type[Hyperparameters]]
    compiles: ClassVar[bool] = True
    hyperparameters: Hyperparameters
    conservative: bool

    def __init__(
        self, hyperparameters: Hyperparameters, generator: torch.Generator | None = None
    ) -> None:
        del generator
        super().__init__()
        self.hyperparameters = hyperparameters
        self.conservative = False

    @property
    def graph_rule(self) -> GraphRule:
        """The neighbour list it expects in a batch; edge features have its edges as rows."""
        raise NotImplementedError

    @property
    def further_graphs(self) -> Mapping[str, GraphRule]:
        """Other neighbour lists it expects, in `Batch.graphs` by these names."""
        return {}

    @property
    def max_atomic_number(self) -> int:
        """The heaviest element it has an embedding for."""
        raise NotImplementedError

    def field_specs(self) -> tuple[FieldSpec, ...]:
        """Everything it returns: energy, forces, atomic_energy and its features."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> ModelOutput:
        """Energies, forces and features.

        Args:
            batch: edges by `graph_rule`; floating tensors in the dtype of the weights.

        Returns:
            Energies and forces in the model's own units, which training normalised; features by
            the names of `field_specs`.
        """
        raise NotImplementedError


def feature_spec(name: str, channels: int, *, vector: bool = False) -> FieldSpec:
    """The specification of a feature with `channels` per atom, vectors as [3, channels]."""
    shape = (3, channels) if vector else (channels,)
    return FieldSpec(
        name, "atom", shape, symmetry="vector" if vector else "invariant", codec="half"
    )
