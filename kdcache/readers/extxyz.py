"""Extended XYZ, one structure at a time.

ASE defines the grammar of the comment line; its file reader is not used because it keeps an index
of all frames and stops at a blank line without a word. Here columns are converted in bulk (several
times faster) and a damaged frame is named by its place and line.
Invariant: numbers, positions, cell, pbc and keys are those `ase.io.iread` gives.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from lzma import LZMAError
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase.data import atomic_numbers as NUMBER_OF_SYMBOL
from ase.io.extxyz import key_val_str_to_dict
from ase.io.formats import open_with_compression

from kdcache.errors import DataError, reason_of
from kdcache.readers.interface import (
    SMALL_BYTES,
    ReadOptions,
    check_ratio,
    place,
    shown,
    unreadable,
)
from kdcache.readers.labels import LabelKeys, label_structure
from kdcache.readers.units import UnitFactors
from kdcache.structures import FloatArray, IntArray, Structure

# ASE's column of a constraint: F where an atom is held, one flag or one for each axis.
MOVE_MASK = "move_mask"
# A count above this is a damaged line, and trusting it would read the rest of the file at once.
MAX_ATOMS = 10_000_000
MAX_LINE = 2**20
# Text of one structure for a byte of a file, which may be packed, and what Python takes for a line
# beside its characters. Packed XYZ is a fourth to a tenth of its text.
LARGEST_TEXT_RATIO = 64
LINE_BYTES = 64
# Values of an atom: a line has no more, and Properties that name more are damaged.
MAX_COLUMNS = 10_000


@dataclass(frozen=True, slots=True)
class Frame:
    """The text of one structure.

    Attributes:
        line: number of the line that holds the number of atoms.
        comment: the comment line.
        table: one line per atom.
    """

    line: int
    comment: str
    table: list[str]


@dataclass(frozen=True, slots=True)
class Columns:
    """Where each property of an atom line stands.

    Attributes:
        of: property name to (type letter R, I, S or L; first column; number of columns).
        n_columns: of a whole line.
    """

    of: dict[str, tuple[str, int, int]]
    n_columns: int


def read_extxyz(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Structures of an extended (or plain) XYZ file, also compressed (.gz, .bz2, .xz).

    Raises:
        DataError: the file is damaged, naming structure and line.
        UnitError: an unknown unit.
    """
    factors = options.factors()
    wanted = {options.forces_key or "REF_forces", "forces", options.tags_key or "forces"}
    try:
        with open_with_compression(str(path)) as file:
            for index, frame in enumerate(_frames(_Lines(file, path), path)):
                yield _parse(frame, path, index, wanted, options, factors, keys)
    except (OSError, EOFError, UnicodeDecodeError, LZMAError, zlib.error) as error:
        raise unreadable(path, "extended XYZ", error) from error


