"""Frames of a relaxation or of molecular dynamics that a teacher drives, through ASE.

Invariant: a frame the teacher itself finds absurd (forces beyond a limit, or none at all) ends the
trajectory and is not handed out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.constraints import FixAtoms
from ase.md.langevin import Langevin
from ase.optimize import LBFGS

from kdcache.ase_calculator import PotentialCalculator
from kdcache.augment.options import AugmentOptions
from kdcache.models.potential import Potential
from kdcache.structures import Structure


def frames(
    structure: Structure,
    teacher: Potential,
    options: AugmentOptions,
    generator: np.random.Generator,
) -> Iterator[tuple[int, Structure]]:
    """Steps and structures of a trajectory that starts at `structure`, the start left out.

    Args:
        structure: its labels do not matter; fixed atoms are held.
        teacher: in eval mode.
        options: method relax or md, and their numbers.
        generator: of velocities and thermostat.

    Yields:
        (step, structure), counted from 1.
    """
    atoms: Any = Atoms(
        numbers=structure.atomic_numbers,
        positions=structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
        calculator=PotentialCalculator(teacher, tags=structure.tags),
    )
    if structure.fixed is not None and structure.fixed.any():
        atoms.set_constraint(FixAtoms(mask=structure.fixed))  # type: ignore[no-untyped-call]
    for step, _ in enumerate(_run(atoms, options, generator)):
        forces = atoms.get_forces()
        # Written so that NaN ends it as well.
        if not np.abs(forces).max() <= options.max_force:
            return
        if step:
            yield step, replace(structure, positions=atoms.get_positions())


def _run(atoms: Any, options: AugmentOptions, generator: np.random.Generator) -> Iterator[object]:
    if options.method == "relax":
        relaxation: Any = LBFGS(atoms, logfile=None)  # type: ignore[arg-type]
        return iter(relaxation.irun(fmax=options.force_goal, steps=options.max_steps))
    # Maxwell and Boltzmann's; set_momenta leaves out those of fixed atoms.
    width = np.sqrt(atoms.get_masses() * units.kB * options.temperature)
    atoms.set_momenta(width[:, None] * generator.standard_normal((len(atoms), 3)))
    dynamics: Any = Langevin(
        atoms,
        options.timestep * units.fs,
        temperature_K=options.temperature,
        friction=options.friction / units.fs,
        rng=generator,
        fixcm=False,
    )
    return iter(dynamics.irun(steps=options.max_steps))
