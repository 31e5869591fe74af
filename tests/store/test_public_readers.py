"""Other people's Zarr readers as judges: they see the same bits, and write the same bytes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorstore
import zarr
import zarrs  # noqa: F401 - registers its codec pipeline

from kdcache.fields import FieldSpec
from kdcache.store import Store, open_store
from tests.store.sample import STRUCTURES, TEACHER, Sample

Array = npt.NDArray[Any]
Read = Callable[[Path], Array]


def with_zarr_python(path: Path) -> Array:
    return np.asarray(zarr.open_array(path, mode="r")[:])


def with_zarrs(path: Path) -> Array:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        return np.asarray(zarr.open_array(path, mode="r")[:])


def with_tensorstore(path: Path) -> Array:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


READERS = (with_zarr_python, with_zarrs, with_tensorstore)
FIELDS = [("structures", s) for s in STRUCTURES] + [("teachers/painn", s) for s in TEACHER]


@pytest.fixture(scope="module")
def store(finished: Path) -> Store:
    return open_store(finished)


def used_rows(store: Store, spec: FieldSpec) -> Array:
    """Rows of a whole array that are no padding."""
    capacity, used = store.plan.capacity(spec.level), store.plan.used(spec.level)
    return np.concatenate([b * capacity + np.arange(n) for b, n in enumerate(used)])


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("group", "spec"), FIELDS, ids=lambda x: getattr(x, "name", x))
def test_every_field_is_read_bit_for_bit(
    store: Store, group: str, spec: FieldSpec, read: Read
) -> None:
    ours = store.read(f"{group}/{spec.name}")
    theirs = read(store.path / group / spec.name)
    rows = used_rows(store, spec)
    if spec.codec == "compact":
        scale = read(store.path / group / f"{spec.name}.scale")
        blocks = rows // store.plan.capacity(spec.level)
        per_row = scale[blocks].reshape(len(rows), *(1,) * (len(spec.shape) - 1), -1)
        decoded = theirs[rows].astype(np.float32) * per_row
    else:
        decoded = theirs[rows]
    assert decoded.dtype == ours.dtype
    assert decoded.tobytes() == ours.tobytes()
    padding = np.setdiff1d(np.arange(len(theirs)), rows)
    assert not theirs[padding].any()


@pytest.mark.parametrize("spec", STRUCTURES, ids=lambda s: s.name)
def test_a_structure_is_found_by_its_places_in_the_index(
    store: Store, sample: Sample, spec: FieldSpec
) -> None:
    whole = with_tensorstore(store.path / "structures" / spec.name)
    index = store.index
    starts = {
        "structure": (index.structure_row, np.ones_like(index.n_atoms)),
        "atom": (index.atom_start, index.n_atoms),
        "edge": (index.edge_start, index.n_edges),
    }
    starts_of_level, counts = starts[spec.level]
    found = [whole[a : a + n] for a, n in zip(starts_of_level, counts, strict=True)]
    assert np.concatenate(found).tobytes() == sample.values(spec).tobytes()


@pytest.mark.parametrize(("group", "spec"), FIELDS, ids=lambda x: getattr(x, "name", x))
def test_zarr_python_writes_the_same_bytes(
    store: Store, tmp_path: Path, group: str, spec: FieldSpec
) -> None:
    ours = store.path / group / spec.name
    document = json.loads((ours / "zarr.json").read_text())
    theirs = tmp_path / spec.name
    theirs.mkdir()
    (theirs / "zarr.json").write_text(json.dumps(document))
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(theirs, mode="r+")
        array[:] = zarr.open_array(ours, mode="r")[:]
    # The last shard is not full: Zarr leaves open whether chunks past the array are written.
    full = store.plan.n_blocks // store.plan.blocks_per_shard
    shards = [file.relative_to(ours) for file in sorted((ours / "c").rglob("*")) if file.is_file()]
    assert len(shards) == store.plan.n_shards
    assert full >= 2
    for shard in shards[:full]:
        assert (theirs / shard).read_bytes() == (ours / shard).read_bytes()


def test_a_public_reader_lists_the_store_without_a_warning(store: Store) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {name for name, _ in zarr.open_group(store.path, mode="r").members(max_depth=None)}
    expected = {"structures", "teachers", "teachers/painn"}
    expected |= {f"{group}/{spec.name}" for group, spec in FIELDS}
    expected |= {f"{group}/{s.name}.scale" for group, s in FIELDS if s.codec == "compact"}
    assert found == expected


def test_groups_can_be_walked_without_the_inline_copy(store: Store) -> None:
    group = zarr.open_group(store.path, mode="r", use_consolidated=False)
    node = group["teachers/painn/node"]
    assert isinstance(node, zarr.Array)
    assert node.attrs["codec"] == "half"
    assert isinstance(group["teachers"], zarr.Group)
    layout = group.attrs["kdcache"]
    assert isinstance(layout, dict)
    assert layout["atom_capacity"] == store.plan.atom_capacity
