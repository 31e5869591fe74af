"""Every format that ASE reads, and ASE databases.

Parsing is ASE's. Invariant: labels are the calculator's raw results, never
`Atoms.get_forces()`, which sets the forces on constrained atoms to zero.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.db
import ase.io
import numpy as np
from ase.constraints import FixAtoms
from ase.io.formats import UnknownFileTypeError

from kdcache.readers.interface import ReadOptions, unreadable
from kdcache.readers.labels import LabelKeys, label_structure
from kdcache.readers.units import UnitFactors
from kdcache.structures import Structure

if TYPE_CHECKING:
    from ase import Atoms


def read_ase(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Structures of any file ASE knows; trajectories one by one, other formats as ASE does.

    Raises:
        DataError: ASE cannot read the file.
        UnitError: an unknown unit.
    """
    factors = options.factors()
    # An "@" in a file's name is not a selection of images.
    images = ase.io.iread(str(path), index=":", do_not_split_by_at_sign=True)
    index = 0
    while True:
        try:
            atoms = next(images, None)
        except UnknownFileTypeError as error:
            raise unreadable(path, "a format ASE knows", error) from error
        # A parser meets anything in a damaged file: IndexError, KeyError, AssertionError, ...
        except Exception as error:
            raise unreadable(path, f"ASE's format at structure {index}", error) from error
        if atoms is None:
            return
        yield _from_atoms(atoms, {}, path, index, options, factors, keys)
        index += 1


def read_ase_database(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Rows of an ASE database, in the order of their ids.

    Key-value pairs and `data` of a row may hold labels, groups, splits and ids.

    Raises:
        DataError: ASE cannot read the database.
        UnitError: an unknown unit.
    """
    factors = options.factors()
    try:
        rows = ase.db.connect(str(path)).select(sort="id")  # type: ignore[no-untyped-call]
        for index, row in enumerate(rows):
            named = {"id": row.id, "unique_id": row.unique_id, **row.key_value_pairs}
            data = row.data if isinstance(row.data, dict) else {}
            yield _from_atoms(row.toatoms(), {**data, **named}, path, index, options, factors, keys)
    except (OSError, KeyError, ValueError, sqlite3.Error) as error:
        raise unreadable(path, "an ASE database", error) from error


def _from_atoms(
    atoms: Atoms,
    named: dict[str, Any],
    path: Path,
    index: int,
    options: ReadOptions,
    factors: UnitFactors,
    keys: LabelKeys,
) -> Structure:
    structure = Structure(
        structure_id="",
        atomic_numbers=atoms.numbers.astype(np.int64),
        positions=np.array(atoms.positions, dtype=np.float64) * factors.length,
        cell=np.array(atoms.cell.array, dtype=np.float64) * factors.length,
        pbc=np.array(atoms.pbc, dtype=np.bool_),
    )
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            if structure.fixed is None:
                structure.fixed = np.zeros(len(atoms), dtype=np.bool_)
            structure.fixed[constraint.index] = True
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    info = {**atoms.info, **named}
    arrays = {**named, **atoms.arrays}
    label_structure(structure, path, index, info, arrays, results, options, factors, keys)
    if structure.fixed is not None:
        keys.record(path, "fixed atoms", "FixAtoms")
    return structure
