"""Structures out of arrays: which array is what, and one row of each made a structure.

Shared by npz, HDF5 and Parquet, whose files differ in how rows are fetched only.
Invariant: rows are fetched in order and in bounded pieces, and arrays of unequal length are
refused before the first structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL

from kdcache.errors import LISTED, DataError, did_you_mean
from kdcache.readers.interface import ReadOptions, place
from kdcache.readers.labels import LabelKeys, as_array, as_energy, as_integers, split_of
from kdcache.readers.units import UnitFactors
from kdcache.structures import IntArray, Structure

Array = npt.NDArray[Any]

# Names as rMD17 and MD17 (R, z, E, F), ANI and schnetpack-like files write them, in that order.
NAMES: dict[str, tuple[str, ...]] = {
    "positions": ("R", "coords", "coordinates", "positions"),
    "numbers": ("z", "nuclear_charges", "atomic_numbers", "species", "numbers", "Z"),
    "energy": ("E", "energies", "energy", "REF_energy"),
    "forces": ("F", "forces", "atomic_forces", "REF_forces"),
    "cell": ("cell", "cells", "lattice"),
    "pbc": ("pbc",),
    "group": ("config_type", "group"),
    "split": ("split",),
}
# Arrays of longer names, or of names that cannot be printed, are left alone.
MAX_NAME = 100
# Atoms fetched at once: a few MB.
ATOMS_AT_ONCE = 65_536


class Column(Protocol):
    """An array that is read in pieces, from front to back."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Array: ...


def match_names(
    present: Sequence[str], where: str, options: ReadOptions, keys: LabelKeys, path: Path
) -> dict[str, str]:
    """Which of the arrays a file holds is which quantity.

    Args:
        present: names of the arrays.
        where: file (and group) for errors.
        options: the user's keys come before the usual names.
        keys: told what is taken.
        path: the file.

    Returns:
        Array names by quantity: those of `NAMES`, "id" and "tags".

    Raises:
        DataError: positions, numbers or a label is missing, a named array is, or two arrays could
            be the label.
    """
    # Names of a file's arrays stand in errors.
    present = [name for name in present if name.isprintable() and len(name) <= MAX_NAME]
    named = {
        "energy": options.energy_key,
        "forces": options.forces_key,
        "group": options.group_key,
        "split": None if options.split_key == "none" else options.split_key,
        "id": options.id_key,
        "tags": options.tags_key,
    }
    found: dict[str, str] = {}
    for quantity in (*NAMES, "id", "tags"):
        key = named.get(quantity)
        if key is not None:
            if key not in present:
                raise DataError(f"{where} has no array {key!r}: {did_you_mean(key, present)}.")
            found[quantity] = key
            continue
        usual = [name for name in NAMES.get(quantity, ()) if name in present]
        if len(usual) > 1 and quantity in ("energy", "forces"):
            raise DataError(
                f"{where} has {' and '.join(usual)}, and either could be the {quantity}. Name one "
                f"(--{quantity}-key {usual[0]})."
            )
        if usual:
            found[quantity] = usual[0]
    if options.split_key == "none":
        found.pop("split", None)
    missing = [name for name in ("positions", "numbers") if name not in found]
    if not options.unlabelled:
        missing += [name for name in ("energy", "forces") if name not in found]
    if missing:
        usual_names = ", ".join(NAMES[missing[0]])
        way_out = (
            f"Name it (--{missing[0]}-key), or pass --unlabelled."
            if missing[0] in ("energy", "forces")
            else "Rename the array."
        )
        raise DataError(
            f"{where} has no {missing[0]} (looked for {usual_names}; it has "
            f"{', '.join(sorted(present)[:LISTED]) or 'nothing'}). {way_out}"
        )
    for quantity in ("energy", "forces"):
        if quantity in found:
            keys.record(path, quantity, found[quantity])
    return found


