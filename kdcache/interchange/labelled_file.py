"""The Zarr layout of nvalchemi-toolkit as a dataset: its structures, and what a teacher said.

Owns the checks of the layout and reading by row; what becomes of it is `labelled`'s. Invariant: a
file whose arrays do not count the same structures is refused before anything is read of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors

from kdcache.errors import DataError, did_you_mean
from kdcache.fields import ENERGY, FORCES, Codec, FieldSpec
from kdcache.interchange.nvalchemi import FIELD_OF_SIGNAL
from kdcache.readers import ReadOptions
from kdcache.readers.interface import LARGEST_RATIO, SMALL_BYTES, place, unreadable
from kdcache.readers.labels import LabelKeys
from kdcache.store.files import disk_size
from kdcache.structures import IntArray, Structure

Array = npt.NDArray[Any]

# The reader below, as --format names it.
FORMAT = "kdcache.interchange.labelled_file:read_labelled"
EMBEDDING = "teacher_node_embeddings"
ATOMS_AT_ONCE = 65_536


def read_labelled(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Structures of a Zarr group of nvalchemi-toolkit, with its energies and forces (eV, Å).

    A reader as `kdcache.readers.Reader` describes it. Samples that were deleted are left out.

    Raises:
        DataError: no such layout, or arrays that do not fit each other.
    """
    file = LabelledFile(path)
    labels = [name for name in ("energy", "forces") if name in file.levels]
    for name in labels:
        keys.record(path, name, name)
    factors = options.factors()
    ends = np.cumsum(np.diff(file.atoms_ptr)[file.samples])
    start, index = 0, 0
    while start < len(file.samples):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + ATOMS_AT_ONCE, side="right")))
        samples = file.samples[start:stop]
        arrays = {name: file.rows(name, samples) for name in ("atomic_numbers", "positions")}
        boxes = {n: file.rows(n, samples) for n in file.levels if n in ("cell", "pbc")}
        arrays |= {name: file.rows(name, samples) for name in labels}
        bounds = np.cumsum(np.diff(file.atoms_ptr)[samples])
        for k, end in enumerate(bounds.tolist()):
            atoms = slice(int(bounds[k - 1]) if k else 0, end)
            structure = _structure(arrays, boxes, k, atoms, place(path, index))
            structure.positions *= factors.length
            structure.cell *= factors.length
            if structure.energy is not None:
                structure.energy *= factors.energy
            if structure.forces is not None:
                structure.forces *= factors.forces
            yield structure
            index += 1
        start = stop


