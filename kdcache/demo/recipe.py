"""The demo as a list of ordinary commands, and the files they need.

Everything the demo does, a user can do by typing these lines. Invariant: all students and the
control run the same number of steps with the same settings, tuned for the control.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from kdcache.structures import Structure

CUTOFF = 4.0  # Å, beyond the second neighbours of five of the metals, all but Ag and Au
STRATEGIES = ("vanilla1", "vanilla2", "n2n", "v2v", "n2n+v2v", "vanilla1+n2n+v2v")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How large a demo is.

    Attributes:
        n_structures: made.
        teacher_steps, student_steps: optimizer steps.
        labels: share of the labels the students see.
    """

    n_structures: int
    teacher_steps: int
    student_steps: int
    labels: float


FULL = Recipe(n_structures=2000, teacher_steps=2500, student_steps=1500, labels=0.1)
QUICK = Recipe(n_structures=450, teacher_steps=400, student_steps=200, labels=0.1)


@dataclass(frozen=True, slots=True)
class Step:
    """One command of the demo.

    Attributes:
        title: what it does, in a line.
        arguments: of `kdcache`.
        report: the JSON file of an evaluation, named after its model; None for other steps.
    """

    title: str
    arguments: tuple[str, ...]
    report: Path | None = None

    @property
    def command(self) -> str:
        """As one would type it."""
        return shlex.join(["kdcache", *self.arguments])


def model_settings(hidden_channels: int, num_layers: int) -> dict[str, object]:
    """A PaiNN for slabs of 13 atoms."""
    return {
        "name": "painn",
        "hidden_channels": hidden_channels,
        "num_layers": num_layers,
        "num_rbf": 20,
        "cutoff": CUTOFF,
    }


def settings(hidden_channels: int, num_layers: int, steps: int, lr: float) -> dict[str, object]:
    """A configuration as `train-student --config` takes it."""
    return {
        "model": model_settings(hidden_channels, num_layers),
        "loss": {"energy_weight": 10, "forces_weight": 100},
        "optimizer": {"lr": lr},
        "schedule": {"name": "cosine", "warmup": 0.05, "min_factor": 0.01},
        "training": {
            "max_steps": steps,
            "batch_size": 16,
            "eval_every": max(1, steps // 10),
            "checkpoint_every": steps,
        },
    }


def write_inputs(directory: Path, recipe: Recipe, structures: Iterable[Structure]) -> None:
    """The files the commands read: structures.extxyz, teacher.yaml, student.yaml."""
    from ase import Atoms
    from ase.io import write

    directory.mkdir(parents=True, exist_ok=True)
    frames = []
    for structure in structures:
        atoms = Atoms(
            numbers=structure.atomic_numbers,
            positions=structure.positions,
            cell=structure.cell,
            pbc=structure.pbc,
        )
        atoms.info["REF_energy"] = structure.energy
        atoms.arrays["REF_forces"] = np.asarray(structure.forces)
        atoms.info["config_type"] = structure.group
        atoms.info["split"] = structure.split
        frames.append(atoms)
    partial = directory / "structures.partial.extxyz"
    write(partial, frames, format="extxyz")
    partial.rename(directory / "structures.extxyz")
    files = {
        "teacher.yaml": settings(64, 3, recipe.teacher_steps, 2e-3),
        "student.yaml": settings(24, 2, recipe.student_steps, 2e-2),
    }
    for name, values in files.items():
        (directory / name).write_text(yaml.safe_dump(values, sort_keys=False))


def steps(directory: Path, recipe: Recipe) -> list[Step]:
    """The commands, in order."""

    def at(name: str) -> str:
        return str(directory / name)

    def evaluation(name: str) -> Step:
        report = at(f"{name}.json")
        return Step(
            f"evaluate {name} on structures nobody trained on",
            ("evaluate", at(name), at("data.zarr"), "--split", "test", "--json", report),
            Path(report),
        )

    student = ("train-student", at("features.zarr"), "--config", at("student.yaml"))
    labels = ("--labels", str(recipe.labels), "--graph-cache", at("graph"))
    found = [
        Step(
            "read the dataset into a store",
            ("import", at("structures.extxyz"), "-o", at("data.zarr"), "--cutoff", str(CUTOFF)),
        ),
        Step(
            "train a teacher on all labels",
            ("train-student", at("data.zarr"), "-o", at("teacher"), "--config", at("teacher.yaml")),
        ),
        evaluation("teacher"),
        Step(
            "run the teacher once, keep its features",
            (
                *("dump-teacher", at("data.zarr"), "--teacher", at("teacher")),
                *("-o", at("features.zarr"), "--name", "painn"),
            ),
        ),
        Step(
            "control: a student that sees few labels and no teacher",
            (*student, "-o", at("control"), "--control", *labels),
        ),
        evaluation("control"),
    ]
    for strategy in STRATEGIES:
        command = (*student, "-o", at(strategy), "--strategy", strategy, *labels)
        title = f"the same student with the teacher's features: {strategy}"
        found += [Step(title, command), evaluation(strategy)]
    return found
