"""Order of a stream: a function of seed and step, covering what was selected, within limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcache.errors import TrainingError
from kdcache.stream.sampler import BlockShuffle, Budget, deal

blocks = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def shuffle(sizes: list[int], **settings: int) -> BlockShuffle:
    block_of_row = np.repeat(np.arange(len(sizes)), sizes)
    arguments = {"batch_size": 4, "seed": 3, "window_blocks": 3} | settings
    return BlockShuffle(block_of_row, np.arange(len(block_of_row)), **arguments)


@st.composite
def limited(draw: st.DrawFn) -> tuple[BlockShuffle, np.ndarray, np.ndarray, int | None, int | None]:
    """A sampler by atoms, by edges or by both, with the counts and limits it goes by."""
    sizes = draw(blocks)
    n = sum(sizes)
    n_atoms = np.array(draw(st.lists(st.integers(1, 30), min_size=n, max_size=n)))
    n_edges = np.array(draw(st.lists(st.integers(0, 900), min_size=n, max_size=n)))
    by = draw(st.sampled_from(["atoms", "edges", "both"]))
    room = st.integers(2, 9)  # largest structures in a batch
    max_atoms = draw(room) * int(n_atoms.max()) + draw(st.integers(0, 29))
    max_edges = draw(room) * max(int(n_edges.max()), 1) + draw(st.integers(0, 29))
    limits = (max_atoms if by != "edges" else None, max_edges if by != "atoms" else None)
    budget = Budget.of(n_atoms, n_edges, max_atoms=limits[0], max_edges=limits[1])
    made = BlockShuffle(
        np.repeat(np.arange(len(sizes)), sizes), np.arange(n), budget=budget,
        seed=draw(st.integers(0, 99)), window_blocks=draw(st.integers(1, 4)),
    )  # fmt: skip
    return made, n_atoms, n_edges, *limits


@given(blocks, st.integers(0, 5), st.integers(1, 7), st.integers(1, 4))
def test_an_epoch_visits_every_row_at_most_once_and_misses_less_than_a_batch(
    sizes: list[int], epoch: int, batch_size: int, window_blocks: int
) -> None:
    sampler = shuffle(sizes, batch_size=batch_size, window_blocks=window_blocks)
    first = epoch * sampler.steps_per_epoch
    seen = np.concatenate([sampler.batch_rows(first + k) for k in range(sampler.steps_per_epoch)])
    assert len(np.unique(seen)) == len(seen)
    assert len(seen) > sum(sizes) - sampler.batch_size
    assert sampler.fewest == sampler.batch_size


@given(limited(), st.integers(0, 5))
def test_limited_batches_keep_their_limits_and_an_epoch_misses_nothing(
    case: tuple[BlockShuffle, np.ndarray, np.ndarray, int | None, int | None], epoch: int
) -> None:
    sampler, n_atoms, n_edges, max_atoms, max_edges = case
    first = epoch * sampler.steps_per_epoch
    batches = [sampler.batch_rows(first + k) for k in range(sampler.steps_per_epoch)]
    assert sorted(np.concatenate(batches).tolist()) == sampler.rows.tolist()
    for rows in batches:
        assert len(rows) >= sampler.fewest >= 1
        assert max_atoms is None or n_atoms[rows].sum() <= max_atoms
        assert max_edges is None or n_edges[rows].sum() <= max_edges
    assert sampler.batch_size == pytest.approx(np.mean([len(rows) for rows in batches]))


@given(limited())
def test_limited_batches_are_filled_but_for_a_largest_structure(
    case: tuple[BlockShuffle, np.ndarray, np.ndarray, int | None, int | None],
) -> None:
    sampler, n_atoms, n_edges, max_atoms, max_edges = case
    parts = [
        counts / limit for counts, limit in ((n_atoms, max_atoms), (n_edges, max_edges)) if limit
    ]
    cost = np.max(parts, axis=0)
    # One batch fewer, and the bound would not hold for every order.
    assert sampler.steps_per_epoch - 1 < max(cost.sum() / (1 - cost.max()), 1) + 1e-6


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 7))
def test_processes_get_disjoint_parts_of_about_the_same_size(
    cost: list[int], n_processes: int
) -> None:
    owner = deal(np.array(cost), n_processes)
    counts = np.bincount(owner, minlength=n_processes)
    loads = np.bincount(owner, cost, minlength=n_processes)
    assert len(counts) == n_processes
    assert counts.sum() == len(cost)
    assert np.ptp(counts) <= 1
    assert np.ptp(loads) <= max(cost)


def test_one_process_keeps_the_order_of_a_batch() -> None:
    assert not deal(np.array([5, 9, 1, 4]), 1).any()


@given(blocks, st.integers(1, 3))
def test_windows_hold_exactly_the_rows_of_their_blocks(sizes: list[int], window: int) -> None:
    sampler = shuffle(sizes, window_blocks=window)
    block_of_row = np.repeat(np.arange(len(sizes)), sizes)
    plans = sampler.windows(1)
    for plan in plans:
        expected = np.flatnonzero(np.isin(block_of_row, plan.blocks))
        assert sorted(plan.rows.tolist()) == expected.tolist()
    assert sorted(np.concatenate([p.blocks for p in plans]).tolist()) == list(range(len(sizes)))


def test_the_order_of_a_seed_is_the_same_for_ever() -> None:
    # As the first version drew it: runs that were begun then are gone on with now.
    sampler = shuffle([3, 4, 2, 5], batch_size=5, seed=11, window_blocks=2)
    found = [sampler.batch_rows(step).tolist() for step in (0, 1, 2, 5)]
    assert found == [[11, 12, 5, 4, 13], [9, 10, 3, 6, 2], [11, 0, 9, 1, 2], [6, 5, 4, 12, 10]]


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
    for settings in ({"batch_size": 2}, {"budget": Budget(np.arange(1, 21), 40, "atoms")}):
        sampler = BlockShuffle(block_of_row, chosen, seed=0, **settings)  # type: ignore[arg-type]
        seen = {int(row) for step in range(20) for row in sampler.batch_rows(step)}
        assert seen == set(chosen.tolist())


def test_fewer_rows_than_the_batch_make_one_smaller_batch() -> None:
    sampler = shuffle([3], batch_size=32)
    assert (sampler.batch_size, sampler.steps_per_epoch) == (3, 1)
    assert sorted(sampler.batch_rows(5).tolist()) == [0, 1, 2]


def test_no_rows_are_refused_with_the_number() -> None:
    with pytest.raises(TrainingError, match="0 structures are selected to train on"):
        BlockShuffle(np.zeros(3, int), np.zeros(0, int), batch_size=2, seed=0)


def test_a_structure_of_more_than_half_a_batch_is_refused_with_the_way_out() -> None:
    budget = Budget.of(np.array([3, 9, 30, 2]), max_atoms=50)
    said = r"row 2 takes 0.6 of a batch by training.max_atoms 50.* Raise the limit 1.2-fold"
    with pytest.raises(TrainingError, match=said):
        BlockShuffle(np.zeros(4, int), np.arange(4), budget=budget, seed=0)
    BlockShuffle(np.zeros(4, int), np.array([0, 1, 3]), budget=budget, seed=0)


def test_counts_too_long_for_64_bits_together_are_cut_right() -> None:
    n = 1000
    cost = np.full(n, 2**50)
    budget = Budget(cost, 2**52 + 1, "atoms")
    sampler = BlockShuffle(np.arange(n) // 10, np.arange(n), budget=budget, seed=0)
    order = np.concatenate([plan.rows for plan in sampler.windows(0)])
    sizes = np.diff(sampler.cuts(order))
    assert sizes.sum() == n
    assert set(sizes.tolist()) <= {2, 3, 4}
