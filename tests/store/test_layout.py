"""Blocks: capacities, places, and what no plan may do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import StoreError
from kdcache.fields import LEVELS
from kdcache.store import plan_blocks

COUNTS = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 90)), min_size=1, max_size=80)


@settings(deadline=None, max_examples=100)
@given(COUNTS, st.integers(0, 40), st.integers(1, 7))
def test_every_structure_lies_in_one_block_and_no_row_belongs_to_two(
    counts: list[tuple[int, int]], spare: int, per_shard: int
) -> None:
    n_atoms, n_edges = (np.array(column) for column in zip(*counts, strict=True))
    plan = plan_blocks(
        n_atoms, n_edges, atom_capacity=int(n_atoms.max()) + spare, blocks_per_shard=per_shard
    )
    for level, starts in zip(
        LEVELS, (plan.structure_row, plan.atom_start, plan.edge_start), strict=True
    ):
        capacity, rows = plan.capacity(level), plan.counts(level)
        owner = np.full(plan.n_blocks * capacity, -1)
        for s, (start, count) in enumerate(zip(starts, rows, strict=True)):
            assert start >= plan.block[s] * capacity
            assert start + count <= (plan.block[s] + 1) * capacity
            assert (owner[start : start + count] == -1).all()
            owner[start : start + count] = s
        used = (owner.reshape(plan.n_blocks, capacity) >= 0).sum(axis=1)
        assert used.tolist() == plan.used(level).tolist()
        # Rows of a block are without gaps: padding comes last.
        for block, count in zip(owner.reshape(plan.n_blocks, capacity), used, strict=True):
            assert (block[:count] >= 0).all()


@settings(deadline=None, max_examples=100)
@given(COUNTS, st.integers(0, 40), st.integers(1, 7))
def test_a_plan_follows_from_its_own_capacities(
    counts: list[tuple[int, int]], spare: int, per_shard: int
) -> None:
    n_atoms, n_edges = (np.array(column) for column in zip(*counts, strict=True))
    plan = plan_blocks(
        n_atoms, n_edges, atom_capacity=int(n_atoms.max()) + spare, blocks_per_shard=per_shard
    )
    again = plan_blocks(
        n_atoms,
        n_edges,
        atom_capacity=plan.atom_capacity,
        blocks_per_shard=plan.blocks_per_shard,
    )
    for name in ("block", "structure_row", "atom_start", "edge_start"):
        assert np.array_equal(getattr(plan, name), getattr(again, name))
    assert (again.n_blocks, again.n_shards) == (plan.n_blocks, plan.n_shards)


@settings(deadline=None, max_examples=100)
@given(COUNTS, st.integers(0, 40))
def test_blocks_are_filled_greedily(counts: list[tuple[int, int]], spare: int) -> None:
    n_atoms = np.array([count for count, _ in counts])
    capacity = int(n_atoms.max()) + spare
    plan = plan_blocks(n_atoms, atom_capacity=capacity)
    filled, block = 0, 0
    for count, given_block in zip(n_atoms, plan.block, strict=True):
        if filled + count > capacity:
            filled, block = 0, block + 1
        filled += count
        assert given_block == block


@settings(deadline=None, max_examples=100)
@given(COUNTS, st.integers(1, 7))
def test_shards_and_blocks_cover_the_structures_once_in_order(
    counts: list[tuple[int, int]], per_shard: int
) -> None:
    n_atoms = np.array([count for count, _ in counts])
    plan = plan_blocks(n_atoms, atom_capacity=30, blocks_per_shard=per_shard)
    rows = np.arange(len(n_atoms))
    by_shard = [rows[plan.shard_structures(shard)] for shard in range(plan.n_shards)]
    by_block = [rows[plan.block_structures(block)] for block in range(plan.n_blocks)]
    blocks = [block for shard in range(plan.n_shards) for block in plan.shard_blocks(shard)]
    assert np.concatenate(by_shard).tolist() == rows.tolist()
    assert np.concatenate(by_block).tolist() == rows.tolist()
    assert blocks == list(range(plan.n_blocks))


def test_the_example_of_the_format_description() -> None:
    plan = plan_blocks([3, 2, 4], atom_capacity=5, blocks_per_shard=2)
    assert plan.atom_start.tolist() == [0, 3, 5]
    assert plan.structure_row.tolist() == [0, 1, 2]
    assert (plan.n_blocks, plan.structure_capacity, plan.atom_capacity) == (2, 2, 5)


def test_a_structure_may_fill_a_block_and_a_store_may_be_one_atom() -> None:
    assert plan_blocks([7, 7, 1], atom_capacity=7).block.tolist() == [0, 1, 2]
    single = plan_blocks([1])
    assert [single.capacity(level) for level in LEVELS] == [1, 1, 1]
    assert single.used("edge").tolist() == [0]


def test_a_block_holds_sixteen_of_the_largest_structure_by_default() -> None:
    assert plan_blocks([1000] * 40).block.tolist() == [0] * 16 + [1] * 16 + [2] * 8
    assert plan_blocks([1] * 5000).used("atom").tolist() == [4096, 904]


@pytest.mark.parametrize(
    ("n_atoms", "n_edges", "options", "message"),
    [
        ([], None, {}, "no structures"),
        ([3, 0], None, {}, r"row 1 has 0 atoms"),
        ([3, 1], [0, -1], {}, r"row 1 has -1 edges"),
        ([3, 9], None, {"atom_capacity": 8}, "capacity is 8, the largest structure has 9"),
        ([3], None, {"blocks_per_shard": 0}, "blocks_per_shard must be at least 1"),
        ([2**62, 2**62, 2**62], None, {}, "More than 2\\^40"),
        ([3, 4], [1], {}, r"n_atoms is \[2\] and n_edges \[1\]"),
    ],
)
def test_impossible_counts_are_refused(
    n_atoms: list[int], n_edges: list[int] | None, options: dict[str, int], message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        plan_blocks(n_atoms, n_edges, **options)
