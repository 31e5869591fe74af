"""The whole chain in small: structures with labels one can learn, a store, a teacher, a dump.

Among the structures are single atoms, pairs out of reach of each other, and crystals whose atoms
see their own images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ase.io
import numpy as np
import torch

from kdcache.checkpoint import save_potential
from kdcache.config import StudentConfig, load_config
from kdcache.distill.strategies import apply_strategy
from kdcache.dump import DumpOptions, DumpReport, dump_teacher
from kdcache.fields import Codec
from kdcache.graphs import GraphRule, neighbor_list
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.models import build_model
from kdcache.models.potential import Normalizer, Potential
from kdcache.models.taps import Tap
from kdcache.readers import ReadOptions
from kdcache.store import Store
from kdcache.structures import Structure
from kdcache.teachers import NativeTeacher
from tests.readers.identity import as_atoms

CUTOFF = 3.0
REFERENCES = {1: -13.5, 6: -1029.25, 8: -2041.75}
PAINN = {
    "name": "painn",
    "hidden_channels": 8,
    "num_layers": 2,
    "num_rbf": 8,
    "cutoff": CUTOFF,
}
SCHNET = {
    "name": "schnet",
    "hidden_channels": 8,
    "num_filters": 8,
    "num_interactions": 2,
    "num_gaussians": 8,
    "cutoff": CUTOFF,
}
# Blocks of a few structures, shards of two blocks: an epoch walks several windows.
SMALL = {"atom_capacity": 16, "blocks_per_shard": 2}


def structures(n: int, seed: int = 0) -> list[Structure]:
    """Of 1 to 6 atoms of H, C, O, with energy and forces of springs between neighbours."""
    return [_structure(s, np.random.default_rng([seed, s])) for s in range(n)]


def _structure(s: int, rng: np.random.Generator) -> Structure:
    n_atoms = (4, 1, 6, 2, 3, 5)[s % 6]
    pbc, cell = np.zeros(3, bool), np.zeros((3, 3))
    if s % 6 == 3 and s % 4 == 3:
        positions = np.array([[0.0, 0.0, 0.0], [7.0, 1.0, 0.0]])  # out of reach
    else:
        grid = np.stack(np.meshgrid(*[np.arange(2)] * 3, indexing="ij"), -1).reshape(-1, 3)
        positions = 1.4 * grid[rng.permutation(8)[:n_atoms]] + rng.normal(0, 0.12, (n_atoms, 3))
    if s % 5 == 0 or s % 12 == 1:
        pbc = np.array([True, True, s % 2 == 0])
        cell = np.diag([2.9, 3.1, 3.3]) + 0.1 * np.eye(3, k=1)
    structure = Structure(
        structure_id=f"s{s}",
        atomic_numbers=rng.choice([1, 6, 8], n_atoms),
        positions=np.round(positions, 6),
        cell=cell,
        pbc=pbc,
        group="even" if s % 2 == 0 else "odd",
    )
    structure.energy, structure.forces = _springs(structure)
    return structure


def _springs(structure: Structure) -> tuple[float, np.ndarray]:
    edges = neighbor_list(structure.positions, structure.cell, structure.pbc, GraphRule(CUTOFF))
    source, target = edges.edge_index
    vector = structure.positions[source] + edges.edge_shift @ structure.cell
    vector = vector - structure.positions[target]
    length = np.linalg.norm(vector, axis=1)
    energy = 0.5 * 0.4 * ((CUTOFF - length) ** 2).sum()
    forces = np.zeros((structure.n_atoms, 3))
    # Each pair stands in the list twice; a force pushes the target away from the source.
    np.add.at(forces, target, -0.8 * (CUTOFF - length)[:, None] * vector / length[:, None])
    numbers = structure.atomic_numbers.tolist()
    return float(energy + sum(REFERENCES[number] for number in numbers)), forces


def write_xyz(
    path: Path, found: Sequence[Structure], unlabelled: Sequence[int] = (), *, split: bool = True
) -> Path:
    """An extended XYZ file, every seventh structure of split "val" unless there are no splits."""
    images = []
    for s, structure in enumerate(found):
        info = {"name": structure.structure_id, "sort": structure.group}
        if split:
            info["split"] = "val" if s % 7 == 6 else "train"
        atoms = as_atoms(structure, **info)
        if s in unlabelled:
            atoms.calc = None
        images.append(atoms)
    ase.io.write(path, images)
    return path


def read_options(**changes: object) -> ReadOptions:
    keys: dict[str, object] = {"id_key": "name", "split_key": "split", "group_key": "sort"}
    return ReadOptions(**{**keys, **changes})  # type: ignore[arg-type]


def make_store(
    directory: Path,
    n: int = 40,
    *,
    graph: GraphRule | None = None,
    unlabelled: Sequence[int] = (),
    split: bool = True,
    found: Sequence[Structure] | None = None,
    name: str = "store.zarr",
    **layout: int,
) -> Store:
    file = directory / f"{name}.extxyz"
    data = write_xyz(file, found or structures(n), unlabelled, split=split)
    read = read_options(unlabelled=bool(unlabelled), split_key="split" if split else None)
    options = ImportOptions(read, graph=graph, **{**SMALL, **layout})  # type: ignore[arg-type]
    return import_dataset(data, directory / name, options)


def make_potential(
    model: Mapping[str, object] = PAINN, *, seed: int = 7, dtype: torch.dtype = torch.float32
) -> Potential:
    """With units and references of its own, none of them 1 or 0."""
    units = Normalizer(energy_scale=1.5, energy_shift=0.25, force_scale=1.5)
    references = {number: energy + 0.125 for number, energy in REFERENCES.items()}
    return Potential(build_model(model, seed=seed), units, references).to(dtype).eval()


def make_teacher(
    directory: Path,
    *,
    model: Mapping[str, object] = PAINN,
    dtype: torch.dtype = torch.float32,
    taps: Sequence[str] = (),
) -> NativeTeacher:
    potential = make_potential({**model, "hidden_channels": 12}, dtype=dtype)
    save_potential(directory / "teacher", potential)
    return NativeTeacher(potential, [Tap.parse(text) for text in taps])


def dump(
    store: Store,
    teacher: NativeTeacher,
    *,
    name: str = "teacher",
    codec: Codec = "exact",
    fields: Sequence[str] | None = None,
) -> DumpReport:
    options = DumpOptions(name=name, codec=codec, fields=fields, threads=1)
    return dump_teacher(store.path, teacher, options)


def student(
    *overrides: str, strategy: str = "control", model: Mapping[str, object] = PAINN
) -> StudentConfig:
    """Small, without average and warm-up, a row of metrics at every step."""
    base: dict[str, object] = {
        "model": dict(model),
        "schedule": {"name": "constant"},
        "ema": None,
        "training": {
            "max_steps": 12,
            "batch_size": 5,
            "eval_every": 1,
            "checkpoint_every": 100,
            "device": "cpu",
        },
    }
    config = apply_strategy(load_config(base=base), strategy)
    return load_config(base=config.model_dump(mode="json"), overrides=list(overrides))


def loss_curve(run: Path, column: str = "train_loss") -> list[str]:
    """A column of metrics.csv, as written."""
    lines = (run / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index(column)
    return [line.split(",")[place] for line in lines[1:]]
