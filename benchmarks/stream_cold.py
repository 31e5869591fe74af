"""Structures per second of a shuffled epoch whose files are not in memory: a store beyond it.

    python benchmarks/stream_cold.py [--structures 40000] [--rounds 3] [--seconds 3] [--work DIR]
        [--json FILE]

The store, peers and batches of `stream_vs_peers.py`. Before each measurement all files leave the
page cache; each side streams for some seconds, its first batch included. DIR must be on a disk, not
in memory.

- `ours`: ranges of a window are asked for before they are read, as long as that meets the disk.
- `ours_unasked`: the same without asking.
- `blocks`: blocks of the features alone, read at random by 8 threads: what the disk gives.
- `memory_map`, `lmdb_raw`, `tensorstore`: the fastest peers of each kind where all is in memory.

`ahead`: ours over ours_unasked. `cold_memmap`, `cold_lmdb`, `cold_zarr`: ours over theirs. No bars.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import stream_peers as peers
import torch
from bench import alternate, medians, versions, write_json
from stream_store import write_store

from kdcache.allocator import keep_freed_memory
from kdcache.store import Store, ahead, open_store
from kdcache.stream.sampler import BlockShuffle

BATCH_SIZE = 64


class Cold:
    """Streams of one store, each from files that have left the page cache."""

    def __init__(self, work: Path, n_structures: int, seconds: float) -> None:
        self._work = work
        self._seconds = seconds
        self._path = work / "store.zarr"
        write_store(self._path, n_structures, codecs=("half",))

    def side(self, name: str) -> Callable[[], float]:
        """What measures a side once."""

        def measure() -> float:
            ahead.ADVISES = name != "ours_unasked"
            store = open_store(self._path)
            rows = np.arange(len(store))
            order = BlockShuffle(store.index.block, rows, batch_size=BATCH_SIZE, seed=0)
            # Files of the peer are written here where they are missing.
            self._stream(name, store, order)
            gc.collect()  # what is mapped stays in memory
            self._evict()
            batches = self._stream(name, store, order)(0)
            start, n = time.perf_counter(), 0
            for _ in batches:
                n += BATCH_SIZE
                if time.perf_counter() - start > self._seconds:
                    break
            taken = time.perf_counter() - start
            batches.close()
            return n / taken

        return measure

    def _stream(self, name: str, store: Store, order: BlockShuffle) -> Callable[[int], Any]:
        streams: dict[str, Callable[[], peers.Stream]] = {
            "ours": lambda: peers.ours(store, order),
            "ours_unasked": lambda: peers.ours(store, order),
            "blocks": lambda: self._blocks(store),
            "memory_map": lambda: peers.memory_map_plain(store, order, self._work),
            "lmdb_raw": lambda: peers.raw_lmdb(store, order, self._work),
            "tensorstore": lambda: peers.public_zarr(store, order, "tensorstore"),
        }
        return streams[name]()

    def _blocks(self, store: Store) -> peers.Stream:
        files = sorted((self._path / "teachers" / "half" / "node" / "c").rglob("*"))
        shards = [file for file in files if file.is_file()]
        size = store.plan.capacity("atom") * store.spec("teachers/half/node").row_size * 2
        per_block = len(store) / store.plan.n_blocks
        places = [
            (shard, offset)
            for shard in shards
            for offset in range(0, shard.stat().st_size - size, size)
        ]

        def read(place: tuple[Path, int]) -> None:
            with open(place[0], "rb", buffering=0) as file:
                os.pread(file.fileno(), size, place[1])

        def batches(epoch: int) -> Iterator[Any]:
            shuffled = [places[k] for k in np.random.default_rng(epoch).permutation(len(places))]
            with ThreadPoolExecutor(8) as pool:
                done = 0.0
                for _ in pool.map(read, shuffled):
                    done += per_block
                    while done >= BATCH_SIZE:
                        done -= BATCH_SIZE
                        yield None

        return batches

    def _evict(self) -> None:
        os.sync()
        for file in self._work.rglob("*"):
            if file.is_file():
                with open(file, "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--structures", type=int, default=40000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each side in a round")
    parser.add_argument("--work", type=Path, help="keep the files here, and use those that are")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        cold = Cold(work, options.structures, options.seconds)
        names = ("ours", "ours_unasked", "blocks", "memory_map", "lmdb_raw", "tensorstore")
        samples = alternate({name: cold.side(name) for name in names}, options.rounds)
    rates = medians(samples)
    for name, value in sorted(rates.items(), key=lambda item: -item[1]):
        low, high = min(samples[name]), max(samples[name])
        print(f"{name:13} {value:7,.0f} structures/s ({low:,.0f} to {high:,.0f})")
    bars = {
        "ahead": rates["ours"] / rates["ours_unasked"],
        "cold_memmap": rates["ours"] / rates["memory_map"],
        "cold_lmdb": rates["ours"] / rates["lmdb_raw"],
        "cold_zarr": rates["ours"] / rates["tensorstore"],
    }
    for name, ratio in bars.items():
        print(f"{name} {ratio:.2f}")
    write_json(
        options.json,
        bars,
        samples,
        libraries=versions("lmdb", "tensorstore"),
        n_structures=options.structures,
    )


if __name__ == "__main__":
    main()
