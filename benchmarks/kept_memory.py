"""A dump on a CPU with the memory that it frees kept, and without.

    python benchmarks/kept_memory.py [--structures 1024] [--rounds 4] [--json FILE]

`dump-teacher` in a process of its own, one thread, PaiNN at the size published for COLL: as it is
(`kept`); without `keep_freed_memory` (`glibc`); and so with MALLOC_TRIM_THRESHOLD_ as dask sets it
for its workers (`dask`). Seconds of the whole command, and page faults. How many glibc meets by
itself depends on where its blocks happen to lie, so look at the spread.

[glibc_over_kept], [dask_over_kept]: ratios of the medians of seconds.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench import alternate, medians, write_json
from dump_overhead import TEACHERS
from workloads import make_potential, make_store

from kdcache.checkpoint import save_potential
from kdcache.store import Store

AS_IT_IS = "from kdcache_cli import main; main.main()"
WITHOUT = "from kdcache_cli import main; main.keep_freed_memory = lambda: None; main.main()"
SIDES: dict[str, tuple[str, dict[str, str]]] = {
    "kept": (AS_IT_IS, {}),
    "glibc": (WITHOUT, {}),
    "dask": (WITHOUT, {"MALLOC_TRIM_THRESHOLD_": "65536"}),
}


class Dumps:
    """Dumps of one teacher into copies of one store."""

    def __init__(self, store: Store, teacher: Path, directory: Path) -> None:
        self._store = store
        self._teacher = teacher
        self._copy = directory / "copy.zarr"
        self.page_faults: dict[str, list[int]] = {side: [] for side in SIDES}

    def seconds(self, side: str) -> float:
        """Of one command."""
        shutil.copytree(self._store.path, self._copy)
        code, environment = SIDES[side]
        command = [sys.executable, "-c", code, "dump-teacher", "--into", str(self._copy)]
        command += ["--teacher", str(self._teacher), "--threads", "1", "--compute-threads", "1"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        started = time.perf_counter()
        subprocess.run(
            [*command, "--device", "cpu"],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        self.page_faults[side].append(after - before)
        shutil.rmtree(self._copy)
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--structures", type=int, default=1024, help="molecules of ten atoms")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    size, model = TEACHERS["painn"]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        potential = make_potential(model)
        save_potential(directory / "teacher", potential)
        graph = potential.model.graph_rule
        store = make_store(directory / "s.zarr", size, options.structures, graph=graph)
        dumps = Dumps(store, directory / "teacher", directory)
        found = alternate({side: partial(dumps.seconds, side) for side in SIDES}, options.rounds)
    middle = medians(found)
    faults = {side: counts[1:] for side, counts in dumps.page_faults.items()}
    for side, seconds in middle.items():
        shown = " ".join(f"{value:.1f}" for value in sorted(found[side]))
        counts = " ".join(f"{count:,}" for count in sorted(faults[side]))
        print(f"{side:6} {seconds:6.2f} s  ({shown})  page faults {counts}")
    bars = {f"{side}_over_kept": middle[side] / middle["kept"] for side in ("glibc", "dask")}
    for name, ratio in bars.items():
        print(f"[{name}] {ratio:.2f}")
    write_json(options.json, bars, found, page_faults=faults, structures=options.structures)


if __name__ == "__main__":
    main()
