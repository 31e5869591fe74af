"""Speed of the students against other implementations, on the same graphs.

    python benchmarks/student_speed.py [--size coll] [--rounds 5] [--threads 1] [--json FILE]

- `schnet` against torch-geometric's SchNet, equal hyperparameters, both with gradient forces.
- `painn` with gradient forces against SchNetPack's PaiNN, which has no others: equal width, layers,
  radial functions, cutoff and graph. They differ in the normalisations of the Open Catalyst variant
  (LayerNorm, scaled activations) and in SchNetPack's cosine cutoff.
- The published PaiNN with direct forces against SchNet's forward pass with its gradient.

- With --compile, ours compiled as `training.compile` does it; SchNetPack has nothing of the kind.

`inference` is energy and forces; `training` forward, loss, backward and an AdamW step. float32.
All sides keep the memory they free, as our commands do: what the C library does by itself depends
on chance, and cost SchNetPack's PaiNN more than ours.
Clock: processor time of the thread with one thread, wall time with more. Where SchNetPack cannot be
imported its side is left out, and the script says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from bench import alternate, medians, peak_memory, write_json
from peer_models import (
    EnergyForces,
    gradient_painn,
    own,
    schnetpack_painn,
    torch_geometric_schnet,
)
from systems import N_STRUCTURES
from torch import nn

from kdcache.allocator import keep_freed_memory
from kdcache.models import build_model

# Direct PaiNN of the published sizes over SchNet with its gradient.
BARS = {"painn_over_schnet_oc20": 3.0, "painn_over_schnet_coll": 3.5, "painn_over_schnetpack": 1.5}


MODES = ("inference", "training")


def clock() -> float:
    """Seconds; of one thread those of the processor, which other work does not lengthen."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def inference(compute: EnergyForces) -> Callable[[], float]:
    """Measures one call."""

    def measure() -> float:
        with torch.no_grad():
            start = clock()
            compute()
            return clock() - start

    return measure


def step(compute: EnergyForces, parameters: Iterable[nn.Parameter]) -> Callable[[], float]:
    """Measures one training step."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def measure() -> float:
        start = clock()
        energy, forces = compute()
        loss = energy.square().mean() + forces.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return clock() - start

    return measure


def make(name: str, size: str) -> tuple[nn.Module, EnergyForces]:
    """A side by name."""
    if name == "torch_geometric_schnet":
        return torch_geometric_schnet(size)
    if name == "schnetpack_painn":
        return schnetpack_painn(size)
    base, _, variant = name.partition(" ")
    if base == "painn_gradient":
        return own(gradient_painn(size), size, variant == "compiled")
    preset = {"painn_direct": "painn", "schnet": "schnet", "gemnet": "gemnet-oc"}[base]
    model, compute = own(build_model({"name": f"{preset}-{size}"}), size, variant == "compiled")
    if variant == "bf16":
        return model, under_bf16(compute)
    return model, compute


def under_bf16(compute: EnergyForces) -> EnergyForces:
    """The same with products in bfloat16."""

    def cast() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return compute()

    return cast


def prepared(name: str, size: str, training: bool) -> Callable[[], float]:
    """What measures a side once."""
    model, compute = make(name, size)
    return step(compute, model.parameters()) if training else inference(compute)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(N_STRUCTURES), action="append")
    parser.add_argument("--mode", choices=MODES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gemnet", action="store_true", help="GemNet-OC as well, which is slow")
    parser.add_argument("--compile", action="store_true", help="SchNet and PaiNN compiled as well")
    parser.add_argument("--bf16", action="store_true", help="PaiNN in bfloat16 as well")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as commands do; for all sides alike
    names = ["schnet", "torch_geometric_schnet", "painn_direct", "painn_gradient"]
    names += ["painn_direct bf16"] if options.bf16 else []
    names += ["schnet compiled", "painn_gradient compiled"] if options.compile else []
    names += ["gemnet"] if options.gemnet else []
    try:
        schnetpack_painn("coll")
        names.append("schnetpack_painn")
    except ImportError as error:
        print(f"SchNetPack's PaiNN is left out: {error}")
    bars: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    for size in options.size or N_STRUCTURES:
        for mode in options.mode or MODES:
            training = mode == "training"
            sides = {name: prepared(name, size, training) for name in names}
            found = alternate(sides, options.rounds)
            del sides
            median = medians(found)
            for name, seconds in median.items():
                spread = f"{min(found[name]):.3f} to {max(found[name]):.3f}"
                rate = N_STRUCTURES[size] / seconds
                peak = peak_memory(prepared, name, size, training)
                print(
                    f"{size} {mode} {name}: {rate:.1f} structures/s, {seconds:.3f} s ({spread}), "
                    f"{peak:.0f} MB"
                )
                samples[f"{size} {mode} {name}"] = found[name]
                memory[f"{size} {mode} {name}"] = peak
            if mode == "inference":
                for over in ("schnet", "torch_geometric_schnet"):
                    key = "painn_over_schnet_" if over == "schnet" else "painn_over_pyg_schnet_"
                    bars[key + size] = median["painn_direct"] / median[over]
            if "schnetpack_painn" in median:
                key = f"painn_over_schnetpack_{mode}_{size}"
                bars[key] = median["schnetpack_painn"] / median["painn_gradient"]
                if options.compile:
                    compiled = median["painn_gradient compiled"]
                    bars[f"compiled_{key}"] = median["schnetpack_painn"] / compiled
            bars[f"schnet_over_pyg_{mode}_{size}"] = (
                median["torch_geometric_schnet"] / median["schnet"]
            )
    for key, ratio in bars.items():
        print(f"{key}: {ratio:.2f}")
    # The claim holds where it holds for every size and mode.
    worst = [ratio for key, ratio in bars.items() if key.startswith("painn_over_schnetpack")]
    if worst:
        bars["painn_over_schnetpack"] = min(worst)
    write_json(options.json, bars, samples, bar_values=BARS, peak_mb=memory)


if __name__ == "__main__":
    main()
