"""Structures per second of a shuffled epoch: kdcache against a memory map, LMDB and Zarr readers.

    python benchmarks/stream_vs_peers.py [--structures 12000] [--rounds 5] [--seconds 2]
        [--work DIR] [--json FILE]

One synthetic store (39 atoms a structure on average, 256 channels an atom), everything a student
needs (inputs, energy, forces, neighbour list, features), owned float32 batches of 64. Files are in
the page cache. Sides alternate; each streams for some seconds, the first window left out.
On a machine that others use, compare the rates per second of processor time beside the bars.
A library that is not installed is left out, and said so. Full size: --structures 20000.

Bars, ratios of medians: memmap (ours with half / the faster memory map), lmdb_pickle, lmdb_raw,
zarr_public (/ the fastest public Zarr reader of the same store), nvalchemi.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import stream_peers as peers
from bench import alternate, medians, versions, write_json
from stream_store import write_store

from kdcache.stream.sampler import BlockShuffle

BARS = {"memmap": 0.75, "lmdb_pickle": 25, "lmdb_raw": 1.5, "zarr_public": 2.5, "nvalchemi": 20}
LIBRARIES = ("lmdb", "torch-geometric", "zarrs", "tensorstore", "nvalchemi-toolkit", "litdata")
BATCH_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--structures", type=int, default=12000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each side in a round")
    parser.add_argument("--sides", nargs="*", help="only these")
    parser.add_argument("--work", type=Path, help="keep the files here, and use those that are")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments, arguments.work or Path(temporary))


def run(arguments: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    store = write_store(work / "store.zarr", arguments.structures)
    rows = np.arange(len(store))
    order = BlockShuffle(store.index.block, rows, batch_size=BATCH_SIZE, seed=0)
    makers: dict[str, Callable[[], peers.Stream]] = {
        "ours_half": lambda: peers.ours(store, order),
        "ours_exact": lambda: peers.ours(store, order, "exact"),
        "memory_map": lambda: peers.memory_map(store, order, work),
        "memory_map_plain": lambda: peers.memory_map_plain(store, order, work),
        "lmdb_raw": lambda: peers.raw_lmdb(store, order, work),
        "lmdb_pickle": lambda: peers.pickled_lmdb(store, order, work),
        "zarr_python": lambda: peers.public_zarr(store, order, "zarr"),
        "zarrs": lambda: peers.public_zarr(store, order, "zarrs"),
        "tensorstore": lambda: peers.public_zarr(store, order, "tensorstore"),
        "nvalchemi": lambda: peers.nvalchemi(store, order, work),
        "litdata": lambda: peers.litdata(store, order, work),
    }
    sides: dict[str, Side] = {}
    for name, make in makers.items():
        if arguments.sides and name not in arguments.sides:
            continue
        try:
            sides[name] = Side(make(), order, arguments.seconds)
        except ImportError as error:
            print(f"{name} is left out: {error}", flush=True)
    samples = alternate(sides, arguments.rounds)
    middle = medians(samples)
    cpu = {name: side.cpu[1:] for name, side in sides.items()}
    cpu_middle = medians(cpu)
    for name, value in sorted(middle.items(), key=lambda item: -item[1]):
        low, high = min(samples[name]), max(samples[name])
        print(
            f"{name:18} {value:8,.0f} structures/s ({low:,.0f} to {high:,.0f}), "
            f"{cpu_middle[name]:8,.0f} per processor second"
        )
    bars, by_cpu = ratios(middle), ratios(cpu_middle)
    for name, value in bars.items():
        print(f"[{name}] {value:.2f} (bar {BARS[name]}); by processor time {by_cpu[name]:.2f}")
    write_json(
        arguments.json,
        bars,
        samples,
        libraries=versions(*LIBRARIES),
        n_structures=len(store),
        n_atoms=int(store.plan.n_atoms.sum()),
        n_edges=int(store.plan.n_edges.sum()),
        medians=middle,
        per_processor_second=cpu,
        bars_by_processor_time=by_cpu,
    )


class Side:
    """One way to stream, measured in the middle of an epoch as a long run has it.

    Attributes:
        cpu: structures per second of processor time, of all threads, measurement by measurement.
    """

    def __init__(self, stream: peers.Stream, order: BlockShuffle, seconds: float) -> None:
        self._stream = stream
        self._order = order
        self._seconds = seconds
        self._epochs = itertools.count()
        self._warmup = order.steps_per_epoch // len(order.windows(0)) + 1
        self.cpu: list[float] = []

    def __call__(self) -> float:
        """Structures per second, from the second window on; sides that end go on anew."""
        batches = self._endless()
        # The first window is waited for, and batches are made ahead: not what a run goes on with.
        for _ in itertools.islice(batches, self._warmup):
            pass
        n, start, start_cpu = 0, time.perf_counter(), time.process_time()
        while (elapsed := time.perf_counter() - start) < self._seconds:
            next(batches)
            n += self._order.batch_size
        self.cpu.append(n / (time.process_time() - start_cpu))
        batches.close()
        return n / elapsed

    def _endless(self) -> Generator[Any]:
        while True:
            yield from self._stream(next(self._epochs))


def ratios(middle: dict[str, float]) -> dict[str, float]:
    """Ours over each kind of side, the fastest of its kind."""
    kinds = {
        "memmap": ("memory_map", "memory_map_plain"),
        "lmdb_pickle": ("lmdb_pickle",),
        "lmdb_raw": ("lmdb_raw",),
        "zarr_public": ("zarr_python", "zarrs", "tensorstore"),
        "nvalchemi": ("nvalchemi",),
    }
    found = {}
    for kind, names in kinds.items():
        present = [middle[name] for name in names if name in middle]
        if present and "ours_half" in middle:
            found[kind] = middle["ours_half"] / max(present)
    return found


if __name__ == "__main__":
    main()
