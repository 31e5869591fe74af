"""Open Catalyst LMDB: both layouts, and everything a stranger's pickle may try."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.errors import DataError
from kdcache.graphs import GraphRule, neighbor_list
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.readers import Dataset, ReadOptions, read_structures
from kdcache.store.verify import verify_store
from kdcache.stream.neighbors import neighbors_for
from kdcache.stream.reader import WindowReader
from kdcache.stream.window import collate, make_batch
from kdcache.structures import Structure
from tests.readers.identity import assert_same, numbered_structure
from tests.readers.lmdb_files import record_of, write_lmdb, write_records

ALLOWED = ReadOptions(allow_pickle=True)
NUMBERED = [numbered_structure(s) for s in range(5)]


def refusal(path: Path, options: ReadOptions = ALLOWED) -> str:
    with pytest.raises(DataError) as caught:
        list(read_structures(path, options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_torch_geometric_writes_today_is_read(tmp_path: Path) -> None:
    dataset = read_structures(write_lmdb(tmp_path / "a.lmdb", NUMBERED), ALLOWED)
    found = list(dataset)
    for i, (structure, expected) in enumerate(zip(found, NUMBERED, strict=True)):
        expected.pbc = np.array([True, True, False])
        assert_same(structure, expected)
        assert structure.structure_id == f"{1000 + i % 2}_{i}"
        assert structure.group == f"{1000 + i % 2}"
        assert structure.tags is not None
        assert structure.fixed is not None
        assert structure.tags.tolist() == [k % 3 for k in range(expected.n_atoms)]
        assert structure.fixed.tolist() == [k % 2 == 0 for k in range(expected.n_atoms)]
    assert dataset.notes == [
        "a.lmdb: energy from y, forces from force, tags from tags, fixed atoms from fixed"
    ]


def test_a_directory_a_glob_and_the_files_are_the_same_dataset(tmp_path: Path) -> None:
    for part, name in ((NUMBERED[:2], "data.0000"), (NUMBERED[2:], "data.0001")):
        write_lmdb(tmp_path / f"{name}.lmdb", part, sid=int(name[-1]))
    (tmp_path / "metadata.npz").write_bytes(b"not a shard")
    files = [tmp_path / "data.0000.lmdb", tmp_path / "data.0001.lmdb"]
    sources: list[list[str]] = [[str(tmp_path)], [str(tmp_path / "*.lmdb")], list(map(str, files))]
    read = [[s.structure_id for s in read_structures(given, ALLOWED)] for given in sources]
    assert read[0] == read[1] == read[2] == ["0_0", "0_1", "1_0", "1_1", "1_2"]


def test_named_keys_and_missing_labels(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", NUMBERED, y=None, force=None, dft=torch.tensor(-3.5))
    assert "has no energy under 'y'" in refusal(path)
    options = ReadOptions(allow_pickle=True, energy_key="dft", id_key="fid", unlabelled=True)
    found = list(read_structures(path, options))
    assert [s.energy for s in found] == [-3.5] * 5
    assert [s.structure_id for s in found] == list("01234")
    assert all(s.forces is None for s in found)


def test_pickles_are_refused_unless_allowed(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", NUMBERED)
    message = refusal(path, ReadOptions())
    assert "can run its code" in message
    assert "--allow-pickle" in message


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


class HostileStorage:
    """A tensor whose storage is a pickle of its own."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __reduce__(self) -> tuple[object, tuple[bytes]]:
        return torch.storage._load_from_bytes, (self.content,)


@pytest.mark.parametrize("place", ["record", "attribute", "length", "storage"])
def test_a_pickle_that_names_anything_else_is_refused_and_not_run(
    tmp_path: Path, place: str
) -> None:
    mark = tmp_path / "it-ran"
    hostile = Hostile(mark)
    first = record_of(NUMBERED[0], 0)
    records = {"0": first, "length": pickle.dumps(1)}
    if place == "record":
        records["0"] = pickle.dumps(hostile)
    elif place == "attribute":
        records["0"] = record_of(NUMBERED[0], 0, extra=hostile)
    elif place == "length":
        records["length"] = pickle.dumps(hostile)
    else:
        content = pickle.dumps(hostile, protocol=2)
        records["0"] = record_of(NUMBERED[0], 0, extra=HostileStorage(content))
    message = refusal(write_records(tmp_path / "a.lmdb", records))
    assert "posix.system" in message
    assert not mark.exists()


