"""A small dataset whose every row says where it belongs: atom k of structure s carries (s, k).

One atom, no edges, and a structure as large as a block are among the structures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.fields import EDGE_INDEX, EDGE_SHIFT, STRUCTURE_FIELDS, FieldSpec
from kdcache.store import (
    BlockPlan,
    DatasetEntry,
    GraphEntry,
    GroupWriter,
    Manifest,
    StoreIndex,
    TeacherEntry,
    add_teacher,
    create_store,
    index_from_plan,
    plan_blocks,
)
from kdcache.structures import Structure, dataset_digest

Array = npt.NDArray[Any]

ATOM_CAPACITY = 12
SIZES = (3, 1, 12, 5, 2, 7, 1, 4, 9, 6, 1, 1, 8, 3, 2, 11, 5, 1, 4, 6)
BLOCKS_PER_SHARD = 3
SEED = 11

STRUCTURES = (*STRUCTURE_FIELDS, EDGE_INDEX, EDGE_SHIFT)
TEACHER = (
    FieldSpec("node", "atom", (5,), codec="half"),
    FieldSpec("vector", "atom", (3, 4), symmetry="vector", codec="compact"),
    FieldSpec("bare", "atom", (3,), "float64", symmetry="vector", codec="compact"),
    FieldSpec("atomic_energy", "atom", (), "float64", "eV"),
    FieldSpec("energy", "structure", (), "float64", "eV"),
    FieldSpec("pooled", "structure", (2,), codec="compact"),
    FieldSpec("message", "edge", (2,), codec="half"),
    FieldSpec("flag", "atom", (), "bool"),
)


def make_structure(s: int, n_atoms: int) -> Structure:
    """Structure s: atom k sits at (s, k, 1/(s + k + 1)); every fifth has no label."""
    k = np.arange(n_atoms)
    labelled = s % 5 != 4
    return Structure(
        structure_id=f"frame:{s}",
        atomic_numbers=1 + (7 * s + k) % 100,
        positions=np.stack([np.full(n_atoms, s), k, 1 / (s + k + 1)], axis=1).astype(np.float64),
        cell=np.diag([10.0 + s, 11.0, -0.0]),
        pbc=np.array([True, s % 2 == 0, False]),
        energy=-float(s) / 3 if labelled else None,
        forces=np.stack([k, np.full(n_atoms, s), -k], axis=1) / 7.0 if labelled else None,
        split="val" if s % 4 == 0 else "train",
        group=f"g{s % 3}",
        weight=1.0 + s,
    )


def make_dataset(sizes: Sequence[int] = SIZES) -> list[Structure]:
    """Structures in dataset order."""
    return [make_structure(s, n) for s, n in enumerate(sizes)]


@dataclass(frozen=True)
class Sample:
    """A dataset laid out, and what each field of it must hold, in store order."""

    dataset: list[Structure]
    source_index: Array
    plan: BlockPlan
    index: StoreIndex

    @property
    def entry(self) -> DatasetEntry:
        hashes = [structure.content_hash() for structure in self.dataset]
        return DatasetEntry(
            digest=dataset_digest(hashes),
            n_structures=len(hashes),
            n_labelled=sum(structure.energy is not None for structure in self.dataset),
            sources=["frames.extxyz"],
        )

    @property
    def graph(self) -> GraphEntry:
        return GraphEntry(cutoff=4.5, max_neighbors=20, truncated=False)

    def values(self, spec: FieldSpec) -> Array:
        """All rows of a field in store order."""
        rows = [self._rows(spec, int(s)) for s in self.source_index]
        return np.concatenate(rows).astype(spec.dtype)

    def shard(self, specs: Sequence[FieldSpec], shard: int) -> dict[str, Array]:
        """What a writer is given."""
        structures = self.plan.shard_structures(shard)
        return {
            spec.name: np.concatenate(
                [self._rows(spec, int(s)) for s in self.source_index[structures]]
            ).astype(spec.dtype)
            for spec in specs
        }

    def _rows(self, spec: FieldSpec, s: int) -> Array:
        structure = self.dataset[s]
        # By object: a teacher's energy is described like the ground truth's.
        if any(spec is known for known in STRUCTURE_FIELDS):
            value = getattr(structure, spec.name)
            if value is None:
                value = np.full((structure.n_atoms, 3) if spec.level == "atom" else (), np.nan)
            return np.asarray(value if spec.level == "atom" else np.asarray(value)[None])
        n = {"atom": structure.n_atoms, "structure": 1, "edge": n_edges(structure)}[spec.level]
        k = np.arange(n)[:, None]
        channel = np.arange(spec.row_size)[None]
        if spec.name == "flag":
            return np.asarray((s + k) % 2 == 1).reshape(n)
        if spec.name == "edge_index":
            # Sorted by target, source, shift: an atom's two edges come from its next one.
            target = k[:, 0] // 2
            return np.stack([(target + 1) % structure.n_atoms, target], 1)
        if spec.name == "edge_shift":
            return np.broadcast_to(np.array([s, 0, -s]), (n, 3)) + k
        # Channel 0 is s, channel 1 is k: a row taken for another's is seen at once.
        rows = np.where(channel == 0, s, np.where(channel == 1, k, np.sin(s + k + channel)))
        return rows.reshape(n, *spec.shape).astype(np.float64)


def n_edges(structure: Structure) -> int:
    """No edges for a single atom, else two per atom."""
    return 2 * structure.n_atoms if structure.n_atoms > 1 else 0


def make_sample(sizes: Sequence[int] = SIZES) -> Sample:
    """The dataset in a random order that is not its own inverse."""
    dataset = make_dataset(sizes)
    order = np.random.default_rng(SEED).permutation(len(dataset))
    if len(dataset) > 2:
        assert not np.array_equal(np.argsort(order), order)
    ordered = [dataset[i] for i in order]
    plan = plan_blocks(
        [s.n_atoms for s in ordered],
        [n_edges(s) for s in ordered],
        atom_capacity=max(ATOM_CAPACITY, max(sizes)),
        blocks_per_shard=BLOCKS_PER_SHARD,
    )
    index = index_from_plan(
        plan,
        structure_id=[s.structure_id for s in ordered],
        content_hash=[s.content_hash() for s in ordered],
        source_index=order,
        split=[s.split for s in ordered],
        group=[s.group for s in ordered],
        weight=[s.weight for s in ordered],
    )
    return Sample(dataset, order, plan, index)


def begin_structures(path: Path, sample: Sample) -> GroupWriter:
    return create_store(
        path,
        index=sample.index,
        plan=sample.plan,
        fields=STRUCTURES,
        dataset=sample.entry,
        graph=sample.graph,
        seed=SEED,
    )


def teacher_entry(**changes: Any) -> TeacherEntry:
    values: dict[str, Any] = {
        "digest": "ab" * 32,
        "fields": TEACHER,
        "model": "painn",
        "architecture": {"hidden": 5, "layers": [1, 2]},
        "references": {1: -13.6},
        "licence": "CC-BY-4.0",
        "precision": "float32",
        "software": {"torch": "2"},
    }
    return TeacherEntry.describe(**(values | changes))


def write_all(
    writer: GroupWriter, sample: Sample, shards: Sequence[int] | None = None
) -> Manifest | None:
    """Write shards, all that are pending by default, and commit when none is left."""
    with writer:
        for shard in writer.pending_shards() if shards is None else shards:
            writer.write_shard(shard, sample.shard(writer.fields, shard))
        return None if writer.pending_shards() else writer.commit()


def write_store(path: Path, sample: Sample, teachers: Sequence[str] = ("painn",)) -> Path:
    """A finished store."""
    write_all(begin_structures(path, sample), sample)
    for name in teachers:
        write_all(add_teacher(path, name, teacher_entry(), TEACHER), sample)
    return path


def files_of(path: Path) -> Mapping[str, bytes]:
    """Every file of a store by its path within it."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }
