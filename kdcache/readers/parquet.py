"""Parquet tables with one structure per row, as shared on Hugging Face.

Reading is pyarrow's, in batches of rows. Invariant: one batch at a time is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdcache.readers.interface import ReadOptions, place, unreadable
from kdcache.readers.labels import LabelKeys
from kdcache.readers.tables import match_names, row_structure
from kdcache.store.parquet_pages import check_parquet
from kdcache.structures import Structure

ROWS_AT_ONCE = 256
# The metadata of tables that `interchange.parquet` wrote.
EXPORTED = b"kdcache"
UNITS = {"energy": "eV", "forces": "eV/Å", "positions": "Å"}


def read_parquet(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Structures of a Parquet table.

    Columns: atomic_numbers (list), positions and forces (lists of three, or flat), energy, optional
    cell (3 x 3 or 9) and pbc; names as in `kdcache.readers.tables`. A null is no value. The energy
    unit must be given, unless `interchange.parquet` wrote the table: its columns say theirs.

    Raises:
        DataError: no Parquet file, or columns that do not fit each other.
        UnitError: no energy unit, or an unknown one.
    """
    try:
        with open(path, "rb") as opened:
            found = check_parquet(opened, columns=())
            texts = list(dict.fromkeys(column.name for column in found.columns if column.is_text))
        # Texts as dictionaries: a long one that every row repeats is held once.
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            names = match_names(file.schema_arrow.names, path.name, options, keys, path)
            factors = _with_units(file.schema_arrow, names, options).stated_factors(path)
            index = 0
            columns = list(dict.fromkeys(names.values()))
            with open(path, "rb") as opened:
                check_parquet(opened, columns=columns)
            # On this thread alone: others may outlive the reading and make Python's exit an abort.
            for batch in file.iter_batches(
                batch_size=ROWS_AT_ONCE, columns=columns, use_threads=False
            ):
                rows = {quantity: _rows(batch.column(name)) for quantity, name in names.items()}
                for row in range(batch.num_rows):
                    values = {
                        quantity: found[row]
                        for quantity, found in rows.items()
                        if found[row] is not None
                    }
                    yield row_structure(values, place(path, index), options, factors)
                    index += 1
    # Damaged pages give texts that are not UTF-8 and lists that do not fit each other.
    except (OSError, pa.ArrowException, ValueError, KeyError, IndexError, TypeError) as error:
        raise unreadable(path, "Parquet", error) from error


def _with_units(schema: pa.Schema, names: Mapping[str, str], options: ReadOptions) -> ReadOptions:
    """What a table that we exported says of its own units, where the user names none.

    Args:
        schema: of the table.
        names: columns by quantity.
        options: as they were given.
    """
    if options.energy_unit is not None or EXPORTED not in (schema.metadata or {}):
        return options
    for quantity, unit in UNITS.items():
        said = schema.field(names[quantity]).metadata if quantity in names else None
        if quantity in names and (said or {}).get(b"unit") != unit.encode():
            return options
    return replace(options, energy_unit=UNITS["energy"])


def _rows(column: Any) -> list[Any]:
    """The values of a column, lists as flat arrays of numbers or strings, nulls as None."""
    if pa.types.is_dictionary(column.type):
        words = [*column.dictionary.to_pylist(), None]
        return [words[i] for i in column.indices.fill_null(len(words) - 1).to_pylist()]
    if not _is_list(column.type):
        values: list[Any] = column.to_pylist()
        return values
    # Flattening level by level costs a few calls per batch; as Python lists a row of 100 atoms
    # would be 300 objects.
    present = column.is_valid().to_numpy(zero_copy_only=False)
    counts = np.ones(int(present.sum()), dtype=np.int64)
    nested = column.drop_null()
    while _is_list(nested.type):
        lengths = pc.fill_null(pc.list_value_length(nested), 0).to_numpy(zero_copy_only=False)
        starts = np.concatenate([[0], np.cumsum(counts)])
        totals = np.concatenate([[0], np.cumsum(lengths)])
        counts = totals[starts[1:]] - totals[starts[:-1]]
        nested = pc.list_flatten(nested)
    flat: Any
    if pa.types.is_dictionary(nested.type):
        flat_words = np.array([*nested.dictionary.to_pylist(), None], object)
        flat = flat_words[
            nested.indices.fill_null(len(flat_words) - 1).to_numpy(zero_copy_only=False)
        ]
    else:
        flat = nested.to_numpy(zero_copy_only=False)
    ends = np.cumsum(counts)
    pieces = iter(np.split(flat, ends[:-1]))
    return [next(pieces) if kept else None for kept in present]


def _is_list(kind: Any) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
