"""A model with its units: normalised outputs to eV and eV/Å, and reference energies on top.

Invariant: inside training all energies are relative to the references, which are large and would
eat the digits of float32; they are added in float64, at prediction only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdcache.errors import ConfigError, DataError
from kdcache.graphs import GraphRule
from kdcache.models.interface import Model
from kdcache.structures import MAX_ATOMIC_NUMBER, Batch, ModelOutput


class Normalizer(BaseModel):
    """How a model's numbers become energies and forces.

    Attributes:
        energy_scale: eV per unit of the model's energy.
        energy_shift: eV added to each structure's energy.
        force_scale: eV/Å per unit of the model's force. A conservative model stays the gradient of
            its energy only where it equals energy_scale.

    Source: the Open Catalyst normalizers, std and mean of target and grad_target.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    energy_scale: float = Field(default=1.0, gt=0.0)
    energy_shift: float = 0.0
    force_scale: float = Field(default=1.0, gt=0.0)

    def to_json(self) -> dict[str, float]:
        """Plain JSON values."""
        return self.model_dump()

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Normalizer:
        """From what `to_json` gave."""
        return cls.model_validate(dict(values))


class Potential(nn.Module):
    """A model that speaks eV and Å.

    Args:
        model: trained or to be trained.
        normalizer: its units.
        references: eV by atomic number; empty where energies are relative to nothing.
    """

    model: Model

    def __init__(
        self, model: Model, normalizer: Normalizer, references: Mapping[int, float]
    ) -> None:
        super().__init__()
        self.model = model
        self.normalizer = normalizer
        self.references = dict(references)
        # No buffer: a cast of the module to float32 must not reach it.
        self._reference_table = _reference_table(self.references)

    @property
    def graph_rule(self) -> GraphRule:
        """The neighbour list it expects in a batch."""
        return self.model.graph_rule

    @property
    def further_graphs(self) -> Mapping[str, GraphRule]:
        """Other neighbour lists it expects, by name."""
        return self.model.further_graphs

    def forward(self, batch: Batch) -> ModelOutput:
        """Energies in eV relative to the references, forces in eV/Å, features as the model's.

        Atomic energies share out the structure's shift evenly, so that they sum to the energy.
        """
        output: ModelOutput = self.model(batch)
        units = self.normalizer
        energy, atomic_energy, forces = output.energy, output.atomic_energy, output.forces
        if units.energy_scale != 1.0:
            energy = energy * units.energy_scale
            atomic_energy = atomic_energy * units.energy_scale
        if units.energy_shift != 0.0:
            energy = energy + units.energy_shift
            ones = torch.ones_like(atomic_energy)
            n_atoms = torch.zeros_like(energy).index_add(0, batch.structure_index, ones)
            share = units.energy_shift / n_atoms
            atomic_energy = atomic_energy + share.index_select(0, batch.structure_index)
        if units.force_scale != 1.0:
            forces = forces * units.force_scale
        return ModelOutput(energy, forces, atomic_energy, output.features)

    def predict(
        self, batch: Batch, compute: Callable[[Batch], ModelOutput] | None = None
    ) -> ModelOutput:
        """Total energies and atomic energies in float64 with the references, forces in eV/Å.

        Without a graph, also where forces are gradients.

        Args:
            batch: edges by `graph_rule`.
            compute: what computes in its place, a compiled form of it.

        Raises:
            DataError: an element without a reference or without an embedding.
        """
        self.check_elements(batch.atomic_numbers)
        with torch.no_grad():
            output: ModelOutput = (compute or self)(batch)
            table = self._reference_table.to(batch.atomic_numbers.device)
            reference = table.index_select(0, batch.atomic_numbers)
            total = torch.zeros_like(output.energy, dtype=torch.float64)
            total = total.index_add(0, batch.structure_index, reference)
            return replace(
                output,
                energy=output.energy.double() + total,
                atomic_energy=output.atomic_energy.double() + reference,
            )

    def check_elements(self, atomic_numbers: Tensor) -> None:
        """Refuse elements that the model or the references do not know.

        Args:
            atomic_numbers: [n_atoms].

        Raises:
            DataError: naming the first.
        """
        heaviest = int(atomic_numbers.max())
        if heaviest > self.model.max_atomic_number:
            raise DataError(
                f"a structure has atomic number {heaviest}, and {self.model.name} has embeddings "
                f"up to {self.model.max_atomic_number}. Use a model made for these elements."
            )
        reference = self._reference_table.to(atomic_numbers.device).index_select(0, atomic_numbers)
        missing = atomic_numbers[reference.isnan()]
        if len(missing):
            raise DataError(
                f"a structure has atomic number {int(missing[0])}, and the model has reference "
                f"energies for {sorted(self.references)} only: its energy would be off by that "
                "atom's. Use a model trained with this element."
            )


def _reference_table(references: Mapping[int, float]) -> Tensor:
    """[119] float64 eV by atomic number; NaN where there is none, or zeros without any."""
    absent = float("nan") if references else 0.0
    table = torch.full((MAX_ATOMIC_NUMBER + 1,), absent, dtype=torch.float64)
    for number, energy in references.items():
        if not 1 <= number <= MAX_ATOMIC_NUMBER:
            raise ConfigError(
                f"references name atomic number {number}; elements run from 1 to "
                f"{MAX_ATOMIC_NUMBER}."
            )
        table[number] = energy
    return table
