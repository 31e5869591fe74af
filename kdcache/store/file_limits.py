"""How large each file of a store can be, by what its manifest describes.

Invariant: nothing is believed of a file before it is read, so a server that sends without end, or a
file made to fill the disk, is stopped at the size that its layout allows.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np

from kdcache.errors import StoreError
from kdcache.store.codecs import MAX_CHUNK_BYTES
from kdcache.store.contents import ZARR, array_documents, expected_files, groups
from kdcache.store.documents import MAX_DOCUMENT_BYTES
from kdcache.store.failures import FAILURES, largest_failures
from kdcache.store.index import INDEX, largest_index
from kdcache.store.layout import BlockPlan
from kdcache.store.manifest import MAX_MANIFEST_BYTES, Manifest
from kdcache.store.metadata import Json
from kdcache.store.shards import index_size
from kdcache.store.zipped import check_names

# Checksum, Blosc's header, and what it adds to bytes it cannot compress.
CHUNK_OVERHEAD = 64


def file_limits(manifest: Manifest, where: str) -> dict[str, int]:
    """Bytes that each file of a store of this manifest has at most, by name.

    Args:
        manifest: as it was read, of whoever wrote it.
        where: the store is, for messages.

    Raises:
        StoreError: the manifest lists a file that such a store does not have.
    """
    plan = _skeleton(manifest)
    plans = dict.fromkeys(groups(manifest), plan)
    arrays = {name: (spec, document) for name, spec, document in array_documents(manifest, plans)}
    # Before names are made: a manifest may claim any number of shards.
    if len(arrays) * plan.n_shards > len(manifest.digests):
        raise StoreError(
            f"{where}: the manifest describes {len(arrays)} arrays of {plan.n_shards} "
            f"shards and lists {len(manifest.digests)} files. It was edited or damaged."
        )
    expected = expected_files(manifest, plans)
    stray = sorted(manifest.digests.keys() ^ expected)
    if stray:
        what = "lists" if stray[0] in manifest.digests else "does not list"
        raise StoreError(
            f"{where}: the manifest {what} {stray[0]!r}, against what it describes. "
            f"Nothing is moved: it was edited, or made to deceive."
        )
    check_names(expected, where)
    limits = {}
    for name in expected:
        array = name.partition("/c/")[0]
        if name == INDEX:
            limits[name] = largest_index(manifest.dataset.n_structures)
        elif name.endswith(ZARR):
            limits[name] = MAX_MANIFEST_BYTES if name == ZARR else MAX_DOCUMENT_BYTES
        elif name.endswith(FAILURES):
            teacher = manifest.teachers[name.split("/")[1]]
            limits[name] = largest_failures(teacher.n_failed)
        else:
            spec, document = arrays[array]
            has_own = _has_own_edges(manifest, array) and spec.level == "edge"
            chunk = MAX_CHUNK_BYTES if has_own else _chunk_bytes(document)
            chunks = plan.blocks_per_shard * (chunk + CHUNK_OVERHEAD)
            limits[name] = chunks + index_size(plan.blocks_per_shard)
    return limits


def _skeleton(manifest: Manifest) -> BlockPlan:
    """A layout of the manifest's capacities, without structures: names of files follow from it."""
    capacities, none = manifest.capacities, np.zeros(0, np.int64)
    return BlockPlan(
        *(none,) * 6,
        n_blocks=capacities.n_blocks,
        structure_capacity=capacities.structure,
        atom_capacity=capacities.atom,
        edge_capacity=capacities.edge,
        blocks_per_shard=capacities.blocks_per_shard,
    )


def _has_own_edges(manifest: Manifest, array: str) -> bool:
    group, _, teacher = array.rpartition("/")[0].partition("/")
    return group == "teachers" and manifest.teachers[teacher].has_own_edges


def _chunk_bytes(document: Json) -> int:
    """Bytes of one decoded block of an array."""
    (sharding,) = cast(list[Json], document["codecs"])
    shape = cast(list[int], cast(Json, sharding["configuration"])["chunk_shape"])
    return math.prod(shape) * np.dtype(str(document["data_type"])).itemsize
