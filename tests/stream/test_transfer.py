"""Batches on their way to the device: unchanged, in order, each begun one ahead."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.graphs import GraphRule
from kdcache.stream.transfer import on_device, one_ahead, pinning, tensors
from kdcache.stream.window import collate
from kdcache.structures import Batch
from tests.chain import CUTOFF
from tests.chain import structures as small_structures

CPU = torch.device("cpu")


def batches(n: int) -> list[Batch]:
    """Of two structures each, with a teacher's features in half precision."""
    found = []
    for k in range(n):
        batch = collate(
            small_structures(2 * k + 2)[2 * k :],
            GraphRule(CUTOFF),
            np.float64,
            further={"wide": GraphRule(4.0)},
        )
        batch.teacher["t/node"] = torch.arange(batch.n_atoms).half() / 8 + k
        found.append(batch)
    return found


def test_on_a_cpu_batches_come_as_they_are_in_the_dtype_asked_for() -> None:
    given = batches(3)
    found = list(on_device(given, CPU, torch.float32))
    assert len(found) == 3
    for ours, theirs in zip(found, given, strict=True):
        for moved, plain in zip(tensors(ours), tensors(theirs), strict=True):
            wanted = torch.float32 if plain.is_floating_point() else plain.dtype
            assert moved.dtype == wanted
            assert torch.equal(moved, plain.to(wanted))


def test_on_a_cpu_nothing_is_pinned_and_no_batch_is_taken_early() -> None:
    assert pinning(CPU) is None
    taken: list[int] = []

    def giving():  # type: ignore[no-untyped-def]
        for k, batch in enumerate(batches(3)):
            taken.append(k)
            yield batch

    moved = on_device(giving(), CPU, torch.float64)
    next(moved)
    assert taken == [0]


def test_tensors_are_all_of_a_batch() -> None:
    (batch,) = batches(1)
    found = {id(tensor) for tensor in tensors(batch)}
    assert {id(batch.positions), id(batch.teacher["t/node"]), id(batch.energy)} <= found
    assert {id(tensor) for tensor in batch.graphs["wide"]} <= found
    present = [batch.tags, batch.fixed, batch.origin_weight]
    assert present == [None, None, None]
    # numbers, positions, cell, pbc, owner, two graphs of two, energy, forces, weight, one field.
    assert len(found) == 13


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_each_is_begun_before_the_one_in_front_of_it_is_handed_out(n: int) -> None:
    begun: list[int] = []

    def start(k: int) -> str:
        begun.append(k)
        return f"item {k}"

    for k, found in enumerate(one_ahead(range(n), start)):
        assert found == f"item {k}"
        assert begun == list(range(min(k + 2, n)))
    assert begun == list(range(n))
