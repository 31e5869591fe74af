"""A clock that is set forwards and backwards, and files from the future: the same store."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from kdcache.ingest import ImportOptions, import_dataset
from kdcache.progress import Advance, silent
from kdcache.store import open_store, read_manifest, verify_store
from tests.chain import SMALL, dump, make_store, make_teacher, structures, write_xyz
from tests.faults.clock import YEARS, jumping_clock
from tests.store.sample import files_of

pytestmark = pytest.mark.fault


class Aging:
    """A progress bar that gives every file below a folder a time of its own, past or future."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rng = folder, np.random.default_rng()

    def __call__(self, label: str, total: int | None, unit: str) -> Aging:
        return self if label == "write" else silent(label, total, unit)  # type: ignore[return-value]

    def __enter__(self) -> Advance:
        return self.advance

    def __exit__(self, *raised: object) -> None: ...

    def advance(self, n: int = 1, /, note: str = "") -> None:
        for file in self.folder.rglob("*"):
            stamp = time.time() + self.rng.uniform(0, YEARS)
            os.utime(file, (stamp, stamp))


def made(folder: Path) -> Path:
    """A store and what a teacher says of it, the dataset's file from the future."""
    folder.mkdir()
    teacher = make_teacher(folder)
    store = make_store(folder, 12)
    dump(store, teacher)
    return Path(str(store.path))


def test_a_clock_that_jumps_changes_no_byte_but_the_date(
    tmp_path: Path,
) -> None:
    with jumping_clock() as seen:
        found = made(tmp_path / "jumping")
    assert len(set(seen)) > 1
    expected = made(tmp_path / "steady")
    dates = {read_manifest(store).created for store in (found, expected)}
    assert len(dates) == 2
    assert read_manifest(found).root_digest == read_manifest(expected).root_digest
    ours, theirs = (
        {name: content for name, content in files_of(store).items() if name != "manifest.json"}
        for store in (found, expected)
    )
    assert ours == theirs
    assert verify_store(found).problems == []


def test_files_from_the_future_are_read_like_any_other(tmp_path: Path) -> None:
    data = write_xyz(tmp_path / "data.extxyz", structures(12), split=False)
    options = ImportOptions(**SMALL)  # type: ignore[arg-type]
    whole = import_dataset(data, tmp_path / "whole.zarr", options)
    os.utime(data, (time.time() + YEARS, time.time() + YEARS))
    store = tmp_path / "store.zarr"
    found = import_dataset(data, store, options, Aging(store))
    assert found.manifest.root_digest == whole.manifest.root_digest
    for file in store.rglob("*"):
        os.utime(file, (time.time() + YEARS, 0))
    np.testing.assert_array_equal(
        open_store(store).read("structures/positions"), whole.read("structures/positions")
    )
