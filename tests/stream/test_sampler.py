"""Order of a stream: a function of seed and step, covering what was selected."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import TrainingError
from kdcache.stream.sampler import BlockShuffle

blocks = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def shuffle(sizes: list[int], **settings: int) -> BlockShuffle:
    block_of_row = np.repeat(np.arange(len(sizes)), sizes)
    arguments = {"batch_size": 4, "seed": 3, "window_blocks": 3} | settings
    return BlockShuffle(block_of_row, np.arange(len(block_of_row)), **arguments)


@given(blocks, st.integers(0, 5), st.integers(1, 7), st.integers(1, 4))
def test_an_epoch_visits_every_row_at_most_once_and_misses_less_than_a_batch(
    sizes: list[int], epoch: int, batch_size: int, window_blocks: int
) -> None:
    sampler = shuffle(sizes, batch_size=batch_size, window_blocks=window_blocks)
    first = epoch * sampler.steps_per_epoch
    seen = np.concatenate([sampler.batch_rows(first + k) for k in range(sampler.steps_per_epoch)])
    assert len(np.unique(seen)) == len(seen)
    assert len(seen) > sum(sizes) - sampler.batch_size


@given(blocks, st.integers(1, 3))
def test_windows_hold_exactly_the_rows_of_their_blocks(sizes: list[int], window: int) -> None:
    sampler = shuffle(sizes, window_blocks=window)
    block_of_row = np.repeat(np.arange(len(sizes)), sizes)
    plans = sampler.windows(1)
    for plan in plans:
        expected = np.flatnonzero(np.isin(block_of_row, plan.blocks))
        assert sorted(plan.rows.tolist()) == expected.tolist()
    assert sorted(np.concatenate([p.blocks for p in plans]).tolist()) == list(range(len(sizes)))


@given(blocks, st.integers(1, 4), st.integers(0, 20))
def test_ranks_share_the_batch_of_one_process(sizes: list[int], ranks: int, step: int) -> None:
    if sum(sizes) < 2 * ranks:
        return
    alone = shuffle(sizes, batch_size=2 * ranks)
    shares = [shuffle(sizes, batch_size=2, rank=r, world_size=ranks) for r in range(ranks)]
    assert len({share.steps_per_epoch for share in shares}) == 1
    if alone.batch_size != 2 * ranks:
        return
    together = np.concatenate([share.batch_rows(step) for share in shares])
    assert sorted(together.tolist()) == sorted(alone.batch_rows(step).tolist())


def test_epochs_differ_and_repeat_with_the_seed() -> None:
    sampler = shuffle([5] * 8)
    orders = [np.concatenate([w.rows for w in sampler.windows(e)]).tolist() for e in (0, 1, 0)]
    assert orders[0] == orders[2]
    assert orders[0] != orders[1]
    other = shuffle([5] * 8, seed=4)
    assert np.concatenate([w.rows for w in other.windows(0)]).tolist() != orders[0]


def test_order_is_not_the_order_of_the_store() -> None:
    order = np.concatenate([w.rows for w in shuffle([50], batch_size=10).windows(0)])
    assert order.tolist() != sorted(order.tolist())


def test_selected_rows_alone_are_visited() -> None:
    block_of_row = np.repeat(np.arange(4), 5)
    chosen = np.array([0, 3, 7, 11, 19])
    sampler = BlockShuffle(block_of_row, chosen, batch_size=2, seed=0)
    seen = {int(row) for step in range(20) for row in sampler.batch_rows(step)}
    assert seen == set(chosen.tolist())


def test_fewer_rows_than_the_batch_make_one_smaller_batch() -> None:
    sampler = shuffle([3], batch_size=32)
    assert (sampler.batch_size, sampler.steps_per_epoch) == (3, 1)
    assert sorted(sampler.batch_rows(5).tolist()) == [0, 1, 2]


def test_no_rows_are_refused_with_the_number() -> None:
    with pytest.raises(TrainingError, match="0 structures are selected for 1 process"):
        BlockShuffle(np.zeros(3, int), np.zeros(0, int), batch_size=2, seed=0)
