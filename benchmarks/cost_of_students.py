"""What K students cost: a pass of the teacher and K trainings from its store, or K with it inside.

    python benchmarks/cost_of_students.py [--size coll] [--epochs 100] [--data DIR] [--json FILE]

Measured: one dump of `--structures` structures, and a training step from the store and with the
teacher in it, which take turns and give the same first losses. Extrapolated, and said to be: the
dump by structures to `--dataset` of them, training by steps to `--epochs` epochs, and both by K.
GemNet-OC teaches PaiNN by n2n, at the sizes published for COLL or those of the study on H2
combustion (benchmarks/recipes; with --data, DIR/train.extxyz in place of random molecules).
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from bench import alternate, medians, write_json
from teacher_in_loop import check_same_losses, steps_of, student_config
from workloads import CLOCKS, devices, make_potential, make_store

from kdcache.config import read_yaml
from kdcache.dump import DumpOptions, dump_teacher
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.models.presets import find_preset
from kdcache.teachers import NativeTeacher

RECIPES = Path(__file__).parent / "recipes"
STUDENTS = (1, 5, 20)
TOLERANCE = 1e-3  # float16 features


def models(size: str) -> tuple[dict[str, object], dict[str, object]]:
    """Hyperparameters of the teacher, and a configuration layer of the student."""
    if size == "coll":
        return dict(find_preset("gemnet-oc-coll").model), find_preset("painn-coll").config()
    teacher = read_yaml(RECIPES / "gemnet_teacher.yaml")["model"]
    assert isinstance(teacher, dict)
    return teacher, read_yaml(RECIPES / "h2combustion_student.yaml")


def measure(size: str, device: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds: a dump by structure, a step from the store, a step with the teacher in it."""
    settings, base = models(size)
    potential = make_potential(settings, device)
    teacher = NativeTeacher(potential)
    clock = CLOCKS[options.clock]
    with tempfile.TemporaryDirectory() as scratch:
        path, cache = Path(scratch) / "store.zarr", Path(scratch) / "graphs"
        if size == "h2combustion" and options.data is not None:
            layout = ImportOptions(graph=teacher.graph_rule)
            import_dataset(options.data / "train.extxyz", path, layout)
        else:
            make_store(path, "coll", options.structures, graph=teacher.graph_rule)
        start = clock()
        report = dump_teacher(path, teacher, DumpOptions("teacher", device=device))
        dump = (clock() - start) / report.n_structures
        config = student_config(base, "n2n", device)
        with (
            steps_of(path, config, cache, ahead=1) as cached,
            steps_of(path, config, cache, potential, ahead=1) as in_loop,
        ):
            worst = check_same_losses(cached, in_loop, 3, TOLERANCE)
            print(f"{size} on {device}: first losses agree to {worst:.1e}; "
                  f"{report.n_structures} structures dumped")  # fmt: skip
            found = alternate(
                {
                    "cached": partial(cached.seconds, options.steps, clock),
                    "in_loop": partial(in_loop.seconds, options.steps, clock),
                },
                options.rounds,
            )
    return {"dump": [dump], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=["coll", "h2combustion"], action="append")
    parser.add_argument("--structures", type=int, default=256, help="measured")
    parser.add_argument("--dataset", type=int, default=100_000, help="structures extrapolated to")
    parser.add_argument("--epochs", type=int, default=100, help="extrapolated to")
    parser.add_argument("--batch-size", type=int, default=32, help="of the recipes")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=[*CLOCKS], default="wall")
    parser.add_argument("--device", default="all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n_steps = options.epochs * (options.dataset // options.batch_size)
    bars, samples = {}, {}
    for device in devices(options.device):
        for size in options.size or ("h2combustion", "coll"):
            name = f"{size} {device}"
            samples[name] = found = measure(size, device, options)
            seconds = medians(found)
            print("measured:")
            for side, unit in (("dump", "structure"), ("cached", "step"), ("in_loop", "step")):
                spread = " ".join(f"{1e3 * value:.1f}" for value in sorted(found[side]))
                print(f"  {side:8} {1e3 * seconds[side]:8.1f} ms a {unit}  ({spread})")
            print(
                f"extrapolated to {options.dataset} structures, {options.epochs} epochs "
                f"({n_steps} steps), hours:\n   K  dump + K cached  K in the loop  ratio"
            )
            for k in STUDENTS:
                ours = (seconds["dump"] * options.dataset + k * n_steps * seconds["cached"]) / 3600
                theirs = k * n_steps * seconds["in_loop"] / 3600
                bars[f"students {k} {name}"] = theirs / ours
                print(f"  {k:2}  {ours:15.1f}  {theirs:13.1f}  {theirs / ours:5.2f}")
    write_json(
        options.json, bars, samples, steps=n_steps, dataset=options.dataset, clock=options.clock
    )


if __name__ == "__main__":
    main()
