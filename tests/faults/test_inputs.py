"""An input file that is written to while it is imported: refused by name, nothing is finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ase.db
import ase.io
import h5py
import numpy as np
import pytest

from kdcache.errors import DataError, IdentityError
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.readers import ReadOptions, read_structures
from tests.chain import structures, write_xyz
from tests.cli.commands import refused
from tests.faults.changing import CHANGES, During, append, long_ago, rewrite
from tests.faults.damage import make_damageable
from tests.readers.identity import as_atoms, numbered_structure
from tests.readers.lmdb_files import write_lmdb
from tests.readers.test_hdf5 import fill

pytestmark = pytest.mark.fault

LAYOUT = {"atom_capacity": 12, "blocks_per_shard": 2}
# Enough that no reader has the whole file in its hands after a few structures.
MANY = 120


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_or_a_later_one_is_read_is_refused(
    change: str, n: int, tmp_path: Path
) -> None:
    work, reason = CHANGES[change]
    files = [tmp_path / "a.extxyz", tmp_path / "b.extxyz"]
    write_xyz(files[0], structures(MANY), split=False)
    write_xyz(files[1], structures(3, 1), split=False)
    long_ago(tmp_path)
    # In the midst of the first file, or when it was read to its end.
    during = During("read", 2 if n == 1 else MANY + 1, lambda: work(files[0]))
    with pytest.raises(DataError, match=rf"a\.extxyz changed while .* read: {reason}\. Struct"):
        import_dataset(files, tmp_path / "s.zarr", progress=during)
    # Not a trace is left, so the same command begins anew, with the file as it is now.
    assert not (tmp_path / "s.zarr").exists()
    assert during.left <= 0
    if change in ("rewritten to the same size", "touched"):
        again = import_dataset(files, tmp_path / "s.zarr")
        hashes = [s.content_hash() for s in read_structures(files)]
        assert [s.content_hash() for s in again.structures()] == hashes


def test_a_file_that_changes_right_before_it_is_read_is_refused(tmp_path: Path) -> None:
    data = long_ago(write_xyz(tmp_path / "a.extxyz", structures(5), split=False))
    during = During("read", 0, lambda: rewrite(data))
    with pytest.raises(DataError, match=r"a\.extxyz changed while the dataset was read"):
        import_dataset(data, tmp_path / "s.zarr", progress=during)
    assert not (tmp_path / "s.zarr").exists()


def test_a_file_that_changes_while_shards_are_written_leaves_no_finished_store(
    tmp_path: Path,
) -> None:
    data = long_ago(write_xyz(tmp_path / "a.extxyz", structures(20), split=False))
    during = During("write", 5, lambda: append(data))
    with pytest.raises(DataError, match=r"a\.extxyz changed .* version before: delete it first\."):
        import_dataset(data, tmp_path / "s.zarr", ImportOptions(**LAYOUT), during)  # type: ignore[arg-type]
    assert not (tmp_path / "s.zarr" / "manifest.json").exists()
    # Shards of the version before are not gone on with.
    assert "unfinished import of other files" in refused("import", data, "-o", tmp_path / "s.zarr")


def test_a_dataset_that_is_only_compared_with_is_watched_too(tmp_path: Path) -> None:
    data = long_ago(write_xyz(tmp_path / "a.extxyz", structures(MANY), split=False))
    reading = iter(read_structures(data))
    next(reading)
    rewrite(data)
    with pytest.raises(DataError, match=r"a\.extxyz changed while the dataset was read"):
        list(reading)


def lmdb_directory(folder: Path, n: int = 6) -> Path:
    write_lmdb(folder / "flat", [numbered_structure(s) for s in range(n)])
    path = folder / "data.lmdb"
    path.mkdir()
    (folder / "flat").rename(path / "data.mdb")
    return path


def hdf5_file(folder: Path) -> Path:
    with h5py.File(folder / "data.h5", "w") as file:
        for k in range(3):
            fill(file.create_group(f"g{k}"), 2 * k, 2, 3)
    return folder / "data.h5"


def npz_file(folder: Path) -> Path:
    np.savez(
        folder / "data.npz",
        z=np.array([1, 6]),
        R=np.arange(36.0).reshape(6, 2, 3),
        E=np.arange(6.0),
        F=np.zeros((6, 2, 3)),
    )
    return folder / "data.npz"


def ase_database(folder: Path) -> Path:
    with ase.db.connect(str(folder / "data.db")) as database:  # type: ignore[no-untyped-call]
        for structure in structures(6):
            database.write(as_atoms(structure))
    return folder / "data.db"


def a_store(folder: Path) -> Path:
    (folder / "made").mkdir()
    return Path(str(make_damageable(folder / "made").path))


FORMATS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "LMDB directory": (lmdb_directory, "data.mdb"),
    "HDF5": (hdf5_file, ""),
    "npz": (npz_file, ""),
    "ASE database": (ase_database, ""),
    "store": (a_store, "manifest.json"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_input_is_watched(name: str, tmp_path: Path) -> None:
    write, inner = FORMATS[name]
    path = write(tmp_path)
    changing = path / inner if inner else path
    long_ago(path)
    read = ReadOptions(energy_unit="eV", allow_pickle=True)
    options = ImportOptions(read, **LAYOUT)  # type: ignore[arg-type]
    undisturbed = import_dataset(path, tmp_path / "whole.zarr", options)
    during = During("read", 2, lambda: os.utime(changing))
    with pytest.raises(DataError, match=f"{changing} changed while the dataset was read"):
        import_dataset(path, tmp_path / "s.zarr", options, during)
    assert not (tmp_path / "s.zarr").exists()
    again = import_dataset(path, tmp_path / "s.zarr", options)
    assert again.manifest.root_digest == undisturbed.manifest.root_digest


def test_the_lock_that_other_readers_of_an_lmdb_write_to_is_not_watched(tmp_path: Path) -> None:
    path = lmdb_directory(tmp_path)
    (path / "lock.mdb").write_bytes(b"nobody")
    long_ago(path)
    options = ImportOptions(ReadOptions(allow_pickle=True), **LAYOUT)  # type: ignore[arg-type]
    during = During("read", 2, lambda: append(path / "lock.mdb"))
    assert len(import_dataset(path, tmp_path / "s.zarr", options, during)) == 6


def test_a_grown_lmdb_directory_is_not_gone_on_with_after_a_kill(tmp_path: Path) -> None:
    path = long_ago(lmdb_directory(tmp_path))
    options = ImportOptions(ReadOptions(allow_pickle=True), **LAYOUT)  # type: ignore[arg-type]

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_dataset(path, tmp_path / "s.zarr", options, During("write", 3, stop))
    shutil.rmtree(path)
    lmdb_directory(tmp_path, 7)
    with pytest.raises(IdentityError, match="unfinished import of other files"):
        import_dataset(path, tmp_path / "s.zarr", options)
