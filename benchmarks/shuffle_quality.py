"""Pairs of one trajectory within a batch, against a full shuffle, in permuted and in raw order.

    python benchmarks/shuffle_quality.py [--trajectories 500] [--length 40] [--epochs 20]
        [--json FILE]

Structures of a trajectory are nearly copies, so pairs of them in a batch make its gradient noisier.
The stream shuffles within windows of a few blocks; what that leaves depends on the order a store is
written in. Counted over epochs; nothing is timed. Bar [pairs]: with our order, at most 1.05.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from bench import write_json
from stream_store import MEAN_ATOMS, SEED

from kdcache.store import plan_blocks
from kdcache.stream.sampler import BlockShuffle

BAR = 1.05
BATCH_SIZE = 64
IntArray = npt.NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trajectories", type=int, default=500)
    parser.add_argument("--length", type=int, default=40, help="structures of each")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    n = arguments.trajectories * arguments.length
    group = np.repeat(np.arange(arguments.trajectories), arguments.length)
    rng = np.random.default_rng(SEED)
    sizes = np.clip(rng.normal(MEAN_ATOMS, 12, arguments.trajectories), 8, 72).astype(np.int64)
    ideal = BATCH_SIZE * (BATCH_SIZE - 1) / 2 * (arguments.length - 1) / (n - 1)
    samples = {}
    for name, source in (("permuted", rng.permutation(n)), ("raw", np.arange(n))):
        # The layout of a store of these sizes; its sampler sees nothing else of it.
        block = plan_blocks(sizes[group[source]]).block
        order = BlockShuffle(block, np.arange(n), batch_size=BATCH_SIZE, seed=SEED)
        samples[name] = [
            pairs(group[source], order, epoch) / ideal for epoch in range(arguments.epochs)
        ]
    samples["full shuffle"] = [
        pairs_of(group[rng.permutation(n)]) / ideal for _ in range(arguments.epochs)
    ]
    for name, values in samples.items():
        spread = np.std(values, ddof=1) / np.sqrt(len(values))
        print(f"{name:12} {np.mean(values):.3f} ± {spread:.3f} times the pairs of a full shuffle")
    bars = {"pairs": float(np.mean(samples["permuted"]))}
    print(f"[pairs] {bars['pairs']:.3f} (bar {BAR})")
    write_json(arguments.json, bars, samples, pairs_expected_per_batch=ideal)


def pairs(group: IntArray, order: BlockShuffle, epoch: int) -> float:
    """Mean number of pairs of one trajectory in a batch of an epoch."""
    first = epoch * order.steps_per_epoch
    rows = [order.batch_rows(first + k) for k in range(order.steps_per_epoch)]
    return pairs_of(group[np.concatenate(rows)])


def pairs_of(group: IntArray) -> float:
    """Mean number of equal pairs in runs of a batch's length."""
    batches = np.sort(group[: len(group) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE))
    total = 0
    for batch in batches:
        counts = np.unique(batch, return_counts=True)[1]
        total += int((counts * (counts - 1) // 2).sum())
    return total / len(batches)


if __name__ == "__main__":
    main()
