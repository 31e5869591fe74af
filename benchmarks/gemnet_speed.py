"""GemNet-OC's forward pass against SchNet's with its force gradient, at the sizes of OC20 and COLL.

    python benchmarks/gemnet_speed.py [--size oc20] [--rounds 9] [--threads 2] [--json FILE]

Three ratios of medians, of sides that alternate so that other work on the machine hits all alike:

- `ratio`: both without gradients of weights, as a teacher or an evaluation runs them.
- `ratio_differentiable`: the same GemNet-OC over a SchNet whose forces can be differentiated again,
  as the reference code's always are.
- `ratio_training`: both as a training step runs them, before its backward pass.

Neighbour lists are made before, as the stream makes them; triplets and quadruplets are found
inside. Random weights and structures: what is counted does not depend on them. Memory is the peak
that one forward pass without gradients adds, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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


def compare(size: str, rounds: int) -> dict[str, Any]:
    """Medians of alternating runs."""
    sides = {name: load(size, side) for side, name in enumerate(("gemnet", "schnet"))}
    samples: dict[str, list[float]] = {}
    # Not all in one round: the gigabytes that training keeps would leave the others a cold heap.
    for names in (("gemnet", "schnet", "schnet_training"), ("gemnet_training", "schnet_training")):
        for repeat in range(rounds + 1):
            for name in names:
                model, batch = sides[name.removesuffix("_training")]
                with torch.set_grad_enabled(name.endswith("_training")):
                    start = time.perf_counter()
                    output = model(batch)
                    taken = time.perf_counter() - start
                del output
                if repeat:  # the first round warms up
                    samples.setdefault(name, []).append(taken)
    median = {name: statistics.median(taken) for name, taken in samples.items()}
    batch = sides["gemnet"][1]
    return {
        "ratio": median["gemnet"] / median["schnet"],
        "ratio_differentiable": median["gemnet"] / median["schnet_training"],
        "ratio_training": median["gemnet_training"] / median["schnet_training"],
        "bar": BARS[size],
        "seconds": median,
        "n_atoms": batch.n_atoms,
        "n_edges": batch.n_edges,
        "further_edges": {k: g.edge_index.shape[1] for k, g in batch.graphs.items()},
        "schnet_edges": sides["schnet"][1].n_edges,
        "peak_mb": peak_memory(size),
        "samples": samples,
    }


def peak_memory(size: str) -> float:
    """MB that one forward pass takes beyond model and batch, in a process of its own."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, __file__, "--memory", size, "--threads", threads]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_memory(size: str) -> None:
    """As `peak_memory`, of this process. Linux only: elsewhere there is no peak to reset."""
    model, batch = load(size, 0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with torch.no_grad():
        model(batch)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MB of this process, now (VmRSS) or at its peak (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024.0
    raise RuntimeError(f"/proc/self/status has no {field}")


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
        bars[size] = found = compare(size, options.rounds)
        taken = {name: f"{1e3 * seconds:.0f}" for name, seconds in found["seconds"].items()}
        print(
            f"{size}: gemnet-oc {taken['gemnet']} ms, schnet {taken['schnet']} ms, ratio "
            f"{found['ratio']:.2f} (bar {found['bar']}); over differentiable forces "
            f"{found['ratio_differentiable']:.2f}, in training {found['ratio_training']:.2f}; "
            f"{found['n_edges']} edges, {found['peak_mb']:.0f} MB"
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
