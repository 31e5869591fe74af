"""What is taken out of a store: which structures, in dataset order, and which fields of a teacher.

Reads each block once per window of structures. Invariant: structures come in the order of the
dataset, each with its own rows, whatever the order of the store.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from kdcache.errors import ConfigError, StoreError, did_you_mean
from kdcache.fields import FieldSpec
from kdcache.store import Store
from kdcache.store.codecs import FLOATS
from kdcache.store.location import local_path
from kdcache.store.records import iterate_structures
from kdcache.structures import IntArray, Structure

Array = npt.NDArray[Any]

# Values held at once: 256 MB in float64.
VALUES_AT_ONCE = 2**25
PREDICTIONS = ("energy", "forces", "atomic_energy")
# What files call something else, and a teacher's field could be called, too.
TAKEN_NAMES = ("structure_id", "config_type", "atomic_numbers", "move_mask")


@dataclass(frozen=True, slots=True)
class Taken:
    """One structure on its way out.

    Attributes:
        structure: with its labels.
        fields: of the teacher by name, [n_rows, *shape], features in float32 whatever the codec;
            None where the teacher failed on the structure.
    """

    structure: Structure
    fields: Mapping[str, Array] | None


@dataclass(frozen=True)
class Selection:
    """Structures of a store and fields of one of its teachers; made by `select`.

    Attributes:
        store: an open store.
        rows: of the structures, in dataset order.
        teacher: name of the teacher; "" for none.
        specs: of its fields.
    """

    store: Store
    rows: IntArray
    teacher: str
    specs: tuple[FieldSpec, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prefix(self) -> str:
        """What the teacher's fields are called by in files: letters, digits, underscores."""
        return re.sub(r"[^A-Za-z0-9]+", "_", self.teacher)

    def __iter__(self) -> Iterator[Taken]:
        """Structures one by one, in bounded memory.

        Raises:
            StoreError: a damaged shard, or the store was published without its structures.
        """
        group = f"teachers/{self.teacher}"
        failed = set(self.store.failures(self.teacher).row.tolist()) if self.teacher else set()
        for window in self._windows():
            columns = {spec.name: self._rows(f"{group}/{spec.name}", window) for spec in self.specs}
            structures = iterate_structures(self.store, window)
            for place, structure in enumerate(structures):
                fields = {name: column[place] for name, column in columns.items()}
                yield Taken(structure, None if int(window[place]) in failed else fields)

    def _windows(self) -> Iterator[IntArray]:
        width = 10 + sum(spec.row_size for spec in self.specs)
        ends = np.cumsum(self.store.index.n_atoms[self.rows] * width)
        start = 0
        while start < len(self.rows):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + VALUES_AT_ONCE, side="right"))
            yield self.rows[start : max(start + 1, stop)]
            start = max(start + 1, stop)

    def _rows(self, name: str, window: IntArray) -> list[Array]:
        """Rows of a field for every structure of a window, in its order."""
        spec, index = self.store.spec(name), self.store.index
        counts = self.store.plans[name.rpartition("/")[0]].counts(spec.level)
        found: list[Array] = [np.empty(0)] * len(window)
        by_block = np.argsort(index.block[window], kind="stable")
        cuts = np.flatnonzero(np.diff(index.block[window[by_block]])) + 1
        for places in np.split(by_block, cuts):
            block = int(index.block[window[places[0]]])
            values = self.store.read(name, [block])
            if spec.dtype in FLOATS and spec.codec != "exact":
                values = values.astype(np.float32, copy=False)
            rows = self.store.plan.block_structures(block)
            ends = np.cumsum(counts[rows])
            for place in places.tolist():
                own = int(window[place]) - rows.start
                stop = int(ends[own])
                found[place] = values[stop - int(counts[rows][own]) : stop].copy()
        return found


def select(
    store: Store,
    *,
    split: str | None = None,
    teacher: str | None = None,
    fields: Sequence[str] | None = None,
) -> Selection:
    """Structures and fields to take out of a store.

    Args:
        store: an open store.
        split: only structures of this split; None for all.
        teacher: whose fields are taken; None for none.
        fields: which; None for its energies and forces, as far as the store has them.

    Raises:
        StoreError: no such teacher, or no structure of this split.
        ConfigError: a field it does not have, that belongs to edges or cannot be named in a file;
            fields without a teacher.
    """
    rows = store.index.source_order
    if split is not None:
        rows = rows[np.asarray(store.index.split[rows] == split)]
        if not len(rows):
            splits = sorted({str(name) for name in store.index.split} - {""})
            raise StoreError(
                f"{store.path} has no structures of split {split!r}: {did_you_mean(split, splits)}"
            )
    if teacher is None:
        if fields:
            raise ConfigError("Fields are a teacher's. Name it with --teacher.")
        return Selection(store, rows, "", ())
    if teacher not in store.teachers:
        raise StoreError(
            f"{store.path} has no teacher {teacher}: {did_you_mean(teacher, store.teachers)}"
        )
    known = store.fields(f"teachers/{teacher}")
    chosen = [name for name in PREDICTIONS if name in known] if fields is None else list(fields)
    for name in chosen:
        if name not in known:
            raise ConfigError(f"{teacher} has no field {name}: {did_you_mean(name, known)}")
        if known[name].level == "edge" or known[name].dtype not in FLOATS:
            raise ConfigError(
                f"{teacher}/{name} is kept by {known[name].level} as {known[name].dtype}; only "
                f"floating fields of structures and atoms are exported. Any Zarr reader opens the "
                f"store itself (see kdcache/store/FORMAT.md)."
            )
    selection = Selection(store, rows, teacher, tuple(known[name] for name in chosen))
    for name in chosen:
        if f"{selection.prefix}_{name}" in TAKEN_NAMES:
            raise ConfigError(
                f"{teacher}/{name} would be called {selection.prefix}_{name} in a file, where that "
                f"means something else. Leave it out (--fields)."
            )
    return selection


@contextmanager
def new_output(path: str | Path) -> Iterator[Path]:
    """A path to write to, that takes its name when all is written; nothing is left of a failure.

    Raises:
        StoreError: something is there already, or an address.
    """
    target = local_path(path, "an export")
    if target.exists():
        raise StoreError(f"{target} exists, and nothing is overwritten. Name another path.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid4().hex}.partial")
    try:
        yield partial
        if target.exists():
            raise StoreError(f"{target} was made by another program meanwhile, and is kept.")
        os.rename(partial, target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
