"""Students compiled against the same students as they are.

    python benchmarks/compiled_speed.py [--size coll] [--rounds 5] [--threads 1] [--device cpu]
        [--json FILE]

SchNet and PaiNN with gradient forces and PaiNN with direct ones, at the published sizes, as
`training.compile` and `kdcache.calculator(run, compile=True)` compile them. `coll` is 32 molecules
of 10 atoms, `oc20` four slabs of 80 atoms, `molecule` and `slab` one of each, as in dynamics.
`inference` is energy and forces; `training` forward, loss, backward and an AdamW step, of batches
alone. float32. Clock: processor time of the thread with one thread on a CPU, else wall time, and a
GPU has finished. `compiling` is the first call, with an empty cache, and its check against the
model.

[compiled_over_eager] is the smallest of the ratios; the bar is 1.2 on a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import alternate, medians, write_json
from peer_models import gradient_painn
from systems import model_batch
from torch import nn

from kdcache.allocator import keep_freed_memory
from kdcache.models import Model, build_model
from kdcache.models.traced import TracedModel
from kdcache.structures import Batch, ModelOutput

BARS = {"compiled_over_eager": 1.2}
SIZES = {"molecule": "coll", "slab": "oc20", "coll": "coll", "oc20": "oc20"}
MODELS: dict[str, Callable[[str], Model]] = {
    "schnet": lambda size: build_model({"name": f"schnet-{size}"}),
    "painn_direct": lambda size: build_model({"name": f"painn-{size}"}),
    "painn_gradient": gradient_painn,
}
Compute = Callable[[Batch], ModelOutput]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--model", choices=list(MODELS), action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Another run's code would be found again, and compiling seem quick.
    torch._inductor.config.force_disable_caches = True
    keep_freed_memory()
    clock = Clock(torch.device(options.device))
    ratios: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    compiling: dict[str, float] = {}
    for size in options.size or SIZES:
        for name in options.model or MODELS:
            model = MODELS[name](SIZES[size]).to(options.device)
            batch = model_batch(model, SIZES[size], 1 if size in ("molecule", "slab") else None)
            batch = batch.to(options.device)
            for mode in ("inference", "training"):
                if mode == "training" and batch.n_structures == 1:
                    continue
                compiled = TracedModel(model, model)
                prepare = infer if mode == "inference" else step
                sides = {
                    "eager": prepare(model, model, batch, clock),
                    "compiled": prepare(compiled, model, batch, clock),
                }
                label = f"{size} {name} {mode}"
                started = time.perf_counter()
                sides["compiled"]()
                compiling[label] = time.perf_counter() - started
                found = alternate(sides, options.rounds)
                middle = medians(found)
                ratios[label] = middle["eager"] / middle["compiled"]
                samples |= {f"{label} {side}": values for side, values in found.items()}
                spread = {k: f"{min(v) * 1e3:.2f} to {max(v) * 1e3:.2f}" for k, v in found.items()}
                print(
                    f"{label}: {middle['eager'] * 1e3:.2f} ms ({spread['eager']}), compiled "
                    f"{middle['compiled'] * 1e3:.2f} ({spread['compiled']}), "
                    f"{ratios[label]:.2f} times as fast, compiling {compiling[label]:.0f} s",
                    flush=True,
                )
    bars = {"compiled_over_eager": min(ratios.values()), **ratios}
    print(f"[compiled_over_eager] {bars['compiled_over_eager']:.2f}")
    write_json(options.json, bars, samples, bar_values=BARS, compiling_seconds=compiling)


class Clock:
    """Seconds of work on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif torch.get_num_threads() == 1:
            # Which other work on the machine does not lengthen.
            return time.thread_time()
        return time.perf_counter()


def infer(compute: Compute, model: nn.Module, batch: Batch, clock: Clock) -> Callable[[], float]:
    """Measures a prediction; a short one as the mean of several."""
    calls = 20 if batch.n_structures == 1 else 1

    def measure() -> float:
        with torch.no_grad():
            start = clock()
            for _ in range(calls):
                compute(batch)
            return (clock() - start) / calls

    return measure


def step(compute: Compute, model: nn.Module, batch: Batch, clock: Clock) -> Callable[[], float]:
    """Measures one training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def measure() -> float:
        start = clock()
        output = compute(batch)
        loss = output.energy.square().mean() + output.forces.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return clock() - start

    return measure


if __name__ == "__main__":
    main()