def opcode_pickle(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


@pytest.mark.parametrize(
    "body",
    [
        # Setting an attribute of the stand-in class, and of an allowed function.
        b"ctorch_geometric.data.data\nData\nN}\x8c\x0c__setstate__\x8c\x01xs\x86b",
        b"ctorch._utils\n_rebuild_tensor_v2\n}\x8c\x08__code__\x8c\x01xsb",
        # copyreg's constructor for another class.
        b"ccopyreg\n_reconstructor\nccollections\nOrderedDict\ncbuiltins\nobject\nN\x87R",
        # A module attribute reached through an allowed module, and a dotted name.
        b"ctorch.storage\nos\n",
        b"\x8c\x1atorch_geometric.data.data\x8c\x0eData.__class__\x93",
    ],
    ids=["class", "function", "constructor", "module", "dotted"],
)
def test_stand_ins_cannot_be_changed_nor_left(tmp_path: Path, body: bytes) -> None:
    records = {"0": opcode_pickle(body), "length": pickle.dumps(1)}
    refusal(write_records(tmp_path / "a.lmdb", records))
    # And the next file is read as ever.
    found = list(read_structures(write_lmdb(tmp_path / "b.lmdb", NUMBERED), ALLOWED))
    assert len(found) == 5


class Tensor:
    """A tensor by hand, whose shape need not fit its storage."""

    def __init__(self, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> None:
        self.layout = (offset, size, stride)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        from torch._utils import _rebuild_tensor_v2

        storage = torch.zeros(6).storage()
        return _rebuild_tensor_v2, (storage, *self.layout, False, {})


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((2**40,), (0,), 0), ((2, 3), (3, 1), 1), ((2,), (-1,), 1), ((7,), (1,), 0)],
)
@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_tensor_larger_than_its_storage_is_refused(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    record = record_of(NUMBERED[0], 0, pos=Tensor(size, stride, offset))
    path = write_records(tmp_path / "a.lmdb", {"0": record, "length": pickle.dumps(1)})
    assert "a.lmdb, structure 0" in refusal(path)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ({"0": b"cut off", "length": pickle.dumps(1)}, "structure 0: it is no complete pickle"),
        ({"0": pickle.dumps({"pos": 1}), "length": pickle.dumps(1)}, "pickled dict"),
        ({"1": b"", "length": pickle.dumps(1)}, "structure 0 is missing"),
        ({"0": b"", "length": pickle.dumps(7)}, "says length 7"),
        ({"0": b"", "length": pickle.dumps("1")}, "says length '1'"),
        ({"0": record_of(NUMBERED[0], 0, pos=None), "length": pickle.dumps(1)}, "has no pos"),
        ({"0": record_of(NUMBERED[0], 0, natoms=9), "length": pickle.dumps(1)}, "says natoms 9"),
        (
            {"0": record_of(NUMBERED[0], 0, fixed=torch.ones(9)), "length": pickle.dumps(1)},
            "fixed must be [3], got [9]",
        ),
        (
            {"0": record_of(NUMBERED[0], 0, tags=torch.full((3,), -1)), "length": pickle.dumps(1)},
            "tags must be integers from 0",
        ),
    ],
)
def test_damage_and_other_contents_get_one_line(
    tmp_path: Path, records: dict[str, bytes], said: str
) -> None:
    assert said in refusal(write_records(tmp_path / "a.lmdb", records))


def test_a_file_that_is_no_lmdb_gets_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.lmdb"
    path.write_bytes(b"x" * 10_000)
    assert "cannot be read as LMDB" in refusal(path)


