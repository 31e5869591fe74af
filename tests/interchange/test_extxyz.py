"""What goes out as extended XYZ comes back to the last bit, by ASE and by our own reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdcache.errors import ConfigError, StoreError
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.interchange import select, write_extxyz
from kdcache.interchange.extxyz import _write
from kdcache.readers import ReadOptions, read_structures
from kdcache.store import Store
from kdcache.structures import Structure
from tests.chain import read_options
from tests.interchange.conftest import FAILED, TEACHER, rows_of
from tests.readers.identity import assert_same, numbered_structure


def test_ase_reads_back_labels_and_what_the_teacher_said(
    store: Store, dataset: list[Structure], tmp_path: Path
) -> None:
    names = [spec.name for spec in TEACHER]
    write_extxyz(select(store, teacher="big-1", fields=names), tmp_path / "a.extxyz")
    found = ase.io.read(tmp_path / "a.extxyz", ":")
    assert len(found) == len(dataset)
    for s, (atoms, structure) in enumerate(zip(found, dataset, strict=True)):
        np.testing.assert_array_equal(atoms.numbers, structure.atomic_numbers)
        np.testing.assert_array_equal(atoms.positions, structure.positions)
        np.testing.assert_array_equal(atoms.cell, structure.cell)
        np.testing.assert_array_equal(atoms.pbc, structure.pbc)
        assert atoms.info["structure_id"] == f"s{s}"
        assert atoms.info["split"] == ("val" if s % 7 == 6 else "train")
        if structure.energy is None:
            assert atoms.calc is None
        else:
            assert atoms.get_potential_energy() == structure.energy
            np.testing.assert_array_equal(atoms.get_forces(), store_forces(store, s))
        for spec in TEACHER:
            name = f"big_1_{spec.name}"
            said = atoms.arrays.get(name, atoms.info.get(name))
            if s in FAILED:
                assert said is None
                continue
            expected = rows_of(spec, s, structure.n_atoms)
            assert said is not None
            np.testing.assert_array_equal(np.reshape(said, expected.shape), expected)


def store_forces(store: Store, s: int) -> np.ndarray:
    forces = store.structure(int(store.index.source_order[s])).forces
    assert forces is not None
    return forces


def test_our_reader_gets_the_same_dataset(store: Store, tmp_path: Path) -> None:
    path = write_extxyz(select(store), tmp_path / "a.xyz")
    options = read_options(id_key="structure_id", group_key=None, unlabelled=True)
    for found, expected in zip(
        read_structures(path, options), store.structures("source"), strict=True
    ):
        assert_same(found, expected)
        assert (found.structure_id, found.split, found.group) == (
            expected.structure_id,
            expected.split,
            expected.group,
        )


def test_tags_fixed_atoms_and_odd_names_come_back(tmp_path: Path) -> None:
    odd = 'a "quoted" = name\\ with, [everything] {in} it\'s'
    given = [numbered_structure(s) for s in range(4)]
    held = np.arange(given[2].n_atoms) % 2 == 0
    rows = [
        {
            "id": odd if s == 2 else "two\nlines" if s == 3 else f"plain{s}",
            "numbers": structure.atomic_numbers.tolist(),
            "positions": structure.positions.ravel().tolist(),
            "energy": structure.energy,
            "forces": np.ravel(structure.forces).tolist(),
            "tags": (np.arange(structure.n_atoms) % 3).tolist(),
        }
        for s, structure in enumerate(given)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    read = ReadOptions(id_key="id", tags_key="tags", energy_unit="eV")
    made = import_dataset(tmp_path / "data.parquet", tmp_path / "s.zarr", ImportOptions(read))
    taken = [replace(t, structure=replace(t.structure)) for t in select(made)]
    taken[2].structure.fixed = held

    path = tmp_path / "a.extxyz"
    with open(path, "w") as file:
        for one in taken:
            _write(file, one, select(made))
    found = list(read_structures(path, ReadOptions(id_key="structure_id", tags_key="tags")))
    assert [one.structure_id for one in found] == ["plain0", "plain1", odd, "two\nlines"]
    assert found[2].fixed is not None
    np.testing.assert_array_equal(found[2].fixed, held)
    assert [a.info["structure_id"] for a in ase.io.read(path, ":")][2] == odd
    for structure in found:
        np.testing.assert_array_equal(structure.tags, np.arange(structure.n_atoms) % 3)


def test_one_split_is_taken(store: Store, tmp_path: Path) -> None:
    path = write_extxyz(select(store, split="val"), tmp_path / "a.extxyz")
    assert [a.info["structure_id"] for a in ase.io.read(path, ":")] == ["s6", "s13"]


def test_what_cannot_be_taken_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"split 'vall': did you mean val\?"):
        select(store, split="vall")
    with pytest.raises(StoreError, match="no teacher big"):
        select(store, teacher="big")
    with pytest.raises(ConfigError, match=r"did you mean node\?"):
        select(store, teacher="big-1", fields=["nod"])
    with pytest.raises(ConfigError, match="--teacher"):
        select(store, fields=["node"])
    (tmp_path / "a.extxyz").write_text("mine")
    with pytest.raises(StoreError, match="nothing is overwritten"):
        write_extxyz(select(store), tmp_path / "a.extxyz")
    assert (tmp_path / "a.extxyz").read_text() == "mine"


def test_an_export_that_fails_leaves_nothing(store: Store, tmp_path: Path) -> None:
    selection = select(store, teacher="big-1")
    broken = replace(selection, specs=(*selection.specs, replace(TEACHER[3], name="gone")))
    with pytest.raises(StoreError, match="gone"):
        write_extxyz(broken, tmp_path / "a.extxyz")
    assert list(tmp_path.iterdir()) == []


def test_windows_of_one_structure_give_the_same_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = select(store, teacher="big-1", fields=["node"])
    whole = write_extxyz(selection, tmp_path / "a.extxyz").read_bytes()
    monkeypatch.setattr("kdcache.interchange.selection.VALUES_AT_ONCE", 1)
    assert write_extxyz(selection, tmp_path / "b.extxyz").read_bytes() == whole
