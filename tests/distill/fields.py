"""A small batch whose rows name themselves, with a student's output and two teachers' fields.

Structure s holds s + 1 atoms, so one atom is among them, and any shift by a row is seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.config import TermConfig
from kdcache.distill.binding import build_terms
from kdcache.distill.schedules import Clock
from kdcache.distill.terms import Terms
from kdcache.fields import FieldSpec
from kdcache.structures import Batch, ModelOutput

STUDENT = (
    FieldSpec("node", "atom", (4,)),
    FieldSpec("vector", "atom", (3, 4), symmetry="vector"),
    FieldSpec("atomic_energy", "atom", unit="eV"),
    FieldSpec("energy", "structure", unit="eV"),
    FieldSpec("forces", "atom", (3,), unit="eV/Å", symmetry="vector"),
)
TEACHER = {
    "node": FieldSpec("node", "atom", (6,), codec="half"),
    "vector": FieldSpec("vector", "atom", (3, 6), symmetry="vector", codec="half"),
    "atomic_energy": FieldSpec("atomic_energy", "atom", unit="eV"),
    "energy": FieldSpec("energy", "structure", unit="eV"),
    "forces": FieldSpec("forces", "atom", (3,), unit="eV/Å", symmetry="vector"),
}
N_STRUCTURES = 3
N_ATOMS = 6
LINEAR = {"kind": "linear"}


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_batch(dtype: torch.dtype = torch.float64) -> Batch:
    """Three structures of 1, 2 and 3 atoms, labelled, with fields of teachers "a" and "b"."""
    teacher = {
        f"{name}/{spec.name}": rows(
            N_ATOMS if spec.level == "atom" else N_STRUCTURES,
            *spec.shape,
            seed=seed + 10 * place,
            dtype=dtype,
        )
        for place, name in enumerate("ab")
        for seed, spec in enumerate(TEACHER.values())
    }
    return Batch(
        atomic_numbers=torch.ones(N_ATOMS, dtype=torch.int64),
        positions=rows(N_ATOMS, 3, seed=50, dtype=dtype),
        cell=torch.zeros(N_STRUCTURES, 3, 3, dtype=dtype),
        pbc=torch.zeros(N_STRUCTURES, 3, dtype=torch.bool),
        structure_index=torch.tensor([0, 1, 1, 2, 2, 2]),
        n_structures=N_STRUCTURES,
        edge_index=torch.zeros(2, 0, dtype=torch.int64),
        edge_shift=torch.zeros(0, 3, dtype=dtype),
        energy=rows(N_STRUCTURES, seed=51, dtype=dtype),
        forces=rows(N_ATOMS, 3, seed=52, dtype=dtype),
        teacher=teacher,
    )


def make_output(dtype: torch.dtype = torch.float64) -> ModelOutput:
    """What a student returned, every tensor a leaf that asks for its gradient."""

    def leaf(*shape: int, seed: int) -> Tensor:
        return rows(*shape, seed=seed, dtype=dtype).requires_grad_()

    return ModelOutput(
        energy=leaf(N_STRUCTURES, seed=60),
        forces=leaf(N_ATOMS, 3, seed=61),
        atomic_energy=leaf(N_ATOMS, seed=62),
        features={"node": leaf(N_ATOMS, 4, seed=63), "vector": leaf(N_ATOMS, 3, 4, seed=64)},
    )


def term(name: str = "x", student: str = "node", **settings: object) -> TermConfig:
    values: dict[str, object] = {"name": name, "student": student, "teacher": student}
    return TermConfig.model_validate({**values, "student_projection": "identity", **settings})


def bind(
    *terms: TermConfig, teachers: str = "a", seed: int = 0, rms: dict[str, float] | None = None
) -> Terms:
    return build_terms(
        terms,
        student_fields=STUDENT,
        teacher_fields=dict.fromkeys(teachers, TEACHER),
        clock=Clock(10),
        seed=seed,
        field_rms=rms,
    ).double()
