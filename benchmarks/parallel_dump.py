"""Structures per second of a dump by one process, by workers of this machine, and by parts.

    python benchmarks/parallel_dump.py [--structures 256] [--rounds 3] [--json FILE]

Every side is the command line a user types, in a process of its own, dumping one teacher into a
copy of one store. `single` is `dump-teacher`; `workers_1` and `workers_2` are `--workers 1` and
`2`; `parts_1` and `parts_2` are so many `--part k/n` started together. They take turns, each
computes with one thread, and all stores must have one root digest. `rate` is structures per second
from the first trace of the teacher in the store to the end of the last process: without the imports
that every command begins with, with the start of workers. `first` is the seconds from the start of
the command to the first shard on disk.

[workers_1_over_single] says what handing out shards costs, [workers_2_over_1] and [parts_2_over_1]
what a second process gains. On two cores that others use, neither can reach 2.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import alternate, medians, write_json
from dump_overhead import TEACHERS
from workloads import make_potential, make_store

from kdcache.checkpoint import save_potential
from kdcache.graphs import GraphRule
from kdcache.store import Store, open_store
from kdcache.store.work import WorkFolder

SIDES: dict[str, list[list[str]]] = {
    "single": [[]],
    "workers_1": [["--workers", "1"]],
    "workers_2": [["--workers", "2"]],
    "parts_1": [["--part", "0/1"]],
    "parts_2": [["--part", "0/2"], ["--part", "1/2"]],
}
# Sixteen molecules to a shard: processes have many to share.
BLOCK_ATOMS = 160
SECONDS_BETWEEN_LOOKS = 0.005


class Dumps:
    """Dumps of one teacher by several processes into copies of one store."""

    def __init__(self, store: Store, teacher: Path, directory: Path) -> None:
        self._store = store
        self._teacher = teacher
        self._copy = directory / "copy.zarr"
        self.digests: set[str] = set()
        self.first: dict[str, list[float]] = {side: [] for side in SIDES}

    def rate(self, side: str) -> float:
        """Structures per second of one dump."""
        shutil.copytree(self._store.path, self._copy)
        work = WorkFolder(self._copy, "teachers/teacher")
        command = [sys.executable, "-m", "kdcache_cli", "dump-teacher", "--into", str(self._copy)]
        command += ["--teacher", str(self._teacher), "--threads", "1", "--compute-threads", "1"]
        command += ["--device", "cpu"]
        started = time.perf_counter()
        processes = [
            subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL) for more in SIDES[side]
        ]
        begun = first = None
        while any(process.poll() is None for process in processes):
            now = time.perf_counter()
            if begun is None and work.begun:
                begun = now
            if first is None and any(work.path.glob("[0-9]*.json")):
                first = now
            time.sleep(SECONDS_BETWEEN_LOOKS)
        ended = time.perf_counter()
        if any(process.returncode for process in processes) or begun is None or first is None:
            raise RuntimeError(f"{side}: the dump failed, or was too short to be watched")
        self.first[side].append(first - started)
        self.digests.add(open_store(self._copy).manifest.root_digest)
        shutil.rmtree(self._copy)
        return len(self._store) / (ended - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", choices=["painn", "gemnet-coll"], default="painn")
    parser.add_argument("--structures", type=int, default=256, help="molecules")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    size, model = TEACHERS[options.teacher]
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        directory = Path(scratch)
        potential = make_potential(model)
        save_potential(directory / "teacher", potential)
        graph: GraphRule = potential.model.graph_rule
        store = make_store(
            directory / "s.zarr", size, options.structures, graph=graph, block_atoms=BLOCK_ATOMS,
            shard_blocks=1,
        )  # fmt: skip
        dumps = Dumps(store, directory / "teacher", directory)
        sides = {side: lambda side=side: dumps.rate(side) for side in SIDES}  # type: ignore[misc]
        rates = alternate(sides, options.rounds)
        shards = store.plan.n_shards
    found = medians(rates)
    first = medians({side: values[1:] for side, values in dumps.first.items()})
    print(f"{options.structures} structures in {shards} shards, load {os.getloadavg()[0]:.1f}")
    for side, rate in found.items():
        shown = " ".join(f"{value:.1f}" for value in sorted(rates[side]))
        print(f"{side:10} {rate:7.1f} structures/s  ({shown})  first shard {first[side]:5.1f} s")
    bars = {
        "workers_1_over_single": found["workers_1"] / found["single"],
        "workers_2_over_1": found["workers_2"] / found["workers_1"],
        "parts_2_over_1": found["parts_2"] / found["parts_1"],
    }
    for name, ratio in bars.items():
        print(f"[{name}] {ratio:.3f}")
    print(f"root digests: {len(dumps.digests)}")
    samples = {"rate": rates, "first": dumps.first}
    write_json(options.json, bars, samples, teacher=options.teacher, structures=options.structures)
    if len(dumps.digests) != 1:
        sys.exit("the stores differ")


if __name__ == "__main__":
    main()
