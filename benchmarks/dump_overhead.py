"""A dump, all of it, against the bare forward pass of its teacher over the same batches in memory.

    python benchmarks/dump_overhead.py [--teacher painn] [--threads 1] [--rounds 3] [--json FILE]

`forward` is the model without gradients on batches made beforehand. `dump` is `dump_teacher` into a
store that has the neighbour lists: reading, batches, the forward pass, reduction of edges,
encoding, checksums, files on disk and the manifest. `whole` also keeps the edges. They take turns.
With one thread for the model, readers and writer have the second core; with as many as there are
cores, they take time from the model.

`edge_write_rate`: where the teacher costs nothing. One that replays edges from memory is dumped
whole, and its float16 bytes per second are divided by those of np.save and fsync of the same bytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import alternate, medians, write_json
from torch import Tensor
from workloads import CLOCKS, devices, make_store, make_teacher

from kdcache.allocator import keep_freed_memory
from kdcache.devices import batch_atoms
from kdcache.dump import DumpOptions, dump_teacher
from kdcache.fields import FieldSpec
from kdcache.graphs import GraphRule
from kdcache.models.presets import find_preset
from kdcache.store import Store
from kdcache.stream.neighbors import further_neighbors, neighbors_for
from kdcache.stream.reader import WindowReader, sequential
from kdcache.structures import Batch
from kdcache.teachers import NativeTeacher, Teacher

# GemNet-OC of half the published width and blocks: some tens of milliseconds for a structure.
REDUCED = {
    **find_preset("gemnet-oc-coll").model,
    "num_blocks": 2,
    "emb_size_atom": 64,
    "emb_size_edge": 64,
    "max_neighbors_aint": 50,
}
TEACHERS: dict[str, tuple[str, str | Mapping[str, object]]] = {
    "painn": ("coll", "painn-coll"),
    "gemnet": ("oc20", REDUCED),
    "gemnet-oc20": ("oc20", "gemnet-oc-oc20"),
    "gemnet-coll": ("coll", "gemnet-oc-coll"),
}
CHANNELS = 512  # of an edge, as GemNet-OC for OC20 has


@dataclass
class Replay:
    """A teacher that answers with edges it holds in memory."""

    device: str
    model_name: str = "replay"
    digest: str = "0" * 64
    graph_rule: GraphRule = field(default_factory=lambda: GraphRule(12.0, 30))
    further_graphs: Mapping[str, GraphRule] = field(default_factory=dict)
    architecture: Mapping[str, Any] = field(default_factory=dict)
    references: Mapping[int, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    _edges: Tensor = field(default_factory=lambda: torch.empty(0, CHANNELS))

    def field_specs(self) -> tuple[FieldSpec, ...]:
        return (FieldSpec("edge", "edge", (CHANNELS,)),)

    def compute(self, batch: Batch) -> dict[str, Tensor]:
        if len(self._edges) < batch.n_edges:
            self._edges = torch.randn(batch.n_edges, CHANNELS, device=self.device)
        return {"edge": self._edges[: batch.n_edges]}


class Dumps:
    """Dumps of one teacher into copies of one store."""

    def __init__(
        self,
        store: Store,
        teacher: Teacher,
        device: str,
        directory: Path,
        clock: Callable[[], float],
    ) -> None:
        self.store, self.teacher, self.device, self.clock = store, teacher, device, clock
        self.directory = directory
        cache = directory / "graphs"
        neighbors = neighbors_for(store, teacher.graph_rule, cache)
        further = further_neighbors(store, teacher.further_graphs, cache)
        reader = WindowReader(store, neighbors, further, labels=False)
        rows = np.arange(len(store.index))
        self.max_atoms = batch_atoms(None, torch.device(device))
        self.batches = [batch.to(device) for batch in sequential(reader, rows, self.max_atoms)]
        self.n_bytes = 0

    def dump(self, fields: Sequence[str] | None) -> float:
        """Seconds of `dump_teacher`, the copy of the store left out."""
        path = self.directory / "copy.zarr"
        shutil.copytree(self.store.path, path)
        options = DumpOptions("teacher", fields=fields, device=self.device)
        start = self.clock()
        report = dump_teacher(path, self.teacher, options)
        taken = self.clock() - start
        self.n_bytes = report.n_bytes
        shutil.rmtree(path)
        return taken

    def forward(self) -> float:
        """Seconds of the model alone."""
        assert isinstance(self.teacher, NativeTeacher)
        self._synchronize()
        start = self.clock()
        with torch.no_grad():
            for batch in self.batches:
                self.teacher.potential.predict(batch)
        self._synchronize()
        return self.clock() - start

    def save(self, n_bytes: int) -> float:
        """Seconds of np.save and fsync of as many bytes."""
        path = self.directory / "saved.npy"
        values = np.ones(n_bytes // 2, np.float16)
        start = self.clock()
        with open(path, "wb") as file:
            np.save(file, values)
            file.flush()
            os.fsync(file.fileno())
        taken = self.clock() - start
        path.unlink()
        return taken

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def compare_overhead(
    name: str, device: str, options: argparse.Namespace, directory: Path
) -> dict[str, list[float]]:
    """Seconds by side."""
    size, model = TEACHERS[name]
    teacher = make_teacher(model, device)
    n_structures = options.structures or {"coll": 512, "oc20": 32}[size]
    store = make_store(
        directory / f"{name}.zarr", size, n_structures, graph=teacher.graph_rule, **layout(size)
    )
    dumps = Dumps(store, teacher, device, directory, CLOCKS[options.clock])
    sides: dict[str, Callable[[], float]] = {
        "forward": dumps.forward,
        "dump": partial(dumps.dump, None),
    }
    if any(spec.level == "edge" for spec in teacher.field_specs()):
        every = [spec.name for spec in teacher.field_specs()]
        sides["whole"] = partial(dumps.dump, every)
    return alternate(sides, options.rounds)


def layout(size: str) -> dict[str, int]:
    """Several shards of a few blocks: reading and writing have something to overlap with."""
    return {"coll": {"block_atoms": 640}, "oc20": {"block_atoms": 640}}[size] | {"shard_blocks": 2}


def compare_edges(
    device: str, options: argparse.Namespace, directory: Path
) -> dict[str, list[float]]:
    """MB/s of whole edges of a teacher that costs nothing, and of np.save."""
    teacher = Replay(device)
    store = make_store(
        directory / "edges.zarr",
        "oc20",
        options.edge_structures,
        graph=teacher.graph_rule,
        block_atoms=1280,
        shard_blocks=2,
    )
    # A disk is waited for: processor time says nothing of it.
    dumps = Dumps(store, teacher, device, directory, CLOCKS["wall"])
    n_bytes = int(store.plan.n_edges.sum()) * CHANNELS * 2
    sides = {
        "save": lambda: n_bytes / dumps.save(n_bytes) / 1e6,
        "edges": lambda: n_bytes / dumps.dump(["edge"]) / 1e6,
    }
    return alternate(sides, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", choices=[*TEACHERS, "none"], action="append")
    parser.add_argument("--structures", type=int, help="default 512 molecules or 32 slabs")
    parser.add_argument("--edge-structures", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    parser.add_argument("--device", default="all")
    parser.add_argument("--directory", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does
    bars: dict[str, float] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    for device in devices(options.device):
        for name in options.teacher or ("painn", "gemnet"):
            if name == "none":
                continue
            with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
                found = compare_overhead(name, device, options, Path(scratch))
            samples[f"{name} {device}"] = found
            seconds = medians(found)
            for side, taken in seconds.items():
                print(f"{name} {device} {side:8} {taken:6.2f} s  {_spread(found[side], 2)}")
                if side != "forward":
                    bars[f"{side}_over_forward {name} {device}"] = taken / seconds["forward"]
        with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
            found = samples[f"edges {device}"] = compare_edges(device, options, Path(scratch))
        rates = medians(found)
        for side, rate in rates.items():
            print(f"edges {device} {side:8} {rate:6.0f} MB/s  {_spread(found[side], 0)}")
        bars[f"edge_write_rate {device}"] = rates["edges"] / rates["save"]
    dumps = [ratio for name, ratio in bars.items() if "_over_forward" in name]
    if dumps:
        bars["dump_over_forward"] = max(dumps)
    bars["edge_write_rate"] = min(r for name, r in bars.items() if name.startswith("edge_write"))
    for name, ratio in bars.items():
        print(f"{name} {ratio:.3f}")
    write_json(options.json, bars, samples, clock=options.clock, threads=options.threads)


def _spread(values: list[float], digits: int) -> str:
    return "(" + " ".join(f"{value:.{digits}f}" for value in sorted(values)) + ")"


if __name__ == "__main__":
    main()
