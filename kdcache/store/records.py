"""Structures of a store as records, in any order and in bounded memory.

Reads each block once per window of structures, however the wanted rows are scattered. Invariant:
records come in the order of the rows asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kdcache.errors import StoreError
from kdcache.fields import OPTIONAL_FIELDS, STRUCTURE_FIELDS
from kdcache.structures import IntArray, Structure

if TYPE_CHECKING:
    from kdcache.store.reader import Store

Array = npt.NDArray[Any]

NEEDED = ("atomic_numbers", "positions", "cell", "pbc")
# About 250 MB of records. In dataset order every window reads all blocks, so fewer is faster.
WINDOW_ATOMS = 2**21


def iterate_structures(store: Store, rows: IntArray) -> Iterator[Structure]:
    """Structures of some rows of the index, in the order given.

    Raises:
        StoreError: the store was published without its structures, or a shard is damaged.
    """
    fields = store.fields("structures")
    missing = [name for name in NEEDED if name not in fields]
    if missing:
        raise absent(store, missing)
    specs = (*STRUCTURE_FIELDS, *OPTIONAL_FIELDS)
    names = [spec.name for spec in specs if spec.name in fields]
    ends = np.cumsum(store.index.n_atoms[rows])
    start = 0
    while start < len(rows):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + WINDOW_ATOMS, side="right")))
        yield from _window(store, rows[start:stop], names)
        start = stop


def absent(store: Store, names: Sequence[str]) -> StoreError:
    """What to say where fields of the structures are needed that a store does not hold."""
    licence = store.manifest.dataset.licences.structures or "unknown"
    said = f"{store.path} does not hold {', '.join(names)} of its structures (licence: {licence})"
    part = store.manifest.withheld
    if part is None or not set(names) <= part.structures.keys():
        return StoreError(f"{said}. Give the dataset itself.")
    return StoreError(
        f"{said}: it was passed on without them. Put your own copy of the data back: "
        f"`kdcache join {store.path} DATA -o FULL`."
    )


def _window(store: Store, rows: IntArray, names: list[str]) -> Iterator[Structure]:
    by_block = np.argsort(store.index.block[rows], kind="stable")
    wanted = rows[by_block]
    found: list[Structure | None] = [None] * len(rows)
    for group in np.split(by_block, np.flatnonzero(np.diff(store.index.block[wanted])) + 1):
        block = int(store.index.block[rows[group[0]]])
        with store.fetched([f"structures/{name}" for name in names], [block]):
            arrays = {name: store.read(f"structures/{name}", [block]) for name in names}
        for place in group.tolist():
            found[place] = _structure(store, int(rows[place]), block, arrays)
    for structure in found:
        if structure is not None:
            yield structure


def _structure(store: Store, row: int, block: int, arrays: Mapping[str, Array]) -> Structure:
    index, plan = store.index, store.plan
    own = int(index.structure_row[row]) - block * plan.structure_capacity
    first = int(index.atom_start[row]) - block * plan.atom_capacity
    atoms = slice(first, first + int(index.n_atoms[row]))
    energy = float(arrays["energy"][own]) if "energy" in arrays else np.nan
    forces = arrays["forces"][atoms].copy() if "forces" in arrays else None
    return Structure(
        structure_id=str(index.structure_id[row]),
        atomic_numbers=arrays["atomic_numbers"][atoms].astype(np.int64),
        positions=arrays["positions"][atoms].copy(),
        cell=arrays["cell"][own].copy(),
        pbc=arrays["pbc"][own].copy(),
        energy=None if np.isnan(energy) else energy,
        forces=None if forces is None or np.isnan(forces).any() else forces,
        origin=str(index.origin[row]),
        weight=float(index.weight[row]),
        group=str(index.group[row]),
        split=str(index.split[row]),
        tags=arrays["tags"][atoms].copy() if "tags" in arrays else None,
        fixed=arrays["fixed"][atoms].copy() if "fixed" in arrays else None,
    )
