"""Training with a teacher's features from a store: against no teacher, and against one in the loop.

    python benchmarks/train_overhead.py [--pair gemnet-painn] [--rounds 5] [--steps 4] [--json FILE]

Three students of one seed take turns, a few steps each: `plain` without terms, `cached` with n2n
from the store, `in_loop` with n2n from the teacher run in every step (see teacher_in_loop.py). All
read the same structures from the same store. Sizes are the published ones for COLL: 32 structures
of ten atoms a batch. Before it is timed, the teacher in the loop must give the losses of the store.

`kd_over_plain` is steps/s of `cached` over those of `plain`; `cached_over_in_loop` likewise.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from bench import alternate, medians, write_json
from teacher_in_loop import Steps, check_same_losses, steps_of, student_config
from workloads import CLOCKS, devices, make_potential, make_store

from kdcache.allocator import keep_freed_memory
from kdcache.dump import DumpOptions, dump_teacher
from kdcache.models.presets import find_preset
from kdcache.teachers import NativeTeacher

PAIRS = {
    "gemnet-painn": ("gemnet-oc-coll", "painn-coll"),
    "painn-small": ("painn-coll", "painn-small-coll"),
    "painn-schnet": ("painn-coll", "schnet-coll"),
}
# A float16 feature is off by 2e-4 at most, the mean over a batch by much less.
TOLERANCE = 1e-4
CHECKED_STEPS = 3


def compare(pair: str, device: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step by side, round by round."""
    teacher_preset, student_preset = PAIRS[pair]
    potential = make_potential(teacher_preset, device)
    teacher = NativeTeacher(potential)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        directory = Path(scratch)
        store = make_store(
            directory / "store.zarr", "coll", options.structures, graph=teacher.graph_rule
        )
        cache = directory / "graphs"
        dump = DumpOptions("teacher", fields=["node"], device=device)
        dump_teacher(store.path, teacher, dump)
        base = find_preset(student_preset).config()

        def side(strategy: str, in_loop: bool = False) -> Steps:
            config = student_config(base, strategy, device)
            return stack.enter_context(
                steps_of(store.path, config, cache, potential if in_loop else None, ahead=1)
            )

        cached, in_loop = side("n2n"), side("n2n", in_loop=True)
        worst = check_same_losses(cached, in_loop, CHECKED_STEPS, TOLERANCE)
        print(f"{pair} on {device}: first {CHECKED_STEPS} losses agree to {worst:.1e}")
        sides = {"plain": side("control"), "cached": cached, "in_loop": in_loop}
        clock = CLOCKS[options.clock]
        measured = {
            name: partial(steps.seconds, options.steps, clock) for name, steps in sides.items()
        }
        return alternate(measured, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", choices=[*PAIRS], action="append")
    parser.add_argument("--structures", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4, help="steps of a side in one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    parser.add_argument("--device", default="all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command does
    bars: dict[str, float] = {}
    samples: dict[str, dict[str, list[float]]] = {}
    for device in devices(options.device):
        for pair in options.pair or PAIRS:
            found = samples[f"{pair} {device}"] = compare(pair, device, options)
            seconds = medians(found)
            bars[f"kd_over_plain {pair} {device}"] = seconds["plain"] / seconds["cached"]
            bars[f"cached_over_in_loop {pair} {device}"] = seconds["in_loop"] / seconds["cached"]
            for name, taken in seconds.items():
                spread = " ".join(f"{1e3 * value:.0f}" for value in sorted(found[name]))
                print(f"  {name:8} {1e3 * taken:7.1f} ms a step  ({spread})")
    # The pair that pays most for its terms answers for all.
    bars["kd_over_plain"] = min(r for name, r in bars.items() if name.startswith("kd_over_plain"))
    for name, ratio in bars.items():
        print(f"{name} {ratio:.3f}")
    write_json(
        options.json,
        bars,
        samples,
        clock=options.clock,
        steps=options.steps,
        structures=options.structures,
    )


if __name__ == "__main__":
    main()
