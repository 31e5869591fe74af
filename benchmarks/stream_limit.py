"""What stops the stream: its two halves alone, as threads of one process, and as two processes.

    python benchmarks/stream_limit.py [--structures 12000] [--rounds 5] [--seconds 1.5]
        [--json FILE]

`read` brings windows of 16 blocks from the page cache to memory, `cut` makes batches of 64 of a
window that is there; the store is that of `stream_vs_peers.py`. A loader does both at the same
time, as threads, so it gives at best what the slower of them does. `waited` is how often a second
the two threads gave up the processor, which each other's lock of the interpreter makes them do.

`threads_over_processes` is the time per structure of the slower half, as threads over as processes:
what threads of one interpreter cost. No bar.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench import medians, write_json
from stream_store import write_store

from kdcache.allocator import keep_freed_memory
from kdcache.store import open_store
from kdcache.stream.neighbors import StoredNeighbors
from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle
from kdcache.stream.window import make_batch

BATCH_SIZE = 64
ROLES = ("read", "cut")
# What works at the same time, turn by turn.
TURNS = (("alone", ("read",)), ("alone", ("cut",)), ("threads", ROLES), ("processes", ROLES))


class Halves:
    """Both halves of a stream of one store, each for itself."""

    def __init__(self, path: Path) -> None:
        store = open_store(path)
        rows = np.arange(len(store))
        order = BlockShuffle(store.index.block, rows, batch_size=BATCH_SIZE, seed=0)
        self._reader = WindowReader(store, StoredNeighbors(store), teacher_fields=["half/node"])
        # The last of an epoch may be small.
        first, *self._plans = order.windows(0)[:-1]
        self._window, self._rows = self._reader.read(first.blocks), first.rows

    def measure(self, role: str, begin: float, end: float) -> float:
        """Microseconds a structure between two times of `time.monotonic`."""
        one_round = {"read": self._read, "cut": self._cut}[role]
        one_round()
        time.sleep(max(0.0, begin - time.monotonic()))
        n, start = 0, time.monotonic()
        while time.monotonic() < end:
            n += one_round()
        return 1e6 * (time.monotonic() - start) / n

    def _read(self) -> int:
        for plan in self._plans:
            self._reader.read(plan.blocks)
        return sum(len(plan.rows) for plan in self._plans)

    def _cut(self) -> int:
        whole = len(self._rows) // BATCH_SIZE * BATCH_SIZE
        for some in self._rows[:whole].reshape(-1, BATCH_SIZE):
            make_batch([self._window.gather(self._window.place(some))])
        return whole


IN_WORKER: list[Halves] = []


def prepare(path: Path) -> None:
    """A process that computes nothing else."""
    torch.set_num_threads(1)
    keep_freed_memory()
    IN_WORKER.append(Halves(path))


def in_a_process(role: str, begin: float, end: float) -> float:
    """`Halves.measure` in a worker."""
    return IN_WORKER[0].measure(role, begin, end)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--structures", type=int, default=12000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each side in a round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    samples: dict[str, list[float]] = {}
    switches: list[float] = []
    # Spawned: a forked child of a process with threads may wait for a lock that no thread holds.
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.zarr"
        write_store(path, options.structures, codecs=("half",))
        halves = Halves(path)
        with (
            ThreadPoolExecutor(2) as threads,
            ProcessPoolExecutor(2, context, prepare, (path,)) as processes,
        ):
            list(processes.map(time.sleep, [2.0, 2.0]))  # both have begun, and are prepared
            for repeat in range(options.rounds + 1):
                for mode, roles in TURNS:
                    here = mode != "processes"
                    measure = halves.measure if here else in_a_process
                    pool = threads if here else processes
                    begin = time.monotonic() + 0.2
                    timed = partial(measure, begin=begin, end=begin + options.seconds)
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
                    found = list(pool.map(timed, roles))
                    waited = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before
                    if not repeat:
                        continue
                    for role, value in zip(roles, found, strict=True):
                        samples.setdefault(f"{role} {mode}", []).append(value)
                    if mode == "threads":
                        switches.append(waited / options.seconds)
    middle = medians(samples)
    for name, value in middle.items():
        low, high = min(samples[name]), max(samples[name])
        print(f"{name:16} {value:5.1f} us a structure ({low:.1f} to {high:.1f})")
    slower = {
        mode: max(middle[f"{role} {mode}"] for role in ROLES) for mode in ("threads", "processes")
    }
    print(f"waited {np.median(switches):,.0f} times a second")
    ratio = slower["threads"] / slower["processes"]
    print(f"threads_over_processes {ratio:.2f}")
    write_json(options.json, {"threads_over_processes": ratio}, samples, waited=switches)


if __name__ == "__main__":
    main()
