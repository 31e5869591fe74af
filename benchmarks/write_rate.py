"""Features from memory into a store, against `np.save` and fsync of the same float16 bytes.

    python benchmarks/write_rate.py [--mb 128] [--rounds 5] [--json FILE]

Three sides, which alternate. None computes features; all end with the bytes on disk.

- `save`: np.save of a float16 array that is ready, into a new file, flush, fsync. One file of all
  bytes, no checksum.
- `float32`: what a dump does. A GroupWriter is given float32, shard by shard: values are checked,
  rounded to float16, the error summed, each block gets its crc32c, each file its SHA-256; file
  and folder are synced, the file renamed, the shard entered in the journal.
- `float16`: the same from values that are float16 already.

The bar is `write_over_save`: seconds of `float32` over those of `save`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from bench import alternate, medians, write_json
from workloads import make_store

from kdcache.fields import FieldSpec
from kdcache.store import Store, TeacherEntry, add_teacher

CHANNELS = 1024  # a node feature of 256 and a vector feature of 3 x 256, as PaiNN has
FIELDS = (
    FieldSpec("node", "atom", (CHANNELS // 4,), codec="half"),
    FieldSpec("vector", "atom", (3, CHANNELS // 4), symmetry="vector", codec="half"),
)


class Sides:
    """A store, and one shard's worth of values that every shard is written from."""

    def __init__(self, directory: Path, megabytes: float) -> None:
        n_structures = max(52, round(1e6 * megabytes / (2 * CHANNELS * 80)))
        self.directory = directory
        self.store: Store = make_store(
            directory / "store.zarr", "oc20", n_structures, shard_blocks=4
        )
        plan = self.store.plan
        self.n_atoms = int(plan.n_atoms.sum())
        rng = np.random.default_rng(0)
        most = max(self._rows(shard) for shard in range(plan.n_shards))
        self.values = {
            spec.name: rng.standard_normal((most, *spec.shape), dtype=np.float32) for spec in FIELDS
        }
        self.halves = {name: values.astype(np.float16) for name, values in self.values.items()}
        self.saved = rng.standard_normal((self.n_atoms, CHANNELS), dtype=np.float32).astype(
            np.float16
        )

    def _rows(self, shard: int) -> int:
        plan = self.store.plan
        return int(plan.n_atoms[plan.shard_structures(shard)].sum())

    def save(self) -> float:
        path = self.directory / "saved.npy"
        start = time.perf_counter()
        with open(path, "wb") as file:
            np.save(file, self.saved)
            file.flush()
            os.fsync(file.fileno())
        taken = time.perf_counter() - start
        path.unlink()
        return taken

    def write(self, values: dict[str, np.ndarray]) -> float:
        path = self.directory / "copy.zarr"
        shutil.copytree(self.store.path, path)
        entry = TeacherEntry.describe(digest="0" * 64, fields=FIELDS, model="none", architecture={})
        writer = add_teacher(path, "teacher", entry, FIELDS)
        with writer:
            start = time.perf_counter()
            for shard in writer.pending_shards():
                rows = self._rows(shard)
                writer.write_shard(shard, {name: array[:rows] for name, array in values.items()})
            taken = time.perf_counter() - start
        shutil.rmtree(path)
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, default=128.0, help="float16 megabytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        sides = Sides(Path(directory), options.mb)
        megabytes = sides.saved.nbytes / 1e6
        samples = alternate(
            {
                "save": sides.save,
                "float32": lambda: sides.write(sides.values),
                "float16": lambda: sides.write(sides.halves),
            },
            options.rounds,
        )
    seconds = medians(samples)
    for name, taken in seconds.items():
        spread = " ".join(f"{megabytes / value:.0f}" for value in sorted(samples[name]))
        print(f"{name:8} {megabytes / taken:6.0f} MB/s of float16  ({spread})")
    bars = {
        "write_over_save": seconds["float32"] / seconds["save"],
        "write_float16_over_save": seconds["float16"] / seconds["save"],
    }
    for name, ratio in bars.items():
        print(f"{name} {ratio:.2f}")
    write_json(options.json, bars, samples, megabytes=megabytes)


if __name__ == "__main__":
    main()