def stacked_structures(
    columns: Mapping[str, Column],
    names: Mapping[str, str],
    where: str,
    path: Path,
    first_index: int,
    options: ReadOptions,
    factors: UnitFactors,
    group: str = "",
) -> Iterator[Structure]:
    """Structures of equal size, stacked: positions [n, n_atoms, 3] and the rest beside them.

    Args:
        columns: by quantity; numbers, cell and pbc may be shared by all ([n_atoms], [3, 3], [3]).
        names: array names by quantity, for errors.
        where: file (and group) for errors.
        path: the file.
        first_index: place of the first of them in the file.
        options, factors: the user's.
        group: for structures without a group of their own.

    Raises:
        DataError: shapes that do not fit each other.
    """
    shape = columns["positions"].shape
    if len(shape) != 3 or shape[2] != 3:
        raise DataError(
            f"{where}: {names['positions']} must be [n_structures, n_atoms, 3], got {list(shape)}."
        )
    n_structures, n_atoms = shape[0], shape[1]
    shared: dict[str, Array] = {}
    for quantity, column in columns.items():
        if _is_shared(quantity, column.shape, n_structures):
            shared[quantity] = (
                column.rows(0, column.shape[0]) if column.shape else column.rows(0, 1)
            )
        elif column.shape[0] != n_structures:
            raise DataError(
                f"{where}: {names[quantity]} has {column.shape[0]} rows, {names['positions']} has "
                f"{n_structures}. Rows would meet the wrong labels."
            )
    step = max(1, ATOMS_AT_ONCE // max(n_atoms, 1))
    for start in range(0, n_structures, step):
        stop = min(start + step, n_structures)
        piece = {
            quantity: column.rows(start, stop)
            for quantity, column in columns.items()
            if quantity not in shared
        }
        for row in range(stop - start):
            values = {quantity: array[row] for quantity, array in piece.items()}
            structure = row_structure(
                {**shared, **values}, place(path, first_index + start + row), options, factors
            )
            structure.group = structure.group or group
            yield structure


def row_structure(
    values: Mapping[str, Any], where: str, options: ReadOptions, factors: UnitFactors
) -> Structure:
    """One structure out of the values of a row.

    Atoms with number 0 are padding and are left out. A cell without pbc is periodic along all
    axes, as in extended XYZ. Where structures without labels are accepted, a label that is NaN
    throughout is none: a table cannot leave a cell out.

    Raises:
        DataError: values of another shape or kind.
    """
    for needed in ("numbers", "positions"):
        if needed not in values:
            raise DataError(f"{where} has no {needed}. Remove it from the dataset.")
    numbers = as_atomic_numbers(values["numbers"], where)
    atoms = numbers != 0
    n_rows = len(numbers)
    cell, pbc = _cell(values.get("cell"), values.get("pbc"), where)
    structure = Structure(
        structure_id=_text(values["id"]) if "id" in values else "",
        atomic_numbers=numbers[atoms],
        positions=_per_atom(values["positions"], n_rows, where, "positions")[atoms]
        * factors.length,
        cell=cell * factors.length,
        pbc=pbc,
        group=_text(values.get("group", "")),
        split=split_of(
            _text(values["split"]) if "split" in values else None, where, named=options.split_key
        ),
    )
    if "tags" in values:
        structure.tags = as_integers(values["tags"], where, "tags", 255)[atoms].astype(np.uint8)
    if values.get("energy") is not None:
        energy = as_energy(values["energy"], where) * factors.energy
        structure.energy = None if options.unlabelled and np.isnan(energy) else energy
    if values.get("forces") is not None:
        forces = _per_atom(values["forces"], n_rows, where, "forces")[atoms] * factors.forces
        absent = options.unlabelled and np.isnan(forces).all()
        structure.forces = None if absent else forces
    return structure


def as_atomic_numbers(values: Any, where: str) -> IntArray:
    """Atomic numbers out of numbers, element symbols or bytes.

    Raises:
        DataError: neither.
    """
    array = np.asarray(values)
    if array.dtype.kind in "iu":
        return array.astype(np.int64).reshape(-1)
    if array.dtype.kind == "f" and (array == np.round(array)).all():
        return array.astype(np.int64).reshape(-1)
    symbols = [_text(value) for value in array.reshape(-1)]
    # An empty symbol is padding, as number 0 is; ASE's "X" is no element.
    unknown = [symbol for symbol in symbols if symbol and not NUMBER_OF_SYMBOL.get(symbol)]
    if unknown:
        raise DataError(f"{where}: {unknown[0]!r} is no element.")
    return np.array([NUMBER_OF_SYMBOL[s] if s else 0 for s in symbols], dtype=np.int64)


def _is_shared(quantity: str, shape: tuple[int, ...], n_structures: int) -> bool:
    if quantity in ("numbers", "pbc", "tags"):
        return len(shape) < 2
    # [3], [9] and [3, 3] are one cell; for three structures [3, 3] is one box (a, b, c) each.
    return quantity == "cell" and (len(shape) < 2 or (shape == (3, 3) and n_structures != 3))


def _per_atom(value: Any, n_atoms: int, where: str, name: str) -> npt.NDArray[np.float64]:
    array = as_array(value, where, name)
    if array.size != 3 * n_atoms:
        raise DataError(f"{where}: {name} has {array.size} values for {n_atoms} atoms, not 3 each.")
    return array.reshape(n_atoms, 3)


def _cell(cell: Any, pbc: Any, where: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    periodic = np.asarray(cell is not None if pbc is None else pbc)
    if periodic.size not in (1, 3):
        raise DataError(f"{where}: pbc must be three flags, got {periodic.tolist()}.")
    flags = np.array(np.broadcast_to(periodic.astype(np.bool_), (3,)))
    if cell is None:
        return np.zeros((3, 3)), flags
    array = as_array(cell, where, "cell")
    if array.size == 3:
        return np.diag(array.reshape(3)), flags
    if array.size != 9:
        raise DataError(f"{where}: cell must be three vectors, got {list(array.shape)}.")
    return array.reshape(3, 3), flags


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
