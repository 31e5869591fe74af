"""Which files a store consists of, from its manifest and its layout.

Every path is made here, none is taken from a file. Invariant: a finished store holds exactly these
files, and the manifest has a digest of each but itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from kdcache.errors import StoreError
from kdcache.fields import FieldSpec
from kdcache.store.index import INDEX, StoreIndex, check_places
from kdcache.store.layout import BlockPlan, plan_blocks
from kdcache.store.manifest import FieldEntry, Manifest
from kdcache.store.metadata import Json, field_documents, group_document

ZARR = "zarr.json"


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


def groups(manifest: Manifest) -> dict[str, dict[str, FieldSpec]]:
    """Fields by name, by group: "structures" and "teachers/<name>"."""

    def specs(entries: dict[str, FieldEntry]) -> dict[str, FieldSpec]:
        return {name: entry.spec(name) for name, entry in entries.items()}

    found = {"structures": specs(manifest.structures)}
    for name, teacher in manifest.teachers.items():
        found[f"teachers/{name}"] = specs(teacher.fields)
    return found


def array_documents(manifest: Manifest, plan: BlockPlan) -> Iterator[tuple[str, FieldSpec, Json]]:
    """Path within the store, field and zarr.json of every array."""
    for group, specs in groups(manifest).items():
        for spec in specs.values():
            for name, document in field_documents(spec, plan).items():
                yield f"{group}/{name}", spec, document


def node_documents(manifest: Manifest, plan: BlockPlan) -> dict[str, Json]:
    """zarr.json of every node below the root, by path within the store."""
    nodes = {"teachers": group_document()}
    nodes |= {group: group_document() for group in groups(manifest)}
    nodes |= {path: document for path, _, document in array_documents(manifest, plan)}
    return nodes


def shard_file(array: str, shard: int, document: Json) -> str:
    """Path of a shard within the store, by Zarr's default chunk keys."""
    trailing = len(cast(list[int], document["shape"])) - 1
    return "/".join([array, "c", str(shard), *["0"] * trailing])


def expected_files(manifest: Manifest, plan: BlockPlan) -> set[str]:
    """Paths of all files the manifest must have a digest of."""
    files = {INDEX, ZARR} | {f"{node}/{ZARR}" for node in node_documents(manifest, plan)}
    for array, _, document in array_documents(manifest, plan):
        files |= {shard_file(array, shard, document) for shard in range(plan.n_shards)}
    return files
