"""What a reader is, and what a user may say about how to read.

Names and types only. Invariant: a reader yields structures one at a time, in file order, in eV, Å
and eV/Å, and holds no more than a bounded part of its file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kdcache.errors import DataError, UnitError, reason_of
from kdcache.readers.units import UnitFactors, unit_factors
from kdcache.structures import Structure

# Bytes in memory for a byte of a file: a file of megabytes must not fill a machine. Positions and
# forces hardly compress, so honest datasets stay below 20. What is small in any case is let be.
LARGEST_RATIO = 256
SMALL_BYTES = 2**24

if TYPE_CHECKING:
    from kdcache.readers.labels import LabelKeys


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How the files of a dataset are read.

    Attributes:
        format: reader by name, or "package.module:function" typed by a person; None chooses by
            the file's suffix.
        energy_key: key, array or column of the energy; None tries REF_energy, then the
            calculator's (extended XYZ, ASE), or the usual names of the format.
        forces_key: likewise.
        energy_unit: None is eV where the format says so (extended XYZ, ASE); npz, HDF5 and Parquet
            files carry no unit and must be given one.
        forces_unit: None is the energy unit per the length unit.
        length_unit: of positions and cells; None is Å.
        unlabelled: accept structures without energy or forces.
        group_key: what errors are reported by; None tries config_type, then group.
        split_key: names train, val or test; None takes "split" where it holds only such names;
            "none" reads no split.
        id_key: the structure's id; None numbers structures as "<file stem>:<place>", or takes the
            format's own ids.
        tags_key: per-atom integers that are Open Catalyst tags (0 below the surface, 1 surface,
            2 adsorbate); None reads them from Open Catalyst's own files alone: elsewhere, as in
            slabs that ASE builds, tags often mean layers.
        allow_pickle: read formats that consist of Python pickles (Open Catalyst LMDB).
    """

    format: str | None = None
    energy_key: str | None = None
    forces_key: str | None = None
    energy_unit: str | None = None
    forces_unit: str | None = None
    length_unit: str | None = None
    unlabelled: bool = False
    group_key: str | None = None
    split_key: str | None = None
    id_key: str | None = None
    tags_key: str | None = None
    allow_pickle: bool = False

    def factors(self) -> UnitFactors:
        """Unit factors with eV, Å and eV/Å where nothing was said.

        Raises:
            UnitError: an unknown unit.
        """
        return unit_factors(self.energy_unit or "eV", self.forces_unit, self.length_unit or "Å")

    def stated_factors(self, path: Path) -> UnitFactors:
        """Unit factors for a format that carries no units.

        Raises:
            UnitError: no energy unit was given, or an unknown one.
        """
        if self.energy_unit is None:
            raise UnitError(
                f"{path.name} does not say its units: rMD17 files are in kcal/mol, ANI files in "
                "Hartree, others in eV. Name the unit of the energies (--energy-unit kcal/mol)."
            )
        return self.factors()


class Reader(Protocol):
    """Yield the structures of one file; a function of this form is a reader.

    Named in the entry-point group `kdcache.readers`. A structure's id may be left "": the dataset
    then numbers it. The dataset checks every structure, so a reader need not.
    """

    def __call__(
        self, path: Path, options: ReadOptions, keys: LabelKeys, /
    ) -> Iterator[Structure]: ...


def place(path: Path, index: int) -> str:
    """How an error names a structure: "train.extxyz, structure 41"."""
    return f"{path.name}, structure {index}"


def unreadable(path: Path, format_name: str, error: Exception) -> DataError:
    """The error for a file another library cannot read, in one line."""
    return DataError(f"{path.name} cannot be read as {format_name}: {reason_of(error)}.")


def shown(text: str, longest: int = 40) -> str:
    """The beginning of a text that a file holds, fit for an error line."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def check_ratio(path: Path, n_bytes: int, what: str) -> None:
    """Refuse a small file that stands for a large one.

    Args:
        path: of the file.
        n_bytes: what it would take, unpacked.
        what: of it would take that, for the message.

    Raises:
        DataError: more than `LARGEST_RATIO` times the bytes of the file.
    """
    size = path.stat().st_size
    if n_bytes > max(LARGEST_RATIO * size, SMALL_BYTES):
        raise DataError(
            f"{path.name} has {size} bytes, and {what} would take {n_bytes}: more than "
            f"{LARGEST_RATIO} times as many. It is not read; if it is honest, store it with less "
            "compression."
        )
