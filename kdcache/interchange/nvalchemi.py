"""The Zarr layout of nvalchemi-toolkit: `meta` with pointers and masks, `core` with flat arrays.

Written from the published layout (nvalchemi-toolkit 0.2 and 0.3), with zarr-python alone.
Invariant: structure i of a file is atoms atoms_ptr[i] … atoms_ptr[i + 1] − 1 of every array of
level "atom" and row i of level "system".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

from kdcache.interchange.selection import Selection, Taken, new_output
from kdcache.progress import Progress, silent

Array = npt.NDArray[Any]
Precision = Literal["float32", "float64"]

# What its label_dataset calls a teacher's signals. Others are called teacher_<field>.
FIELD_OF_SIGNAL = {
    "teacher_energy": "energy",
    "teacher_forces": "forces",
    "teacher_atomic_energies": "atomic_energy",
    "teacher_node_embeddings": "node",
}
SIGNAL_OF_FIELD = {field: signal for signal, field in FIELD_OF_SIGNAL.items()}
ROWS_PER_CHUNK = 4096
ATOMS_AT_ONCE = 65_536


def write_nvalchemi(
    selection: Selection,
    path: str | Path,
    *,
    precision: Precision = "float64",
    progress: Progress = silent,
) -> Path:
    """Write structures, labels and a teacher's fields as its AtomicDataZarrReader reads them.

    A missing label, and what a teacher failed on, is NaN there. Its layout has no place for ids,
    groups, splits and weights.

    Args:
        selection: what is written.
        path: of a new Zarr group.
        precision: of all but features, which are float32; its reader casts every field to that of
            the positions.
        progress: shows structures.

    Returns:
        The path.

    Raises:
        StoreError: something is there already, or a shard is damaged.
    """
    with new_output(path) as partial:
        root = zarr.open_group(partial, mode="w", zarr_format=3)
        n_atoms = selection.store.index.n_atoms[selection.rows]
        ends = np.concatenate([[0], np.cumsum(n_atoms)]).astype(np.int64)
        _write_meta(root, ends)
        fields = _Fields(root, selection, precision, int(ends[-1]))
        with progress("export", len(selection), "structures") as advance:
            first = 0
            for some in _runs(selection):
                fields.write(some, first, int(ends[first]))
                first += len(some)
                advance(len(some))
        root.attrs["num_samples"] = len(selection)
        root.attrs["fields"] = {"core": fields.levels, "custom": {}}
    return Path(path)


class _Fields:
    """The arrays of `core`, filled from the first row on."""

    def __init__(
        self, root: zarr.Group, selection: Selection, precision: Precision, n_atoms: int
    ) -> None:
        self._core = root.create_group("core")
        root.create_group("custom")
        self._rows = {"atom": n_atoms, "system": len(selection)}
        self._selection = selection
        self.levels: dict[str, str] = {}
        self._create("atomic_numbers", "atom", (), "int64")
        self._create("positions", "atom", (3,), precision)
        self._create("cell", "system", (3, 3), precision)
        self._create("pbc", "system", (3,), "bool")
        if selection.store.manifest.dataset.n_labelled:
            self._create("energy", "system", (1,), precision)
            self._create("forces", "atom", (3,), precision)
        for spec in selection.specs:
            level = "atom" if spec.level == "atom" else "system"
            shape = spec.shape if level == "atom" or spec.shape else (1,)
            dtype = precision if spec.unit else "float32"
            self._create(signal(spec.name), level, shape, dtype)

    def write(self, some: list[Taken], first: int, first_atom: int) -> None:
        """Structures from number `first` on."""
        for name, level in self.levels.items():
            array: Any = self._core[name]
            shape = (-1, *array.shape[1:])
            rows = np.concatenate([self._of(name, taken).reshape(shape) for taken in some])
            start = first_atom if level == "atom" else first
            array[start : start + len(rows)] = rows

    def _create(self, name: str, level: str, shape: tuple[int, ...], dtype: str) -> None:
        self._core.create_array(
            name, shape=(self._rows[level], *shape), chunks=(ROWS_PER_CHUNK, *shape), dtype=dtype
        )
        self.levels[name] = level

    def _of(self, name: str, taken: Taken) -> Array:
        structure = taken.structure
        if name == "energy":
            return np.array([[np.nan if structure.energy is None else structure.energy]])
        if name == "forces" and structure.forces is None:
            return np.full((structure.n_atoms, 3), np.nan)
        if name in ("cell", "pbc"):
            return np.asarray(getattr(structure, name))[None]
        if name in ("atomic_numbers", "positions", "forces"):
            return np.asarray(getattr(structure, name))
        for spec in self._selection.specs:
            if signal(spec.name) == name and taken.fields is not None:
                return taken.fields[spec.name]
        n_rows = structure.n_atoms if self.levels[name] == "atom" else 1
        shape: tuple[int, ...] = self._core[name].shape[1:]  # type: ignore[union-attr]
        return np.full((n_rows, *shape), np.nan)


def signal(field: str) -> str:
    """What its programs call a field of a teacher."""
    return SIGNAL_OF_FIELD.get(field, f"teacher_{field}")


def _runs(selection: Selection) -> Iterator[list[Taken]]:
    some: list[Taken] = []
    n_atoms = 0
    for taken in selection:
        some.append(taken)
        n_atoms += taken.structure.n_atoms
        if n_atoms >= ATOMS_AT_ONCE:
            yield some
            some, n_atoms = [], 0
    if some:
        yield some


def _write_meta(root: zarr.Group, ends: Array) -> None:
    meta = root.create_group("meta")
    n_structures = len(ends) - 1
    for name, values in (
        ("atoms_ptr", ends),
        # No edges: which ones a model needs follows from its cutoff.
        ("edges_ptr", np.zeros(n_structures + 1, np.int64)),
        ("samples_mask", np.ones(n_structures, bool)),
        ("atoms_mask", np.ones(int(ends[-1]), bool)),
        ("edges_mask", np.ones(0, bool)),
    ):
        meta.create_array(name, data=values)
