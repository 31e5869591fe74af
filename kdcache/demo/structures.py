"""Catalyst-like structures with energies and forces, made on the spot.

Slabs of seven fcc metals with an adsorbate, shaken by short molecular dynamics, labelled by ASE's
effective medium theory: a potential that needs no data, no download and no licence.
Invariant: the structures are a function of the seed, whatever the number of processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from kdcache.progress import Progress, silent
from kdcache.structures import Structure

METALS = ("Cu", "Ag", "Au", "Ni", "Pd", "Pt", "Al")
ADSORBATES = {"H": 1.0, "C": 1.2, "N": 1.2, "O": 1.3}  # Å above the surface
SITES = {"fcc111": ("ontop", "bridge", "fcc", "hcp"), "fcc100": ("ontop", "bridge", "hollow")}
FRAMES_PER_TRAJECTORY = 9
STEPS_PER_FRAME = 4
TIMESTEP_FS = 4.0
# A start on top of another atom: EMT answers with forces no catalyst sees.
MAX_FORCE_EV_PER_A = 8.0
# Whole trajectories are held out: frames of one are too alike to test each other.
_SPLITS = {8: "val", 9: "test"}


@dataclass(frozen=True, slots=True)
class _Trajectory:
    number: int
    metal: str
    facet: str
    adsorbate: str
    seed: int


def catalyst_structures(
    n_structures: int, seed: int, *, processes: int = 2, progress: Progress = silent
) -> Iterator[Structure]:
    """Labelled slabs with adsorbates, 13 atoms each, periodic along two axes.

    Args:
        n_structures: how many; frames of a trajectory stand together.
        seed: of everything random.
        processes: that run the dynamics.
        progress: shows the making.

    Yields:
        Structures grouped by metal, ids "Pt-fcc111-O-0012:3".
    """
    trajectories = _trajectories(seed)
    made = 0
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        progress("make structures", n_structures, "structures") as advance,
    ):
        while made < n_structures:
            missing = -(-(n_structures - made) // FRAMES_PER_TRAJECTORY)
            batch = [next(trajectories) for _ in range(missing)]
            for frames in pool.map(_run, batch, chunksize=4):
                for structure in frames[: n_structures - made]:
                    made += 1
                    yield structure
                advance(len(frames))


def _trajectories(seed: int) -> Iterator[_Trajectory]:
    """Every combination in turn, each with a seed of its own, without end."""
    seeds = np.random.default_rng(seed)
    number = 0
    while True:
        for metal in METALS:
            for facet in SITES:
                for adsorbate in ADSORBATES:
                    yield _Trajectory(number, metal, facet, adsorbate, int(seeds.integers(2**31)))
                    number += 1


def _run(trajectory: _Trajectory) -> list[Structure]:
    import ase.build
    from ase import units
    from ase.calculators.emt import EMT
    from ase.md.velocitydistribution import thermalize_momenta
    from ase.md.verlet import VelocityVerlet

    random = np.random.default_rng(trajectory.seed)
    atoms = getattr(ase.build, trajectory.facet)(trajectory.metal, (2, 2, 3), vacuum=6.0)
    site = str(random.choice(SITES[trajectory.facet]))
    height = ADSORBATES[trajectory.adsorbate]
    ase.build.add_adsorbate(atoms, trajectory.adsorbate, height, site)  # type: ignore[no-untyped-call]
    atoms.positions += random.normal(scale=0.05, size=atoms.positions.shape)
    atoms.calc = EMT()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        thermalize_momenta(atoms, temperature_K=float(random.uniform(300, 1200)), rng=random)
    dynamics = VelocityVerlet(atoms, timestep=TIMESTEP_FS * units.fs)
    name = f"{trajectory.metal}-{trajectory.facet}-{trajectory.adsorbate}-{trajectory.number:04d}"
    frames = []
    for frame in range(FRAMES_PER_TRAJECTORY):
        dynamics.run(STEPS_PER_FRAME)  # type: ignore[no-untyped-call]
        forces = atoms.get_forces()
        if np.abs(forces).max() > MAX_FORCE_EV_PER_A:
            continue
        frames.append(
            Structure(
                structure_id=f"{name}:{frame}",
                atomic_numbers=np.array(atoms.numbers, np.int64),
                positions=atoms.positions.copy(),
                cell=np.array(atoms.cell.array),
                pbc=np.array(atoms.pbc, bool),
                energy=float(atoms.get_potential_energy()),
                forces=forces,
                group=trajectory.metal,
                split=_SPLITS.get(trajectory.number % 10, "train"),
            )
        )
    return frames
