"""LMDB files as Open Catalyst writes them, small, of our numbered structures or of real records."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import lmdb
import torch

from kdcache.structures import Structure

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
    from torch_geometric.data import Data

SIDS = (1000, 1001)


def write_records(path: Path, records: Mapping[str, bytes]) -> Path:
    with (
        lmdb.open(str(path), subdir=False, map_size=2**24) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in records.items():
            transaction.put(key.encode(), value)
    Path(f"{path}-lock").unlink()
    return path


def record_of(structure: Structure, index: int, **changes: object) -> bytes:
    """A structure as a pickled Data of the torch-geometric installed here."""
    values: dict[str, object] = {
        "pos": torch.tensor(structure.positions, dtype=torch.float32),
        "cell": torch.tensor(structure.cell, dtype=torch.float32).reshape(1, 3, 3),
        "atomic_numbers": torch.tensor(structure.atomic_numbers, dtype=torch.float32),
        "natoms": structure.n_atoms,
        "tags": torch.arange(structure.n_atoms) % 3,
        "fixed": (torch.arange(structure.n_atoms) % 2 == 0).float(),
        "y": structure.energy,
        "force": torch.tensor(structure.forces, dtype=torch.float32),
        "sid": SIDS[index % 2],
        "fid": index,
    }
    kept = {key: value for key, value in {**values, **changes}.items() if value is not None}
    return pickle.dumps(Data(**kept), protocol=4)


def write_lmdb(path: Path, structures: Sequence[Structure], **changes: object) -> Path:
    records = {str(i): record_of(s, i, **changes) for i, s in enumerate(structures)}
    return write_records(path, {**records, "length": pickle.dumps(len(records))})


def first_records(source: Path, target: Path, n_records: int) -> Path:
    """A file with the first records of another, byte for byte."""
    with (
        lmdb.open(str(source), subdir=False, readonly=True, lock=False) as environment,
        environment.begin() as transaction,
    ):
        records = {str(i): bytes(transaction.get(str(i).encode())) for i in range(n_records)}
    return write_records(target, {**records, "length": pickle.dumps(n_records)})
