"""Memory of fields that were read: used again, but never while anybody refers to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.graphs import GraphRule
from kdcache.store import Store
from kdcache.stream.buffers import FieldReads
from tests.chain import make_store

NAME = "structures/positions"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"), 40, graph=GraphRule(3.0))


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_every_field_is_what_the_store_reads(store: Store) -> None:
    reads = FieldReads(store)
    for blocks in ([0, 1], [2], [3, 0], list(range(store.plan.n_blocks))):
        for name in store.fields("structures"):
            found = reads.read(f"structures/{name}", blocks)
            np.testing.assert_array_equal(found, store.read(f"structures/{name}", blocks))


def test_memory_that_nobody_refers_to_is_used_again(store: Store) -> None:
    reads = FieldReads(store)
    first = address(reads.read(NAME, [0, 1]))
    assert address(reads.read(NAME, [2, 3])) == first
    assert address(reads.read(NAME, [1])) == first


@pytest.mark.parametrize("kept", ["array", "view", "reshaped", "tensor", "scalar view"])
def test_memory_in_use_is_left_alone(store: Store, kept: str) -> None:
    reads = FieldReads(store)
    array = reads.read(NAME, [0, 1])
    views = {
        "array": array,
        "view": array[1:],
        "reshaped": array.reshape(-1),
        "tensor": torch.from_numpy(array)[1:],
        "scalar view": array[0, 0:1],
    }
    view = views[kept]
    expected = view.clone() if isinstance(view, torch.Tensor) else view.copy()
    del array, views
    others = [reads.read(NAME, [block]) for block in range(2, store.plan.n_blocks)]
    assert len({address(other) for other in others}) == len(others)
    assert bool((view == expected).all())
