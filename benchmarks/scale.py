"""What a structure costs as a store grows: to dump it, and to stream it, with one process and two.

    python benchmarks/scale.py [--gb 0.25 --gb 0.5 --gb 1] [--processes 2] [--json FILE]

Stores of slabs, features of 2 kB an atom from a teacher that answers from memory, so that only what
kdcache does is timed. `dump` writes the whole store; `stream` reads it, shuffled, through a Loader
over one epoch, in batches of 32. The sizes take turns. With more processes, each works
on a store of its own at the same time: what they share is the machine.

`linear` is the largest deviation of the time per structure from its median over the sizes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench import write_json
from torch import Tensor
from workloads import make_store

from kdcache.dump import DumpOptions, dump_teacher
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.store import open_store
from kdcache.stream.loader import Loader
from kdcache.stream.neighbors import neighbors_for
from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle
from kdcache.structures import Batch

PARTS = ("dump", "stream")
CHANNELS = 1024
BYTES = 2 * CHANNELS * 80  # of a slab's features
RULE = GraphRule(3.0)


@dataclass
class Answers:
    """A teacher whose feature is ready."""

    model_name: str = "answers"
    digest: str = "0" * 64
    graph_rule: GraphRule = RULE
    further_graphs: Mapping[str, GraphRule] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[int, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    _node: Tensor = field(default_factory=lambda: torch.randn(4096, CHANNELS))

    def field_specs(self) -> tuple[FieldSpec, ...]:
        return (FieldSpec("node", "atom", (CHANNELS,)),)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        return {"node": self._node[: batch.n_atoms]}


def prepare(directory: Path, n_structures: int) -> None:
    """A store without teachers in `directory`."""
    make_store(directory / "plain.zarr", "oc20", n_structures, graph=RULE, shard_blocks=4)


def dump_and_stream(directory: Path) -> tuple[float, float]:
    """Seconds of a dump and of an epoch."""
    torch.set_num_threads(1)
    path = directory / "store.zarr"
    shutil.copytree(directory / "plain.zarr", path)
    start = time.perf_counter()
    options = DumpOptions("teacher", threads=1)
    dump_teacher(path, Answers(), options)
    dumped = time.perf_counter() - start
    store = open_store(path)
    neighbors = neighbors_for(store, RULE, directory / "graphs")
    reader = WindowReader(store, neighbors, teacher_fields=("teacher/node",))
    rows = torch.arange(len(store.index)).numpy()
    sampler = BlockShuffle(store.index.block, rows, batch_size=32, seed=0, window_blocks=4)
    start = time.perf_counter()
    with Loader([(reader, sampler)]) as loader:
        batches = iter(loader)
        for _ in range(sampler.steps_per_epoch):
            next(batches)
        streamed = time.perf_counter() - start
    del batches, reader, neighbors, store
    shutil.rmtree(path)
    return dumped, streamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, action="append", help="of features, up to 20")
    parser.add_argument("--processes", type=int, default=2, help="at most, at the same time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = sorted(options.gb or (0.25, 0.5, 1.0))
    counts = {gb: round(1e9 * gb / BYTES) for gb in sizes}
    bars: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    # Spawned: a forked child of a process with threads may wait for a lock that no thread holds.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        folders = {
            gb: [Path(scratch) / f"{gb}-{k}" for k in range(options.processes)] for gb in sizes
        }
        for gb, paths in folders.items():
            for path in paths:
                prepare(path, counts[gb])
        for n_processes in range(1, options.processes + 1):
            with ProcessPoolExecutor(n_processes, mp_context=context) as pool:
                for repeat in range(options.rounds + 1):
                    for gb in sizes:
                        found = list(pool.map(dump_and_stream, folders[gb][:n_processes]))
                        if repeat:
                            for part, seconds in zip(PARTS, zip(*found, strict=True), strict=True):
                                name = f"{part} {gb:g} GB {n_processes} processes"
                                samples.setdefault(name, []).append(max(seconds) / counts[gb])
            for part in PARTS:
                bars[f"linear {part} {n_processes}"] = report(part, sizes, n_processes, samples)
    bars["linear"] = max(bars.values())
    for name, deviation in bars.items():
        print(f"{name} {deviation:.3f}")
    write_json(options.json, bars, samples, structures={f"{gb:g}": counts[gb] for gb in sizes})


def report(
    part: str, sizes: list[float], n_processes: int, samples: Mapping[str, list[float]]
) -> float:
    """Prints every size; the largest deviation from the median of the sizes."""
    costs = []
    for gb in sizes:
        found = samples[f"{part} {gb:g} GB {n_processes} processes"]
        costs.append(statistics.median(found))
        rate = n_processes * BYTES / costs[-1] / 1e6
        spread = " ".join(f"{1e3 * value:.3f}" for value in sorted(found))
        print(f"{part:6} {gb:g} GB, {n_processes} processes: {1e3 * costs[-1]:.3f} ms a structure "
              f"in each ({spread}), {rate:.0f} MB/s together")  # fmt: skip
    middle = statistics.median(costs)
    return max(abs(cost / middle - 1) for cost in costs)


if __name__ == "__main__":
    main()
