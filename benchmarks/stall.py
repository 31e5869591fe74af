"""The share of training time that is spent waiting for data.

    python benchmarks/stall.py [--student painn-small-coll] [--steps 30] [--json FILE]

A student with n2n and v2v steps from a store; what is counted is the time blocked in
`next(batches)`, the copy to a GPU included where it has to be waited for. The first steps fill the
queue and are left out. `stall` is waited / elapsed, the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench import write_json
from teacher_in_loop import Steps, steps_of, student_config
from workloads import devices, make_store, make_teacher

from kdcache.dump import DumpOptions, dump_teacher
from kdcache.models.presets import find_preset

# Cheap to run, with the fields of a PaiNN teacher at its published width.
TEACHER = {**find_preset("painn-coll").model, "num_layers": 1}


def stalls(student: str, device: str, options: argparse.Namespace) -> list[float]:
    """The share of every round."""
    teacher = make_teacher(TEACHER, device)
    with tempfile.TemporaryDirectory() as scratch:
        path, cache = Path(scratch) / "store.zarr", Path(scratch) / "graphs"
        make_store(path, "coll", options.structures, graph=teacher.graph_rule)
        dump = DumpOptions("teacher", fields=["node", "vector"], device=device)
        dump_teacher(path, teacher, dump)
        strategy = "n2n" if student.startswith("schnet") else "n2n+v2v"
        config = student_config(find_preset(student).config(), strategy, device)
        with steps_of(path, config, cache) as steps:
            _share(steps, options.warmup)
            return [_share(steps, options.steps) for _ in range(options.rounds)]


def _share(steps: Steps, n_steps: int) -> float:
    waited, start = steps.waited, time.perf_counter()
    steps.seconds(n_steps)
    return (steps.waited - waited) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", action="append", help="presets")
    parser.add_argument("--structures", type=int, default=4096)
    parser.add_argument("--warmup", type=int, default=5, help="steps before the first round")
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bars, samples = {}, {}
    for device in devices(options.device):
        for student in options.student or ("painn-small-coll", "schnet-coll"):
            name = f"{student} {device}"
            samples[name] = found = stalls(student, device, options)
            bars[f"stall {name}"] = statistics.median(found)
            print(f"{name}: stall {statistics.median(found):.4f}  "
                  f"({' '.join(f'{share:.4f}' for share in sorted(found))})")  # fmt: skip
    bars["stall"] = max(bars.values())
    print(f"stall {bars['stall']:.4f}")
    write_json(options.json, bars, samples, steps=options.steps, structures=options.structures)


if __name__ == "__main__":
    main()
