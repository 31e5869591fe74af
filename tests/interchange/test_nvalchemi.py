"""The Zarr layout of nvalchemi-toolkit, both ways; its own programs judge where they are installed.

Files that its label_dataset would write are made here with zarr-python, by the published layout.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from kdcache.errors import DataError, IdentityError, StoreError
from kdcache.ingest import ImportOptions
from kdcache.interchange import LabelledOptions, import_labelled, select, write_nvalchemi
from kdcache.interchange.labelled_file import LabelledFile
from kdcache.store import Store, open_store, verify_store
from kdcache.structures import Structure
from tests.chain import structures
from tests.interchange.conftest import FAILED, TEACHER, rows_of

D = 5


def labels(found: list[Structure]) -> dict[str, np.ndarray]:
    """What a teacher would have said: atom k of structure s carries (s, k)."""
    atoms = [
        np.stack([np.full(s.n_atoms, i), np.arange(s.n_atoms)], 1) for i, s in enumerate(found)
    ]
    place = np.concatenate(atoms).astype(np.float32)
    channels = np.arange(D, dtype=np.float32) / 8
    return {
        "teacher_energy": np.arange(len(found), dtype=np.float32)[:, None] - 0.5,
        "teacher_forces": np.concatenate([place, place[:, :1] / 4], 1),
        "teacher_atomic_energies": place[:, 0] + place[:, 1] / 16,
        "teacher_node_embeddings": place[:, :1] + place[:, 1:] / 8 + channels,
        "teacher_stress": np.ones((len(found), 3, 3), np.float32),
    }


def write_labelled(
    path: Path,
    found: list[Structure],
    deleted: tuple[int, ...] = (),
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """A group as AtomicDataZarrWriter lays it out."""
    root = zarr.open_group(path, mode="w", zarr_format=3)
    ends = np.concatenate([[0], np.cumsum([s.n_atoms for s in found])])
    mask = np.ones(len(found), bool)
    mask[list(deleted)] = False
    meta = {
        "atoms_ptr": ends,
        "edges_ptr": np.zeros(len(found) + 1, np.int64),
        "samples_mask": mask,
        "atoms_mask": np.repeat(mask, np.diff(ends)),
        "edges_mask": np.ones(0, bool),
    }
    core = {
        "atomic_numbers": np.concatenate([s.atomic_numbers for s in found]),
        "positions": np.concatenate([s.positions for s in found]),
        "cell": np.stack([s.cell for s in found]),
        "pbc": np.stack([s.pbc for s in found]),
        "energy": np.array([[s.energy] for s in found]),
        "forces": np.concatenate(
            [np.zeros((0, 3)) if s.forces is None else s.forces for s in found]
        ),
        **labels(found),
        **(changes or {}),
    }
    core = {name: array for name, array in core.items() if array is not None}
    for group, arrays in (("meta", meta), ("core", core)):
        made = root.create_group(group)
        for name, array in arrays.items():
            made.create_array(
                name, data=array, chunks=(min(7, max(1, len(array))), *array.shape[1:])
            )
    root.create_group("custom")
    root.attrs["num_samples"] = len(found)
    system = {"cell", "pbc", "energy", "teacher_energy", "teacher_stress"}
    root.attrs["fields"] = {
        "core": {name: "system" if name in system else "atom" for name in core},
        "custom": {},
    }
    return path


def imported(path: Path, output: Path, **options: Any) -> Store:
    layout = ImportOptions(atom_capacity=12, blocks_per_shard=2)
    return import_labelled(path, output, LabelledOptions("nv", layout, **options))


@pytest.mark.parametrize("deleted", [(), (0, 5, 6)], ids=["all", "some deleted"])
def test_labels_meet_their_structures(deleted: tuple[int, ...], tmp_path: Path) -> None:
    found = structures(14)
    path = write_labelled(tmp_path / "labelled.zarr", found, deleted)
    store = imported(path, tmp_path / "store.zarr", codec="half")
    assert verify_store(store.path).problems == []
    kept = [s for s in range(14) if s not in deleted]
    assert len(store) == len(kept)
    said, atoms = labels(found), np.cumsum([0, *(s.n_atoms for s in found)])
    for row, source in enumerate(store.index.source_index.tolist()):
        structure, s = store.structure(row), kept[source]
        np.testing.assert_array_equal(structure.positions, found[s].positions)
        np.testing.assert_array_equal(structure.cell, found[s].cell)
        assert structure.energy == found[s].energy
        np.testing.assert_array_equal(structure.forces, found[s].forces)
        first = int(store.index.atom_start[row]) - int(store.index.block[row]) * 12
        block = [int(store.index.block[row])]
        own = slice(atoms[s], atoms[s + 1])
        for field, name in (
            ("forces", "teacher_forces"),
            ("atomic_energy", "teacher_atomic_energies"),
            ("node", "teacher_node_embeddings"),
        ):
            rows = store.read(f"teachers/nv/{field}", block)
            capacity = store.plan.atom_capacity
            first = int(store.index.atom_start[row]) - block[0] * capacity
            np.testing.assert_array_equal(rows[first : first + structure.n_atoms], said[name][own])
    energies = store.read("teachers/nv/energy")
    expected = [kept[s] - 0.5 for s in store.index.source_index.tolist()]
    assert energies.tolist() == expected
    entry = store.teachers["nv"]
    assert entry.fields["node"].codec == "half"
    assert entry.model == "unknown"
    assert LabelledFile(path).left_out == ["teacher_stress"]


def test_a_structure_without_one_atoms_label_is_one_the_teacher_failed_on(tmp_path: Path) -> None:
    found = structures(14)
    forces = labels(found)["teacher_forces"]
    first = sum(s.n_atoms for s in found[:5])
    assert found[5].n_atoms > 2
    forces[first + 1, 2] = np.nan
    path = write_labelled(tmp_path / "a.zarr", found, changes={"teacher_forces": forces})
    store = imported(path, tmp_path / "s.zarr")
    failures = store.failures("nv")
    assert store.index.source_index[failures.row].tolist() == [5]
    assert failures.reason.tolist() == ["forces is not finite in the file"]
    assert verify_store(store.path).problems == []


def test_the_digest_of_an_unknown_teacher_is_its_labels(tmp_path: Path) -> None:
    found = structures(6)
    digests = []
    for k, changes in enumerate([{}, {}, {"teacher_energy": np.zeros((6, 1), np.float32)}]):
        path = write_labelled(tmp_path / f"{k}.zarr", found, changes=changes)
        digests.append(imported(path, tmp_path / f"s{k}.zarr").teachers["nv"].digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_second_labelling_goes_beside_the_first_and_only_of_the_same_data(
    tmp_path: Path,
) -> None:
    found = structures(6)
    path = write_labelled(tmp_path / "a.zarr", found)
    imported(path, tmp_path / "s.zarr")
    with pytest.raises(StoreError, match="nv"):
        imported(path, tmp_path / "s.zarr")
    layout = ImportOptions()
    import_labelled(path, tmp_path / "s.zarr", LabelledOptions("second", layout))
    assert set(open_store(tmp_path / "s.zarr").teachers) == {"nv", "second"}
    other = write_labelled(tmp_path / "b.zarr", structures(6, seed=1))
    with pytest.raises(IdentityError):
        import_labelled(other, tmp_path / "s.zarr", LabelledOptions("third", layout))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher_forces": np.zeros((3, 3))}, "teacher_forces has shape"),
        ({"teacher_energy": np.zeros((6, 2))}, "1 floating values per system"),
        ({"teacher_energy": np.zeros((6, 1), np.int64)}, "floating values per system"),
        ({"positions": None}, "no positions"),
        (dict.fromkeys(labels(structures(6))), "no labels of a teacher"),
    ],
    ids=["too short", "too wide", "whole numbers", "no positions", "no teacher"],
)
def test_files_that_do_not_fit_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = write_labelled(tmp_path / "a.zarr", structures(6), changes=changes)
    with pytest.raises(DataError, match=said):
        imported(path, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("name", ["meta/atoms_ptr", "core/positions"])
@pytest.mark.parametrize("is_chunk", [False, True], ids=["array", "chunk"])
def test_a_small_file_does_not_stand_for_a_large_one(
    name: str, is_chunk: bool, tmp_path: Path
) -> None:
    path = write_labelled(tmp_path / "a.zarr", structures(6))
    root = zarr.open_group(path, mode="r+")
    array: Any = root[name]
    shape, many = array.shape, (2**31, *array.shape[1:])
    root.create_array(
        name, shape=shape if is_chunk else many, chunks=many, dtype=array.dtype, overwrite=True
    )
    with pytest.raises(DataError, match=rf"{name} would take \d+ bytes"):
        imported(path, tmp_path / "s.zarr")


def test_a_group_may_have_any_name(tmp_path: Path) -> None:
    path = write_labelled(tmp_path / "labelled", structures(6))
    assert len(imported(path, tmp_path / "s.zarr")) == 6


def test_what_is_no_such_file_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as Zarr of nvalchemi-toolkit"):
        imported(Path(store.path), tmp_path / "s.zarr")  # type: ignore[arg-type]


def test_an_export_comes_back_as_the_same_dataset_and_teacher(store: Store, tmp_path: Path) -> None:
    names = ["energy", "forces", "atomic_energy", "node"]
    path = write_nvalchemi(select(store, teacher="big-1", fields=names), tmp_path / "a.zarr")
    root = zarr.open_group(path, mode="r")
    assert root.attrs["num_samples"] == len(store)
    assert root.attrs["fields"]["core"]["teacher_node_embeddings"] == "atom"  # type: ignore[index, call-overload]
    found = imported(path, tmp_path / "failed.zarr", unlabelled=True)
    failed = found.index.source_index[found.failures("nv").row]
    assert sorted(failed.tolist()) == list(FAILED)
    assert verify_store(found.path).problems == []
    good = select(store, split="val", teacher="big-1", fields=names)
    path = write_nvalchemi(good, tmp_path / "b.zarr")
    found = imported(path, tmp_path / "s.zarr", unlabelled=True, codec="exact")
    for ours, row in zip(found.structures(), good.rows.tolist(), strict=True):
        assert ours.content_hash() == store.structure(row).content_hash()
        assert ours.energy == store.structure(row).energy
    order = found.index.source_order
    node = found.read("teachers/nv/node")
    ends = np.cumsum(found.index.n_atoms)
    for place, s in zip(order.tolist(), (6, 13), strict=True):
        rows = node[ends[place] - found.index.n_atoms[place] : ends[place]]
        np.testing.assert_array_equal(rows, rows_of(TEACHER[3], s, len(rows)))


@pytest.fixture
def toolkit() -> Any:
    """nvalchemi-toolkit's data package, where it is installed."""
    pytest.importorskip("nvalchemi", reason="nvalchemi-toolkit is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("nvalchemi.data.datapipes.backends.zarr")


@pytest.mark.filterwarnings("ignore")
def test_its_own_reader_reads_an_export(
    toolkit: Any, store: Store, dataset: list[Structure], tmp_path: Path
) -> None:
    names = [spec.name for spec in TEACHER]
    path = write_nvalchemi(select(store, teacher="big-1", fields=names), tmp_path / "a.zarr")
    reader = toolkit.AtomicDataZarrReader(path)
    data = importlib.import_module("nvalchemi.data")
    assert len(reader) == len(dataset)
    for s, structure in enumerate(dataset):
        sample, _ = reader[s]
        np.testing.assert_array_equal(sample["positions"].numpy(), structure.positions)
        np.testing.assert_array_equal(sample["atomic_numbers"].numpy(), structure.atomic_numbers)
        np.testing.assert_array_equal(sample["cell"].numpy()[0], structure.cell)
        np.testing.assert_array_equal(sample["pbc"].numpy()[0], structure.pbc)
        if structure.energy is not None:
            assert float(sample["energy"][0, 0]) == structure.energy
        for spec in TEACHER if s not in FAILED else ():
            name = {
                "atomic_energy": "teacher_atomic_energies",
                "node": "teacher_node_embeddings",
            }.get(spec.name, f"teacher_{spec.name}")
            expected = rows_of(spec, s, structure.n_atoms)
            found = sample[name].numpy().reshape(expected.shape)
            np.testing.assert_array_equal(found, expected)
        record = data.AtomicData(**sample)
        assert record.num_nodes == structure.n_atoms


@pytest.mark.filterwarnings("ignore")
def test_what_its_own_writer_writes_is_read(toolkit: Any, tmp_path: Path) -> None:
    import torch

    data = importlib.import_module("nvalchemi.data")
    found, rows = structures(6), []
    said, atoms = labels(found), np.cumsum([0, *(s.n_atoms for s in found)])
    for s, structure in enumerate(found):
        record = data.AtomicData(
            atomic_numbers=torch.from_numpy(structure.atomic_numbers),
            positions=torch.from_numpy(structure.positions),
            cell=torch.from_numpy(structure.cell)[None],
            pbc=torch.from_numpy(structure.pbc)[None],
            energy=torch.tensor([[structure.energy]], dtype=torch.float64),
            forces=torch.from_numpy(structure.forces),
        )
        own = slice(atoms[s], atoms[s + 1])
        for name in ("teacher_forces", "teacher_atomic_energies", "teacher_node_embeddings"):
            record.add_node_property(name, torch.from_numpy(said[name][own]).double())
        energy = torch.from_numpy(said["teacher_energy"][s : s + 1]).double()
        record.add_system_property("teacher_energy", energy)
        rows.append(record)
    writer = toolkit.AtomicDataZarrWriter(tmp_path / "a.zarr")
    writer.write(rows)
    writer.delete([1])
    store = imported(tmp_path / "a.zarr", tmp_path / "s.zarr", codec="exact")
    kept = [0, 2, 3, 4, 5]
    assert len(store) == 5
    ends = np.cumsum(store.index.n_atoms)
    node = store.read("teachers/nv/node")
    for row, source in enumerate(store.index.source_index.tolist()):
        s = kept[source]
        assert store.structure(row).energy == found[s].energy
        own = node[ends[row] - store.index.n_atoms[row] : ends[row]]
        expected = said["teacher_node_embeddings"][atoms[s] : atoms[s + 1]]
        np.testing.assert_array_equal(own, expected)
