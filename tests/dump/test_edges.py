"""Edge features in a store: summed at the atoms by default, kept whole with identity on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from kdcache.dump import DumpOptions, DumpReport, dump_teacher
from kdcache.errors import StoreError, TeacherError
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule, neighbor_list
from kdcache.models.potential import Normalizer, Potential
from kdcache.models.taps import Tap
from kdcache.store import Store, open_store, verify_store
from kdcache.structures import Batch
from kdcache.teachers import NativeTeacher, Teacher
from tests.chain import REFERENCES, SCHNET, make_potential, make_store
from tests.dump.test_pipeline import Interrupted, assert_close, one_by_one
from tests.edge_model import EdgeNet, EdgeNetHyperparameters

GRAPHS = (None, GraphRule(3.0), GraphRule(4.0), GraphRule(2.0))


def make_teacher(
    dtype: torch.dtype = torch.float64,
    references: Mapping[int, float] = REFERENCES,
    **settings: object,
) -> NativeTeacher:
    hyperparameters = EdgeNetHyperparameters.model_validate(settings)
    model = EdgeNet(hyperparameters, torch.Generator().manual_seed(3))
    units = Normalizer(energy_scale=1.5, force_scale=1.5)
    return NativeTeacher(Potential(model, units, references).to(dtype).eval())


def run(store: Store, teacher: Teacher, **options: object) -> DumpReport:
    settings = {"name": "teacher", "threads": 1, "codec": "exact", **options}
    chosen = DumpOptions(**settings)  # type: ignore[arg-type]
    return dump_teacher(store.path, teacher, chosen)


def one_structure_at_a_time(store: Store, field: str) -> Iterator[np.ndarray]:
    """Rows of a stored edge field, structure by structure, by the places that FORMAT.md gives."""
    group = zarr.open_group(store.path, mode="r")
    counts = np.asarray(group["teachers/teacher/n_edges"])  # type: ignore[arg-type]
    rows = np.asarray(group[f"teachers/teacher/{field}"])  # type: ignore[arg-type]
    capacity = len(rows) // store.plan.n_blocks
    filled, block = 0, -1
    for row in range(len(store)):
        if store.index.block[row] != block:
            filled, block = 0, int(store.index.block[row])
        count = int(counts[store.index.structure_row[row]])
        start = block * capacity + filled
        yield rows[start : start + count]
        filled += count


@pytest.mark.proof
def test_e2n_and_v2v_of_a_store_are_equations_5_and_6_edge_by_edge(tmp_path: Path) -> None:
    teacher = make_teacher()
    store = make_store(tmp_path, 18)
    run(store, teacher, fields=["edge", "edge_to_node", "edge_to_vector"])
    store = open_store(store.path)
    node = store.read("teachers/teacher/edge_to_node")
    vector = store.read("teachers/teacher/edge_to_vector")
    lists = {name: one_structure_at_a_time(store, name) for name in ("edge_index", "edge_shift")}
    first = own_images = 0
    for row, edge in enumerate(one_structure_at_a_time(store, "edge")):
        structure = store.structure(row)
        sums = np.zeros((structure.n_atoms, 6))
        vectors = np.zeros((structure.n_atoms, 3, 6))
        shifts = next(lists["edge_shift"])
        for k, (j, i) in enumerate(next(lists["edge_index"])):
            u_ij = structure.positions[j] + shifts[k] @ structure.cell - structure.positions[i]
            u_ij = u_ij / np.linalg.norm(u_ij)
            sums[i] += edge[k]
            vectors[i] += np.outer(u_ij, edge[k])
            own_images += i == j
        atoms = slice(first, first + structure.n_atoms)
        np.testing.assert_allclose(node[atoms], sums, rtol=0, atol=1e-12)
        np.testing.assert_allclose(vector[atoms], vectors, rtol=0, atol=1e-12)
        first = atoms.stop
    assert own_images > 0


def test_sums_are_kept_by_default_and_whole_edges_are_not(tmp_path: Path) -> None:
    store = make_store(tmp_path, 24)
    teacher = make_teacher()
    run(store, teacher)
    found = open_store(store.path)
    expected = one_by_one(store, teacher)
    assert set(found.fields("teachers/teacher")) == set(expected) - {"edge"}
    assert {"edge_to_node", "edge_to_vector"} < set(expected)
    assert found.spec("teachers/teacher/edge_to_vector").symmetry == "vector"
    assert_close(found, expected, "teacher", 2e-6)
    # Nothing here that an older program could not read.
    assert found.manifest.format_version == 1


@pytest.mark.parametrize("rule", GRAPHS, ids=["none", "same", "wider", "narrower"])
def test_whole_edges_are_those_of_the_teachers_graph_whatever_the_store_keeps(
    rule: GraphRule | None, tmp_path: Path
) -> None:
    store = make_store(tmp_path, 24, graph=rule)
    teacher = make_teacher(max_neighbors=5)
    run(store, teacher, fields=["edge", "node"])
    found = open_store(store.path)
    names = {"edge", "node", "edge_index", "edge_shift", "n_edges"}
    assert set(found.fields("teachers/teacher")) == names
    counts = found.plans["teachers/teacher"].n_edges
    assert found.read("teachers/teacher/n_edges").tolist() == counts.tolist()
    lists = [
        neighbor_list(s.positions, s.cell, s.pbc, teacher.graph_rule)
        for s in found.structures("store")
    ]
    assert counts.tolist() == [edges.n_edges for edges in lists]
    expected = one_by_one(store, teacher) | {
        "edge_index": np.concatenate([edges.edge_index.T for edges in lists]),
        "edge_shift": np.concatenate([edges.edge_shift for edges in lists]),
        "n_edges": counts,
    }
    assert_close(found, expected, "teacher", 2e-6)
    assert found.manifest.format_version == 2
    assert found.index.n_edges.sum() == (0 if rule is None else found.manifest.n_edges)
    report = verify_store(store.path)
    assert report.problems == []


@pytest.mark.proof
def test_zarr_python_reads_whole_edges(tmp_path: Path) -> None:
    store = make_store(tmp_path, 24)
    run(store, make_teacher(torch.float32), codec="half", fields=["edge"])
    store = open_store(store.path)
    for field in ("edge", "edge_index", "edge_shift"):
        theirs = np.concatenate(list(one_structure_at_a_time(store, field)))
        ours = store.read(f"teachers/teacher/{field}")
        assert theirs.dtype == ours.dtype
        assert theirs.tobytes() == ours.tobytes()
        assert len(ours) == store.read("teachers/teacher/n_edges").sum() > 100


def test_a_tap_on_edges_is_summed_and_kept_likewise(tmp_path: Path) -> None:
    teacher = NativeTeacher(make_potential(SCHNET), [Tap.parse("edge/gate=interactions.0.mlp")])
    store = make_store(tmp_path, 24, graph=GraphRule(4.0))
    run(store, teacher)
    run(store, teacher, name="whole", fields=["edge_gate"])
    found, expected = open_store(store.path), one_by_one(store, teacher)
    assert {"edge_gate_to_node", "edge_gate_to_vector"} < set(found.fields("teachers/teacher"))
    assert_close(found, expected, "teacher", 2e-6)
    whole = found.read("teachers/whole/edge_gate")
    np.testing.assert_allclose(whole, expected["edge_gate"], rtol=0, atol=2e-6)


@pytest.mark.proof
@pytest.mark.parametrize("batches", [0, 3, 5])
def test_a_dump_of_edges_that_was_interrupted_ends_with_the_same_digests(
    batches: int, tmp_path: Path
) -> None:
    teacher = make_teacher(torch.float32)
    whole = make_store(tmp_path, 24, name="whole.zarr")
    run(whole, teacher, fields=["edge", "energy"])
    broken = make_store(tmp_path, 24, name="broken.zarr")
    with pytest.raises(KeyboardInterrupt):
        run(broken, Interrupted(teacher, batches), fields=["edge", "energy"])  # type: ignore[arg-type]
    report = run(broken, teacher, fields=["edge", "energy"])
    assert report.computed < 24 or batches < 3
    ours, theirs = (open_store(store.path).manifest for store in (whole, broken))
    shards = [name for name in ours.digests if name.startswith("teachers/teacher")]
    assert {name.split("/")[2] for name in shards} >= {"edge", "edge_index", "n_edges"}
    assert all(ours.digests[name] == theirs.digests[name] for name in shards)
    assert verify_store(broken.path).problems == []


def test_another_graph_does_not_go_on_with_an_interrupted_dump(tmp_path: Path) -> None:
    store = make_store(tmp_path, 24)
    with pytest.raises(KeyboardInterrupt):
        run(store, Interrupted(make_teacher(), 3), fields=["edge"])  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="unfinished"):
        run(store, make_teacher(max_neighbors=3), fields=["edge"])


class Short:
    """A teacher that leaves out the last edge of every batch."""

    def __init__(self, inner: NativeTeacher) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def compute(self, batch: Batch) -> dict[str, torch.Tensor]:
        computed = self.inner.compute(batch)
        return {**computed, "edge": computed["edge"][:-1]}


def test_a_teacher_with_other_edges_than_the_batch_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, 24)
    with pytest.raises(TeacherError, match=r"edgenet gave edge as \[\d+, 6\] for a batch where"):
        run(store, Short(make_teacher()), fields=["edge"])  # type: ignore[arg-type]
    assert not open_store(store.path).teachers


def test_teachers_with_and_without_edges_share_a_store(tmp_path: Path) -> None:
    store = make_store(tmp_path, 24, graph=GraphRule(3.5))
    wide, narrow = make_teacher(), make_teacher(cutoff=2.0)
    for name, teacher in (("wide", wide), ("narrow", narrow)):
        run(store, teacher, name=name, fields=["edge"])
    run(store, make_teacher(), name="sums")
    found = open_store(store.path)
    counts = {name: found.plans[f"teachers/{name}"].n_edges.sum() for name in found.teachers}
    assert 0 < counts["narrow"] < counts["wide"] < counts["sums"] == found.index.n_edges.sum()
    assert verify_store(store.path).problems == []
    spec: FieldSpec = found.spec("teachers/narrow/edge")
    assert spec.level == "edge"
    assert len(found.read("teachers/narrow/edge")) == counts["narrow"]