def _parse(
    frame: Frame,
    path: Path,
    index: int,
    wanted: set[str],
    options: ReadOptions,
    factors: UnitFactors,
    keys: LabelKeys,
) -> Structure:
    try:
        info = _comment(frame.comment)
        columns = _columns(str(info.pop("Properties", "species:S:1:pos:R:3")))
        arrays = _arrays(frame.table, columns, wanted)
        structure = _structure(info, arrays, factors.length)
    # ASE's grammar and the columns meet anything in a damaged line.
    except (
        ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise DataError(
            f"{place(path, index)} (line {frame.line}) is no extended XYZ: {reason_of(error)}."
        ) from error
    results = {
        key: source.pop(key)
        for key, source in (("energy", info), ("forces", arrays))
        if key in source
    }
    label_structure(structure, path, index, info, arrays, results, options, factors, keys)
    if structure.fixed is not None:
        keys.record(path, "fixed atoms", MOVE_MASK)
    return structure


class _Lines:
    """The lines of a file; neither one line nor one structure is more than such a file may hold.

    Attributes:
        held: bytes, about, that the lines since it was set to 0 take.
    """

    def __init__(self, file: IO[str], path: Path) -> None:
        self.held = 0
        self._file = file
        self._path = path
        self._room = max(SMALL_BYTES, LARGEST_TEXT_RATIO * path.stat().st_size)

    def __iter__(self) -> Iterator[str]:
        read = 0
        while line := self._file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise DataError(
                    f"{self._path.name} has a line of more than {MAX_LINE:,} characters, so it is "
                    "damaged or no extended XYZ. Get it again."
                )
            self.held += len(line) + LINE_BYTES
            read += len(line)
            if self.held > self._room:
                raise DataError(
                    f"{self._path.name} has {self._path.stat().st_size} bytes, and one structure "
                    f"of it would take {self.held} as text, or more. It is not read."
                )
            if read > self._room:
                check_ratio(self._path, read, "its text")
            yield line


def _frames(lines: _Lines, path: Path) -> Iterator[Frame]:
    """The text of each structure; blank lines between structures are passed over."""
    line_number, index = 0, 0
    file = iter(lines)
    for header in file:
        lines.held = 0
        line_number += 1
        text = header.strip()
        if not text:
            continue
        if not (text.isdecimal() and int(text) <= MAX_ATOMS):
            way_out = " Try --format ase." if text.startswith("VEC") else ""
            raise DataError(
                f"{path.name}, line {line_number}: a number of atoms must stand where structure "
                f"{index} begins, got {shown(text)!r}. The structure before may have more "
                f"atoms than it says.{way_out}"
            )
        n_atoms = int(text)
        text_lines = list(islice(file, n_atoms + 1))
        if len(text_lines) < n_atoms + 1:
            raise DataError(
                f"{place(path, index)} ends after {max(len(text_lines) - 1, 0)} of {n_atoms} "
                "atoms: the file is cut off. Copy or write it again."
            )
        yield Frame(line_number, text_lines[0], text_lines[1:])
        line_number += n_atoms + 1
        index += 1


def _comment(line: str) -> dict[str, Any]:
    if not line.strip():
        return {}
    parsed: dict[str, Any] = key_val_str_to_dict(line)  # type: ignore[no-untyped-call]
    return parsed


@lru_cache(maxsize=64)
def _columns(properties: str) -> Columns:
    """Parse `Properties=species:S:1:pos:R:3`."""
    parts = properties.split(":")
    found: dict[str, tuple[str, int, int]] = {}
    start = 0
    for name, kind, count in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if kind not in ("R", "I", "S", "L"):
            raise ValueError(f"Properties: type {kind!r} of {name!r} is none of R, I, S, L")
        n_columns = int(count)
        if not 0 < n_columns <= MAX_COLUMNS - start:
            raise ValueError(f"Properties: {name!r} has {shown(count)} columns")
        found[name] = (kind, start, n_columns)
        start += n_columns
    return Columns(found, start)


def _arrays(
    table: list[str], columns: Columns, wanted: set[str]
) -> dict[str, list[str] | FloatArray]:
    """The columns that are read: species as text, a mask as flags, the others as numbers."""
    width = columns.n_columns
    tokens = "".join(table).split()
    if len(tokens) != len(table) * width:
        rows = [line.split() for line in table]
        for place_in_frame, row in enumerate(rows):
            if len(row) < width:
                raise ValueError(
                    f"atom {place_in_frame} has {len(row)} columns, Properties names {width}"
                )
        # As ASE does: columns that Properties does not name are left alone.
        tokens = [token for row in rows for token in row[:width]]
    arrays: dict[str, list[str] | FloatArray] = {}
    for name, (kind, start, count) in columns.of.items():
        if name in ("species", "Z"):
            arrays[name] = tokens[start::width]
        elif name == MOVE_MASK and kind == "L":
            flags = [tokens[c::width] for c in range(start, start + count)]
            arrays[name] = np.array([[flag[0] in "Tt1" for flag in axis] for axis in flags]).T
        elif name == "pos" or name in wanted:
            if kind not in ("R", "I"):
                raise ValueError(f"{name} must be numbers (R), Properties says {kind}")
            values = [list(map(float, tokens[c::width])) for c in range(start, start + count)]
            arrays[name] = np.ascontiguousarray(np.array(values).T)
    return arrays


def _structure(info: dict[str, Any], arrays: dict[str, Any], length_factor: float) -> Structure:
    """Numbers, positions, cell and pbc, taken out of `info` and `arrays`."""
    lattice = info.pop("Lattice", None)
    # A file with a lattice and no pbc is periodic along all axes; without a lattice, along none.
    pbc = np.broadcast_to(np.array(info.pop("pbc", lattice is not None)), (3,))
    moves = arrays.pop(MOVE_MASK, None)
    if pbc.dtype.kind not in "bi":
        raise ValueError(f"pbc must be T or F for three axes, got {pbc.tolist()}")
    cell = np.zeros((3, 3)) if lattice is None else np.array(lattice.T, dtype=np.float64)
    return Structure(
        structure_id="",
        atomic_numbers=_numbers(arrays.pop("species", None), arrays.pop("Z", None)),
        positions=arrays.pop("pos") * length_factor,
        cell=cell * length_factor,
        pbc=pbc.astype(np.bool_),
        fixed=None if moves is None else ~moves.any(axis=1),
    )


def _numbers(symbols: list[str] | None, written: list[str] | None) -> IntArray:
    if written is not None:
        return np.array(written, dtype=np.int64)
    if symbols is None:
        raise ValueError("Properties names neither species nor Z")
    try:
        return np.array([NUMBER_OF_SYMBOL[symbol.capitalize()] for symbol in symbols], np.int64)
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is no element") from error
