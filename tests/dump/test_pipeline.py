"""A dump holds what the teacher says of each structure, and refuses what would spoil it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.dump import DumpOptions, DumpReport, dump_teacher, open_or_import
from kdcache.errors import ConfigError, IdentityError, KdcacheError, StoreError, TeacherError
from kdcache.fields import Codec
from kdcache.graphs import GraphRule
from kdcache.ingest import ImportOptions
from kdcache.models.taps import Tap
from kdcache.store import Store, open_store, verify_store
from kdcache.stream.window import collate
from kdcache.structures import Batch
from kdcache.teachers import NativeTeacher, Teacher
from tests.chain import (
    CUTOFF,
    PAINN,
    SCHNET,
    SMALL,
    dump,
    make_potential,
    make_store,
    read_options,
    structures,
    write_xyz,
)

# Relative to the largest value of a field: half keeps 11 bits, compact 7 per channel.
CODEC_ERROR: dict[Codec, float] = {"exact": 2e-6, "half": 5e-4, "compact": 5e-3}


def run(store: Store, teacher: Teacher, **options: object) -> DumpReport:
    chosen = DumpOptions(**{"name": "teacher", "threads": 1, **options})  # type: ignore[arg-type]
    return dump_teacher(store.path, teacher, chosen)


def one_by_one(store: Store, teacher: Teacher) -> dict[str, np.ndarray]:
    """What the teacher says of each structure alone, in store order."""
    said = []
    dtype = np.float64 if teacher.dtype == torch.float64 else np.float32
    for structure in store.structures("store"):
        said.append(teacher.compute(collate([structure], teacher.graph_rule, dtype)))
    return {name: np.concatenate([one[name].numpy() for one in said]) for name in said[0]}


def assert_close(store: Store, expected: dict[str, np.ndarray], name: str, error: float) -> None:
    for field in store.fields(f"teachers/{name}"):
        found = store.read(f"teachers/{name}/{field}").astype(np.float64)
        largest = np.abs(expected[field]).max()
        assert found.shape == expected[field].shape
        allowed = error if store.spec(f"teachers/{name}/{field}").codec != "exact" else 2e-6
        np.testing.assert_allclose(found, expected[field], rtol=0, atol=allowed * largest)


@pytest.mark.parametrize("codec", CODEC_ERROR)
@pytest.mark.parametrize("model", [PAINN, SCHNET], ids=["painn", "schnet"])
def test_a_dump_is_the_teachers_word_on_each_structure(
    model: dict[str, object], codec: Codec, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    sizes = store.index.n_atoms
    assert 1 in sizes
    teacher = NativeTeacher(make_potential(model))
    report = dump(store, teacher, codec=codec)
    found = open_store(store.path)
    assert_close(found, one_by_one(store, teacher), "teacher", CODEC_ERROR[codec])
    assert verify_store(store.path).problems == []
    for name, entry in found.fields("teachers/teacher").items():
        assert entry.codec == ("exact" if entry.unit else codec)
        error = report.entry.errors[name].relative
        assert (error == 0) == (entry.codec == "exact")
        assert error < 2 * CODEC_ERROR[codec]
    assert (report.n_structures, report.computed) == (40, 40)
    assert report.n_atoms == sizes.sum()
    files = (store.path / "teachers" / "teacher").rglob("*")
    assert report.n_bytes == sum(file.stat().st_size for file in files if file.is_file())


def test_a_block_sized_structure_and_others_come_through(tmp_path: Path) -> None:
    store = make_store(tmp_path, atom_capacity=6)
    assert (store.plan.used("atom") == store.plan.capacity("atom")).any()
    teacher = NativeTeacher(make_potential())
    dump(store, teacher)
    assert_close(open_store(store.path), one_by_one(store, teacher), "teacher", 2e-6)


def test_batches_of_any_size_agree(tmp_path: Path) -> None:
    teacher = NativeTeacher(make_potential(dtype=torch.float64))
    store = make_store(tmp_path)
    for max_atoms in (1, 7, 4096):
        run(store, teacher, name=f"t{max_atoms}", max_atoms=max_atoms, codec="exact")
    found = open_store(store.path)
    for field in found.fields("teachers/t1"):
        whole = found.read(f"teachers/t4096/{field}")
        for name in ("t1", "t7"):
            other = found.read(f"teachers/{name}/{field}")
            np.testing.assert_allclose(other, whole, rtol=0, atol=1e-12 * np.abs(whole).max())


class Counting:
    """A teacher that remembers the batches it was given."""

    def __init__(self, inner: NativeTeacher) -> None:
        self.inner = inner
        self.sizes: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def compute(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.sizes.append(batch.n_atoms)
        return self.inner.compute(batch)


def test_batches_keep_their_bound(tmp_path: Path) -> None:
    teacher = Counting(NativeTeacher(make_potential()))
    store = make_store(tmp_path)
    run(store, teacher, max_atoms=6)  # type: ignore[arg-type]
    assert max(teacher.sizes) == 6
    assert sum(teacher.sizes) == store.index.n_atoms.sum()


def test_the_graph_of_the_store_makes_no_difference(tmp_path: Path) -> None:
    teacher = NativeTeacher(make_potential(dtype=torch.float64))
    for name, rule in (("none", None), ("same", GraphRule(CUTOFF)), ("wider", GraphRule(4.0))):
        # Room for all edges: blocks stay the same.
        store = make_store(tmp_path, graph=rule, name=f"{name}.zarr")
        dump(store, teacher)
        assert_close(open_store(store.path), one_by_one(store, teacher), "teacher", 2e-6)


def test_only_the_fields_asked_for_are_stored(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    teacher = NativeTeacher(make_potential(), [Tap.parse("node/msg1=message_layers.0")])
    run(store, teacher, fields=["node_msg1", "energy", "node_msg1"])
    found = open_store(store.path)
    assert set(found.fields("teachers/teacher")) == {"node_msg1", "energy"}
    assert_close(found, one_by_one(store, teacher), "teacher", CODEC_ERROR["half"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [(["nodes"], "no field nodes: did you mean node"), ([], "nothing to dump")],
)
def test_fields_the_teacher_does_not_give_are_refused(
    fields: Sequence[str], message: str, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    with pytest.raises(ConfigError, match=message):
        run(store, NativeTeacher(make_potential()), fields=fields)
    assert not open_store(store.path).teachers
    assert not (store.path / ".work").exists()


def test_a_second_teacher_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    first, second = NativeTeacher(make_potential()), NativeTeacher(make_potential(SCHNET))
    dump(store, first, name="first")
    before = open_store(store.path).manifest.digests
    dump(store, second, name="second")
    found = open_store(store.path)
    assert list(found.teachers) == ["first", "second"]
    assert found.teachers["second"].digest == second.digest
    shards = {name: digest for name, digest in before.items() if name.startswith("teachers/first")}
    assert shards.items() <= found.manifest.digests.items()
    assert verify_store(store.path).problems == []
    with pytest.raises(StoreError, match="finished"):
        dump(store, second, name="first")


class Spoiled:
    """A teacher that says one wrong number, of one atom of one structure."""

    def __init__(self, inner: NativeTeacher, positions: np.ndarray, value: float) -> None:
        self.inner = inner
        self.place = torch.from_numpy(positions[-1].astype("f4"))
        self.value = value

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def compute(self, batch: Batch) -> dict[str, torch.Tensor]:
        computed = self.inner.compute(batch)
        here = (batch.positions == self.place).all(1)
        computed["node"][here, 2] = self.value
        return computed


@pytest.mark.parametrize("value", [1e6, float("nan"), float("-inf")])
def test_a_number_that_cannot_be_kept_stops_with_its_structure(
    value: float, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    chosen = structures(40)[26]
    assert chosen.n_atoms == 6
    teacher = Spoiled(NativeTeacher(make_potential()), chosen.positions, value)
    with pytest.raises(TeacherError, match=r"Structure 's26': node at atom 5 is"):
        run(store, teacher)  # type: ignore[arg-type]
    settings = {"on_overflow": "clip"} if value == 1e6 else {"on_nonfinite": "zero"}
    report = run(store, teacher, name="other", **settings)  # type: ignore[arg-type]
    errors = report.entry.errors["node"]
    assert errors.clipped + errors.nonfinite == 1
    found = open_store(store.path)
    node = found.read("teachers/other/node")
    assert np.isfinite(node).all()
    (row,) = np.flatnonzero(found.index.structure_id == "s26")
    last = found.index.n_atoms[: row + 1].sum() - 1
    assert node[last, 2] == (65504 if value == 1e6 else 0)
    if value == 1e6:
        assert (np.abs(node) == 65504).sum() == 1
    if value == 1e6:
        exact = run(store, teacher, name="exact", codec="exact")  # type: ignore[arg-type]
        assert exact.entry.errors["node"].clipped == 0


class Interrupted:
    """A teacher whose machine is taken away after some batches."""

    def __init__(self, inner: NativeTeacher, batches: int) -> None:
        self.inner = inner
        self.left = batches

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def compute(self, batch: Batch) -> dict[str, torch.Tensor]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.inner.compute(batch)


@pytest.mark.parametrize("batches", [0, 1, 5, 9])
def test_a_dump_that_was_interrupted_ends_with_the_same_digests(
    batches: int, tmp_path: Path
) -> None:
    teacher = NativeTeacher(make_potential())
    whole = make_store(tmp_path, name="whole.zarr")
    dump(whole, teacher)
    # Ids come from the file's keys, so the two stores are of one dataset.
    broken = make_store(tmp_path, name="whole.zarr-again")
    with pytest.raises(KeyboardInterrupt):
        run(broken, Interrupted(teacher, batches), codec="exact")  # type: ignore[arg-type]
    assert not open_store(broken.path).teachers
    report = dump(broken, teacher)
    assert report.computed < 40 or batches < 3
    ours, theirs = (open_store(store.path).manifest for store in (whole, broken))
    shards = [name for name in ours.digests if name.startswith("teachers/teacher")]
    assert len(shards) > 6
    assert all(ours.digests[name] == theirs.digests[name] for name in shards)
    assert verify_store(broken.path).problems == []


def test_another_teacher_does_not_go_on_with_an_interrupted_dump(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    teacher = NativeTeacher(make_potential())
    with pytest.raises(KeyboardInterrupt):
        run(store, Interrupted(teacher, 5))  # type: ignore[arg-type]
    for other, options in (
        (NativeTeacher(make_potential(seed=8)), {}),
        (teacher, {"fields": ["node"]}),
        (teacher, {"codec": "exact"}),
    ):
        with pytest.raises(KdcacheError, match="unfinished"):
            run(store, other, **options)


def import_options() -> ImportOptions:
    return ImportOptions(read_options(), **SMALL)  # type: ignore[arg-type]


def test_the_right_dataset_is_taken_and_a_wrong_one_refused(tmp_path: Path) -> None:
    found = structures(24)
    data = write_xyz(tmp_path / "data.extxyz", found)
    path = tmp_path / "store.zarr"

    def opened(file: Path | None, *, new: bool) -> Path:
        files = [str(file)] if file else []
        return open_or_import(files, path, import_options(), name="t", new=new)

    assert opened(data, new=True) == path
    assert opened(data, new=True) == path  # no teacher yet: as good as new
    dump(open_store(path), NativeTeacher(make_potential()))
    for file in (data, path, None):
        assert opened(file, new=False) == path
    with pytest.raises(StoreError, match=r"holds teachers \['teacher'\].*--into"):
        opened(data, new=True)

    nudged = replace(found[5], positions=found[5].positions + np.array([0, 0, 1e-6]))
    moved = [*found[:5], nudged, *found[6:]]
    for name, others, message in (
        ("moved", moved, "s5"),
        ("reordered", [found[1], found[0], *found[2:]], "reordered|another order"),
        ("fewer", found[:-1], "23"),
        ("other", structures(24, seed=1), "s0"),
    ):
        wrong = write_xyz(tmp_path / f"{name}.extxyz", others)
        with pytest.raises(IdentityError, match=message):
            opened(wrong, new=False)


def test_a_store_that_is_missing_is_refused_when_it_should_be_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        open_or_import([], tmp_path / "no.zarr", import_options(), name="t", new=False)
