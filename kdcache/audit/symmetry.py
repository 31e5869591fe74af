"""What turning and moving the atoms of a structure must do to a teacher's fields.

Edges are kept as they are, by identity, so nothing but the geometry changes. Invariant: the batch
that is given stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from kdcache.fields import ENERGY, FORCES, FieldSpec
from kdcache.stream.window import reference_table
from kdcache.structures import Batch, FloatArray
from kdcache.teachers import Teacher

# Å; large enough for the energy of a float32 model to change by more than its rounding.
STEP = 0.02


def turning_errors(
    teacher: Teacher,
    batch: Batch,
    specs: Sequence[FieldSpec],
    generator: np.random.Generator,
    references: Mapping[int, float],
) -> dict[str, float]:
    """How far fields of turned structures are from the turned fields of the structures.

    Args:
        teacher: on the device of the batch.
        batch: a few structures, each of which is turned by a rotation of its own.
        specs: fields to look at; those of whole numbers are left out.
        generator: of the rotations.
        references: eV by atomic number, taken off energies.

    Returns:
        By field: ‖v(Rx) − R v(x)‖ / ‖v(x)‖, R = 1 for invariant fields.
    """
    turns = torch.from_numpy(rotations(batch.n_structures, generator)).to(batch.positions.device)
    owner = batch.structure_index
    turned = replace(
        batch,
        positions=torch.einsum("nij,nj->ni", turns[owner], batch.positions.double()).to(
            batch.positions.dtype
        ),
        cell=torch.einsum("sij,skj->ski", turns, batch.cell.double()).to(batch.cell.dtype),
    )
    before, after = teacher.compute(batch), teacher.compute(turned)
    of_level = {
        "structure": torch.arange(batch.n_structures, device=owner.device),
        "atom": owner,
        "edge": owner[batch.edge_index[1]],
    }
    energies = _reference_energies(batch, references)
    found = {}
    for spec in specs:
        if spec.name not in before or not before[spec.name].is_floating_point():
            continue
        values, moved = before[spec.name].double(), after[spec.name].double()
        if spec.unit == "eV" and spec.level in energies:
            values, moved = values - energies[spec.level], moved - energies[spec.level]
        if spec.symmetry == "vector":
            expected = torch.einsum("nij,nj...->ni...", turns[of_level[spec.level]], values)
        else:
            expected = values
        norm = float(torch.linalg.vector_norm(values))
        off = float(torch.linalg.vector_norm(moved - expected))
        found[spec.name] = off / norm if norm else off
    return found


def force_mismatch(
    teacher: Teacher,
    batch: Batch,
    generator: np.random.Generator,
    references: Mapping[int, float],
) -> float | None:
    """How far forces are from −dE/dx, along one random direction per structure.

    Args:
        teacher: on the device of the batch.
        batch: a few structures.
        generator: of the directions.
        references: eV by atomic number, taken off energies.

    Returns:
        Root mean square difference over that of the forces along the directions; None without
        energies and forces, or without any force.

    Source: ours; central difference of fourth order.
    """
    if not {ENERGY.name, FORCES.name} <= {spec.name for spec in teacher.field_specs()}:
        return None
    direction = torch.from_numpy(generator.normal(size=(batch.n_atoms, 3))).to(
        batch.positions.device
    )
    reference = _reference_energies(batch, references)["structure"]

    def energy(step: float) -> Tensor:
        positions = (batch.positions.double() + step * direction).to(batch.positions.dtype)
        moved = teacher.compute(replace(batch, positions=positions))
        return moved[ENERGY.name].double() - reference

    slope = 8 * (energy(STEP) - energy(-STEP)) - (energy(2 * STEP) - energy(-2 * STEP))
    slope = slope / (12 * STEP)
    forces = teacher.compute(batch)[FORCES.name].double()
    along = torch.zeros_like(slope)
    along.index_add_(0, batch.structure_index, (forces * direction).sum(dim=1))
    size = float(along.square().mean().sqrt())
    return float((slope + along).square().mean().sqrt()) / size if size else None


def rotations(n: int, generator: np.random.Generator) -> FloatArray:
    """[n, 3, 3] random rotations, none of them a reflection."""
    turns, triangles = np.linalg.qr(generator.normal(size=(n, 3, 3)))
    # Signs of the diagonal make the distribution uniform.
    turns = turns * np.sign(np.einsum("nii->ni", triangles))[:, None, :]
    turns[np.linalg.det(turns) < 0, :, 0] *= -1
    return np.asarray(turns)


def _reference_energies(batch: Batch, references: Mapping[int, float]) -> dict[str, Tensor]:
    table = torch.from_numpy(reference_table(references)).to(batch.positions.device)
    per_atom = table[batch.atomic_numbers]
    total = torch.zeros(batch.n_structures, dtype=torch.float64, device=per_atom.device)
    return {"atom": per_atom, "structure": total.index_add_(0, batch.structure_index, per_atom)}
