"""The demo's commands are real commands, and its files what they read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.config import load_config
from kdcache.demo.recipe import FULL, QUICK, STRATEGIES, steps, write_inputs
from kdcache.demo.structures import MAX_FORCE_EV_PER_A, catalyst_structures
from kdcache.distill.strategies import apply_strategy
from kdcache.readers import read_structures
from kdcache.structures import Structure, check_structure
from kdcache_cli.main import COMMANDS


@pytest.fixture(scope="module")
def structures() -> list[Structure]:
    return list(catalyst_structures(95, seed=3, processes=1))


def test_structures_are_a_function_of_the_seed_alone(structures: list[Structure]) -> None:
    again = list(catalyst_structures(20, seed=3, processes=2))
    assert [s.content_hash() for s in again] == [s.content_hash() for s in structures[:20]]
    other = next(catalyst_structures(1, seed=4, processes=1))
    assert other.content_hash() != structures[0].content_hash()


def test_structures_are_labelled_slabs_with_whole_trajectories_held_out(
    structures: list[Structure],
) -> None:
    for structure in structures:
        check_structure(structure, structure.structure_id)
        assert structure.pbc.tolist() == [True, True, False]
        assert structure.n_atoms == 13
        assert structure.forces is not None
        assert np.abs(structure.forces).max() <= MAX_FORCE_EV_PER_A
    split_of: dict[str, set[str]] = {}
    for structure in structures:
        split_of.setdefault(structure.structure_id.split(":")[0], set()).add(structure.split)
    assert all(len(splits) == 1 for splits in split_of.values())
    assert {s.split for s in structures} == {"train", "val", "test"}


def test_forces_are_the_gradient_of_the_energies(structures: list[Structure]) -> None:
    from ase import Atoms
    from ase.calculators.emt import EMT

    structure = structures[0]
    atoms = Atoms(structure.atomic_numbers, structure.positions, cell=structure.cell,
                  pbc=structure.pbc)  # fmt: skip
    step = 1e-4
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[12, 2] += sign * step
        moved.calc = EMT()
        energies.append(moved.get_potential_energy())
    assert structure.forces is not None
    slope = -(energies[0] - energies[1]) / (2 * step)
    assert structure.forces[12, 2] == pytest.approx(slope, abs=1e-5)


def test_the_files_read_back_to_the_same_structures(
    structures: list[Structure], tmp_path: Path
) -> None:
    write_inputs(tmp_path, QUICK, structures[:12])
    found = list(read_structures([str(tmp_path / "structures.extxyz")]))
    for ours, theirs in zip(structures[:12], found, strict=True):
        assert theirs.energy == pytest.approx(ours.energy, abs=1e-6)
        assert theirs.forces == pytest.approx(ours.forces, abs=1e-6)
        assert (theirs.group, theirs.split) == (ours.group, ours.split)
    for name in ("teacher", "student"):
        load_config(tmp_path / f"{name}.yaml")


@pytest.mark.parametrize("recipe", [FULL, QUICK])
def test_steps_are_known_commands_that_differ_by_strategy_alone(recipe: object) -> None:
    planned = steps(Path("demo"), FULL if recipe is FULL else QUICK)
    assert {step.arguments[0] for step in planned} <= set(COMMANDS)
    students = [s.arguments for s in planned if "--labels" in s.arguments]
    assert len(students) == len(STRATEGIES) + 1
    without = {
        tuple(a for a in arguments[:4] if not a.startswith("demo/")) for arguments in students
    }
    assert len(without) == 1


def test_control_and_students_share_every_setting_but_the_terms(tmp_path: Path) -> None:
    write_inputs(tmp_path, QUICK, [])
    config = load_config(tmp_path / "student.yaml")
    control = apply_strategy(config, "control")
    for strategy in STRATEGIES:
        student = apply_strategy(config, strategy)
        assert student.terms
        if "vanilla1" in strategy:
            # How labels are counted where some are missing: the control has none missing.
            data = student.data.model_copy(update={"labelled_share": control.data.labelled_share})
            loss = student.loss.model_copy(update={"mean_over": control.loss.mean_over})
            student = student.model_copy(update={"data": data, "loss": loss})
        assert student.model_copy(update={"terms": ()}) == control
