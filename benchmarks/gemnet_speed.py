"""GemNet-OC's forward pass against SchNet's with its force gradient, at the sizes of OC20 and COLL.

    python benchmarks/gemnet_speed.py [--size oc20] [--rounds 9] [--threads 2] [--json FILE]

Sides alternate, so that other work on the machine hits both; ratios are of medians. Neighbour lists
are made before, as the stream makes them; triplets and quadruplets are found inside. Random weights
and structures: what is counted does not depend on them. Peak memory is of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from ase.build import add_adsorbate, fcc111

from kdcache.models import Model, build_model
from kdcache.stream.window import collate
from kdcache.structures import Batch, Structure

# The reference code takes 10.1 and 16.3 times as long as SchNet.
BARS = {"oc20": 9.0, "coll": 13.0}
PRESETS = {"oc20": ("gemnet-oc-oc20", "schnet-oc20"), "coll": ("gemnet-oc-coll", "schnet-coll")}


def slabs(n_structures: int) -> tuple[list[Structure], list[np.ndarray]]:
    """Metal slabs of 75 atoms with an adsorbate of five, rattled, and their tags."""
    structures, tags = [], []
    for k in range(n_structures):
        rng = np.random.default_rng(k)
        atoms = fcc111(["Cu", "Pt", "Ag", "Pd"][k % 4], (5, 3, 5), vacuum=10.0)
        n_metal = len(atoms)
        height = [1.8, 2.9, 2.9, 3.4, 3.4]
        for z, symbol, spot in zip(height, "COHHH", [0.0, 0.4, 0.9, -0.7, 0.2], strict=True):
            add_adsorbate(atoms, symbol, z, (3.0 + spot, 2.0 - spot))
        positions = atoms.get_positions() + rng.normal(scale=0.05, size=(len(atoms), 3))
        tag = np.where(atoms.get_tags() == 1, 1, 0)
        tag[n_metal:] = 2
        structures.append(
            Structure(
                structure_id=f"slab{k}",
                atomic_numbers=atoms.numbers.astype(np.int64),
                positions=positions,
                cell=np.array(atoms.cell),
                pbc=np.array([True, True, False]),
            )
        )
        tags.append(tag)
    return structures, tags


def molecules(n_structures: int) -> tuple[list[Structure], list[np.ndarray]]:
    """Ten atoms each, at random, none closer than 0.9 Å; all with tag 2."""
    structures, tags = [], []
    for k in range(n_structures):
        rng = np.random.default_rng(k)
        positions = np.zeros((1, 3))
        while len(positions) < 10:
            point = rng.uniform(0.0, 3.6, 3)
            if np.linalg.norm(positions - point, axis=1).min() > 0.9:
                positions = np.vstack([positions, point])
        structures.append(
            Structure(
                structure_id=f"molecule{k}",
                atomic_numbers=rng.choice([1, 6, 8], 10),
                positions=positions,
                cell=np.zeros((3, 3)),
                pbc=np.zeros(3, bool),
            )
        )
        tags.append(np.full(10, 2))
    return structures, tags


def load(size: str, side: int) -> tuple[Model, Batch]:
    """The model and its batch; side 0 is GemNet-OC, 1 SchNet."""
    model = build_model({"name": PRESETS[size][side]})
    structures, tags = slabs(4) if size == "oc20" else molecules(32)
    batch = collate(structures, model.graph_rule, further=model.further_graphs)
    batch.tags = torch.tensor(np.concatenate(tags), dtype=torch.uint8)
    return model.eval(), batch


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(size: str, rounds: int) -> dict[str, object]:
    """Medians of alternating runs of both sides."""
    sides = [load(size, side) for side in (0, 1)]
    samples: list[list[float]] = [[], []]

    def step(side: int) -> object:
        model, batch = sides[side]
        with torch.no_grad():
            return model(batch)

    for _ in range(2):
        step(0), step(1)
    for _ in range(rounds):
        for side in (0, 1):
            samples[side].append(seconds(lambda side=side: step(side)))
    gemnet, schnet = (statistics.median(s) for s in samples)
    batch = sides[0][1]
    return {
        "ratio": gemnet / schnet,
        "bar": BARS[size],
        "gemnet_s": gemnet,
        "schnet_s": schnet,
        "n_atoms": batch.n_atoms,
        "n_edges": batch.n_edges,
        "further_edges": {k: g.edge_index.shape[1] for k, g in batch.graphs.items()},
        "samples": {"gemnet": samples[0], "schnet": samples[1]},
    }


def peak_memory(size: str) -> float:
    """MB that one forward pass takes beyond model and batch, in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--memory",
        size,
        "--threads",
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_memory(size: str) -> None:
    model, batch = load(size, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        model(batch)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*BARS], action="append")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", choices=[*BARS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print_memory(options.memory)
        return
    bars = {}
    for size in options.size or BARS:
        found = compare(size, options.rounds)
        found["peak_rss_mb"] = peak_memory(size)
        bars[size] = found
        print(
            f"{size}: gemnet-oc {1e3 * found['gemnet_s']:.0f} ms, schnet "
            f"{1e3 * found['schnet_s']:.0f} ms, ratio {found['ratio']:.2f} (bar {found['bar']}), "
            f"{found['n_edges']} edges, {found['peak_rss_mb']:.0f} MB"
        )
    if options.json:
        report = {
            "bars": bars,
            "threads": options.threads,
            "machine": {"processor": platform.processor() or platform.machine(),
                        "cores": os.cpu_count()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
