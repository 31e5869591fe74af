"""Time to the first batch of a resumed stream, at any step, against that of a fresh start.

    python benchmarks/stream_resume.py [--structures 8000] [--rounds 9] [--json FILE]

Steps deep into the first epoch and in later ones. Their batches must be those of a stream that was
never interrupted, tensor by tensor. Bar [resume]: the slowest over the fresh start, at most 1.1.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from bench import alternate, medians, write_json
from stream_store import write_store

from kdcache.store import Store
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import StoredNeighbors
from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle
from kdcache.structures import Batch

BAR = 1.1
NAMES = ("atomic_numbers", "positions", "energy", "forces", "edge_index", "edge_shift")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--structures", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, help="keep the store here, and use one that is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = (arguments.work or Path(temporary)) / "store.zarr"
        measure(write_store(path, arguments.structures), arguments)


def measure(store: Store, arguments: argparse.Namespace) -> None:
    order = BlockShuffle(store.index.block, np.arange(len(store)), batch_size=64, seed=0)
    epoch = order.steps_per_epoch
    steps = [0, epoch // 3, epoch - 1, epoch, epoch + epoch // 2, 2 * epoch + epoch // 5]
    check(store, order, steps)
    steps.append(1000 * epoch + epoch // 2)
    samples = alternate({str(step): first(store, order, step) for step in steps}, arguments.rounds)
    middle = medians(samples)
    for name, values in samples.items():
        print(
            f"step {name:>8}: {1e3 * middle[name]:7.1f} ms to the first batch "
            f"({1e3 * min(values):.1f} to {1e3 * max(values):.1f})"
        )
    slowest = max(middle[str(step)] for step in steps[1:]) / middle["0"]
    print(f"[resume] {slowest:.3f} (bar {BAR})")
    write_json(arguments.json, {"resume": slowest}, samples, steps_per_epoch=epoch)


def first(store: Store, order: BlockShuffle, step: int) -> Callable[[], float]:
    """Seconds from making a reader and a loader to the first batch."""

    def seconds() -> float:
        start = time.perf_counter()
        with loader(store, order, step) as stream:
            next(iter(stream))
            return time.perf_counter() - start

    return seconds


def check(store: Store, order: BlockShuffle, steps: list[int]) -> None:
    """Batches of resumed streams are those of one that was never interrupted."""
    with loader(store, order, 0) as stream:
        expected = {
            step: batch
            for step, batch in enumerate(islice(stream, max(steps) + 1))
            if step in steps
        }
    for step in steps:
        with loader(store, order, step) as stream:
            found: Batch = next(iter(stream))
        for name in NAMES:
            assert torch.equal(getattr(found, name), getattr(expected[step], name)), (step, name)
        feature = found.teacher["half/node"], expected[step].teacher["half/node"]
        assert torch.equal(*feature), step


def loader(store: Store, order: BlockShuffle, step: int) -> Loader:
    reader = WindowReader(store, StoredNeighbors(store), teacher_fields=["half/node"])
    return Loader([(reader, order)], start_step=step)


if __name__ == "__main__":
    main()
