"""A dataset into a store: everything in its place, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ase.io
import numpy as np
import pytest

from kdcache.errors import ConfigError, DataError, IdentityError, KdcacheError, StoreError
from kdcache.graphs import GraphRule, neighbor_list
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.progress import Advance
from kdcache.readers import ReadOptions, read_structures
from kdcache.store import Store, open_store
from kdcache.structures import dataset_digest
from tests.readers.identity import as_atoms, assert_same, numbered_structure

# Blocks of a few structures, shards of two blocks: many of both.
SMALL = {"atom_capacity": 12, "blocks_per_shard": 2}


def write(path: Path, n: int = 60, **info: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [as_atoms(numbered_structure(s), name=f"n{s}", rxn=s // 6, **info) for s in range(n)]
    ase.io.write(path, images)
    return path


def digests(store: Store) -> dict[str, str]:
    return {**store.manifest.digests, "root": store.manifest.root_digest}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.extxyz")


def test_every_structure_comes_back_in_dataset_order(tmp_path: Path, data: Path) -> None:
    store = import_dataset(data, tmp_path / "s.zarr", ImportOptions(**SMALL))
    assert store.plan.n_shards > 3
    assert not (tmp_path / "s.zarr" / ".work").exists()
    found = list(store.structures("source"))
    assert [s.structure_id for s in found] == [f"data:{s}" for s in range(60)]
    for s, structure in enumerate(found):
        assert_same(structure, numbered_structure(s))


def test_the_order_is_numpys_permutation_of_the_recorded_seed(tmp_path: Path, data: Path) -> None:
    store = import_dataset(data, tmp_path / "s.zarr", ImportOptions(seed=7, **SMALL))
    expected = np.random.Generator(np.random.PCG64(7)).permutation(60)
    np.testing.assert_array_equal(store.index.source_index, expected)
    assert store.manifest.order.seed == 7
    energies = store.read("structures/energy")
    np.testing.assert_array_equal(energies, [numbered_structure(s).energy for s in expected])


def test_the_manifest_says_where_the_dataset_comes_from(tmp_path: Path, data: Path) -> None:
    options = ImportOptions(
        ReadOptions(energy_unit="Hartree"), licence_structures="CC0", licence_labels="MIT"
    )
    store = import_dataset([data], tmp_path / "s.zarr", options)
    entry = store.manifest.dataset
    assert entry.digest == dataset_digest(s.content_hash() for s in read_structures(data))
    assert (entry.n_structures, entry.n_labelled) == (60, 60)
    assert entry.sources == ["data.extxyz"]
    assert entry.keys == {"energy": "energy", "forces": "forces"}
    assert entry.units == {"energy": "Hartree", "forces": "Hartree/Å", "length": "Å"}
    assert entry.notes == ["data.extxyz: energy from energy, forces from forces"]
    assert (entry.licences.structures, entry.licences.labels) == ("CC0", "MIT")
    text = "".join(p.read_text(errors="replace") for p in store.path.rglob("*") if p.is_file())
    assert str(tmp_path) not in text


def test_equal_imports_give_equal_digests_and_another_seed_another_order(
    tmp_path: Path, data: Path
) -> None:
    first = import_dataset(data, tmp_path / "a.zarr", ImportOptions(**SMALL))
    second = import_dataset(data, tmp_path / "b.zarr", ImportOptions(**SMALL))
    other = import_dataset(data, tmp_path / "c.zarr", ImportOptions(seed=1, **SMALL))
    assert digests(first) == digests(second)
    assert first.manifest.root_digest != other.manifest.root_digest
    assert first.manifest.dataset.digest == other.manifest.dataset.digest


def test_neighbour_lists_are_kept_beside_their_structures(tmp_path: Path, data: Path) -> None:
    rule = GraphRule(1.6)
    stores = [
        import_dataset(
            data, tmp_path / f"{threads}.zarr", ImportOptions(graph=rule, threads=threads, **SMALL)
        )
        for threads in (1, 3)
    ]
    store = stores[0]
    assert digests(store) == digests(stores[1])
    assert store.graph == rule
    index, shift = (store.read(f"structures/{name}") for name in ("edge_index", "edge_shift"))
    ends = np.cumsum(store.index.n_edges)
    assert 0 in store.index.n_edges
    for row, source in enumerate(store.index.source_index):
        structure = numbered_structure(int(source))
        edges = neighbor_list(structure.positions, structure.cell, structure.pbc, rule)
        here = slice(ends[row] - edges.n_edges, ends[row])
        np.testing.assert_array_equal(index[here], edges.edge_index.T)
        np.testing.assert_array_equal(shift[here], edges.edge_shift)


def test_one_structure_of_one_atom(tmp_path: Path) -> None:
    path = tmp_path / "one.extxyz"
    ase.io.write(path, as_atoms(numbered_structure(1, periodic=False)))
    options = ImportOptions(graph=GraphRule(5.0))
    (found,) = import_dataset(path, tmp_path / "s.zarr", options).structures("source")
    assert_same(found, numbered_structure(1, periodic=False))


def test_a_structure_as_large_as_a_block(tmp_path: Path) -> None:
    path = tmp_path / "data.extxyz"
    ase.io.write(path, [as_atoms(numbered_structure(s, n)) for s, n in enumerate((3, 12, 1, 12))])
    store = import_dataset(path, tmp_path / "s.zarr", ImportOptions(**SMALL))
    assert store.plan.atom_capacity == 12
    for s, structure in enumerate(store.structures("source")):
        assert_same(structure, numbered_structure(s, (3, 12, 1, 12)[s]))


def test_structures_without_labels_are_kept_as_such(tmp_path: Path) -> None:
    images = [as_atoms(numbered_structure(s)) for s in range(6)]
    images[2].calc = None
    path = tmp_path / "data.extxyz"
    ase.io.write(path, images)
    with pytest.raises(DataError, match=r"data.extxyz, structure 2 has no energy"):
        import_dataset(path, tmp_path / "s.zarr")
    # What failed left nothing behind.
    assert not (tmp_path / "s.zarr").exists()
    store = import_dataset(path, tmp_path / "s.zarr", ImportOptions(ReadOptions(unlabelled=True)))
    assert store.manifest.dataset.n_labelled == 5
    found = list(store.structures("source"))
    assert found[2].energy is None
    assert found[2].forces is None
    assert_same(found[3], numbered_structure(3))


def test_an_id_that_occurs_twice_is_refused_naming_both_places(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.extxyz", 4) for name in ("a", "b")]
    options = ImportOptions(ReadOptions(id_key="name"))
    with pytest.raises(
        DataError, match=r"b.extxyz, structure 0 and a.extxyz, structure 0 are both called 'n0'"
    ):
        import_dataset(files, tmp_path / "s.zarr", options)


def test_repeated_contents_are_noted_and_kept(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.extxyz", n) for name, n in (("a", 4), ("b", 3))]
    store = import_dataset(files, tmp_path / "s.zarr")
    assert len(store.index) == 7
    assert "3 structures repeat the contents" in store.manifest.dataset.notes[-1]


def test_splits_are_drawn_by_structure_or_by_whole_group(tmp_path: Path, data: Path) -> None:
    read = ReadOptions(group_key="rxn")
    options = ImportOptions(read, split={"val": 0.1, "test": 0.2})
    store = import_dataset(data, tmp_path / "a.zarr", options)
    names, counts = np.unique(store.index.split.astype(str), return_counts=True)
    assert dict(zip(names, counts, strict=True)) == {"test": 12, "train": 42, "val": 6}
    whole = ImportOptions(read, split={"val": 0.1, "test": 0.2}, split_groups=True)
    store = import_dataset(data, tmp_path / "b.zarr", whole)
    groups = {
        name: set(store.index.group[store.index.split == name]) for name in ("train", "val", "test")
    }
    assert [len(groups[name]) for name in ("train", "val", "test")] == [7, 1, 2]
    assert not groups["train"] & (groups["val"] | groups["test"])
    assert store.manifest.dataset.notes[-1] == "splits: test 12, train 42, val 6"
    with pytest.raises(ConfigError, match="neither val nor test"):
        import_dataset(data, tmp_path / "c.zarr", ImportOptions(split={"valid": 0.1}))


def test_a_store_is_a_source_and_keeps_ids_groups_splits(tmp_path: Path, data: Path) -> None:
    read = ReadOptions(id_key="name", group_key="rxn")
    first = import_dataset(
        data, tmp_path / "a.zarr", ImportOptions(read, split={"val": 0.25}, **SMALL)
    )
    again = import_dataset(first.path, tmp_path / "b.zarr", ImportOptions(seed=5))
    assert again.manifest.dataset.digest == first.manifest.dataset.digest
    for a, b in zip(first.structures("source"), again.structures("source"), strict=True):
        assert_same(a, b)
        assert (a.structure_id, a.group, a.split) == (b.structure_id, b.group, b.split)


@pytest.mark.proof
def test_real_data_survives_the_import_to_the_last_bit(tmp_path: Path, shared: Path) -> None:
    path = shared / "data" / "h2combustion" / "tiny_train.extxyz"
    store = import_dataset(path, tmp_path / "s.zarr", ImportOptions(atom_capacity=100))
    expected = list(ase.io.iread(path, ":"))
    assert len(expected) == len(store.index) == 400
    for structure, atoms in zip(store.structures("source"), expected, strict=True):
        np.testing.assert_array_equal(structure.atomic_numbers, atoms.numbers)
        np.testing.assert_array_equal(structure.positions, atoms.positions)
        np.testing.assert_array_equal(structure.forces, atoms.calc.results["forces"])
        assert structure.energy == atoms.calc.results["energy"]
        assert structure.split == "train"


def test_nothing_is_overwritten(tmp_path: Path, data: Path) -> None:
    store = import_dataset(data, tmp_path / "s.zarr")
    before = digests(store)
    with pytest.raises(StoreError, match="is a finished store"):
        import_dataset(data, store.path)
    assert not (store.path / ".work").exists()
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("")
    for taken in (folder, data):
        with pytest.raises(StoreError, match="nothing is overwritten"):
            import_dataset(data, taken)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]
    assert digests(open_store(store.path)) == before


def test_no_structures_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.extxyz").write_text("\n")
    with pytest.raises(DataError, match=r"a.extxyz holds no structures"):
        import_dataset(tmp_path / "a.extxyz", tmp_path / "s.zarr")


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from kdcache.ingest import ImportOptions, import_dataset

data, output, label, count = sys.argv[1:]
left = int(count)

@contextmanager
def progress(name, total, unit):
    def advance(n=1, /, note=""):
        global left
        if name == label:
            left -= n
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
    yield advance

options = ImportOptions(split={"val": 0.1}, atom_capacity=12, blocks_per_shard=2)
import_dataset(Path(data), Path(output), options, progress)
"""


