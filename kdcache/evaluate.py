"""How wrong a potential is on labelled structures, overall and by group.

Owns the metrics and the walk over structures; tables and files are the callers'.
Invariant: energies are compared relative to the references, taken off the labels in float64, so
large totals lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from kdcache.devices import batch_atoms
from kdcache.errors import ConfigError, DataError
from kdcache.models.potential import Potential
from kdcache.progress import Progress, silent
from kdcache.stream.window import (
    atom_bounded,
    make_batch,
    reference_table,
    reference_totals,
    window_of,
)
from kdcache.structures import Batch, FloatArray, IntArray, Structure

BoolArray = npt.NDArray[np.bool_]

# OC20's thresholds for "energy and forces within threshold" (Chanussot et al. 2021, section 3).
EFWT_ENERGY_EV = 0.02
EFWT_FORCE_EV_PER_A = 0.03


@dataclass(frozen=True, slots=True)
class Metrics:
    """Errors over a set of structures, named with their units.

    Attributes:
        n_structures, n_atoms: what energies are taken over; forces, without fixed atoms.
        energy_mae_mev, energy_rmse_mev: per structure, meV.
        energy_mae_mev_per_atom, energy_rmse_mev_per_atom: meV per atom.
        force_mae_mev_per_a, force_rmse_mev_per_a: per component, meV/Å.
        force_cos: mean over atoms of the cosine between predicted and true force.
        efwt: share of structures with |ΔE| < 0.02 eV and every |ΔF component| < 0.03 eV/Å.
    """

    n_structures: int
    n_atoms: int
    energy_mae_mev: float
    energy_rmse_mev: float
    energy_mae_mev_per_atom: float
    energy_rmse_mev_per_atom: float
    force_mae_mev_per_a: float
    force_rmse_mev_per_a: float
    force_cos: float
    efwt: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predicted and true values of a set of structures, in the order they came.

    Attributes:
        n_atoms: [n_structures].
        energy, true_energy: [n_structures] eV.
        forces, true_forces: [n_atoms, 3] eV/Å.
        groups: [n_structures] group names.
        free: [n_atoms] bool, atoms whose forces count; None for all.
    """

    n_atoms: IntArray
    energy: FloatArray
    true_energy: FloatArray
    forces: FloatArray
    true_forces: FloatArray
    groups: list[str]
    free: BoolArray | None = None

    @property
    def n_fixed(self) -> int:
        """Atoms whose forces do not count."""
        return 0 if self.free is None else int((~self.free).sum())

    def metrics(self, chosen: BoolArray | None = None) -> Metrics:
        """Errors of all structures, or of the chosen ones ([n_structures] bool)."""
        if chosen is None:
            chosen = np.ones(len(self.n_atoms), bool)
        atoms = np.repeat(chosen, self.n_atoms)
        n_atoms = self.n_atoms[chosen]
        energy_error = (self.energy - self.true_energy)[chosen]
        free = np.ones(len(atoms), bool) if self.free is None else self.free
        counted = atoms & free
        forces, truth = self.forces[counted], self.true_forces[counted]
        force_error = forces - truth
        norms = np.linalg.norm(forces, axis=1) * np.linalg.norm(truth, axis=1)
        # As torch's cosine_similarity: an atom without force counts 0, it is not left out.
        cosine = (forces * truth).sum(1) / np.maximum(norms, 1e-8)
        # Of every atom, 0 where its force does not count: a structure may have no free atom.
        largest = np.zeros(len(atoms))
        largest[counted] = np.abs(force_error).max(axis=1)
        worst = np.maximum.reduceat(largest[atoms], np.cumsum(n_atoms) - n_atoms)
        within = (np.abs(energy_error) < EFWT_ENERGY_EV) & (worst < EFWT_FORCE_EV_PER_A)
        return Metrics(
            n_structures=len(n_atoms),
            n_atoms=int(n_atoms.sum()),
            energy_mae_mev=1e3 * float(np.abs(energy_error).mean()),
            energy_rmse_mev=1e3 * float(np.sqrt((energy_error**2).mean())),
            energy_mae_mev_per_atom=1e3 * float(np.abs(energy_error / n_atoms).mean()),
            energy_rmse_mev_per_atom=1e3 * float(np.sqrt(((energy_error / n_atoms) ** 2).mean())),
            force_mae_mev_per_a=1e3 * _mean(np.abs(force_error)),
            force_rmse_mev_per_a=1e3 * float(np.sqrt(_mean(force_error**2))),
            force_cos=_mean(cosine),
            efwt=float(within.mean()),
        )

    def by_group(self) -> dict[str, Metrics]:
        """Errors by group name, in alphabetical order; empty without groups."""
        names = sorted({group for group in self.groups if group})
        labels = np.array(self.groups)
        return {name: self.metrics(labels == name) for name in names}


def _mean(values: FloatArray) -> float:
    """NaN of nothing, as in a group whose atoms are all fixed."""
    return float(values.mean()) if values.size else float("nan")


