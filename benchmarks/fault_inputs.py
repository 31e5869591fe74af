"""Faults of what is read: files that change during an import, clocks that jump."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fault_rows import Row, times

from kdcache.errors import DataError
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.store import read_manifest
from tests.chain import SMALL, dump, make_store, make_teacher, structures, write_xyz
from tests.faults.changing import CHANGES, During, long_ago
from tests.faults.clock import jumping_clock

N_STRUCTURES = 200


def inputs(folder: Path, scale: float) -> Iterator[Row]:
    """A file that is written to while it, or a later one, is read."""
    rng = np.random.default_rng(3)
    options = ImportOptions(**SMALL)  # type: ignore[arg-type]
    for change, (work, reason) in CHANGES.items():
        row = Row(f"an input file {change} during an import: refused by name")
        for k in range(times(20, scale)):
            place = folder / f"{change}{k}"
            place.mkdir()
            files = [place / "a.extxyz", place / "b.extxyz"]
            write_xyz(files[0], structures(N_STRUCTURES, k), split=False)
            write_xyz(files[1], structures(20, k + 1), split=False)
            long_ago(place)
            during: Any = During(
                "read", int(rng.integers(1, N_STRUCTURES + 10)), partial(work, files[0])
            )
            try:
                import_dataset(files, place / "store.zarr", options, during)
                survived, said = False, "imported"
            except DataError as error:
                said = str(error)
                survived = (
                    f"{files[0]} changed while" in said and not (place / "store.zarr").exists()
                )
            row.count(survived, f"{reason}: {said}")
        yield row


def clocks(folder: Path, scale: float) -> Iterator[Row]:
    """Every look at the clock finds it within twenty years of the truth."""
    row = Row("the clock jumps to and fro during import and dump: same digests")
    looks = 0

    def made(place: Path) -> str:
        place.mkdir()
        store = make_store(place, 12)
        dump(store, make_teacher(place))
        return read_manifest(store.files).root_digest

    expected = made(folder / "steady")
    for k in range(times(10, scale)):
        with jumping_clock() as seen:
            found = made(folder / f"jumping{k}")
        looks += len(seen)
        row.count(found == expected, k)
    row.note = f"{looks} looks at the clock"
    yield row


FAULTS = [inputs, clocks]