def run_until(data: Path, output: Path, label: str, count: int) -> int:
    """Import in a process of its own that kills itself after `count` structures of a bar."""
    command = [sys.executable, "-c", KILLED, str(data), str(output), label, str(count)]
    return subprocess.run(
        command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ).returncode


@pytest.mark.proof
def test_an_import_killed_anywhere_ends_with_the_same_digests(tmp_path: Path, data: Path) -> None:
    options = ImportOptions(split={"val": 0.1}, **SMALL)
    expected = digests(import_dataset(data, tmp_path / "undisturbed.zarr", options))
    output = tmp_path / "killed.zarr"
    # While reading, at the last structure, after the first shard, in the middle, after the last.
    for label, count in (("read", 23), ("read", 60), ("write", 1), ("write", 20), ("write", 30)):
        assert run_until(data, output, label, count) == -signal.SIGKILL
        with pytest.raises(StoreError):
            open_store(output)
    assert run_until(data, output, "never", 1) == 0
    assert digests(open_store(output)) == expected
    assert not (output / ".work").exists()


class Stopped(Exception):
    """Raised where a test ends an import."""


def stop_at(label: str, count: int) -> object:
    @contextmanager
    def progress(name: str, total: int | None, unit: str) -> Iterator[Advance]:
        left = count

        def advance(n: int = 1, /, note: str = "") -> None:
            nonlocal left
            left -= n
            if name == label and left <= 0:
                raise Stopped

        yield advance

    return progress