def predict_batches(
    potential: Potential,
    batches: Iterable[Batch],
    *,
    groups: list[str] | None = None,
    free_atoms_only: bool = True,
) -> Predictions:
    """Predictions beside the labels of batches whose energies are relative to the references.

    Args:
        potential: its mode decides whether gradient forces keep their graph; pass it in eval mode.
        batches: with energy and forces, on any device.
        groups: group names of all structures, in order; empty names without.
        free_atoms_only: forces on atoms that the data holds fixed do not count, as in OC20.
    """
    device = next(potential.parameters()).device
    n_atoms: list[IntArray] = []
    found: tuple[list[FloatArray], ...] = ([], [], [], [])
    free: list[BoolArray] = []
    any_fixed = False
    with torch.no_grad():
        for batch in batches:
            output = potential(batch.to(device))
            counts = torch.bincount(batch.structure_index, minlength=batch.n_structures)
            n_atoms.append(counts.cpu().numpy())
            values = (output.energy, batch.energy, output.forces, batch.forces)
            for part, value in zip(found, values, strict=True):
                assert value is not None
                part.append(value.detach().double().cpu().numpy())
            if batch.fixed is None or not free_atoms_only:
                free.append(np.ones(batch.n_atoms, bool))
            else:
                free.append(~batch.fixed.cpu().numpy())
                any_fixed = True
    if not n_atoms:
        raise DataError("There are no structures to evaluate on. Check the file and the split.")
    energy, true_energy, forces, true_forces = (np.concatenate(part) for part in found)
    counts_all = np.concatenate(n_atoms)
    names = groups if groups is not None else [""] * len(counts_all)
    return Predictions(
        counts_all,
        energy,
        true_energy,
        forces,
        true_forces,
        names,
        np.concatenate(free) if any_fixed else None,
    )


def predict_structures(
    potential: Potential,
    structures: Iterable[Structure],
    *,
    n_structures: int | None = None,
    max_atoms: int | None = None,
    free_atoms_only: bool = True,
    progress: Progress = silent,
) -> Predictions:
    """Energies and forces of labelled structures beside their labels, relative to the references.

    Args:
        potential: in eval mode.
        structures: read as they come, a thousand at a time.
        n_structures: how many there are, for the progress bar.
        max_atoms: atoms in one batch; None for what suits the device.
        free_atoms_only: as for `predict_batches`.
        progress: shows the walk.

    Raises:
        DataError: a structure without energy or forces, an element the model does not know, or no
            structures.
    """
    groups: list[str] = []
    float64 = next(potential.parameters()).dtype == torch.float64
    device = next(potential.parameters()).device
    table = reference_table(potential.references)
    at_once = batch_atoms(max_atoms, device)

    def batches() -> Iterator[Batch]:
        iterator = iter(structures)
        with progress("evaluate", n_structures, "structures") as advance:
            while chunk := list(islice(iterator, 1024)):
                for structure in chunk:
                    _require_labels(structure)
                groups.extend(structure.group for structure in chunk)
                dtype = np.float64 if float64 else np.float32
                window = window_of(
                    chunk, potential.graph_rule, further=potential.further_graphs, dtype=dtype
                )
                window.arrays["energy"] -= reference_totals(
                    window.arrays["atomic_numbers"], window.n_atoms, table
                )
                numbers = torch.from_numpy(window.arrays["atomic_numbers"].astype(np.int64))
                potential.check_elements(numbers.to(device))
                for run in atom_bounded(window.n_atoms, at_once):
                    yield make_batch([window.gather(np.arange(run.start, run.stop))])
                advance(len(chunk))

    return predict_batches(potential, batches(), groups=groups, free_atoms_only=free_atoms_only)


def kept(
    structures: Iterable[Structure], *, split: str | None = None, max_force: float | None = None
) -> Iterator[Structure]:
    """The structures of one split, without those with a force component above `max_force`.

    Args:
        structures: any.
        split: name, or None for all.
        max_force: eV/Å, or None for all.

    Raises:
        ConfigError: a limit that is not positive.
    """
    if max_force is not None and not max_force > 0:
        raise ConfigError(f"max_force must be a positive number, got {max_force}.")
    for structure in structures:
        if split is not None and structure.split != split:
            continue
        forces = structure.forces
        if max_force is not None and forces is not None and np.abs(forces).max() > max_force:
            continue
        yield structure


def gap_closed(value: float, control: float, teacher: float) -> float:
    """Share of the gap between control and teacher that a student closes.

    1 at the teacher, 0 at the control, negative when worse than the control; NaN without a gap.

    Source: Ekström Kelvinius et al. 2023, Table 3 (in percent there).
    """
    gap = control - teacher
    return (control - value) / gap if gap else float("nan")


def _require_labels(structure: Structure) -> None:
    if structure.energy is None or structure.forces is None:
        missing = "energy" if structure.energy is None else "forces"
        raise DataError(
            f'Structure "{structure.structure_id}" has no {missing}, so there is nothing to '
            f"compare with. Evaluate on labelled structures."
        )
