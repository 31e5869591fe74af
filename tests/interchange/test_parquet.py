"""A Parquet table holds what the store holds, for pyarrow and for our own import."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from ase import units

from kdcache.errors import UnitError
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.interchange import select, write_parquet
from kdcache.readers import ReadOptions, read_structures
from kdcache.store import Store
from kdcache.structures import Structure
from tests.interchange.conftest import FAILED, TEACHER, rows_of


def test_pyarrow_reads_every_column(store: Store, dataset: list[Structure], tmp_path: Path) -> None:
    names = [spec.name for spec in TEACHER]
    path = write_parquet(select(store, teacher="big-1", fields=names), tmp_path / "a.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    assert [row["structure_id"] for row in rows] == [f"s{s}" for s in range(len(dataset))]
    for s, (row, structure) in enumerate(zip(rows, dataset, strict=True)):
        assert row["positions"] == structure.positions.ravel().tolist()
        assert row["atomic_numbers"] == structure.atomic_numbers.tolist()
        assert row["cell"] == structure.cell.ravel().tolist()
        assert row["pbc"] == structure.pbc.tolist()
        assert row["energy"] == structure.energy
        assert (row["forces"] is None) == (structure.forces is None)
        for spec in TEACHER:
            said = row[f"big_1_{spec.name}"]
            if s in FAILED:
                assert said is None
                continue
            expected = rows_of(spec, s, structure.n_atoms)
            shape = json.loads(table.schema.field(f"big_1_{spec.name}").metadata[b"shape"])
            assert tuple(shape) == spec.shape
            np.testing.assert_array_equal(np.reshape(said, expected.shape), expected)
    said = json.loads(table.schema.metadata[b"kdcache"])
    assert said["root_digest"] == store.manifest.root_digest
    assert said["teacher_digest"] == "ab" * 32


def test_our_own_tables_say_their_units_and_others_do_not(store: Store, tmp_path: Path) -> None:
    path = write_parquet(select(store), tmp_path / "a.parquet")
    named, unnamed = (
        import_dataset(
            path,
            tmp_path / f"{unit}.zarr",
            ImportOptions(ReadOptions(energy_unit=unit, id_key="structure_id", unlabelled=True)),
        )
        for unit in ("eV", None)
    )
    assert unnamed.manifest.root_digest == named.manifest.root_digest
    in_hartree = ReadOptions(energy_unit="Ha", unlabelled=True)
    found = zip(read_structures(path, in_hartree), named.structures("source"), strict=True)
    energies = [(theirs.energy, ours.energy) for theirs, ours in found]
    ratios = [theirs / ours for theirs, ours in energies if theirs and ours]
    assert ratios == pytest.approx([units.Ha] * len(ratios))
    assert ratios
    table = pq.read_table(path)
    energy = table.schema.get_field_index("energy")
    for change in (
        table.replace_schema_metadata(None),
        table.set_column(energy, "energy", table["energy"]),
        table.set_column(
            energy, table.schema.field("energy").with_metadata({"unit": "Ha"}), table["energy"]
        ),
    ):
        pq.write_table(change, tmp_path / "b.parquet")
        with pytest.raises(UnitError, match="does not say its units"):
            list(read_structures(tmp_path / "b.parquet", ReadOptions(unlabelled=True)))


def test_our_import_makes_the_same_dataset_of_it(store: Store, tmp_path: Path) -> None:
    path = write_parquet(select(store), tmp_path / "a.parquet")
    read = ReadOptions(energy_unit="eV", id_key="structure_id", unlabelled=True)
    found = import_dataset(path, tmp_path / "again.zarr", ImportOptions(read))
    # The dataset digest is over numbers, positions, cells and flags of all, in their order.
    assert found.manifest.dataset.digest == store.manifest.dataset.digest
    for ours, theirs in zip(found.structures(), store.structures(), strict=True):
        assert (ours.structure_id, ours.energy, ours.split, ours.group) == (
            theirs.structure_id,
            theirs.energy,
            theirs.split,
            theirs.group,
        )
        if theirs.forces is not None:
            np.testing.assert_array_equal(ours.forces, theirs.forces)
