"""A store as a source."""

from __future__ import annotations

from pathlib import Path

import ase.io
import pytest

from kdcache.errors import StoreError
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.readers import ReadOptions, read_structures
from tests.readers.identity import as_atoms, assert_same, numbered_structure


@pytest.fixture
def store(tmp_path: Path) -> Path:
    images = [as_atoms(numbered_structure(s), config_type=f"kind{s % 2}") for s in range(20)]
    ase.io.write(tmp_path / "data.extxyz", images)
    options = ImportOptions(split={"test": 0.25}, atom_capacity=12)
    return import_dataset(tmp_path / "data.extxyz", tmp_path / "s.zarr", options).path


def test_structures_come_in_dataset_order_with_what_they_carried(store: Path) -> None:
    found = list(read_structures(store))
    for s, structure in enumerate(found):
        assert_same(structure, numbered_structure(s))
        assert structure.structure_id == f"data:{s}"
        assert structure.group == f"kind{s % 2}"
    assert sorted({s.split for s in found}) == ["test", "train"]
    assert {s.split for s in read_structures(store, ReadOptions(split_key="none"))} == {""}


def test_units_of_other_files_do_not_scale_a_store(store: Path) -> None:
    found = read_structures(store, ReadOptions(energy_unit="Hartree", length_unit="Bohr"))
    assert_same(next(iter(found)), numbered_structure(0))


def test_a_directory_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(StoreError):
        list(read_structures(tmp_path / "a.zarr"))
