"""npz archives in the rMD17 manner: stacked structures of equal size.

Members are streamed out of the zip, so that an archive larger than memory is read in pieces.
Invariant: nothing is unpickled; arrays of Python objects are refused.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from kdcache.errors import DataError, KdcacheError
from kdcache.readers.interface import ReadOptions, check_ratio, shown, unreadable
from kdcache.readers.labels import LabelKeys
from kdcache.readers.tables import Array, match_names, stacked_structures
from kdcache.structures import Structure

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
KINDS = "biufSU"
MAX_TEXT_BYTES = 4096


def read_npz(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Structures of an npz archive.

    Arrays: R or coords [n, n_atoms, 3]; z or nuclear_charges [n_atoms] or [n, n_atoms] (0 pads);
    E or energies [n]; F or forces [n, n_atoms, 3]; optional cell and pbc, shared or one each. Names
    as in `kdcache.readers.tables`. The energy unit must be given: rMD17 is in kcal/mol.

    Raises:
        DataError: no npz archive, arrays of objects, or arrays that do not fit each other.
        UnitError: no energy unit, or an unknown one.
    """
    factors = options.stated_factors(path)
    try:
        with zipfile.ZipFile(path) as archive, ExitStack() as stack:
            present = [name.removesuffix(".npy") for name in archive.namelist()]
            names = match_names(present, path.name, options, keys, path)
            columns = {}
            for quantity, name in names.items():
                method = archive.getinfo(f"{name}.npy").compress_type
                if method not in METHODS:
                    # zipfile unpacks these in pieces of any size.
                    raise DataError(
                        f"{path.name}: {name} is packed by method {method}, and numpy packs by "
                        "none or deflate (0, 8). Save it with np.savez_compressed."
                    )
                file = stack.enter_context(archive.open(f"{name}.npy"))
                columns[quantity] = Member(file, path, name)
            yield from stacked_structures(columns, names, path.name, path, 0, options, factors)
    except (KdcacheError, MemoryError):
        raise
    # A damaged archive or header ends in whatever it runs into: zlib.error, KeyError, TokenError, …
    except Exception as error:
        raise unreadable(path, "an npz archive", error) from error


class Member:
    """One array of an archive, read from front to back.

    Attributes:
        shape: of the whole array.
    """

    def __init__(self, file: IO[bytes], path: Path, name: str) -> None:
        self._file = file
        self._name = f"{path.name}: {name}"
        version = npy_format.read_magic(file)
        read_header = (
            npy_format.read_array_header_1_0
            if version == (1, 0)
            else npy_format.read_array_header_2_0
        )
        self.shape, fortran_order, self._dtype = read_header(file)
        if self._dtype.hasobject:
            raise DataError(
                f"{self._name} holds Python objects, and reading them could run code. Save it as "
                "numbers; structures of different sizes go into extended XYZ or Parquet."
            )
        texts = self._dtype.kind in "SU"
        wide = not 0 < self._dtype.itemsize <= (MAX_TEXT_BYTES if texts else 16)
        if self._dtype.kind not in KINDS or wide or min([*self.shape, 0]) < 0:
            raise DataError(
                f"{self._name} is {shown(str(self._dtype))} {shown(str(list(self.shape)))}, and "
                "numbers or texts are expected. Save it anew."
            )
        # numpy's product would wrap around.
        check_ratio(path, math.prod(self.shape) * self._dtype.itemsize, name)
        self._row = 0
        # Column-major arrays have no rows to stream: numpy is asked for the whole.
        self._whole: Array | None = None
        if fortran_order and len(self.shape) > 1:
            data = self._bytes(math.prod(self.shape))
            self._whole = np.frombuffer(data, self._dtype).reshape(self.shape, order="F")

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop); `start` must be where the last call stopped."""
        if self._whole is not None:
            return self._whole[start:stop]
        if start != self._row:
            raise DataError(f"{self._name}: row {start} asked for, {self._row} is next.")
        self._row = stop
        trailing = self.shape[1:]
        data = self._bytes((stop - start) * math.prod(trailing))
        shape = (stop - start, *trailing) if self.shape else ()
        return np.frombuffer(data, self._dtype).reshape(shape)

    def _bytes(self, n_values: int) -> bytes:
        wanted = n_values * self._dtype.itemsize
        data = self._file.read(wanted)
        if len(data) < wanted:
            raise DataError(f"{self._name} ends early: the file is cut off. Copy it again.")
        return data
