"""Memory of the stream beyond its two windows, and how it grows with the store.

    python benchmarks/stream_memory.py [--structures 5500] [--json FILE]

Stores of 1, 4 and 16 times as many structures, each streamed for a while in a process of its own.
Counted is the resident memory at its peak, over that before the loader was made and the store's
index was read, less what batches that wait in the queue hold.

Bars: [windows] the peak's extra over two windows, at most 1.1; [growth] how much more the largest
store takes than the smallest, at most 0.03.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import stream_peers as peers
from bench import write_json
from stream_store import write_store

from kdcache.store import open_store
from kdcache.stream.neighbors import StoredNeighbors
from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle

BARS = {"windows": 1.1, "growth": 0.03}
SIZES = (1, 4, 16)
STEPS = 400
WINDOW_BLOCKS = 16  # as training reads; the smallest store has four windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--structures", type=int, default=5500, help="of the smallest store")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--work", type=Path, help="keep the stores here, and use those that are")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--stream", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stream:
        print(json.dumps(streamed(arguments.stream)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        found = {}
        for size in SIZES:
            path = work / f"{size}.zarr"
            write_store(path, size * arguments.structures, arguments.channels, ["half"])
            command = [sys.executable, __file__, "--stream", str(path)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[size] = json.loads(output.splitlines()[-1])
            extra, window = found[size]["extra"], found[size]["window"]
            print(
                f"{size:3}x: {extra / 2**20:7.1f} MiB beyond the start, a window is "
                f"{window / 2**20:.1f} MiB, {extra / (2 * window):.3f} of two"
            )
    worst = max(one["extra"] / (2 * one["window"]) for one in found.values())
    bars = {"windows": worst, "growth": found[SIZES[-1]]["extra"] / found[SIZES[0]]["extra"] - 1}
    for name, value in bars.items():
        print(f"[{name}] {value:.3f} (bar {BARS[name]})")
    write_json(arguments.json, bars, {str(size): one for size, one in found.items()})


def streamed(path: Path) -> dict[str, float]:
    """Bytes of a window, and the most that was resident beyond the start while streaming."""
    store = open_store(path)
    order = BlockShuffle(
        store.index.block,
        np.arange(len(store)),
        batch_size=64,
        seed=0,
        window_blocks=WINDOW_BLOCKS,
    )
    reader = WindowReader(store, StoredNeighbors(store), teacher_fields=["half/node"])
    whole = np.arange(min(WINDOW_BLOCKS, store.plan.n_blocks))
    window = sum(array.nbytes for array in reader.read(whole).arrays.values())
    del reader
    # A batch warms up torch and the allocator, of a stream whose memory is given back.
    with_few = BlockShuffle(store.index.block, np.arange(64), batch_size=64, seed=0)
    for _ in islice(peers.ours(store, with_few)(0), 2):
        pass
    before = resident()
    peak, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    waiting = 0
    for batch in islice(peers.ours(store, order)(0), STEPS):
        tensors = [batch.positions, batch.forces, batch.edge_index, batch.edge_shift]
        tensors += list(batch.teacher.values())
        waiting = max(waiting, sum(t.numel() * t.element_size() for t in tensors))
    stop.set()
    watcher.join()
    # Four wait, one is being made, and one is in the loop's hands.
    return {"extra": peak[0] - before - 6 * waiting, "window": window, "batch": waiting}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


if __name__ == "__main__":
    main()