def test_an_unfinished_import_is_gone_on_with_only_by_the_same_one(
    tmp_path: Path, data: Path
) -> None:
    output = tmp_path / "s.zarr"
    options = ImportOptions(**SMALL)
    with pytest.raises(Stopped):
        import_dataset(data, output, options, stop_at("write", 10))
    other = write(tmp_path / "other.extxyz", 20)
    with pytest.raises(IdentityError, match="unfinished import of other files"):
        import_dataset(other, output, options)
    with pytest.raises(KdcacheError, match="unfinished structures with another"):
        import_dataset(data, output, ImportOptions(seed=3, **SMALL))
    read: list[str] = []

    @contextmanager
    def progress(name: str, total: int | None, unit: str) -> Iterator[Advance]:
        read.append(f"{name} {total}")
        yield lambda n=1, /, note="": None

    store = import_dataset(data, output, options, progress)
    # Nothing was read again, and what was written was not written again.
    assert len(read) == 1
    assert read[0].startswith("write ")
    assert int(read[0].split()[1]) < 60
    undisturbed = import_dataset(data, tmp_path / "u.zarr", options)
    assert digests(store) == digests(undisturbed)


def test_an_import_stopped_before_its_last_cleaning_is_finished_by_the_next(
    tmp_path: Path, data: Path
) -> None:
    output = tmp_path / "s.zarr"
    with pytest.raises(Stopped):
        import_dataset(data, output, ImportOptions(**SMALL), stop_at("write", 10))
    kept = {p: p.read_bytes() for p in (output / ".work" / "spool").iterdir()}
    expected = digests(import_dataset(data, output, ImportOptions(**SMALL)))
    for path, content in kept.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert digests(import_dataset(data, output, ImportOptions(**SMALL))) == expected
    assert not (output / ".work").exists()


def peak_bytes(data: Path, output: Path) -> int:
    options = ImportOptions(ReadOptions(energy_unit="eV"), atom_capacity=4000, blocks_per_shard=2)
    tracemalloc.start()
    import_dataset(data, output, options)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_dataset(tmp_path: Path) -> None:
    structure = numbered_structure(0, 400, periodic=False)
    peaks = []
    for name, n in (("warm", 200), ("small", 400), ("large", 1200)):
        np.savez(
            tmp_path / f"{name}.npz",
            z=structure.atomic_numbers,
            R=np.tile(structure.positions, (n, 1, 1)),
            E=np.zeros(n),
            F=np.zeros((n, 400, 3)),
        )
        peaks.append(peak_bytes(tmp_path / f"{name}.npz", tmp_path / f"{name}.zarr"))
    # The larger dataset holds 15 MB more of positions and forces.
    assert peaks[2] < peaks[1] + 2_000_000
