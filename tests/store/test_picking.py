"""Which rows go where: against copying them one by one, and riffles against all permutations."""

from __future__ import annotations

import doctest
from itertools import permutations
from math import factorial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcache.errors import StoreError
from kdcache.fields import LEVELS
from kdcache.store import picking, plan_blocks
from kdcache.store.layout import BlockPlan
from kdcache.store.picking import Pick, dataset_places, pick_rows, riffle, row_numbers, shard_runs

COUNTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=20)


def test_examples_worked_by_hand() -> None:
    assert doctest.testmod(picking).failed == 0


def planned(counts: npt.NDArray[np.int64], spare: int, per_shard: int) -> BlockPlan:
    return plan_blocks(
        counts[:, 0],
        counts[:, 1],
        atom_capacity=int(counts[:, 0].max()) + spare,
        blocks_per_shard=per_shard,
    )


@settings(max_examples=60)
@given(
    st.lists(COUNTS, min_size=1, max_size=3),
    st.randoms(use_true_random=False),
    st.integers(0, 12),
    st.integers(1, 4),
    st.integers(1, 5),
)
def test_runs_copy_every_row_to_its_place(
    counts: list[list[tuple[int, int]]], random: object, spare: int, per_shard: int, at_once: int
) -> None:
    generator = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    tables = [np.array(table) for table in counts]
    sources = [planned(table, spare, per_shard) for table in tables]
    chosen = [
        np.flatnonzero(np.append(generator.random(len(table) - 1) < 0.6, True)) for table in tables
    ]
    pick = riffle(chosen, seed=spare)
    both = np.stack([tables[s][r] for s, r in zip(pick.source, pick.row, strict=True)])
    plan = planned(both, spare + 3, per_shard)
    for level in LEVELS:
        # Row r of structure i in source s is called (s, i, r).
        named = [
            [(s, i, r) for i in range(len(table)) for r in range(plan_s.counts(level)[i])]
            for s, (table, plan_s) in enumerate(zip(tables, sources, strict=True))
        ]
        starts = [np.append(0, np.cumsum(plan_s.counts(level))) for plan_s in sources]
        for shard in range(plan.n_shards):
            here = plan.shard_structures(shard)
            wanted = [
                row
                for s, i in zip(pick.source[here], pick.row[here], strict=True)
                for row in named[s][starts[s][i] : starts[s][i + 1]]
            ]
            copied: list[tuple[int, int, int] | None] = [None] * len(wanted)
            for run in shard_runs(pick, plan, sources, level, shard, at_once):
                assert 1 <= len(run.blocks) <= at_once
                source = sources[run.source]
                read = [
                    row
                    for block in run.blocks
                    for i in range(*source.block_structures(int(block)).indices(len(source.block)))
                    for row in named[run.source][starts[run.source][i] : starts[run.source][i + 1]]
                ]
                for old, new in zip(
                    row_numbers(run.start, run.count),
                    row_numbers(run.target, run.count),
                    strict=True,
                ):
                    assert copied[new] is None
                    copied[new] = read[old]
            assert copied == wanted


def test_a_source_that_is_laid_out_by_other_counts_is_refused() -> None:
    source = plan_blocks([3, 2])
    with pytest.raises(StoreError, match="Row 1 of source 0 has 2 rows of level atom"):
        list(shard_runs(pick_rows([0, 1]), plan_blocks([3, 1]), [source], "atom", 0, 1))


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3), (1, 2, 1)])
def test_a_riffle_of_random_orders_is_a_uniformly_random_order(sizes: tuple[int, ...]) -> None:
    """Chi-square over all n! orders of 4 structures, each source shuffled before."""
    generator = np.random.default_rng(5)
    n, draws = sum(sizes), 6000
    first = np.cumsum(sizes) - sizes
    count = dict.fromkeys(permutations(range(n)), 0)
    for seed in range(draws):
        shuffled = [generator.permutation(size) for size in sizes]
        pick = riffle([np.arange(size) for size in sizes], seed)
        places = zip(pick.source, pick.row, strict=True)
        count[tuple(int(first[s] + shuffled[s][r]) for s, r in places)] += 1
    expected = draws / factorial(n)
    chi_square = sum((found - expected) ** 2 / expected for found in count.values())
    # 23 degrees of freedom: beyond 56 once in 10,000 times.
    assert chi_square < 56
    assert min(count.values()) > 0


def test_a_riffle_without_shuffling_is_seen_to_be_none() -> None:
    """The judge above does judge: sources in their own order give 6 of 24 orders."""
    orders = {
        tuple((pick.source * 2 + pick.row).tolist())
        for pick in (riffle([[0, 1], [0, 1]], seed) for seed in range(200))
    }
    assert len(orders) == 6


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_the_new_dataset_is_the_old_ones_one_after_another(sizes: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(size) for size in sizes]
    chosen = [np.sort(generator.permutation(size)[: size // 2 + 1]) for size in sizes]
    pick = riffle(chosen, seed)
    places = dataset_places(pick, orders)
    by_place = sorted(range(len(pick)), key=lambda k: places[k])
    wanted = [
        (s, place) for s, order in enumerate(orders) for place in sorted(order[chosen[s]].tolist())
    ]
    found = [(int(pick.source[k]), int(orders[pick.source[k]][pick.row[k]])) for k in by_place]
    assert found == wanted


def test_rows_of_a_source_stay_in_their_order() -> None:
    pick = riffle([[3, 5, 8], [1, 2]], seed=9)
    assert pick.rows_of(0).tolist() == [3, 5, 8]
    assert pick.rows_of(1).tolist() == [1, 2]
    again = riffle([[3, 5, 8], [1, 2]], seed=9)
    assert again.source.tolist() == pick.source.tolist()
    assert isinstance(again, Pick)
