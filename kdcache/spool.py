"""Structures of an import on disk, between the pass over the files and the writing of shards.

A store is written in a permuted order that is known only when all structures are counted. Flat
files, one per field, hold them until then, so that memory does not grow with the dataset.
Invariant: a spool is either complete, with the identity of its import, or worth nothing.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.errors import naming
from kdcache.fields import GRAPH_FIELDS, OPTIONAL_FIELDS, STRUCTURE_FIELDS, FieldSpec, Level
from kdcache.graphs import Edges
from kdcache.structures import CONTENT_HASH_BYTES, DEFAULT_TAG, IntArray, Structure

Array = npt.NDArray[Any]

SPOOL_FIELDS = (*STRUCTURE_FIELDS, *OPTIONAL_FIELDS, *GRAPH_FIELDS)
COLUMNS = pa.schema(
    [
        ("structure_id", pa.string()),
        ("origin", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
        ("weight", pa.float64()),
        ("n_atoms", pa.int64()),
        ("n_edges", pa.int64()),
        ("labelled", pa.bool_()),
        ("content_hash", pa.binary(CONTENT_HASH_BYTES)),
    ]
)
COLUMN_FILE = "structures.parquet"
COMPLETE = "complete.json"
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Spool:
    """All structures of an import, in dataset order.

    Attributes:
        directory: where the flat files are.
        structure_id, origin, group, split: [n_structures] str.
        weight: [n_structures].
        n_atoms, n_edges: [n_structures].
        labelled: [n_structures] both energy and forces are there.
        content_hash: [n_structures, 16] uint8.
        notes: what was said while reading.
        keys: which key of the files each quantity was taken from.
        truncated: a neighbour list was cut by the rule's limit.
        optional: names of the optional fields that at least one structure has.
    """

    directory: Path
    structure_id: Array
    origin: Array
    group: Array
    split: Array
    weight: npt.NDArray[np.float64]
    n_atoms: IntArray
    n_edges: IntArray
    labelled: npt.NDArray[np.bool_]
    content_hash: npt.NDArray[np.uint8]
    notes: tuple[str, ...]
    keys: dict[str, str]
    truncated: bool
    optional: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.n_atoms)

    def read(self, spec: FieldSpec, rows: IntArray) -> Array:
        """Values of some structures, concatenated in the order given.

        Args:
            spec: one of the structure, optional or graph fields.
            rows: [k] places in the dataset.
        """
        counts = self._counts(spec.level)
        starts = np.cumsum(counts) - counts
        total = int(counts.sum())
        path = self.directory / f"{spec.name}.bin"
        shape = (total, *spec.shape)
        # An empty file cannot be mapped: no structure has an edge.
        values: Array = (
            np.memmap(path, spec.dtype, "r", shape=shape) if total else np.zeros(shape, spec.dtype)
        )
        return np.asarray(values[_ranges(starts[rows], counts[rows])])

    def _counts(self, level: Level) -> IntArray:
        if level == "structure":
            return np.ones(len(self), dtype=np.int64)
        return self.n_atoms if level == "atom" else self.n_edges


class SpoolWriter:
    """Append structures to a fresh spool; a context manager that closes its files."""

    def __init__(self, directory: Path) -> None:
        # What a killed import left cannot be trusted to its last byte.
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self.directory = directory
        self.truncated = False
        self._optional: set[str] = set()
        with ExitStack() as stack:
            self._files: dict[str, IO[bytes]] = {
                spec.name: stack.enter_context(open(directory / f"{spec.name}.bin", "wb"))
                for spec in SPOOL_FIELDS
            }
            self._open = stack.pop_all()
        self._rows: list[dict[str, Any]] = []
        self._tables: list[pa.Table] = []

    def __enter__(self) -> SpoolWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        with naming(str(self.directory)):
            self._open.close()

    def append(self, structure: Structure, edges: Edges | None) -> None:
        """Add a structure, with its neighbour list where the store keeps one."""
        n_atoms = structure.n_atoms
        forces = structure.forces
        tags, fixed = structure.tags, structure.fixed
        values: dict[str, Any] = {
            "atomic_numbers": structure.atomic_numbers,
            "positions": structure.positions,
            "cell": structure.cell,
            "pbc": structure.pbc,
            "energy": np.nan if structure.energy is None else structure.energy,
            "forces": np.full((n_atoms, 3), np.nan) if forces is None else forces,
            "tags": np.full(n_atoms, DEFAULT_TAG) if tags is None else tags,
            "fixed": np.zeros(n_atoms) if fixed is None else fixed,
        }
        self._optional |= {n for n in ("tags", "fixed") if getattr(structure, n) is not None}
        if edges is not None:
            values |= {"edge_index": edges.edge_index.T, "edge_shift": edges.edge_shift}
            self.truncated |= edges.truncated
        for spec in SPOOL_FIELDS:
            if spec.name in values:
                content = np.asarray(values[spec.name], spec.dtype).tobytes()
                file = self._files[spec.name]
                with naming(str(file.name)):
                    file.write(content)
        self._rows.append(
            {
                "structure_id": structure.structure_id,
                "origin": structure.origin,
                "group": structure.group,
                "split": structure.split,
                "weight": structure.weight,
                "n_atoms": n_atoms,
                "n_edges": 0 if edges is None else edges.n_edges,
                "labelled": structure.energy is not None and forces is not None,
                "content_hash": structure.content_hash(),
            }
        )
        if len(self._rows) == ROWS_AT_ONCE:
            self._gather_rows()

    def finish(
        self, identity: Mapping[str, Any], notes: Sequence[str], keys: Mapping[str, str]
    ) -> Spool:
        """Close the files, mark the spool complete and open it."""
        self._gather_rows()
        with naming(str(self.directory)):
            self._open.close()
        columns = io.BytesIO()
        table = pa.concat_tables([COLUMNS.empty_table(), *self._tables])
        pq.write_table(table, columns, compression="zstd")
        record = {
            "identity": identity,
            "notes": list(notes),
            "keys": dict(keys),
            "truncated": self.truncated,
            "optional": sorted(self._optional),
        }
        partial = self.directory / f"{COMPLETE}.partial"
        for spec in SPOOL_FIELDS:
            _flush(self.directory / f"{spec.name}.bin")
        _write(self.directory / COLUMN_FILE, columns.getbuffer())
        _write(partial, json.dumps(record).encode())
        os.replace(partial, self.directory / COMPLETE)
        spool = open_spool(self.directory, identity)
        if spool is None:
            raise RuntimeError(f"the spool just written at {self.directory} is gone")
        return spool

    def _gather_rows(self) -> None:
        if self._rows:
            self._tables.append(pa.Table.from_pylist(self._rows, schema=COLUMNS))
            self._rows.clear()


def open_spool(directory: Path, identity: Mapping[str, Any]) -> Spool | None:
    """The complete spool of this very import, or None.

    Args:
        directory: where it would be.
        identity: JSON values; files, options and whatever else the structures depend on.
    """
    complete = directory / COMPLETE
    if not complete.is_file():
        return None
    record = json.loads(complete.read_text())
    if record["identity"] != json.loads(json.dumps(identity)):
        return None
    # Not by read_table, whose threads may outlive it and end Python's exit with SIGABRT
    # (apache/arrow issues 34314 and 39862).
    with pq.ParquetFile(directory / COLUMN_FILE, memory_map=True) as file:
        table = file.read(use_threads=False).cast(COLUMNS)
    hashes = b"".join(table["content_hash"].to_pylist())

    def column(name: str) -> Array:
        # Groups and splits repeat: as objects, equal strings are one.
        return np.asarray(table[name].to_numpy())

    return Spool(
        directory=directory,
        structure_id=column("structure_id"),
        origin=column("origin"),
        group=column("group"),
        split=column("split"),
        weight=column("weight"),
        n_atoms=column("n_atoms"),
        n_edges=column("n_edges"),
        labelled=column("labelled"),
        content_hash=np.frombuffer(hashes, np.uint8).reshape(-1, CONTENT_HASH_BYTES),
        notes=tuple(record["notes"]),
        keys=record["keys"],
        truncated=record["truncated"],
        # Absent from a spool that an earlier version left behind.
        optional=tuple(record.get("optional", ())),
    )


def _ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """Concatenated [start, start + count) of every entry."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    rows: IntArray = np.arange(total) + np.repeat(starts - (ends - counts), counts)
    return rows


def _write(path: Path, content: bytes | memoryview) -> None:
    # Not by a library of its own: when the disk is full, those say so late and at length.
    with naming(str(path)), open(path, "wb") as file:
        file.write(content)
    _flush(path)


def _flush(path: Path) -> None:
    with open(path, "rb") as file, naming(str(path)):
        os.fsync(file.fileno())
