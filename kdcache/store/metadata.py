"""The zarr.json documents of a store.

They follow from the fields and the plan alone: the writer writes them, the reader asks that they
are there unchanged. Invariant: what a field's document says is what `shards` writes and reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from pydantic import JsonValue

from kdcache.errors import StoreError
from kdcache.fields import FieldSpec
from kdcache.store.codecs import BLOSC_LEVEL, MAX_CHUNK_BYTES, channels, stored_dtype
from kdcache.store.layout import BlockPlan

Json = dict[str, JsonValue]

SCALE_SUFFIX = ".scale"


def canonical(document: JsonValue | Mapping[str, JsonValue]) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces and no escapes but the needed: one text per value."""
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def readable(document: JsonValue | Mapping[str, JsonValue]) -> bytes:
    """UTF-8 JSON for files that people open: sorted keys, indented by one."""
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def group_document(attributes: Json | None = None) -> Json:
    """zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def root_document(plan: BlockPlan, format_version: int, nodes: Mapping[str, Json]) -> Json:
    """zarr.json of the store: capacities, and every other document inline.

    The inline copy lets a public reader list the store over http, and keeps it from warning about
    manifest.json and index.parquet, which are no Zarr nodes.
    """
    document = group_document(
        {
            "kdcache": {
                "format_version": format_version,
                "n_structures": plan.n_structures,
                "n_blocks": plan.n_blocks,
                "blocks_per_shard": plan.blocks_per_shard,
                "structure_capacity": plan.structure_capacity,
                "atom_capacity": plan.atom_capacity,
                "edge_capacity": plan.edge_capacity,
            }
        }
    )
    document["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": dict(nodes),
    }
    return document


def field_documents(spec: FieldSpec, plan: BlockPlan) -> dict[str, Json]:
    """zarr.json of a field's arrays by array name: one, or two for a compact field.

    Raises:
        StoreError: a dtype or codec the store does not know, or a block too large to compress.
    """
    dtype = stored_dtype(spec)
    capacity = plan.capacity(spec.level)
    if capacity * spec.row_size * dtype.itemsize > MAX_CHUNK_BYTES:
        raise StoreError(
            f"A block of field {spec.name} would take {capacity * spec.row_size * dtype.itemsize} "
            f"bytes, more than a chunk may ({MAX_CHUNK_BYTES}). Lay the store out with a smaller "
            f"atom_capacity than {plan.atom_capacity}."
        )
    attributes: Json = {
        "level": spec.level,
        "unit": spec.unit,
        "symmetry": spec.symmetry,
        "codec": spec.codec,
        "dtype": spec.dtype,
    }
    documents = {
        spec.name: _array_document(
            plan, capacity, spec.shape, dtype, spec.codec == "exact", attributes
        )
    }
    if spec.codec == "compact":
        documents[spec.name + SCALE_SUFFIX] = _array_document(
            plan, 1, (channels(spec),), np.dtype("<f4"), False, {"scale_of": spec.name}
        )
    return documents


def _array_document(
    plan: BlockPlan,
    capacity: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    compressed: bool,
    attributes: Json,
) -> Json:
    little: Json = {"name": "bytes"}
    if dtype.itemsize > 1:
        little["configuration"] = {"endian": "little"}
    index_bytes: Json = {"name": "bytes", "configuration": {"endian": "little"}}
    crc: Json = {"name": "crc32c"}
    blosc: Json = {
        "name": "blosc",
        "configuration": {
            "cname": "lz4",
            "clevel": BLOSC_LEVEL,
            "shuffle": "shuffle" if dtype.itemsize > 1 else "noshuffle",
            "typesize": dtype.itemsize,
            "blocksize": 0,
        },
    }
    fill: JsonValue = 0
    if dtype.kind == "b":
        fill = False
    elif dtype.kind == "f":
        fill = 0.0
    trailing: list[JsonValue] = list(shape)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [plan.n_blocks * capacity, *trailing],
        "data_type": dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [plan.blocks_per_shard * capacity, *trailing]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [capacity, *trailing],
                    "codecs": [little, blosc, crc] if compressed else [little, crc],
                    "index_codecs": [index_bytes, crc],
                    "index_location": "end",
                },
            }
        ],
        "storage_transformers": [],
        "attributes": attributes,
    }
