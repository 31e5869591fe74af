"""An audit passes what a dump wrote, and names whatever is not the teacher's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache.audit import AuditOptions, AuditReport, audit_store
from kdcache.errors import StoreError
from kdcache.fields import Codec
from kdcache.graphs import GraphRule
from kdcache.store import Store, open_store
from kdcache.structures import Batch
from kdcache.teachers import NativeTeacher, Teacher
from tests.audit.damage import damaged
from tests.chain import PAINN, SCHNET, dump, make_potential, make_store
from tests.dump import test_edges as edges
from tests.dump.failing import Behaviour, Failing
from tests.dump.test_failures import run as run_failing

MODELS = pytest.mark.parametrize("model", [PAINN, SCHNET], ids=["painn", "schnet"])


def audit(store: Store, teacher: Teacher, **options: object) -> AuditReport:
    chosen = AuditOptions(**{"threads": 1, **options})  # type: ignore[arg-type]
    return audit_store(store, teacher, chosen)


def wrong(report: AuditReport) -> list[str]:
    return [one.spec.name for one in report.fields if one.problem]


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, NativeTeacher]:
    store = make_store(tmp_path_factory.mktemp("audit"))
    teacher = NativeTeacher(make_potential())
    dump(store, teacher, codec="half")
    return open_store(store.path), teacher


@MODELS
@pytest.mark.parametrize("codec", ["half", "exact", "compact"])
def test_an_untouched_store_passes(model: dict[str, object], codec: Codec, tmp_path: Path) -> None:
    store = make_store(tmp_path, 24)
    teacher = NativeTeacher(make_potential(model))
    dump(store, teacher, codec=codec)
    report = audit(open_store(store.path), teacher, max_atoms=20)
    assert report.problems == []
    assert report.is_same_teacher
    assert (report.n_structures, report.n_left_out) == (24, 0)
    for one in report.fields:
        atoms = int(store.index.n_atoms.sum())
        assert one.n_rows == (atoms if one.spec.level == "atom" else 24)
        assert one.cosine > 0.9999
        # Over all structures, what is measured is what the manifest recorded.
        lossy = one.spec.codec != "exact"
        assert one.relative == pytest.approx(one.recorded if lossy else 0, rel=0.02, abs=1e-6)
        assert one.turning is not None
        assert one.turning < 1e-4
    assert report.force_mismatch is not None
    # SchNet's forces are the gradient of its energy, PaiNN's come from a head of their own.
    assert (report.force_mismatch < 1e-3) == (model is SCHNET)


@pytest.mark.parametrize("rule", [None, GraphRule(4.0)], ids=["searched", "wider"])
@pytest.mark.parametrize("codec", ["half", "exact", "compact"])
def test_whole_edges_pass(codec: Codec, rule: GraphRule | None, tmp_path: Path) -> None:
    store = make_store(tmp_path, 24, graph=rule)
    teacher = edges.make_teacher(max_neighbors=5)
    edges.run(store, teacher, fields=["edge", "edge_to_vector", "energy"], codec=codec)
    found = open_store(store.path)
    report = audit(found, teacher, sample=9)
    assert report.problems == []
    (edge,) = (one for one in report.fields if one.spec.name == "edge")
    assert 0 < edge.n_rows < found.plans["teachers/teacher"].n_edges.sum()


def test_one_row_in_anothers_place_is_found(
    taught: tuple[Store, NativeTeacher], tmp_path: Path
) -> None:
    store, teacher = taught
    (row, *_) = np.flatnonzero(store.index.n_atoms > 4).tolist()
    block, n_atoms = int(store.index.block[row]), int(store.index.n_atoms[row])
    first = int(store.index.atom_start[row]) - block * store.plan.atom_capacity
    here = store.read("teachers/teacher/node", [block])

    def swap(values: np.ndarray) -> np.ndarray:
        if np.array_equal(values, here):
            values[[first, first + n_atoms - 1]] = values[[first + n_atoms - 1, first]]
        return values

    shard = block // store.plan.blocks_per_shard
    found = damaged(store, tmp_path / "c.zarr", "teachers/teacher/node", swap, shard)
    report = audit(found, teacher)
    assert wrong(report) == ["node"]
    (node,) = (one for one in report.fields if one.problem)
    assert node.n_outside == 2
    assert node.worst_structure == store.index.structure_id[row]
    assert repr(str(store.index.structure_id[row])) in report.problems[0]


def test_a_single_value_beyond_rounding_is_found(
    taught: tuple[Store, NativeTeacher], tmp_path: Path
) -> None:
    store, teacher = taught

    def nudge(values: np.ndarray) -> np.ndarray:
        # Three steps of float16: the relative error of the field stays within its bound.
        bits = values.view(np.uint16)
        bits[0, np.abs(values[0]).argmax()] += 3
        return values

    found = damaged(store, tmp_path / "c.zarr", "teachers/teacher/node", nudge)
    report = audit(found, teacher)
    assert wrong(report) == ["node"]
    (node,) = (one for one in report.fields if one.problem)
    assert node.relative < node.bound
    assert node.n_outside == len(store.plan.shard_blocks(0))


def test_swapped_axes_of_vectors_are_named(
    taught: tuple[Store, NativeTeacher], tmp_path: Path
) -> None:
    store, teacher = taught
    found = damaged(
        store, tmp_path / "c.zarr", "teachers/teacher/vector", lambda values: values[:, [1, 2, 0]]
    )
    first = found.plan.shard_structures(0)
    assert first.stop - first.start > 3
    report = audit(found, teacher)
    assert wrong(report) == ["vector"]
    # All of it, as a faulty writer would: then the axes can be told.
    for shard in range(1, store.plan.n_shards):
        copy = tmp_path / f"{shard}.zarr"
        found = damaged(
            found, copy, "teachers/teacher/vector", lambda values: values[:, [1, 2, 0]], shard
        )
    (problem,) = audit(found, teacher).problems
    assert "+0.00 +1.00 +0.00; +0.00 +0.00 +1.00; +1.00 +0.00 +0.00" in problem


def test_axes_that_are_the_teachers_are_not_blamed(
    taught: tuple[Store, NativeTeacher], tmp_path: Path
) -> None:
    found, teacher = taught
    for shard in range(found.plan.n_shards):
        copy = tmp_path / f"{shard}.zarr"
        found = damaged(
            found, copy, "teachers/teacher/vector", lambda values: values * 1.004, shard
        )
    (problem,) = audit(found, teacher).problems
    assert "other axes" not in problem


def test_features_of_another_checkpoint_are_found(taught: tuple[Store, NativeTeacher]) -> None:
    store, _ = taught
    other = NativeTeacher(make_potential(seed=8))
    report = audit(store, other)
    assert not report.is_same_teacher
    assert wrong(report) == [one.spec.name for one in report.fields]


def test_another_architecture_is_said(taught: tuple[Store, NativeTeacher]) -> None:
    store, _ = taught
    report = audit(store, NativeTeacher(make_potential(SCHNET)))
    by_name = {one.spec.name: one.problem for one in report.fields}
    assert "the teacher gives no such field" in by_name["vector"]
    wider = NativeTeacher(make_potential({**PAINN, "hidden_channels": 12}))
    by_name = {one.spec.name: one.problem for one in audit(store, wider).fields}
    assert "shape [8], the teacher gives it by atom with shape [12]" in by_name["node"]


def test_edges_that_are_not_the_teachers_are_found(tmp_path: Path) -> None:
    store = make_store(tmp_path, 18)
    edges.run(store, edges.make_teacher(max_neighbors=5), fields=["edge"])
    report = audit(open_store(store.path), edges.make_teacher(max_neighbors=3))
    assert wrong(report) == ["edge"]
    assert report.fields[0].n_outside > 0


def test_structures_the_teacher_failed_on_are_left_out(tmp_path: Path) -> None:
    store = make_store(tmp_path, 24)
    failed = (3, 11, 0)
    run_failing(store, Behaviour(raises=failed), on_error="skip", codec="half")
    # One that would raise if it were asked for them.
    report = audit(open_store(store.path), Failing(Behaviour(raises=failed)), name="t")
    assert (report.n_structures, report.n_left_out, report.n_in_store) == (21, 3, 24)
    # It says "invariant" of what holds a position: values are stored rightly, described wrongly.
    assert sorted(wrong(report)) == ["energy", "node"]
    assert all("described as invariant" in problem for problem in report.problems)


class Crooked:
    """A teacher whose vectors are not turned with the structure."""

    def __init__(self, inner: NativeTeacher) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        said = self.inner.compute(batch)
        return {**said, "vector": said["vector"] + torch.tensor([0.5, 0, 0])[None, :, None]}


def test_vectors_that_do_not_turn_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path, 12)
    teacher = Crooked(NativeTeacher(make_potential()))
    dump(store, teacher)  # type: ignore[arg-type]
    found = open_store(store.path)
    (problem,) = audit(found, teacher).problems  # type: ignore[arg-type]
    assert problem.startswith("vector: described as vector, but values do not turn")
    assert audit(found, teacher, symmetry_limit=10.0).problems == []  # type: ignore[arg-type]


class Leaning(Crooked):
    """A teacher whose energies depend on where x points, by little beside its references."""

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        said = self.inner.compute(batch)
        added = torch.zeros_like(said["energy"])
        added.index_add_(0, batch.structure_index, 0.3 * batch.positions[:, 0].to(added.dtype))
        return {**said, "energy": said["energy"] + added}


def test_energies_that_depend_on_the_frame_are_named(tmp_path: Path) -> None:
    store = make_store(tmp_path, 12)
    teacher = Leaning(NativeTeacher(make_potential()))
    dump(store, teacher)  # type: ignore[arg-type]
    (problem,) = audit(open_store(store.path), teacher).problems  # type: ignore[arg-type]
    assert problem.startswith("energy: described as invariant, but values do not stay")


def test_the_sample_is_the_seeds(taught: tuple[Store, NativeTeacher]) -> None:
    store, teacher = taught
    one, same, other = (audit(store, teacher, sample=5, seed=seed) for seed in (1, 1, 2))
    assert one.to_json() == same.to_json() != other.to_json()
    assert one.n_structures == 5


def test_a_teacher_that_is_not_there_is_refused(taught: tuple[Store, NativeTeacher]) -> None:
    store, teacher = taught
    with pytest.raises(StoreError, match="did you mean teacher"):
        audit(store, teacher, name="teachr")
