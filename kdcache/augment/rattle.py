"""Displacements of fixed length: in random directions, or up the teacher–student difference.

Owns directions and lengths; which structures are displaced is `overlay`'s.
Invariant: the length is exact, and atoms that are held in place stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kdcache.models.potential import Potential
from kdcache.stream.window import collate, reference_table, reference_totals
from kdcache.structures import FloatArray, ModelOutput, Structure

NormOf = Literal["atom", "structure"]


def scaled_to(direction: FloatArray, norm: float, norm_of: NormOf) -> FloatArray:
    """Directions at a fixed length; where there is no direction, no displacement.

    Args:
        direction: [n_atoms, 3].
        norm: Å.
        norm_of: "atom" for every row, "structure" for all rows as one vector.

    Returns:
        [n_atoms, 3] Å.
    """
    axes = 1 if norm_of == "atom" else None
    # First by the largest entry: squares of a tiny gradient would vanish.
    largest = np.abs(direction).max(axis=axes, keepdims=True)
    unit = direction / np.where(largest > 0, largest, 1.0)
    length = np.sqrt((unit**2).sum(axis=axes, keepdims=True))
    scaled: FloatArray = norm * unit / np.where(length > 0, length, 1.0)
    return scaled


def random_step(
    structure: Structure, norm: float, norm_of: NormOf, generator: np.random.Generator
) -> FloatArray:
    """[n_atoms, 3] Å, uniform over all directions.

    Source: Ekström Kelvinius et al. 2023, section D.1.
    """
    return scaled_to(
        _free(structure, generator.standard_normal((structure.n_atoms, 3))), norm, norm_of
    )


def ascent_steps(
    structures: Sequence[Structure],
    teacher: Potential,
    student: Potential,
    norm: float,
    norm_of: NormOf,
) -> list[FloatArray]:
    """One step of gradient ascent on the difference, from no displacement, at a fixed length.

    Args:
        structures: computed together; the result of each does not depend on the others.
        teacher, student: in eval mode, on any devices.
        norm, norm_of: as in `scaled_to`.

    Returns:
        [n_atoms, 3] Å of each structure; zeros where the difference does not change.

    Source: Ekström Kelvinius et al. 2023, section D.1: delta' = delta + alpha grad L_KD.
    """
    start = np.concatenate([s.positions for s in structures])
    positions = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    total = _differences(structures, teacher, student, positions).sum()
    (gradient,) = torch.autograd.grad(total, positions)
    ends = np.cumsum([s.n_atoms for s in structures])[:-1]
    return [
        scaled_to(_free(structure, rows), norm, norm_of)
        for structure, rows in zip(structures, np.split(gradient.numpy(), ends), strict=True)
    ]


def differences(
    structures: Sequence[Structure], teacher: Potential, student: Potential
) -> FloatArray:
    """[n_structures] L_KD of each structure, its loss with the teacher's values as labels."""
    positions = torch.tensor(np.concatenate([s.positions for s in structures]))
    with torch.no_grad():
        found: FloatArray = _differences(structures, teacher, student, positions).numpy()
    return found


# alpha_E and alpha_F of L_0 in the source, Tables 5–7.
ENERGY_WEIGHT, FORCES_WEIGHT = 1.0, 100.0


def _differences(
    structures: Sequence[Structure], teacher: Potential, student: Potential, positions: Tensor
) -> Tensor:
    """|ΔE| and the mean length of ΔF, weighed as the ground-truth loss weighs them."""
    (theirs, their_total), (ours, our_total) = (
        _outputs(potential, structures, positions) for potential in (teacher, student)
    )
    n_atoms = torch.tensor([s.n_atoms for s in structures])
    owner = torch.repeat_interleave(torch.arange(len(structures)), n_atoms)
    # Energies of two models have a frame in common only with their references.
    shift = torch.from_numpy(our_total - their_total)
    energy = (ours.energy.double().cpu() - theirs.energy.double().cpu() + shift).abs()
    gap = ours.forces.double().cpu() - theirs.forces.double().cpu()
    lengths = torch.linalg.vector_norm(gap, dim=1)
    forces = torch.zeros_like(energy).index_add(0, owner, lengths) / n_atoms
    return ENERGY_WEIGHT * energy + FORCES_WEIGHT * forces


def _outputs(
    potential: Potential, structures: Sequence[Structure], positions: Tensor
) -> tuple[ModelOutput, FloatArray]:
    """A potential at `positions`, and the sum of its references in each structure."""
    parameter = next(potential.parameters())
    dtype = np.float64 if parameter.dtype == torch.float64 else np.float32
    batch = collate(structures, potential.graph_rule, dtype, further=potential.further_graphs)
    potential.check_elements(batch.atomic_numbers.to(parameter.device))
    moved = positions.to(parameter.device, parameter.dtype)
    output: ModelOutput = potential(replace(batch.to(parameter.device), positions=moved))
    numbers = np.concatenate([s.atomic_numbers for s in structures])
    n_atoms = np.array([s.n_atoms for s in structures])
    return output, reference_totals(numbers, n_atoms, reference_table(potential.references))


def _free(structure: Structure, direction: FloatArray) -> FloatArray:
    """Directions without those of atoms held in place."""
    if structure.fixed is None:
        return direction
    return np.where(structure.fixed[:, None], 0.0, direction)
