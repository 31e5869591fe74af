"""A teacher's edge features arrive on the student's own edges, and nowhere else."""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache.dump import DumpOptions, dump_teacher
from kdcache.errors import ConfigError
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.store import Store, TeacherEntry, add_teacher, open_store
from kdcache.stream.edges import check_edge_coverage
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import neighbors_for
from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle
from kdcache.stream.window import collate, take_matched
from kdcache.structures import Batch
from tests.chain import make_store
from tests.dump.test_edges import make_teacher

THEIRS = GraphRule(3.0, 6, symmetric=True)
# Of the teacher's own graph: itself, a part, more than all, another choice of neighbours, nothing.
OURS = {
    "same": THEIRS,
    "subset": GraphRule(1.9),
    "superset": GraphRule(3.8),
    "limited": GraphRule(3.4, 3),
    "empty": GraphRule(0.2),
}
Identity = tuple[int, ...]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Structures with the whole edges of a teacher; the store keeps a graph of another rule."""
    made = make_store(tmp_path_factory.mktemp("store"), 24, graph=GraphRule(3.2))
    teacher = make_teacher(max_neighbors=6)
    assert teacher.graph_rule == THEIRS
    options = DumpOptions("teacher", ["edge", "node"], "exact", threads=1)
    dump_teacher(made.path, teacher, options)
    return open_store(made.path)


@pytest.fixture(scope="module")
def said(store: Store) -> dict[Identity, torch.Tensor]:
    """What the teacher says of every edge: (structure, source, target, shift) -> features."""
    teacher = make_teacher(max_neighbors=6)
    found = {}
    for row, structure in enumerate(store.structures("store")):
        batch = collate([structure], THEIRS, np.float64)
        features = teacher.compute(batch)["edge"]
        found |= dict(zip(identities(batch, [row]), features, strict=True))
    return found


def identities(batch: Batch, rows: list[int]) -> list[Identity]:
    """Of every edge of a batch: row in the store, source, target, shift."""
    owner = batch.structure_index.tolist()
    first = np.searchsorted(owner, np.arange(batch.n_structures))
    return [
        (rows[owner[i]], j - first[owner[i]], i - first[owner[i]], *map(int, shift))
        for (j, i), shift in zip(batch.edge_index.T.tolist(), batch.edge_shift, strict=True)
    ]


def reader(store: Store, rule: GraphRule, **changes: object) -> WindowReader:
    settings = {"teacher_fields": ("teacher/edge", "teacher/node"), "dtype": np.float64, **changes}
    neighbors = neighbors_for(store, rule, store.path.parent / "graphs")
    return WindowReader(store, neighbors, **settings)  # type: ignore[arg-type]


@pytest.mark.proof
@pytest.mark.parametrize("rule", OURS.values(), ids=OURS)
def test_every_edge_of_a_batch_has_its_own_features_or_none(
    rule: GraphRule, store: Store, said: dict[Identity, torch.Tensor]
) -> None:
    sampler = BlockShuffle(
        store.index.block, np.arange(len(store)), batch_size=6, seed=1, window_blocks=3
    )
    met, missed, of_itself = set(), 0, 0
    with Loader([(reader(store, rule), sampler)]) as loader:
        for batch in islice(loader, sampler.steps_per_epoch):
            assert batch.rows is not None
            features = batch.teacher["teacher/edge"]
            assert len(features) == batch.n_edges
            for identity, feature in zip(
                identities(batch, batch.rows.tolist()), features, strict=True
            ):
                if identity in said:
                    torch.testing.assert_close(feature, said[identity], rtol=0, atol=1e-12)
                    met.add(identity)
                    of_itself += identity[1] == identity[2]
                else:
                    assert feature.isnan().all()
                    missed += 1
            assert not batch.teacher["teacher/node"].isnan().any()
    assert (missed == 0) == (rule in (THEIRS, OURS["empty"]))
    if rule == OURS["superset"]:
        assert met == set(said)
        assert of_itself > 0


def test_half_precision_keeps_what_is_missing_missing() -> None:
    array = np.arange(6, dtype=np.float16).reshape(3, 2)
    taken = take_matched(array, np.array([2, -1, 0]), np.float16)
    assert taken.dtype == np.float16
    assert np.isnan(taken[1]).all()
    assert taken[[0, 2]].tolist() == [[4, 5], [0, 1]]
    wide = take_matched(array, np.array([2, -1, 0]), np.float32)
    assert wide.dtype == np.float32
    np.testing.assert_array_equal(wide, taken.astype(np.float32))
    assert np.isnan(take_matched(array[:0], np.array([-1, -1]), np.float32)).all()


def test_the_share_of_edges_is_reported(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    shares = {}
    with caplog.at_level(logging.INFO, "kdcache.stream.edges"):
        for name, rule in OURS.items():
            neighbors = neighbors_for(store, rule, store.path.parent / "graphs")
            fields = ["teacher/node", "teacher/edge"]
            shares |= {name: check_edge_coverage(store, neighbors, fields, 0.0)["teacher"]}
            assert check_edge_coverage(store, neighbors, ["teacher/node"], 1.0) == {}
    assert shares["same"] == shares["empty"] == 1
    assert 0.9 < shares["subset"] <= 1
    assert 0 < shares["superset"] < shares["limited"] < 1
    assert "teacher teacher has 100.0 % of the student's edges" in caplog.messages


def test_a_share_below_the_bound_is_refused(store: Store) -> None:
    neighbors = neighbors_for(store, OURS["superset"], store.path.parent / "graphs")
    message = (
        r"Teacher teacher \(graph: cutoff 3 Å, at most 6 neighbours\) has \d\d\.\d % of the "
        r"student's edges, \d+ of \d+ in the first structures; at least 99 % is asked for\. .* "
        r"lower data\.min_edge_coverage"
    )
    with pytest.raises(ConfigError, match=message):
        check_edge_coverage(store, neighbors, ["teacher/edge"], 0.99)


def test_a_list_of_edges_is_no_feature(store: Store) -> None:
    neighbors = neighbors_for(store, THEIRS, store.path.parent / "graphs")
    with pytest.raises(ConfigError, match="teacher/edge_shift names the edges"):
        check_edge_coverage(store, neighbors, ["teacher/edge_shift"], 0.5)


@pytest.mark.proof
def test_the_edges_of_another_dataset_are_refused(store: Store, tmp_path: Path) -> None:
    """The right counts, the right atoms, but images that none of these structures see."""
    foreign = open_store(make_store(tmp_path, 24, graph=THEIRS).path)
    fields = [store.spec(f"teachers/teacher/{n}") for n in ("edge", "edge_index", "edge_shift")]
    counts = foreign.plan.n_edges
    entry = TeacherEntry.describe(digest="0" * 64, fields=fields, model="edgenet", graph=THEIRS)
    with add_teacher(foreign.path, "foreign", entry, fields, n_edges=counts) as writer:
        for shard in writer.pending_shards():
            blocks = list(foreign.plan.shard_blocks(shard))
            index = foreign.read("structures/edge_index", blocks)
            shift = foreign.read("structures/edge_shift", blocks) + np.array([0, 0, 2], np.int16)
            arrays = {"edge": np.zeros((len(index), 6)), "edge_index": index, "edge_shift": shift}
            writer.write_shard(shard, arrays)
        writer.commit()
    neighbors = neighbors_for(foreign, THEIRS, tmp_path)
    with pytest.raises(ConfigError, match=r"has 0\.0 % of the student's edges"):
        check_edge_coverage(open_store(foreign.path), neighbors, ["foreign/edge"], 0.5)


def test_edges_kept_by_the_graph_of_the_store_are_matched_too(tmp_path: Path) -> None:
    """As stores were written before teachers had edges of their own."""
    made = make_store(tmp_path, 24, graph=THEIRS)
    spec = FieldSpec("message", "edge", (2,))
    entry = TeacherEntry.describe(digest="0" * 64, fields=[spec], model="edgenet", graph=THEIRS)
    with add_teacher(made.path, "old", entry, [spec]) as writer:
        for shard in writer.pending_shards():
            index = made.read("structures/edge_index", list(made.plan.shard_blocks(shard)))
            writer.write_shard(shard, {"message": index.astype("f4")})
        writer.commit()
    found = open_store(made.path)
    window = reader(found, OURS["superset"], teacher_fields=("old/message",)).read(np.array([1, 0]))
    gathered = window.gather(np.arange(len(window.rows))[::-1])
    message, index = gathered["old/message"], gathered["edge_index"]
    present = ~np.isnan(message).any(axis=1)
    assert 0 < present.sum() < len(present)
    assert np.array_equal(message[present], index[present])
