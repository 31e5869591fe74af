"""A store with a teacher that gives everything an export can hold, and one that failed twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kdcache.fields import ENERGY, FORCES, FieldSpec
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.store import Store, TeacherEntry, add_teacher, open_store
from kdcache.structures import Structure
from tests.chain import read_options, structures, write_xyz

FAILED = (2, 7)
TEACHER = (
    ENERGY,
    FORCES,
    FieldSpec("atomic_energy", "atom", (), "float64", "eV"),
    FieldSpec("node", "atom", (4,), codec="half"),
    FieldSpec("vector", "atom", (3, 2), symmetry="vector", codec="exact"),
    FieldSpec("pooled", "structure", (2,), codec="exact"),
)


def rows_of(spec: FieldSpec, s: int, n_atoms: int) -> np.ndarray:
    """Rows of structure s of the dataset: value (s + k/8 + c/64), exact in half precision."""
    n = n_atoms if spec.level == "atom" else 1
    grid = np.arange(n)[:, None] / 8 + np.arange(spec.row_size)[None] / 64
    return (s + grid).reshape(n, *spec.shape).astype(spec.dtype)


@pytest.fixture(scope="session")
def dataset() -> list[Structure]:
    """Fourteen structures, two of them without labels, of splits and groups."""
    found = structures(14)
    for s in (4, 9):
        found[s] = replace(found[s], energy=None, forces=None)
    return found


@pytest.fixture(scope="session")
def store(dataset: list[Structure], tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("interchange")
    file = write_xyz(directory / "data.extxyz", dataset, unlabelled=(4, 9))
    options = ImportOptions(read_options(unlabelled=True), atom_capacity=12, blocks_per_shard=2)
    made = import_dataset(file, directory / "store.zarr", options)
    entry = TeacherEntry.describe(digest="ab" * 32, fields=TEACHER, model="invented")
    with add_teacher(made.path, "big-1", entry, TEACHER) as writer:
        for shard in writer.pending_shards():
            rows = made.plan.shard_structures(shard)
            sources = made.index.source_index[rows].tolist()
            values = {
                spec.name: np.concatenate([rows_of(spec, s, dataset[s].n_atoms) for s in sources])
                for spec in TEACHER
            }
            failures = {rows.start + k: "too hot" for k, s in enumerate(sources) if s in FAILED}
            writer.write_shard(shard, values, failures)
        writer.commit()
    return open_store(made.path)
