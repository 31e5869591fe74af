"""The synthetic store that the benchmarks of the stream read, laid out like any other.

Crystals of jittered grids with their neighbour lists, energies, forces, and one random feature of
an atom kept twice: as teacher "half" (float16) and as teacher "exact" (float32, compressed).
Invariant: what a structure holds depends on its number and the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.fields import GRAPH_FIELDS, STRUCTURE_FIELDS, Codec, FieldSpec
from kdcache.graphs import Edges, GraphRule, neighbor_list
from kdcache.store import (
    DatasetEntry,
    GraphEntry,
    GroupWriter,
    Store,
    TeacherEntry,
    add_teacher,
    create_store,
    index_from_plan,
    open_store,
    plan_blocks,
)
from kdcache.structures import IntArray, dataset_digest

Array = npt.NDArray[Any]

RULE = GraphRule(4.5)
MEAN_ATOMS = 39
SPACING = 2.7  # Å between grid points: 19 neighbours within 4.5 Å
N_SHAPES = 256
SEED = 7


@dataclass(frozen=True)
class Shape:
    """A crystal that many structures are translated copies of, so that its list serves all."""

    atomic_numbers: Array
    positions: Array
    cell: Array
    edges: Edges


def write_store(
    path: Path,
    n_structures: int,
    channels: int = 256,
    codecs: Sequence[Codec] = ("half", "exact"),
    *,
    trajectory: int = 1,
    permuted: bool = True,
) -> Store:
    """A finished store of `n_structures` of 39 atoms on average.

    Args:
        path: where it is made; opened as it is where it is finished already.
        n_structures: in the store.
        channels: of the feature of an atom.
        codecs: a teacher of this name for each.
        trajectory: structures of one group, one after the other in the dataset.
        permuted: write in a random order as an import does, else as they come.
    """
    if (path / "manifest.json").is_file():
        return open_store(path)
    rng = np.random.default_rng(SEED)
    known = shapes()
    shape_of = rng.integers(len(known), size=n_structures)
    source = rng.permutation(n_structures) if permuted else np.arange(n_structures)
    sizes = np.array([len(shape.atomic_numbers) for shape in known])[shape_of]
    edges = np.array([shape.edges.n_edges for shape in known])[shape_of]
    plan = plan_blocks(sizes[source], edges[source])
    # Not what an import writes: hashing structures is not what is measured.
    hashes = rng.integers(256, size=(n_structures, 16), dtype=np.uint8)
    index = index_from_plan(
        plan,
        structure_id=[str(s) for s in source],
        content_hash=hashes[source],
        source_index=source,
        group=[str(s // trajectory) for s in source],
    )
    dataset = DatasetEntry(
        digest=dataset_digest([row.tobytes() for row in hashes]),
        n_structures=n_structures,
        n_labelled=n_structures,
    )
    writer = create_store(
        path,
        index=index,
        plan=plan,
        fields=(*STRUCTURE_FIELDS, *GRAPH_FIELDS),
        dataset=dataset,
        graph=GraphEntry.describe(RULE, truncated=False),
        seed=SEED,
    )
    _write(writer, lambda rows: _structures([known[k] for k in shape_of[source[rows]]], rows))
    for codec in codecs:
        node = FieldSpec("node", "atom", (channels,), codec=codec)
        entry = TeacherEntry.describe(digest="0" * 64, fields=[node], model="random")
        _write(
            add_teacher(path, codec, entry, [node]),
            lambda rows: {"node": _features(rows, int(plan.n_atoms[rows].sum()), channels)},
        )
    return open_store(path)


def shapes() -> list[Shape]:
    """Crystals of 8 to 72 atoms."""
    return [_shape(np.random.default_rng([SEED, k])) for k in range(N_SHAPES)]


def _shape(rng: np.random.Generator) -> Shape:
    n_atoms = int(np.clip(rng.normal(MEAN_ATOMS, 12), 8, 72))
    side = int(np.ceil(n_atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    positions = SPACING * grid[rng.permutation(len(grid))[:n_atoms]]
    positions = positions + rng.normal(0, 0.1, positions.shape)
    cell = SPACING * side * np.eye(3)
    edges = neighbor_list(positions, cell, np.ones(3, bool), RULE)
    return Shape(rng.choice([1, 6, 8], n_atoms), positions, cell, edges)


def _structures(found: Sequence[Shape], rows: IntArray) -> dict[str, Array]:
    rng = np.random.default_rng([SEED, 1, int(rows[0])])
    shift = rng.uniform(0, SPACING, (len(found), 3))
    positions = [shape.positions + shift[k] for k, shape in enumerate(found)]
    n_atoms = sum(map(len, positions))
    return {
        "atomic_numbers": np.concatenate([shape.atomic_numbers for shape in found]).astype("u1"),
        "positions": np.concatenate(positions),
        "cell": np.stack([shape.cell for shape in found]),
        "pbc": np.ones((len(found), 3), bool),
        "energy": rng.normal(size=len(found)),
        "forces": rng.normal(size=(n_atoms, 3)),
        "edge_index": np.concatenate([shape.edges.edge_index.T for shape in found]),
        "edge_shift": np.concatenate([shape.edges.edge_shift for shape in found]),
    }


def _features(rows: IntArray, n_atoms: int, channels: int) -> Array:
    rng = np.random.default_rng([SEED, 2, int(rows[0])])
    return rng.standard_normal((n_atoms, channels), np.float32)


def _write(writer: GroupWriter, arrays: Any) -> None:
    with writer:
        for shard in writer.pending_shards():
            structures = writer.plan.shard_structures(shard)
            rows = np.arange(structures.start, structures.stop)
            writer.write_shard(shard, arrays(rows))
        writer.commit()