def test_tags_and_fixed_atoms_travel_to_the_batch(tmp_path: Path) -> None:
    lmdb_file = write_lmdb(tmp_path / "a.lmdb", NUMBERED)
    options = ImportOptions(read=ALLOWED, graph=GraphRule(3.0), atom_capacity=6)
    store = import_dataset(lmdb_file, tmp_path / "a.zarr", options)
    assert {"tags", "fixed"} <= set(store.fields("structures"))
    assert not verify_store(tmp_path / "a.zarr", data=read_structures(lmdb_file, ALLOWED)).problems
    expected = list(read_structures(lmdb_file, ALLOWED))
    for found, original in zip(store.structures("source"), expected, strict=True):
        np.testing.assert_array_equal(found.tags, original.tags)
        np.testing.assert_array_equal(found.fixed, original.fixed)
    neighbors = neighbors_for(store, GraphRule(3.0), tmp_path / "graph")
    window = WindowReader(store, neighbors).read(np.arange(store.plan.n_blocks))
    batch = make_batch([window.gather(np.arange(5))])
    direct = collate([expected[i] for i in store.index.source_index], GraphRule(3.0))
    for name in ("tags", "fixed"):
        assert torch.equal(getattr(batch, name), getattr(direct, name))
    assert batch.tags is not None
    assert (batch.tags.dtype, batch.n_atoms) == (torch.uint8, 15)


def test_a_dataset_without_tags_has_no_such_fields(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "a.lmdb", NUMBERED, tags=None, fixed=None)
    store = import_dataset(path, tmp_path / "a.zarr", ImportOptions(read=ALLOWED))
    assert not {"tags", "fixed"} & set(store.fields("structures"))
    assert store.structure(0).tags is None


def test_unsaid_tags_are_two_and_unsaid_atoms_free(tmp_path: Path) -> None:
    records = {
        "0": record_of(NUMBERED[0], 0),
        "1": record_of(NUMBERED[2], 1, tags=None, fixed=None),
        "length": pickle.dumps(2),
    }
    path = write_records(tmp_path / "a.lmdb", records)
    store = import_dataset(path, tmp_path / "a.zarr", ImportOptions(read=ALLOWED))
    unsaid = list(store.structures("source"))[1]
    assert unsaid.tags is not None
    assert unsaid.fixed is not None
    assert unsaid.tags.tolist() == [2] * 5
    assert not unsaid.fixed.any()


def test_tags_are_part_of_what_a_structure_is() -> None:
    plain, tagged, other = (numbered_structure(0) for _ in range(3))
    tagged.tags = np.full(3, 2, np.uint8)
    other.tags = np.array([2, 1, 2], np.uint8)
    assert plain.content_hash() == tagged.content_hash() != other.content_hash()


@pytest.fixture(scope="module")
def oc20(shared: Path) -> tuple[Dataset, list[Structure]]:
    dataset = read_structures(shared / "data" / "oc20_lmdb", ALLOWED)
    return dataset, list(dataset)


@pytest.mark.proof
def test_both_shards_of_oc20_are_read_whole(oc20: tuple[Dataset, list[Structure]]) -> None:
    dataset, found = oc20
    assert dataset.names == ("data.0000.lmdb", "data.0001.lmdb")
    assert dataset.counts == [331, 336]
    n_atoms = [s.n_atoms for s in found]
    assert (min(n_atoms), max(n_atoms), round(np.mean(n_atoms))) == (33, 185, 78)
    assert len({n for s in found for n in s.atomic_numbers.tolist()}) == 41
    assert len({s.structure_id for s in found}) == 667
    for s in found:
        assert s.group == s.structure_id.split("_")[0]
        assert s.forces is not None
        assert s.fixed is not None
        assert s.tags is not None
        assert not s.tags.any()
        assert np.isfinite(s.forces).all()
        assert 0 < s.fixed.mean() < 1
    largest = max(float(np.abs(s.forces).max()) for s in found if s.forces is not None)
    assert largest == pytest.approx(26.23, abs=0.01)
    assert len(Counter(s.group for s in found)) == 30


@pytest.mark.proof
def test_no_slab_of_oc20_sees_another_across_the_vacuum(
    oc20: tuple[Dataset, list[Structure]],
) -> None:
    # So it makes no difference to a model of 12 Å that c is taken for not periodic.
    for structure in oc20[1][::60]:
        rule = GraphRule(12.0)
        cut = neighbor_list(structure.positions, structure.cell, structure.pbc, rule)
        full = neighbor_list(structure.positions, structure.cell, np.ones(3, bool), rule)
        assert np.array_equal(cut.edge_index, full.edge_index)


@pytest.mark.proof
def test_another_layout_gets_one_line(shared: Path) -> None:
    message = refusal(shared / "data" / "lips_lmdb" / "data.lmdb", ALLOWED)
    assert "no key 'length'" in message
    assert "extended XYZ" in message
