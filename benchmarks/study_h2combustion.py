"""Does distillation pay on reactive H/O radicals, and when? Teacher PaiNN, student PaiNN-small.

Trains one teacher, dumps it once, and trains a grid of students and controls from the store on all
processes given, evaluating each on the published test split at 25, 50 and 100 % of its steps.
Stopped and started again it goes on where it was.

    python benchmarks/study_h2combustion.py --data DIR -o study --processes 2
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kdcache.checkpoint import load_potential, training_seconds
from kdcache.config import StudentConfig, load_config
from kdcache.distill.strategies import apply_strategy
from kdcache.dump import DumpOptions, dump_teacher
from kdcache.evaluate import Predictions, gap_closed, kept, predict_structures
from kdcache.graphs import GraphRule
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.readers import ReadOptions
from kdcache.store import open_store
from kdcache.teachers import load_native
from kdcache.train import train_student
from kdcache_cli.progress import bars

RECIPES = Path(__file__).parent / "recipes"
MAX_FORCE = 20.0  # eV/Å; 0.9 % of the structures are above, near-collisions
CUTOFF = 5.0
QUARTERS = (0.25, 0.5, 1.0)

# λ on the features of this teacher, chosen on the validation split with seed 0.
WEIGHTS = {"n2n": 30.0, "v2v": 30.0, "vanilla1": 1.0, "vanilla2": 100.0}
STRATEGIES = ("control", "n2n", "v2v", "vanilla1", "vanilla2", "n2n+v2v", "annealed")
LABELS = (1.0, 0.05)


def student_config(strategy: str, labels: float, seed: int, steps: int) -> StudentConfig:
    """The student's recipe with one strategy applied; all share optimizer, rate and length."""
    config = load_config(
        RECIPES / "h2combustion_student.yaml",
        overrides=[
            f"data.labels={labels}",
            f"training.seed={seed}",
            f"training.max_steps={steps}",
            f"training.eval_every={steps // 4}",
            f"training.checkpoint_every={steps}",
        ],
    )
    names = strategy.partition(":")[2] or strategy
    parts = ("n2n", "v2v", "vanilla2") if strategy == "annealed" else names.split("+")
    weights = {name: WEIGHTS[name] for name in parts if name in WEIGHTS}
    return apply_strategy(config, strategy, weights=weights)


def evaluated(run: Path, store: Path, split: str) -> Predictions:
    """Predictions of a run on a split of the store."""
    structures = kept(open_store(store).structures("store"), split=split, max_force=MAX_FORCE)
    return predict_structures(load_potential(run), structures)


def run_one(job: tuple[str, float, int, int], directory: Path, store: Path) -> dict[str, Any]:
    """One student, its test errors at each quarter; read back if it ran before."""
    strategy, labels, seed, steps = job
    run = directory / f"{strategy}-labels{100 * labels:g}-seed{seed}"
    report = run / "study.json"
    if report.is_file():
        return dict(json.loads(report.read_text()))
    torch.set_num_threads(1)
    config = student_config(strategy, labels, seed, steps)
    found: dict[str, Any] = {"strategy": strategy, "labels": labels, "seed": seed, "at": {}}
    for share in QUARTERS:
        stop = round(share * steps)
        train_student(store, run, config, graph_cache=directory / "graph", stop_after=stop)
        found["at"][f"{share:g}"] = evaluated(run, store, "test").metrics().as_dict()
    found["validation"] = evaluated(run, store, "val").metrics().as_dict()
    found["training_seconds"] = training_seconds(run)
    report.write_text(json.dumps(found, indent=1) + "\n")
    return found


