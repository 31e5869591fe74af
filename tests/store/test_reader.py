"""Reading: the right rows in the order asked for, whoever asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import ShapeError, StoreError
from kdcache.fields import FieldSpec
from kdcache.store import Store, open_store
from tests.store.sample import STRUCTURES, TEACHER, Sample

SPECS = [(f"structures/{spec.name}", spec) for spec in STRUCTURES]
SPECS += [(f"teachers/painn/{spec.name}", spec) for spec in TEACHER]
FIELDS = [name for name, _ in SPECS]
RAW, BLOSC, COMPACT = "teachers/painn/node", "structures/forces", "teachers/painn/vector"


@pytest.fixture(scope="module")
def store(finished: Path) -> Store:
    return open_store(finished)


@pytest.mark.parametrize(("name", "spec"), SPECS, ids=FIELDS)
def test_all_rows_come_back_as_they_were_written(
    store: Store, sample: Sample, name: str, spec: FieldSpec
) -> None:
    values, read = sample.values(spec), store.read(name)
    if spec.codec == "exact":
        assert read.tobytes() == values.tobytes()
        assert read.dtype == spec.dtype
    elif spec.codec == "half":
        assert read.tobytes() == values.astype(np.float16).tobytes()
    else:
        assert read.dtype == np.float32
        assert np.abs(read - values).max() <= np.abs(values).max() / 254 * 1.001


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_blocks_come_in_the_order_asked_for(store: Store, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(FIELDS))
    blocks = data.draw(st.lists(st.integers(0, store.plan.n_blocks - 1), max_size=12))
    check = data.draw(st.booleans())
    used = store.plan.used(store.spec(name).level)
    parts = np.split(store.read(name), np.cumsum(used)[:-1])
    expected = [parts[block] for block in blocks]
    read = store.read(name, blocks, check=check)
    assert read.shape == (used[blocks].sum() if blocks else 0, *store.spec(name).shape)
    assert read.tobytes() == b"".join(part.tobytes() for part in expected)


@pytest.mark.parametrize(
    "name", ["structures/forces", "teachers/painn/node", "teachers/painn/vector"]
)
def test_memory_may_be_used_again(store: Store, name: str) -> None:
    expected = store.read(name, [2, 0])
    memory = np.empty((len(expected) + 3, *expected.shape[1:]), expected.dtype)
    read = store.read(name, [2, 0], out=memory)
    assert read.base is memory
    assert np.array_equal(read, expected)
    for wrong in (memory[:2], np.zeros(memory.shape, np.int64), np.asfortranarray(memory)):
        with pytest.raises(ShapeError, match="out must be"):
            store.read(name, [2, 0], out=wrong)


def test_threads_read_what_one_reads(store: Store) -> None:
    fresh = open_store(store.path)
    blocks = [(name, block) for block in range(store.plan.n_blocks) for name in FIELDS]
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda job: fresh.read(job[0], [job[1]]).tobytes(), blocks))
    assert read == [store.read(name, [block]).tobytes() for name, block in blocks]


def test_structures_come_back_in_dataset_order_and_in_store_order(
    store: Store, sample: Sample
) -> None:
    for order, expected in (
        ("source", sample.dataset),
        ("store", [sample.dataset[i] for i in sample.source_index]),
    ):
        found = list(store.structures(order))  # type: ignore[arg-type]
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.content_hash() == theirs.content_hash()
            assert (ours.structure_id, ours.energy) == (theirs.structure_id, theirs.energy)
            assert (ours.split, ours.group, ours.weight) == (
                theirs.split,
                theirs.group,
                theirs.weight,
            )
            assert (ours.forces is None) == (theirs.forces is None)
            if ours.forces is not None and theirs.forces is not None:
                assert np.array_equal(ours.forces, theirs.forces)


def test_windows_smaller_than_the_store_change_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [s.structure_id for s in store.structures()]
    monkeypatch.setattr("kdcache.store.records.WINDOW_ATOMS", 10)
    assert [s.structure_id for s in store.structures()] == whole


def test_one_structure_is_found_by_its_row(store: Store, sample: Sample) -> None:
    for row in range(len(store)):
        expected = sample.dataset[sample.source_index[row]]
        assert store.structure(row).content_hash() == expected.content_hash()
    with pytest.raises(StoreError, match="has rows 0…19, not 20"):
        store.structure(20)


def test_unknown_names_are_answered_with_near_ones(store: Store) -> None:
    with pytest.raises(StoreError, match="did you mean forces"):
        store.read("structures/force")
    with pytest.raises(StoreError, match="did you mean teachers/painn"):
        store.read("teachers/pain/node")
    with pytest.raises(StoreError, match=r"Blocks -1…-1 .* are asked for"):
        store.read("structures/forces", [-1])
