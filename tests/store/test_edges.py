"""Edges of a teacher's own: their layout, what a writer refuses, what a verifier finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr

from kdcache.errors import ShapeError, StoreError
from kdcache.fields import EDGE_INDEX, EDGE_SHIFT, GRAPH_FIELDS, N_EDGES, FieldSpec
from kdcache.graphs import GraphRule, neighbor_list
from kdcache.store import (
    FieldEntry,
    GroupWriter,
    Store,
    add_teacher,
    describe_store,
    format_description,
    open_store,
    plan_blocks,
    verify_store,
)
from kdcache.store.edges import check_edges
from kdcache.store.layout import with_edges
from tests.store.sample import Sample, teacher_entry

Array = npt.NDArray[Any]

RULE = GraphRule(2.5)
FIELDS = (FieldSpec("edge", "edge", (2,), codec="half"), *GRAPH_FIELDS)


@pytest.fixture(scope="module")
def lists(sample: Sample) -> list[dict[str, Array]]:
    """Of every structure in store order: real edges, and features that say (structure, edge)."""
    found = []
    for s in sample.source_index:
        structure = sample.dataset[int(s)]
        edges = neighbor_list(structure.positions, structure.cell, structure.pbc, RULE)
        k = np.arange(edges.n_edges)
        feature = np.stack([np.full(edges.n_edges, s), k], axis=1).astype(np.float32)
        found.append({"edge": feature, "edge_index": edges.edge_index.T, "edge_shift":
                      edges.edge_shift})  # fmt: skip
    assert {len(one["edge"]) for one in found} > {0}
    return found


def counts(lists: list[dict[str, Array]]) -> list[int]:
    return [len(one["edge"]) for one in lists]


def shard(writer: GroupWriter, lists: list[dict[str, Array]], number: int) -> dict[str, Array]:
    rows = writer.plan.shard_structures(number)
    return {name: np.concatenate([one[name] for one in lists[rows]]) for name in lists[0]}


def write(
    path: Path, lists: list[dict[str, Array]], fields: tuple[FieldSpec, ...] = FIELDS
) -> Store:
    entry = teacher_entry(graph=RULE)
    with add_teacher(path, "edges", entry, fields, n_edges=counts(lists)) as writer:
        for number in writer.pending_shards():
            writer.write_shard(number, shard(writer, lists, number))
        writer.commit()
    return open_store(path)


def altered(lists: list[dict[str, Array]], row: int, **arrays: Array) -> list[dict[str, Array]]:
    return [one | arrays if k == row else one for k, one in enumerate(lists)]


def longest(lists: list[dict[str, Array]]) -> int:
    return int(np.argmax(counts(lists)))


def test_the_example_of_the_format_description() -> None:
    plan = plan_blocks([3, 2, 4], [1, 1, 1], atom_capacity=5, blocks_per_shard=2)
    own = with_edges(plan, [6, 0, 9])
    assert (own.edge_capacity, own.edge_start.tolist()) == (9, [0, 6, 9])
    assert own.n_blocks * own.edge_capacity == 18
    for name in ("block", "structure_row", "atom_start"):
        assert getattr(own, name).tolist() == getattr(plan, name).tolist()


def test_every_edge_keeps_its_feature_and_its_identity(
    copied: Path, lists: list[dict[str, Array]]
) -> None:
    store = write(copied, lists)
    for name in lists[0]:
        whole = np.concatenate([one[name] for one in lists])
        assert np.array_equal(store.read(f"teachers/edges/{name}"), whole)
    for block in range(store.plan.n_blocks):
        rows = store.plan.block_structures(block)
        expected = np.concatenate([one["edge"] for one in lists[rows]])
        assert np.array_equal(store.read("teachers/edges/edge", [block]), expected)
    # The other teacher's rows still belong to the edges of the store.
    assert len(store.read("teachers/painn/message")) == store.index.n_edges.sum()
    assert verify_store(copied).problems == []


def test_other_readers_find_an_edge_by_counting(
    copied: Path, lists: list[dict[str, Array]]
) -> None:
    """As FORMAT.md says: counts by structure, blocks of one capacity, no gaps within a block."""
    store = write(copied, lists)
    group = zarr.open_group(copied, mode="r")["teachers/edges"]
    assert isinstance(group, zarr.Group)
    n_edges, edge = (np.asarray(group[name]) for name in ("n_edges", "edge"))  # type: ignore[arg-type]
    index = store.index
    own = n_edges[index.structure_row]
    assert own.tolist() == counts(lists)
    per_block = [int(own[index.block == block].sum()) for block in range(store.plan.n_blocks)]
    capacity = max(1, *per_block)
    assert edge.shape == (len(per_block) * capacity, 2)
    for row, one in enumerate(lists):
        earlier = (index.block == index.block[row]) & (np.arange(len(own)) < row)
        start = int(index.block[row]) * capacity + int(own[earlier].sum())
        assert np.array_equal(edge[start : start + own[row]], one["edge"])


def test_a_store_with_edges_of_a_teacher_is_of_a_newer_format_than_one_without(
    copied: Path, lists: list[dict[str, Array]]
) -> None:
    assert open_store(copied).manifest.format_version == 1
    store = write(copied, lists)
    assert store.manifest.format_version == 2
    attributes = zarr.open_group(copied, mode="r").attrs["kdcache"]
    assert isinstance(attributes, Mapping)
    assert attributes["format_version"] == 2
    assert attributes["edge_capacity"] == store.plan.edge_capacity
    with add_teacher(copied, "later", teacher_entry(), FIELDS[:1]) as writer:
        for number in writer.pending_shards():
            n = int(store.plan.n_edges[store.plan.shard_structures(number)].sum())
            writer.write_shard(number, {"edge": np.zeros((n, 2), np.float32)})
        writer.commit()
    assert open_store(copied).manifest.format_version == 2
    assert verify_store(copied).problems == []


def test_a_description_says_how_many_edges_a_teacher_has(
    copied: Path, lists: list[dict[str, Array]]
) -> None:
    write(copied, lists)
    text = format_description(describe_store(copied))
    assert f"cutoff 2.5 Å, {sum(counts(lists)):,} edges kept" in text


@pytest.mark.parametrize("field", [EDGE_INDEX, EDGE_SHIFT])
def test_own_edges_without_their_identity_are_refused(
    copied: Path, lists: list[dict[str, Array]], field: FieldSpec
) -> None:
    kept = tuple(spec for spec in FIELDS if spec is not field)
    with pytest.raises(StoreError, match="rows would have no atoms to belong to"):
        write(copied, lists, kept)
    named = (*FIELDS, replace(N_EDGES, dtype="int32"))
    with pytest.raises(StoreError, match="n_edges is written by the store itself"):
        write(copied, lists, named)


def test_counts_that_no_list_has_are_refused(copied: Path, lists: list[dict[str, Array]]) -> None:
    for wrong, message in (([1], "must be"), ([-1] * len(lists), "has -1 edges")):
        with pytest.raises(StoreError, match=message):
            add_teacher(copied, "edges", teacher_entry(), FIELDS, n_edges=wrong)
    more = [n + 1 for n in counts(lists)]
    with (
        add_teacher(copied, "edges", teacher_entry(), FIELDS, n_edges=more) as writer,
        pytest.raises(ShapeError, match="edge must be"),
    ):
        writer.write_shard(0, shard(writer, lists, 0))


@pytest.mark.proof
@pytest.mark.parametrize("wrong", ["atom", "order", "twice", "image"])
def test_a_foreign_edge_list_is_refused(
    copied: Path, lists: list[dict[str, Array]], wrong: str
) -> None:
    """As it is written where it cannot be of these structures, by verify where it is too long."""
    row = longest(lists)
    index, shift = (lists[row][name].copy() for name in ("edge_index", "edge_shift"))
    if wrong == "atom":
        index[-1] = index[-1, 0], index.max() + 1
    elif wrong == "order":
        index[:2], shift[:2] = index[1::-1].copy(), shift[1::-1].copy()
    elif wrong == "twice":
        index[1], shift[1] = index[0], shift[0]
    else:
        shift[-1, 0] += 3
        write(copied, altered(lists, row, edge_shift=shift))
        (problem,) = verify_store(copied).problems
        assert "Å long, the teacher's graph ends at 2.5 Å" in problem
        return
    with pytest.raises(
        StoreError, match=r"an atom its structure lacks|is not behind the one before"
    ):
        write(copied, altered(lists, row, edge_index=index, edge_shift=shift))
    assert "edges" not in open_store(copied).teachers


def test_an_empty_list_and_a_single_edge_are_in_order() -> None:
    none = np.zeros((0, 2), int), np.zeros((0, 3), int), np.array([1, 1]), np.array([0, 0])
    check_edges(*none, "here")
    check_edges(np.array([[0, 0]]), np.array([[1, 0, 0]]), np.array([1]), np.array([1]), "here")


def test_counts_that_were_tampered_with_are_refused(
    copied: Path, lists: list[dict[str, Array]]
) -> None:
    store = write(copied, lists)
    array = zarr.open_array(copied / "teachers" / "edges" / "n_edges", mode="r+")
    array[int(store.index.structure_row[longest(lists)])] = -4
    with pytest.raises(StoreError, match=r"n_edges: The structure in row \d+ has -4 edges"):
        open_store(copied)


def test_a_field_that_only_shares_the_name_of_the_counts_lays_nothing_out() -> None:
    other = replace(N_EDGES, dtype="int32")
    entry = teacher_entry(fields=[other])
    assert not entry.has_own_edges
    assert entry.fields == {"n_edges": FieldEntry.describe(other)}
    assert teacher_entry(fields=[N_EDGES]).has_own_edges
