"""Errors of the models of a sweep, and of the teacher as the store remembers it.

Invariant: all runs of a sweep are measured on the same structures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from kdcache.checkpoint import load_potential
from kdcache.config import DataConfig, StudentConfig
from kdcache.devices import batch_atoms, find_device
from kdcache.errors import DataError
from kdcache.evaluate import Metrics, Predictions, predict_batches, predict_structures
from kdcache.models.potential import Potential
from kdcache.readers import ReadOptions, read_structures
from kdcache.selection import select
from kdcache.store import Store
from kdcache.stream.neighbors import further_neighbors, neighbors_for
from kdcache.stream.reader import WindowReader, sequential
from kdcache.structures import Batch, IntArray


@dataclass(frozen=True, slots=True)
class Target:
    """What errors are measured on.

    Attributes:
        split: of the store; not read where there are files.
        files: labelled structures instead.
        read: how the files are read.
    """

    split: Literal["val", "test"] = "val"
    files: tuple[str, ...] = ()
    read: ReadOptions = field(default_factory=ReadOptions)

    @property
    def name(self) -> str:
        """How a report calls it."""
        return ", ".join(Path(file).name for file in self.files) or f"split {self.split}"

    def identity(self, store: Store) -> list[object]:
        """What an evaluation depends on beside the model, as JSON values."""
        if not self.files:
            return [self.split, store.manifest.root_digest]
        stats = [(path, path.stat()) for path in read_structures(self.files, self.read).paths]
        return [[str(path), status.st_size, status.st_mtime_ns] for path, status in stats]


def rows_of_split(store: Store, split: Literal["val", "test"], settings: DataConfig) -> IntArray:
    """Labelled rows of a split, ascending; for "val", those a run of these settings watches.

    Raises:
        DataError: there are none.
    """
    rows: IntArray
    if split == "val":
        rows = select(store, settings).validation
    else:
        rows = np.flatnonzero(np.asarray(store.index.split) == split)
        if len(rows):
            blocks = np.unique(store.index.block[rows])
            energy = np.full(len(store), np.nan)
            for block in blocks:
                here = store.plan.block_structures(int(block))
                energy[here] = store.read("structures/energy", [int(block)])
            rows = rows[np.isfinite(energy[rows])]
    if not len(rows):
        raise DataError(
            f"{store.path} has no labelled structures of split {split} to measure errors on. Name "
            f"another split, or files (--data)."
        )
    return rows


def evaluate_run(
    run: Path, store: Store, config: StudentConfig, target: Target, graph_cache: Path
) -> Metrics:
    """Errors of the kept model of a run."""
    device = str(find_device(config.training.device, "training.device"))
    potential = load_potential(run, device=device)
    free = config.loss.free_atoms_only
    if target.files:
        structures = read_structures(target.files, target.read)
        found = predict_structures(potential, structures, free_atoms_only=free)
        return found.metrics()
    rows = rows_of_split(store, target.split, config.data)
    batches = _batches(store, rows, potential, graph_cache)
    return predict_batches(potential, batches, free_atoms_only=free).metrics()


def _batches(
    store: Store, rows: IntArray, potential: Potential, graph_cache: Path
) -> Iterator[Batch]:
    reader = WindowReader(
        store,
        neighbors_for(store, potential.graph_rule, graph_cache),
        further_neighbors(store, potential.further_graphs, graph_cache),
        references=potential.references,
    )
    device = next(potential.parameters()).device
    return sequential(reader, rows, batch_atoms(None, device))


def teacher_errors(
    store: Store, target: Target, settings: DataConfig, free_atoms_only: bool
) -> dict[str, Metrics]:
    """Errors of the teachers whose energies and forces the store keeps, without running them.

    Returns:
        By name; empty where errors are measured on files.
    """
    names = [
        name
        for name in store.teachers
        if not target.files and {"energy", "forces"} <= set(store.fields(f"teachers/{name}"))
    ]
    if not names:
        return {}
    rows = rows_of_split(store, target.split, settings)
    return {name: _stored(store, rows, name, free_atoms_only).metrics() for name in names}


def _stored(store: Store, rows: IntArray, teacher: str, free_atoms_only: bool) -> Predictions:
    """A teacher's values beside the labels of some rows."""
    wanted = np.zeros(len(store), bool)
    wanted[rows] = True
    parts: dict[str, list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]]] = {}
    free = []
    for block in np.unique(store.index.block[rows]).tolist():
        here = wanted[store.plan.block_structures(block)]
        n_atoms = store.index.n_atoms[store.plan.block_structures(block)]
        atoms = np.repeat(here, n_atoms)
        for group in ("structures", f"teachers/{teacher}"):
            for quantity, chosen in (("energy", here), ("forces", atoms)):
                values = store.read(f"{group}/{quantity}", [block])[chosen].astype(np.float64)
                parts.setdefault(f"{group}/{quantity}", []).append(values)
        if free_atoms_only and "fixed" in store.fields("structures"):
            free.append(~store.read("structures/fixed", [block])[atoms])
    energy, forces, true_energy, true_forces = (
        np.concatenate(parts[f"{group}/{quantity}"])
        for group in (f"teachers/{teacher}", "structures")
        for quantity in ("energy", "forces")
    )
    n_atoms = store.index.n_atoms[rows]
    return Predictions(
        n_atoms=n_atoms,
        energy=energy,
        true_energy=true_energy,
        forces=forces,
        true_forces=true_forces,
        groups=[""] * len(rows),
        free=np.concatenate(free) if free else None,
    )
