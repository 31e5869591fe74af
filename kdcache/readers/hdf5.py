"""HDF5 files in the ANI manner: groups of structures of equal size, nested as one likes.

Reading is h5py's, an extra. Invariant: groups are visited in the file's order, and only slices of
their arrays are held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.errors import DataError, KdcacheError
from kdcache.readers.interface import ReadOptions, check_ratio, shown, unreadable
from kdcache.readers.labels import LabelKeys
from kdcache.readers.tables import NAMES, Array, match_names, stacked_structures
from kdcache.structures import Structure

if TYPE_CHECKING:
    import h5py

MAX_TEXT_BYTES = 4096
TEXTS_AT_ONCE = 64
# Of HDF5 itself and of h5py, by number; any other is a library that is searched for and loaded.
FILTERS = {
    1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf",
}  # fmt: skip


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
                present = [key for key, child in _owned(group) if isinstance(child, h5py.Dataset)]
                names = match_names(present, where, options, keys, path)
                columns = {
                    quantity: Slices(_checked(group[key], path)) for quantity, key in names.items()
                }
                yield from stacked_structures(
                    columns, names, where, path, index, options, factors, name
                )
                index += int(columns["positions"].shape[0])
            if not index:
                raise DataError(
                    f"{path.name} has no group with one of {', '.join(NAMES['positions'])}. "
                    "Rename its arrays."
                )
    except (KdcacheError, MemoryError):
        raise
    # A damaged file ends in whatever h5py makes of it: KeyError, RuntimeError, TypeError, ...
    except Exception as error:
        raise unreadable(path, "HDF5", error) from error


@dataclass(frozen=True, slots=True)
class Slices:
    """An HDF5 array read in slices."""

    dataset: h5py.Dataset

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dataset.shape)

    def rows(self, start: int, stop: int) -> Array:
        if self.dataset.dtype.kind == "O":
            return np.array([self._texts(row) for row in range(start, stop)], object)
        return np.asarray(self.dataset[start:stop] if self.dataset.shape else self.dataset[()])

    def _texts(self, row: int) -> Any:
        """Texts of any length of one row, few at once: each may be the same one of megabytes."""
        found = []
        places = range(0, self.shape[1] if len(self.shape) > 1 else 1, TEXTS_AT_ONCE)
        for place in places:
            piece = self.dataset[(row, slice(place, place + TEXTS_AT_ONCE))[: len(self.shape)]]
            texts = np.atleast_1d(np.asarray(piece, object)).tolist()
            if max(map(len, texts)) > MAX_TEXT_BYTES:
                raise DataError(
                    f"{self.dataset.name} holds a text of more than {MAX_TEXT_BYTES} bytes, and "
                    "symbols or names are expected."
                )
            found += texts
        return found if len(self.shape) > 1 else found[0]


def _groups(file: h5py.File) -> Iterator[h5py.Group]:
    """The groups that hold positions, each once, from the root down in the file's order."""
    import h5py

    # Hard links too may lead in circles.
    seen: set[int] = set()
    pending: list[h5py.Group] = [file]
    while pending:
        group = pending.pop()
        place = h5py.h5o.get_info(group.id).addr
        if place in seen:
            continue
        seen.add(place)
        owned = _owned(group)
        if any(name in NAMES["positions"] for name, _ in owned):
            yield group
        pending += [child for _, child in reversed(owned) if isinstance(child, h5py.Group)]


def _owned(group: h5py.Group) -> list[tuple[str, object]]:
    """What a group holds itself: soft and external links could lead to other files."""
    import h5py

    return [
        (name, group[name])
        for name in group
        if isinstance(group.get(name, getlink=True), h5py.HardLink)
    ]


def _checked(dataset: h5py.Dataset, path: Path) -> h5py.Dataset:
    """A dataset whose bytes are in this file, packed by what is part of HDF5.

    Raises:
        DataError: naming what it is instead.
    """
    import h5py

    where = f"{path.name}: {shown(str(dataset.name), 100)}"
    settings = dataset.id.get_create_plist()
    if dataset.is_virtual or settings.get_external_count():
        raise DataError(
            f"{where} takes its values from another file. What is read must be in the file that "
            "was named: write them into one (h5repack)."
        )
    for i in range(settings.get_nfilters()):
        number = settings.get_filter(i)[0]
        if number not in FILTERS:
            # HDF5 would look for a library to load.
            raise DataError(
                f"{where} is packed by the filter {number}, and only {', '.join(FILTERS.values())} "
                "are read. Repack it (h5repack -f GZIP=4)."
            )
    kind = dataset.dtype.kind
    texts = kind == "O" and h5py.check_string_dtype(dataset.dtype) and dataset.ndim in (1, 2)
    wide = dataset.dtype.itemsize > MAX_TEXT_BYTES
    if wide or not (kind in "biufSU" or texts):
        raise DataError(
            f"{where} holds {shown(str(dataset.dtype))}, and numbers or texts are expected."
        )
    # Exact: h5py's own product of the extents may wrap around.
    check_ratio(path, math.prod(dataset.shape) * dataset.dtype.itemsize, str(dataset.name))
    return dataset
