"""A store and a dataset that do not belong together never meet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import IdentityError
from kdcache.store import Store, open_store
from kdcache.structures import Structure
from tests.store.sample import Sample, make_dataset


@pytest.fixture(scope="module")
def store(finished: Path) -> Store:
    return open_store(finished)


def check(store: Store, dataset: list[Structure]) -> str:
    with pytest.raises(IdentityError) as raised:
        store.check_dataset([s.content_hash() for s in dataset], [s.structure_id for s in dataset])
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_the_dataset_it_was_made_from_passes(store: Store, sample: Sample) -> None:
    dataset = sample.dataset
    store.check_dataset([s.content_hash() for s in dataset], [s.structure_id for s in dataset])


def test_negative_zeros_and_new_labels_are_no_difference(store: Store) -> None:
    dataset = make_dataset()
    for structure in dataset:
        structure.positions = np.where(structure.positions == 0, -0.0, structure.positions)
        structure.energy = 1.0
    store.check_dataset([s.content_hash() for s in dataset], [s.structure_id for s in dataset])


def test_a_reordered_dataset_is_refused(store: Store) -> None:
    # 0 → 1 → 2 → 0: applying it twice does not give the old order back.
    dataset = make_dataset()
    dataset[0], dataset[1], dataset[2] = dataset[2], dataset[0], dataset[1]
    message = check(store, dataset)
    assert "the same structures in another order" in message
    assert "structure 0, 'frame:2', in the store 'frame:0'" in message


def test_store_order_is_not_taken_for_dataset_order(store: Store, sample: Sample) -> None:
    assert "another order" in check(store, [sample.dataset[i] for i in sample.source_index])


def test_one_moved_atom_is_refused(store: Store) -> None:
    dataset = make_dataset()
    dataset[7].positions[2, 1] = np.nextafter(dataset[7].positions[2, 1], 9.0)
    message = check(store, dataset)
    assert "1 of 20 structures were edited" in message
    assert "first difference: structure 7, 'frame:7'" in message


@pytest.mark.parametrize("part", ["atomic_numbers", "cell", "pbc"])
def test_whatever_a_teacher_sees_counts(store: Store, part: str) -> None:
    dataset = make_dataset()
    value = getattr(dataset[3], part)
    value[...] = ~value if value.dtype == bool else value + 1
    assert "structure 3" in check(store, dataset)


def test_another_dataset_is_refused(store: Store) -> None:
    dataset = make_dataset((4, 4, 4))
    message = check(store, dataset)
    assert "another dataset, 0 structures in common" in message
    assert "3 structures against 20" in message


@pytest.mark.parametrize(("change", "first"), [(slice(0, -1), 19), (slice(1, None), 0)])
def test_a_missing_structure_is_refused(store: Store, change: slice, first: int) -> None:
    message = check(store, make_dataset()[change])
    assert "19 structures against 20" in message
    assert f"structure {first}," in message


def test_a_structure_too_many_is_refused(store: Store) -> None:
    message = check(store, make_dataset((*(s.n_atoms for s in make_dataset()), 3)))
    assert "21 structures against 20" in message
    assert "structure 20, 'frame:20', in the store 'none'" in message
