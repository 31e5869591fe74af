"""Structures in which atom k of structure s carries (s, k), so that any shift by one shows."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from kdcache.structures import Structure

# Sizes with one atom among them, and no two neighbours alike.
SIZES = (3, 1, 5, 2, 4)
ELEMENTS = (1, 6, 7, 8, 29)


def numbered_structure(s: int, n_atoms: int | None = None, *, periodic: bool = True) -> Structure:
    """Positions (s, k, s + k/16), forces (-s, k, 0.5): exact in binary and in eight decimals."""
    n_atoms = SIZES[s % len(SIZES)] if n_atoms is None else n_atoms
    k = np.arange(n_atoms, dtype=np.float64)
    positions = np.stack([np.full(n_atoms, float(s)), k, s + k / 16], axis=1)
    forces = np.stack([np.full(n_atoms, -float(s)), k, np.full(n_atoms, 0.5)], axis=1)
    flags = [True, True, s % 2 == 0] if periodic else [False] * 3
    cell = np.array([[10.0 + s, 0.5, 0.0], [0.0, 11.0, 0.25], [0.0, 0.0, 12.0]])
    return Structure(
        structure_id=f"structure-{s}",
        atomic_numbers=np.array([ELEMENTS[(s + i) % len(ELEMENTS)] for i in range(n_atoms)]),
        positions=positions,
        cell=cell if periodic else np.zeros((3, 3)),
        pbc=np.array(flags),
        energy=-100.0 * s - n_atoms,
        forces=forces,
    )


def as_atoms(structure: Structure, **info: object) -> Atoms:
    """The structure as ASE holds it, labels in a calculator."""
    atoms = Atoms(
        structure.atomic_numbers,
        structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
        info=info,
    )
    atoms.calc = SinglePointCalculator(atoms, energy=structure.energy, forces=structure.forces)
    return atoms


def assert_same(found: Structure, expected: Structure) -> None:
    """Everything but the id, to the last bit."""
    np.testing.assert_array_equal(found.atomic_numbers, expected.atomic_numbers)
    np.testing.assert_array_equal(found.positions, expected.positions)
    np.testing.assert_array_equal(found.cell, expected.cell)
    np.testing.assert_array_equal(found.pbc, expected.pbc)
    assert found.energy == expected.energy
    if expected.forces is None:
        assert found.forces is None
    else:
        np.testing.assert_array_equal(found.forces, expected.forces)
