"""The student inside ASE: the same forces as in evaluation, and energy that is conserved."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units
from ase.md.verlet import VelocityVerlet

import kdcache
from kdcache.ase_calculator import PotentialCalculator
from kdcache.checkpoint import load_potential, save_potential
from kdcache.errors import DataError, TrainingError
from kdcache.evaluate import predict_structures
from kdcache.train import train_student
from tests.chain import PAINN, REFERENCES, SCHNET, make_potential, make_store, structures, student
from tests.readers.identity import as_atoms

GRADIENT = {**PAINN, "direct_forces": False}


@pytest.mark.parametrize("model", [PAINN, GRADIENT, SCHNET], ids=["direct", "gradient", "schnet"])
def test_energies_and_forces_are_those_of_evaluation(
    model: dict[str, object], tmp_path: Path
) -> None:
    save_potential(tmp_path, make_potential(model))
    found = structures(24)
    expected = predict_structures(load_potential(tmp_path), found)
    ends = expected.n_atoms.cumsum()
    calculator = kdcache.calculator(tmp_path)
    for s, structure in enumerate(found):
        atoms = as_atoms(structure)
        atoms.calc = calculator
        here = slice(ends[s] - structure.n_atoms, ends[s])
        np.testing.assert_allclose(atoms.get_forces(), expected.forces[here], atol=2e-5)
        references = sum(REFERENCES[int(n)] + 0.125 for n in structure.atomic_numbers)
        energy = atoms.get_potential_energy()
        assert energy == pytest.approx(expected.energy[s] + references, abs=2e-5)
        assert atoms.get_potential_energies().sum() == pytest.approx(energy, abs=1e-5)


@pytest.mark.parametrize("model", [GRADIENT, SCHNET], ids=["painn", "schnet"])
def test_forces_are_the_finite_differences_of_the_energy(model: dict[str, object]) -> None:
    calculator = PotentialCalculator(make_potential(model, dtype=torch.float64))
    moved = 0
    for structure in structures(12):
        atoms = as_atoms(structure)
        atoms.calc = calculator
        forces = atoms.get_forces()
        positions = atoms.positions.copy()
        for k, axis in [(0, 0), (structure.n_atoms - 1, 2)]:
            energies = []
            for step in (1e-4, -1e-4):
                atoms.positions = positions
                atoms.positions[k, axis] += step
                energies.append(atoms.get_potential_energy())
            expected = -(energies[0] - energies[1]) / 2e-4
            assert forces[k, axis] == pytest.approx(expected, abs=2e-6)
            moved += abs(expected) > 1e-2
    assert moved > 8


def test_a_single_atom_has_no_forces_and_feels_no_shift() -> None:
    calculator = PotentialCalculator(make_potential(GRADIENT, dtype=torch.float64))
    single = next(s for s in structures(12) if s.n_atoms == 1)
    atoms = as_atoms(single)
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    assert np.abs(atoms.get_forces()).max() < 1e-12
    atoms.positions += [0.3, -5.0, 40.0]
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-9)


def spread_of_energies(run: Path, n_atoms: int, timestep: float, steps: int) -> tuple[float, float]:
    """Largest minus smallest potential and total energy of a run from rest, eV."""
    atoms = as_atoms(next(s for s in structures(12) if s.n_atoms == n_atoms))
    atoms.calc = kdcache.calculator(run)
    dynamics = VelocityVerlet(atoms, timestep=timestep * units.fs)
    potential, total = [], []
    for _ in range(steps):
        potential.append(atoms.get_potential_energy())
        total.append(atoms.get_total_energy())
        dynamics.run(1)
    return float(np.ptp(potential)), float(np.ptp(total))


# Six atoms fly apart, and most of their pairs cross the cutoff, where an energy that does not go
# smoothly to its value without the pair would jump.
@pytest.mark.parametrize(
    ("model", "n_atoms", "femtoseconds"),
    [(GRADIENT, 6, 20.0), (SCHNET, 6, 20.0)],
    ids=["painn", "schnet"],
)
def test_energy_is_conserved_in_dynamics(
    model: dict[str, object], n_atoms: int, femtoseconds: float, tmp_path: Path
) -> None:
    """Of trained students: an untrained surface is flat, and would conserve anything."""
    store = make_store(tmp_path)
    settings = ("training.max_steps=60", "training.eval_every=60", "optimizer.lr=1e-2")
    config = student(*settings, "training.precision=float64", model=model)
    train_student(store.path, tmp_path / "run", config)
    errors = []
    for timestep in (0.2, 0.1):
        steps = round(femtoseconds / timestep) + 1
        exchanged, lost = spread_of_energies(tmp_path / "run", n_atoms, timestep, steps)
        assert exchanged > 0.05
        assert lost < 1e-3 * exchanged
        errors.append(lost)
    # What is left is velocity Verlet's own error, of second order. A wrong force would not shrink.
    assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.05)


def test_moved_atoms_are_computed_again_and_others_are_not() -> None:
    calculator = PotentialCalculator(make_potential())
    atoms = as_atoms(structures(1)[0])
    atoms.calc = calculator
    before = atoms.get_forces()
    results = calculator.results
    atoms.get_potential_energy()
    assert calculator.results is results
    atoms.positions[0] += 0.1
    assert not np.allclose(atoms.get_forces(), before)


def test_what_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    atoms = as_atoms(structures(1)[0])
    atoms.numbers[0] = 79
    atoms.calc = PotentialCalculator(make_potential())
    with pytest.raises(DataError, match="atomic number 79"):
        atoms.get_forces()
    with pytest.raises(TrainingError, match="holds no trained model"):
        kdcache.calculator(tmp_path)


def test_atoms_that_cannot_be_computed_are_refused_in_one_line() -> None:
    calculator = PotentialCalculator(make_potential())
    found = as_atoms(next(s for s in structures(12) if s.n_atoms > 1))
    moved, bare = found.copy(), found.copy()
    moved.positions[1, 2] = np.nan
    bare.cell[:] = 0
    bare.pbc = (True, True, False)
    for atoms, message in (
        (found[:0], "has no atoms"),
        (moved, "positions holds NaN or infinity"),
        (bare, "periodic along 2 axes but its cell does not span them"),
    ):
        atoms.calc = calculator
        with pytest.raises(DataError, match=f"^The Atoms object.*{message}"):
            atoms.get_potential_energy()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_a_compiled_calculator_gives_the_same_along_a_trajectory(tmp_path: Path) -> None:
    save_potential(tmp_path, make_potential({**GRADIENT, "num_layers": 1}, dtype=torch.float64))
    eager, compiled = kdcache.calculator(tmp_path), kdcache.calculator(tmp_path, compile=True)
    for structure in structures(3):
        atoms = as_atoms(structure)
        atoms.calc = compiled
        dynamics = VelocityVerlet(atoms, 0.2 * units.fs)
        for _ in range(3):
            dynamics.run(1)
            other = atoms.copy()
            other.calc = eager
            np.testing.assert_allclose(atoms.get_forces(), other.get_forces(), atol=1e-10)
            assert atoms.get_potential_energy() == pytest.approx(other.get_potential_energy())
