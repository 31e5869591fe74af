"""Which files a store consists of and how each group is laid out, from its manifest and its counts.

Every path is made here, none is taken from a file. Invariant: a finished store holds exactly these
files, the manifest has a digest of each but itself, and groups differ in the edges of a teacher
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from kdcache.errors import StoreError
from kdcache.fields import (
    GRAPH_FIELDS,
    N_EDGES,
    OPTIONAL_FIELDS,
    STRUCTURE_FIELDS,
    FieldSpec,
)
from kdcache.store.arrays import ArrayReader
from kdcache.store.entries import FieldEntry
from kdcache.store.failures import FAILURES
from kdcache.store.files import LocalFiles, StoreFiles
from kdcache.store.index import INDEX, StoreIndex, check_places
from kdcache.store.layout import BlockPlan, plan_blocks, with_edges
from kdcache.store.manifest import Manifest
from kdcache.store.metadata import SCALE_SUFFIX, Json, field_documents, group_document

ZARR = "zarr.json"
Plans = Mapping[str, BlockPlan]


def plan_of(manifest: Manifest, index: StoreIndex, where: str) -> BlockPlan:
    """The layout of a store, from the counts in its index.

    Raises:
        StoreError: index or manifest say otherwise than the counts give.
    """
    capacities, counts = manifest.capacities, (manifest.n_atoms, manifest.n_edges)
    plan = plan_blocks(
        index.n_atoms,
        index.n_edges,
        atom_capacity=capacities.atom,
        blocks_per_shard=capacities.blocks_per_shard,
    )
    check_places(index, plan, where)
    for name, said, found in (
        ("n_blocks", capacities.n_blocks, plan.n_blocks),
        ("blocks_per_shard", capacities.blocks_per_shard, plan.blocks_per_shard),
        ("structure capacity", capacities.structure, plan.structure_capacity),
        ("atom capacity", capacities.atom, plan.atom_capacity),
        ("edge capacity", capacities.edge, plan.edge_capacity),
        ("n_atoms", counts[0], int(plan.n_atoms.sum())),
        ("n_edges", counts[1], int(plan.n_edges.sum())),
    ):
        if said != found:
            raise StoreError(
                f"{where}: the manifest says {name} {said}, the index gives {found}. Rows would be "
                f"taken for those of another structure. Fetch the store again."
            )
    return plan


def group_plans(
    store: Path | StoreFiles, manifest: Manifest, plan: BlockPlan
) -> dict[str, BlockPlan]:
    """The layout of every group: the store's, or with a teacher's own edges where it has some.

    Args:
        store: path or files of the store, in which the counts of such edges are read.
        manifest: its groups.
        plan: `plan_of` the store.

    Raises:
        StoreError: counts that are missing, damaged or impossible.
    """
    files = LocalFiles(store) if isinstance(store, Path) else store
    plans = {"structures": plan}
    for name, teacher in manifest.teachers.items():
        group = f"teachers/{name}"
        plans[group] = plan
        if not teacher.has_own_edges:
            continue
        (document,) = field_documents(N_EDGES, plan).values()
        reader = array_reader(files, f"{group}/{N_EDGES.name}", N_EDGES, document, plan)
        reader.check_files()
        blocks = np.arange(plan.n_blocks)
        n_edges = reader.allocate(blocks)
        reader.read(blocks, n_edges, check=True)
        try:
            plans[group] = with_edges(plan, n_edges)
        except StoreError as error:
            raise StoreError(f"{files.where(f'{group}/{N_EDGES.name}')}: {error}") from None
    return plans


def array_reader(
    files: StoreFiles, name: str, spec: FieldSpec, document: Json, plan: BlockPlan
) -> ArrayReader:
    """The reader of an array that `array_documents` lists, under the plan of its group."""
    is_scale = name.endswith(SCALE_SUFFIX)
    shape = cast(list[int], document["shape"])
    return ArrayReader(
        files=files,
        names=[shard_file(name, shard, document) for shard in range(plan.n_shards)],
        used=np.ones(plan.n_blocks, np.int64) if is_scale else plan.used(spec.level),
        capacity=1 if is_scale else plan.capacity(spec.level),
        row_shape=tuple(shape[1:]),
        dtype=np.dtype(str(document["data_type"])).newbyteorder("<"),
        blocks_per_shard=plan.blocks_per_shard,
        compressed=spec.codec == "exact",
    )


def groups(manifest: Manifest) -> dict[str, dict[str, FieldSpec]]:
    """Fields by name, by group: "structures" and "teachers/<name>"."""

    def specs(entries: dict[str, FieldEntry]) -> dict[str, FieldSpec]:
        return {name: entry.spec(name) for name, entry in entries.items()}

    found = {"structures": specs(manifest.structures)}
    for name, teacher in manifest.teachers.items():
        found[f"teachers/{name}"] = specs(teacher.fields)
    return found


def check_meaning(manifest: Manifest, where: str) -> None:
    """Fields of fixed meaning have the level, shape and dtype of that meaning.

    Raises:
        StoreError: naming the first field that has not.
    """
    for group, specs in groups(manifest).items():
        known = (*GRAPH_FIELDS, N_EDGES)
        if group == "structures":
            known = (*STRUCTURE_FIELDS, *OPTIONAL_FIELDS, *GRAPH_FIELDS)
        for spec in known:
            found = specs.get(spec.name, spec)
            if _layout_of(found) != _layout_of(spec):
                raise StoreError(
                    f"{where}: {group}/{spec.name} is {_layout_of(found)} in the manifest, the "
                    f"format has {_layout_of(spec)}. Rows would be taken for something else. Fetch "
                    f"the store again."
                )


def _layout_of(spec: FieldSpec) -> str:
    return f"{spec.dtype[:40]} {list(spec.shape)} of each {spec.level}"


def array_documents(manifest: Manifest, plans: Plans) -> Iterator[tuple[str, FieldSpec, Json]]:
    """Path within the store, field and zarr.json of every array."""
    for group, specs in groups(manifest).items():
        for spec in specs.values():
            for name, document in field_documents(spec, plans[group]).items():
                yield f"{group}/{name}", spec, document


def node_documents(manifest: Manifest, plans: Plans) -> dict[str, Json]:
    """zarr.json of every node below the root, by path within the store."""
    nodes = {"teachers": group_document()}
    nodes |= {group: group_document() for group in groups(manifest)}
    nodes |= {path: document for path, _, document in array_documents(manifest, plans)}
    return nodes


def shard_file(array: str, shard: int, document: Json) -> str:
    """Path of a shard within the store, by Zarr's default chunk keys."""
    trailing = len(cast(list[int], document["shape"])) - 1
    return "/".join([array, "c", str(shard), *["0"] * trailing])


def expected_files(manifest: Manifest, plans: Plans) -> set[str]:
    """Paths of all files the manifest must have a digest of."""
    files = {INDEX, ZARR} | {f"{node}/{ZARR}" for node in node_documents(manifest, plans)}
    failing = [name for name, teacher in manifest.teachers.items() if teacher.n_failed]
    files |= {f"teachers/{name}/{FAILURES}" for name in failing}
    n_shards = plans["structures"].n_shards
    for array, _, document in array_documents(manifest, plans):
        files |= {shard_file(array, shard, document) for shard in range(n_shards)}
    return files
