"""HDF5 files in the ANI manner: groups of structures of equal size, nested as one likes.

Reading is h5py's, an extra. Invariant: groups are visited in the file's order, and only slices of
their arrays are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdcache.errors import DataError
from kdcache.readers.interface import ReadOptions, unreadable
from kdcache.readers.labels import LabelKeys
from kdcache.readers.tables import NAMES, Array, match_names, stacked_structures
from kdcache.structures import Structure

if TYPE_CHECKING:
    import h5py


def read_hdf5(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Structures of every group that holds coordinates.

    A group holds coordinates [n, n_atoms, 3], species [n_atoms] or [n, n_atoms] (symbols, bytes or
    numbers), energies [n], forces [n, n_atoms, 3], optionally cell and pbc. Without a group key of
    its own a structure's group is the path of its HDF5 group. The energy unit must be given: ANI
    files are in Hartree.

    Raises:
        DataError: h5py is missing, no HDF5 file, no coordinates, or arrays that do not fit.
        UnitError: no energy unit, or an unknown one.
    """
    factors = options.stated_factors(path)
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"{path.name} is HDF5, and h5py is not installed: pip install kdcache[hdf5]"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            index = 0
            for group in _groups(file):
                # The root is named "/": its structures belong to no group.
                name = str(group.name).strip("/")
                where = f"{path.name}, group {name}" if name else path.name
                present = [key for key in group if isinstance(group.get(key), h5py.Dataset)]
                names = match_names(present, where, options, keys, path)
                columns = {quantity: Slices(group[key]) for quantity, key in names.items()}
                yield from stacked_structures(
                    columns, names, where, path, index, options, factors, name
                )
                index += int(columns["positions"].shape[0])
            if not index:
                raise DataError(
                    f"{path.name} has no group with one of {', '.join(NAMES['positions'])}. "
                    "Rename its arrays."
                )
    except (OSError, KeyError, RuntimeError) as error:
        raise unreadable(path, "HDF5", error) from error


@dataclass(frozen=True, slots=True)
class Slices:
    """An HDF5 array read in slices."""

    dataset: h5py.Dataset

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dataset.shape)

    def rows(self, start: int, stop: int) -> Array:
        return np.asarray(self.dataset[start:stop] if self.dataset.shape else self.dataset[()])


def _groups(group: h5py.Group) -> Iterator[h5py.Group]:
    """The group and those below it that hold positions."""
    import h5py

    if any(name in group for name in NAMES["positions"]):
        yield group
    for name in group:
        # Soft and external links could lead to other files or around in circles.
        if isinstance(group.get(name, getlink=True), h5py.HardLink):
            child = group[name]
            if isinstance(child, h5py.Group):
                yield from _groups(child)
