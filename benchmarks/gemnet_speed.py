"""GemNet-OC's forward pass against SchNet's with its force gradient, at the sizes of OC20 and COLL.

    python benchmarks/gemnet_speed.py [--size oc20] [--rounds 7] [--threads 2] [--json FILE]

Ratios of medians, of sides that alternate so that other work on the machine hits all alike:

- `gemnet_over_schnet_SIZE`: over torch-geometric's SchNet on our graph, both without gradients of
  weights, as a teacher or an evaluation runs them. The reference code takes 10.1 (OC20) and 16.3
  (COLL) times as long as its SchNet.
- `gemnet_over_own_schnet_SIZE`: over ours, which is faster.
- `gemnet_over_differentiable_schnet_SIZE`: over torch-geometric's with forces that can be
  differentiated again, as a training step needs them.

Neighbour lists are made before, as the stream makes them; triplets and quadruplets are found
inside. Random weights and structures: what is counted does not depend on them. Memory is the peak
that one forward pass without gradients adds, in a process of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import alternate, medians, peak_memory, write_json
from peer_models import EnergyForces, own, torch_geometric_schnet
from systems import N_STRUCTURES, model_batch

from kdcache.models import build_model

BARS = {"gemnet_over_schnet_oc20": 9.0, "gemnet_over_schnet_coll": 13.0}


def timed(compute: EnergyForces, *, differentiable: bool = False) -> Callable[[], float]:
    """Measures one forward pass, in seconds."""

    def measure() -> float:
        with torch.set_grad_enabled(differentiable):
            start = time.perf_counter()
            output = compute()
            taken = time.perf_counter() - start
        del output
        return taken

    return measure


def compare(size: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every side, alternating."""
    _, gemnet = own(build_model({"name": f"gemnet-oc-{size}"}).eval(), size)
    _, ours = own(build_model({"name": f"schnet-{size}"}).eval(), size)
    _, theirs = torch_geometric_schnet(size)
    sides = {
        "gemnet": timed(gemnet),
        "schnet": timed(theirs),
        "own_schnet": timed(ours),
        "differentiable_schnet": timed(theirs, differentiable=True),
    }
    return alternate(sides, rounds)


def forward_pass(size: str) -> Callable[[], object]:
    """GemNet-OC's, without gradients, ready to be called."""
    _, compute = own(build_model({"name": f"gemnet-oc-{size}"}).eval(), size)

    def work() -> object:
        with torch.no_grad():
            return compute()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=[*N_STRUCTURES], action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bars: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    sizes: dict[str, dict[str, float]] = {}
    for size in options.size or N_STRUCTURES:
        found = compare(size, options.rounds)
        seconds = medians(found)
        batch = model_batch(build_model({"name": f"gemnet-oc-{size}"}), size)
        sizes[size] = {
            "n_atoms": batch.n_atoms,
            "n_edges": batch.n_edges,
            "peak_mb": peak_memory(forward_pass, size),
        }
        print(f"{size}: {sizes[size]}")
        for name, values in found.items():
            samples[f"{size} {name}"] = values
            spread = f"{1e3 * min(values):.0f} to {1e3 * max(values):.0f}"
            print(f"  {name:22} {1e3 * seconds[name]:7.0f} ms ({spread})")
        for over in ("schnet", "own_schnet", "differentiable_schnet"):
            bars[f"gemnet_over_{over}_{size}"] = seconds["gemnet"] / seconds[over]
    for name, ratio in bars.items():
        print(f"[{name}] {ratio:.2f}" + (f" (bar {BARS[name]:g})" if name in BARS else ""))
    write_json(options.json, bars, samples, threads=options.threads, sizes=sizes)


if __name__ == "__main__":
    main()
