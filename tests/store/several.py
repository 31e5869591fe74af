"""Stores of parts of one large dataset, and an independent reader that finds rows by id.

Beside a teacher on the store's graph there is one with edges of its own that failed on some
structures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import zarr

from kdcache.fields import GRAPH_FIELDS, FieldSpec
from kdcache.graphs import GraphRule, neighbor_list
from kdcache.store import (
    Store,
    TeacherEntry,
    add_teacher,
    create_store,
    index_from_plan,
    open_store,
    plan_blocks,
)
from tests.store.sample import (
    ATOM_CAPACITY,
    BLOCKS_PER_SHARD,
    SIZES,
    STRUCTURES,
    TEACHER,
    Sample,
    make_structure,
    n_edges,
    teacher_entry,
    write_all,
)

Array = npt.NDArray[Any]
T = TypeVar("T")

RULE = GraphRule(2.5)
OWN_EDGES = (FieldSpec("edge", "edge", (2,), codec="half"), FieldSpec("node", "atom", (3,)))


def part(numbers: Sequence[int], seed: int, **layout: int) -> Sample:
    """Structures of these numbers, in a random order."""
    dataset = [make_structure(s, SIZES[s % len(SIZES)]) for s in numbers]
    order = np.random.default_rng(seed).permutation(len(dataset))
    ordered = [dataset[i] for i in order]
    plan = plan_blocks(
        [s.n_atoms for s in ordered],
        [n_edges(s) for s in ordered],
        atom_capacity=layout.get("atom_capacity", ATOM_CAPACITY),
        blocks_per_shard=layout.get("blocks_per_shard", BLOCKS_PER_SHARD),
    )
    index = index_from_plan(
        plan,
        structure_id=[s.structure_id for s in ordered],
        content_hash=[s.content_hash() for s in ordered],
        source_index=order,
        origin=["rattled" if s.n_atoms == 1 else "data" for s in ordered],
        split=[s.split for s in ordered],
        group=[s.group for s in ordered],
        weight=[s.weight for s in ordered],
    )
    return Sample(dataset, order, plan, index)


def write_part(path: Path, sample: Sample, *, edges: bool = True, **entry: Any) -> Store:
    """A finished store with the teachers "painn" and, if asked for, "edges"."""
    licences = {"structures": f"of {path.stem}", "labels": ""}
    dataset = sample.entry.model_copy(update={"sources": [f"{path.stem}.extxyz"]})
    dataset = dataset.model_validate(dataset.model_dump() | {"licences": licences})
    structures = create_store(
        path,
        index=sample.index,
        plan=sample.plan,
        fields=STRUCTURES,
        dataset=dataset,
        graph=sample.graph,
        seed=1,
    )
    write_all(structures, sample)
    write_all(add_teacher(path, "painn", teacher_entry(**entry), TEACHER), sample)
    if edges:
        write_edges(path, sample, teacher_entry(digest="ef" * 32, graph=RULE))
    return open_store(path)


def write_edges(path: Path, sample: Sample, entry: TeacherEntry) -> None:
    ordered = [sample.dataset[int(i)] for i in sample.source_index]
    lists = [neighbor_list(s.positions, s.cell, s.pbc, RULE) for s in ordered]
    counts = [one.n_edges for one in lists]
    fields = (*OWN_EDGES, *GRAPH_FIELDS)
    failed = {row: f"no {s.structure_id}" for row, s in enumerate(ordered) if s.n_atoms in (5, 6)}
    with add_teacher(path, "edges", entry, fields, n_edges=counts) as writer:
        for shard in writer.pending_shards():
            here = writer.plan.shard_structures(shard)
            numbers = [float(s.structure_id.rpartition(":")[2]) for s in ordered[here]]
            rows = lists[here]
            n_atoms = [s.n_atoms for s in ordered[here]]
            arrays = {
                "edge": np.concatenate([said(one.n_edges, 2, s) for one, s in zip(rows, numbers)]),  # noqa: B905
                "node": np.concatenate([said(n, 3, s) for n, s in zip(n_atoms, numbers)]),  # noqa: B905
                "edge_index": np.concatenate([one.edge_index.T for one in rows]),
                "edge_shift": np.concatenate([one.edge_shift for one in rows]),
            }
            of_shard = {row: why for row, why in failed.items() if here.start <= row < here.stop}
            writer.write_shard(shard, arrays, of_shard)
        writer.commit()


def said(n: int, channels: int, structure: float) -> Array:
    """[n, channels] rows that say which structure and which row they are."""
    rows = np.full((n, channels), structure, np.float32)
    rows[:, 1] = np.arange(n)
    return rows


def by_id(path: Path, name: str) -> dict[str, Array]:
    """Rows of a field by structure, found with zarr-python, pyarrow and FORMAT.md alone."""
    index = {k: v.to_numpy() for k, v in zip_columns(path)}
    array = zarr.open_array(path / name, mode="r")
    values = np.asarray(array[:])
    level = array.attrs["level"]
    n_blocks = int(index["block"].max()) + 1
    capacity = len(values) // n_blocks
    counts = {"structure": np.ones_like(index["n_atoms"]), "atom": index["n_atoms"]}.get(
        str(level), index["n_edges"]
    )
    own = path / name.rpartition("/")[0] / "n_edges"
    if level == "edge" and own.exists():
        rows_of_counts = np.asarray(zarr.open_array(own, mode="r")[:])
        counts = rows_of_counts[index["structure_row"]]
    if array.attrs["codec"] == "compact":
        scale = np.asarray(zarr.open_array(path / f"{name}.scale", mode="r")[:])
        blocks = np.repeat(scale, capacity, axis=0)
        shape = (len(values), *(1,) * (values.ndim - 2), -1)
        per_row = blocks.reshape(shape) if values.ndim > 1 else blocks[:, 0]
        values = values.astype(np.float32) * per_row
    found = {}
    filled = np.zeros(n_blocks, np.int64)
    for row, structure_id in enumerate(index["structure_id"]):
        block = int(index["block"][row])
        start = block * capacity + int(filled[block])
        found[str(structure_id)] = values[start : start + int(counts[row])]
        filled[block] += int(counts[row])
    return found


def zip_columns(path: Path) -> Iterator[tuple[str, Any]]:
    table = pq.read_table(path / "index.parquet")
    return zip(table.column_names, table.columns, strict=True)


def assert_same_rows(found: dict[str, Array], wanted: dict[str, Array]) -> None:
    """Bit for bit, for every structure that was found."""
    assert found
    for structure_id, rows in found.items():
        assert rows.dtype == wanted[structure_id].dtype
        assert rows.tobytes() == wanted[structure_id].tobytes(), structure_id


@dataclass
class Backwards:
    """A cluster that does the last item first, and dies after some."""

    lives: int = 10**9

    def run(
        self, prepare: Callable[[], Callable[[int], T]], items: Iterable[int]
    ) -> Iterator[tuple[int, T]]:
        work = prepare()
        for item in reversed(list(items)):
            if not self.lives:
                raise KeyboardInterrupt
            self.lives -= 1
            yield item, work(item)
