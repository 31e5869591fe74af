"""A Parquet table out of a store: a row per structure, lists for what belongs to atoms.

The names are those our reader and others look for; shapes of features are in the columns' metadata.
Invariant: a null where there is no label, or the teacher failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdcache.interchange.selection import Selection, Taken, new_output
from kdcache.progress import Progress, silent

ROWS_AT_ONCE = 256

Value = Callable[[Taken], Any]


def write_parquet(selection: Selection, path: str | Path, *, progress: Progress = silent) -> Path:
    """Write structures, labels and a teacher's fields to a Parquet table.

    Columns: structure_id, atomic_numbers, positions (flat list, Å), cell (9 values, Å), pbc,
    energy (eV), forces (flat list, eV/Å), split, config_type, origin, weight; tags and fixed where
    the store has them; `<teacher>_<field>` as flat lists, or numbers where it is one per structure.

    Args:
        selection: what is written.
        path: of a new file.
        progress: shows structures.

    Returns:
        The path.

    Raises:
        StoreError: something is there already, or a shard is damaged.
    """
    columns = _columns(selection)
    schema = pa.schema([field for field, _ in columns], metadata=_provenance(selection))
    with (
        new_output(path) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd") as writer,
        progress("export", len(selection), "structures") as advance,
    ):
        structures = iter(selection)
        while rows := list(islice(structures, ROWS_AT_ONCE)):
            arrays = [
                pa.array([value(taken) for taken in rows], field.type) for field, value in columns
            ]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            advance(len(rows))
    return Path(path)


def _columns(selection: Selection) -> list[tuple[pa.Field, Value]]:
    numbers = pa.list_(pa.float64())
    known = selection.store.fields("structures")
    columns: list[tuple[pa.Field, Value]] = [
        (pa.field("structure_id", pa.string()), lambda t: t.structure.structure_id),
        (
            pa.field("atomic_numbers", pa.list_(pa.int64())),
            lambda t: t.structure.atomic_numbers,
        ),
        (_field("positions", numbers, "Å", (3,)), lambda t: t.structure.positions.ravel()),
        (_field("cell", numbers, "Å", (3, 3)), lambda t: t.structure.cell.ravel()),
        (pa.field("pbc", pa.list_(pa.bool_())), lambda t: t.structure.pbc),
        (_field("energy", pa.float64(), "eV", ()), lambda t: t.structure.energy),
        (
            _field("forces", numbers, "eV/Å", (3,)),
            lambda t: None if t.structure.forces is None else t.structure.forces.ravel(),
        ),
        (pa.field("split", pa.string()), lambda t: t.structure.split or None),
        (pa.field("config_type", pa.string()), lambda t: t.structure.group),
        (pa.field("origin", pa.string()), lambda t: t.structure.origin),
        (pa.field("weight", pa.float64()), lambda t: t.structure.weight),
    ]
    if "tags" in known:
        columns.append((pa.field("tags", pa.list_(pa.uint8())), lambda t: t.structure.tags))
    if "fixed" in known:
        columns.append((pa.field("fixed", pa.list_(pa.bool_())), lambda t: t.structure.fixed))
    for spec in selection.specs:
        exact = spec.codec == "exact" and spec.dtype == "float64"
        item = pa.float64() if exact else pa.float32()
        plain = spec.level == "structure" and not spec.shape
        field = _field(
            f"{selection.prefix}_{spec.name}",
            item if plain else pa.list_(item),
            spec.unit,
            spec.shape,
        )
        columns.append((field, _value(spec.name, plain)))
    return columns


def _value(name: str, plain: bool) -> Value:
    def value(taken: Taken) -> Any:
        if taken.fields is None:
            return None
        rows = taken.fields[name]
        return rows[0] if plain else np.ascontiguousarray(rows).ravel()

    return value


def _field(name: str, kind: pa.DataType, unit: str, shape: tuple[int, ...]) -> pa.Field:
    """A column that says its unit, and the trailing shape of what is a flat list."""
    return pa.field(name, kind, metadata={"unit": unit, "shape": json.dumps(shape)})


def _provenance(selection: Selection) -> dict[str, str]:
    manifest = selection.store.manifest
    said = {
        "root_digest": manifest.root_digest,
        "dataset_digest": manifest.dataset.digest,
        "licence_structures": manifest.dataset.licences.structures,
        "licence_labels": manifest.dataset.licences.labels,
    }
    if selection.teacher:
        entry = manifest.teachers[selection.teacher]
        said |= {
            "teacher": selection.teacher,
            "teacher_digest": entry.digest,
            "licence_teacher": entry.licence,
        }
    return {"kdcache": json.dumps(said)}