def make_store(data: Path, directory: Path, teacher_steps: int) -> Path:
    """The dataset, the teacher and the store with its features."""
    store, teacher = directory / "features.zarr", directory / "teacher"
    if not (store / "manifest.json").is_file():
        files = [str(data / f"{name}.extxyz") for name in ("train", "val", "test")]
        options = ImportOptions(read=ReadOptions(group_key="rxn"), graph=GraphRule(CUTOFF))
        import_dataset(files, store, options, progress=bars)
    if open_store(store).teachers:
        return store
    recipe = RECIPES / "h2combustion_teacher.yaml"
    config = load_config(recipe, overrides=[f"training.max_steps={teacher_steps}"])
    if not (teacher / "finished").is_file():
        train_student(store, teacher, config, progress=bars)
        (teacher / "finished").touch()
    loaded = load_native(str(teacher), device="cpu", dtype=torch.float32)
    dump_teacher(
        store, loaded, DumpOptions(name="painn"), graph_cache=directory / "graph", progress=bars
    )
    return store


def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation over seeds."""
    found = list(values)
    if len(found) < 2:
        return f"{found[0]:.1f}"
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"


def summary(results: list[dict[str, Any]], teacher: dict[str, float]) -> str:
    """A Markdown table per share of labels."""
    lines = [
        f"Teacher on test: energy {teacher['energy_mae_mev']:.1f} meV, "
        f"forces {teacher['force_mae_mev_per_a']:.1f} meV/Å."
    ]
    for labels in sorted({r["labels"] for r in results}, reverse=True):
        chosen = [r for r in results if r["labels"] == labels]
        control = [r for r in chosen if r["strategy"] == "control"]
        means = {
            key: statistics.mean(r["at"]["1"][key] for r in control)
            for key in ("energy_mae_mev", "force_mae_mev_per_a")
        }
        lines += [
            "",
            f"{100 * labels:g} % of the labels, {len(control)} seeds; "
            "energy meV / forces meV/Å at 25, 50 and 100 % of the steps:",
            "",
            "| strategy | 25 % | 50 % | 100 %: energy | forces | gap closed E / F | train s |",
            "|---|---|---|---|---|---|---|",
        ]
        for strategy in dict.fromkeys(r["strategy"] for r in chosen):
            rows = [r for r in chosen if r["strategy"] == strategy]
            early = [
                f"{statistics.mean(r['at'][share]['energy_mae_mev'] for r in rows):.1f} / "
                f"{statistics.mean(r['at'][share]['force_mae_mev_per_a'] for r in rows):.1f}"
                for share in ("0.25", "0.5")
            ]
            final = {key: [r["at"]["1"][key] for r in rows] for key in means}
            gaps = [
                f"{100 * gap_closed(statistics.mean(final[key]), means[key], teacher[key]):.0f} %"
                for key in means
            ]
            seconds = statistics.mean(r["training_seconds"] for r in rows)
            lines.append(
                f"| {strategy} | {early[0]} | {early[1]} | {spread(final['energy_mae_mev'])} | "
                f"{spread(final['force_mae_mev_per_a'])} | {' / '.join(gaps)} | {seconds:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train, val, test.extxyz"
    )
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--teacher-steps", type=int, default=20_000)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--labels", type=float, nargs="*", default=LABELS)
    arguments = parser.parse_args()
    directory = arguments.output
    directory.mkdir(parents=True, exist_ok=True)
    store = make_store(arguments.data, directory, arguments.teacher_steps)
    teacher = evaluated(directory / "teacher", store, "test").metrics().as_dict()
    jobs = [
        (strategy, labels, seed, arguments.steps)
        for seed in range(arguments.seeds)
        for labels in arguments.labels
        for strategy in arguments.strategies.split(",")
    ]
    results = []
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=spawn) as pool:
        waiting = [pool.submit(run_one, job, directory, store) for job in jobs]
        for done in tqdm(as_completed(waiting), total=len(jobs), unit=" runs"):
            results.append(done.result())
    order = {job[:3]: k for k, job in enumerate(jobs)}
    results.sort(key=lambda r: order[r["strategy"], r["labels"], r["seed"]])
    (directory / "results.json").write_text(
        json.dumps({"teacher": teacher, "runs": results}, indent=1)
    )
    text = summary(results, teacher)
    (directory / "summary.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
