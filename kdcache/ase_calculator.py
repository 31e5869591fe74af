"""A trained model as an ASE calculator.

Owns the neighbour list of one structure at a time and the units (already ASE's eV and Å).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from kdcache.checkpoint import load_potential
from kdcache.errors import DataError
from kdcache.models.potential import Potential
from kdcache.models.traced import TracedModel
from kdcache.stream.window import collate
from kdcache.structures import Structure, check_structure


class PotentialCalculator(Calculator):
    """Energy, forces and atomic energies of a potential.

    Args:
        potential: in eval mode, on the device to compute on.
        tags: [n_atoms] Open Catalyst tags of the atoms it will be given; None counts all as 2.
        compile: with torch.compile, at the first calculation.

    Raises:
        ConfigError: a model that cannot be compiled is to be.
    """

    def __init__(
        self,
        potential: Potential,
        *,
        tags: npt.NDArray[np.uint8] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._compute = TracedModel(potential, potential.model) if compile else potential
        self.implemented_properties = ["energy", "free_energy", "forces", "energies"]
        self.potential = potential
        self.tags = tags

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Compute all properties for `atoms` (eV, eV/Å); see ASE's Calculator.

        Raises:
            DataError: no atoms, positions that are not finite, periodic axes without a cell, or an
                element that the model does not know.
        """
        super().calculate(atoms, properties, system_changes)  # type: ignore[no-untyped-call]
        current = self.atoms
        assert isinstance(current, Atoms)
        structure = Structure(
            structure_id="atoms",
            atomic_numbers=np.asarray(current.numbers, np.int64),
            positions=np.asarray(current.positions, np.float64),
            cell=np.asarray(current.cell.array, np.float64),
            pbc=np.asarray(current.pbc, np.bool_),
            tags=self.tags,
        )
        if not structure.n_atoms:
            raise DataError("The Atoms object has no atoms: there is nothing to compute.")
        check_structure(structure, "The Atoms object", unlabelled=True)
        parameter = next(self.potential.parameters())
        dtype = np.float64 if parameter.dtype == torch.float64 else np.float32
        potential = self.potential
        batch = collate([structure], potential.graph_rule, dtype, further=potential.further_graphs)
        output = potential.predict(batch.to(parameter.device), self._compute)
        energy = float(output.energy[0])
        self.results: dict[str, Any] = {
            "energy": energy,
            "free_energy": energy,
            "forces": output.forces.detach().cpu().double().numpy(),
            "energies": output.atomic_energy.detach().cpu().double().numpy(),
        }


def calculator(
    run: str | Path, *, device: str = "cpu", compile: bool = False
) -> PotentialCalculator:
    """An ASE calculator from a trained run.

    Args:
        run: directory that `kdcache train-student` wrote.
        device: torch device.
        compile: with torch.compile (PaiNN and SchNet). The first calculation then takes up to a
            minute, a few seconds once torch has cached it; the others are several times faster for
            molecules. Needs a C++ compiler.

    Raises:
        TrainingError: no model there, or a damaged one.
        ConfigError: a model that cannot be compiled is to be.

    Example:
        >>> atoms.calc = kdcache.calculator("student")  # doctest: +SKIP
    """
    return PotentialCalculator(load_potential(run, device=device), compile=compile)