class LabelledFile:
    """A Zarr group of nvalchemi-toolkit, its layout checked.

    Attributes:
        path: of the group.
        atoms_ptr: [n_samples + 1] first atom of each sample, deleted ones among them.
        samples: numbers of the samples that are not deleted.
        levels: "atom" or "system" of every array there is, by name; edges are not read.

    Raises:
        DataError: no such layout, or arrays that do not fit it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._room = max(SMALL_BYTES, LARGEST_RATIO * disk_size(path))
        try:
            self._root = zarr.open_group(path, mode="r")
            fields: Any = self._root.attrs["fields"]
            self.atoms_ptr: IntArray = self._array("meta/atoms_ptr").astype(np.int64)
            mask = self._array("meta/samples_mask").astype(bool)
        except (OSError, KeyError, ValueError, TypeError, zarr.errors.BaseZarrError) as error:
            raise unreadable(path, "Zarr of nvalchemi-toolkit", error) from error
        n_samples = len(self.atoms_ptr) - 1
        if n_samples < 1 or self.atoms_ptr[0] != 0 or (np.diff(self.atoms_ptr) < 1).any():
            raise DataError(f"{path.name}: meta/atoms_ptr does not count the atoms of structures.")
        if len(mask) != n_samples:
            raise DataError(
                f"{path.name}: meta/samples_mask has {len(mask)} entries for {n_samples} "
                f"structures. It was left half-written; write it again."
            )
        self.samples: IntArray = np.flatnonzero(mask)
        self.levels: dict[str, str] = {}
        self._groups: dict[str, str] = {}
        rows = {"atom": int(self.atoms_ptr[-1]), "system": n_samples}
        for group in ("core", "custom"):
            for name, level in dict(fields.get(group, {})).items():
                if level not in rows:
                    continue
                array = self._opened(f"{group}/{name}")
                if array.shape[:1] != (rows[level],):
                    raise DataError(
                        f"{path.name}: {group}/{name} has shape {list(array.shape)}, {rows[level]} "
                        f"rows are expected of level {level}. Rows would meet others' structures."
                    )
                self.levels[name], self._groups[name] = level, group
        missing = [name for name in ("atomic_numbers", "positions") if name not in self.levels]
        if missing:
            raise DataError(f"{path.name} has no {' and no '.join(missing)}: no structures.")

    def teacher_specs(self, embedding: str, codec: Codec) -> dict[str, FieldSpec]:
        """Fields of a store by the array they are read from.

        Raises:
            DataError: nothing of a teacher there, or of another shape than its name says.
        """
        atomic = FieldSpec("atomic_energy", "atom", (), "float64", "eV")
        wanted = {"teacher_energy": ENERGY, "teacher_forces": FORCES}
        wanted["teacher_atomic_energies"] = atomic
        specs = {name: spec for name, spec in wanted.items() if name in self.levels}
        if embedding in self.levels:
            shape = self._opened(f"{self._groups[embedding]}/{embedding}").shape[1:]
            specs[embedding] = FieldSpec(FIELD_OF_SIGNAL[EMBEDDING], "atom", shape, codec=codec)
        elif embedding != EMBEDDING:
            raise DataError(
                f"{self.path.name} has no array {embedding}: {did_you_mean(embedding, self.levels)}"
            )
        if not specs:
            raise DataError(
                f"{self.path.name} holds no labels of a teacher (it has "
                f"{', '.join(sorted(self.levels))}). Import it as a plain dataset with --format "
                f"{FORMAT}, or name an --embedding."
            )
        for name, spec in specs.items():
            array = self._opened(f"{self._groups[name]}/{name}")
            width = int(np.prod(array.shape[1:], dtype=np.int64))
            level = "atom" if spec.level == "atom" else "system"
            if array.dtype.kind != "f" or (width, self.levels[name]) != (spec.row_size, level):
                raise DataError(
                    f"{self.path.name}: {name} is {array.dtype} {list(array.shape)} of level "
                    f"{self.levels[name]}; {spec.row_size} floating values per {level} are "
                    f"expected. It is not what its name says."
                )
        return specs

    @property
    def left_out(self) -> list[str]:
        """A teacher's arrays that a store is not given: neither energies, forces nor a feature."""
        known = (*FIELD_OF_SIGNAL, EMBEDDING)
        return sorted(n for n in self.levels if n.startswith("teacher_") and n not in known)

    def rows(self, name: str, samples: IntArray) -> Array:
        """Rows of some samples, in their order; [n_rows, *shape], single trailing ones cut off.

        Raises:
            DataError: the array cannot be read.
        """
        array = self._opened(f"{self._groups[name]}/{name}")
        places = samples
        if self.levels[name] == "atom":
            counts = np.diff(self.atoms_ptr)[samples]
            ends = np.cumsum(counts)
            places = np.repeat(self.atoms_ptr[samples] - (ends - counts), counts)
            places = places + np.arange(len(places))
        # Ascending, each chunk is decoded once.
        order = np.argsort(places, kind="stable")
        try:
            found = np.asarray(array.oindex[places[order]])
        except (OSError, ValueError, RuntimeError) as error:
            raise unreadable(self.path, f"Zarr ({name})", error) from error
        values = np.empty_like(found)
        values[order] = found
        while values.ndim > 1 and values.shape[-1] == 1 and name not in ("cell", "pbc"):
            values = values[..., 0]
        return values

    def _array(self, name: str) -> Array:
        return np.asarray(self._opened(name)[:])

    def _opened(self, name: str) -> Any:
        array = self._root[name]
        if not isinstance(array, zarr.Array) or array.dtype.kind not in "fiub":
            raise DataError(f"{self.path.name}: {name} is no array of numbers.")
        # A chunk is unpacked whole, and may be larger than what is in it.
        n_bytes = max(map(math.prod, (array.shape, array.chunks))) * array.dtype.itemsize
        if n_bytes > self._room:
            raise DataError(
                f"{self.path.name}: {name} would take {n_bytes} bytes, at most {self._room} are "
                f"expected of a group of its size. It is not read; if it is honest, write it with "
                f"less compression."
            )
        return array


def _structure(
    arrays: dict[str, Array], boxes: dict[str, Array], k: int, atoms: slice, where: str
) -> Structure:
    cell = boxes["cell"][k] if "cell" in boxes else np.zeros((3, 3))
    pbc = boxes["pbc"][k] if "pbc" in boxes else np.zeros(3, bool)
    if cell.size != 9 or pbc.size != 3:
        raise DataError(f"{where}: cell and pbc have {cell.size} and {pbc.size} values, not 9, 3.")
    energy = float(arrays["energy"][k]) if "energy" in arrays else np.nan
    forces = arrays["forces"][atoms].astype(np.float64) if "forces" in arrays else None
    return Structure(
        structure_id="",
        atomic_numbers=arrays["atomic_numbers"][atoms].astype(np.int64),
        positions=arrays["positions"][atoms].astype(np.float64),
        cell=cell.reshape(3, 3).astype(np.float64),
        pbc=pbc.reshape(3).astype(bool),
        energy=None if np.isnan(energy) else energy,
        forces=None if forces is None or np.isnan(forces).any() else forces,
    )
