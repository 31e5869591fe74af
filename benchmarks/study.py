"""Train one teacher, dump it once, train a grid of students from the store, tabulate their errors.

Shared by the study_*.py scripts, each of which says which data, sizes and weights it is about.
A study that is stopped goes on where it was: finished runs are read back.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kdcache.checkpoint import load_potential, training_seconds
from kdcache.config import StudentConfig, load_config
from kdcache.distill.strategies import ANNEALED_TERMS, apply_strategy
from kdcache.dump import DumpOptions, dump_teacher
from kdcache.evaluate import Predictions, gap_closed, kept, predict_structures
from kdcache.fit_scales import fit_scale_factors, sample_batches, write_scale_factors
from kdcache.graphs import GraphRule
from kdcache.ingest import ImportOptions, import_dataset
from kdcache.models import build_model
from kdcache.models.taps import Tap
from kdcache.readers import ReadOptions, read_structures
from kdcache.store import open_store
from kdcache.teachers import load_native
from kdcache.train import train_student
from kdcache_cli.progress import bars

RECIPES = Path(__file__).parent / "recipes"
QUARTERS = (0.25, 0.5, 1.0)
ERRORS = ("energy_mae_mev", "force_mae_mev_per_a")
HIDDEN = ("node", "vector", "edge")


@dataclass(frozen=True)
class Study:
    """What a study is about.

    Attributes:
        teacher: its recipe, recipes/<teacher>.yaml.
        student: likewise; runs lie in a folder of this name.
        files: of the dataset, trained on by their splits.
        test_file: errors are measured on it; None for the split "test" of `files`.
        group_key: info key of the reports' groups.
        cutoff: Å, of the kept neighbour lists.
        max_force: eV/Å; structures above are left out everywhere.
        weights: λ by strategy on this teacher's features.
        few_labels: settings that differ from the recipe, by share of labels;
            the same for control and students.
        normalise: of terms on hidden features; "rms" makes weights independent of their scale.
        taps: inner modules of the teacher that are stored as well.
        fields: of the teacher that are stored; None for those a dump takes by itself.
    """

    teacher: str
    student: str
    files: tuple[str, ...]
    test_file: str | None
    group_key: str | None
    cutoff: float
    max_force: float | None
    weights: Mapping[str, float]
    few_labels: Mapping[float, Sequence[str]] = field(default_factory=dict)
    normalise: str = "none"
    taps: tuple[str, ...] = ()
    fields: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Job:
    """One run of the grid.

    Attributes:
        strategy: as `--strategy` takes it; "control, annealed" for a control whose ground-truth
            weights rise as in "annealed"; "n2n@field" for n2n from another field of the teacher.
    """

    strategy: str
    labels: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        name = self.strategy.replace(", ", "-")
        return f"{name}-labels{100 * self.labels:g}-seed{self.seed}"


def scale_factors(recipe: str, directory: Path) -> list[str]:
    """The setting of a GemNet-OC's scale factors, fitted once; none for other models."""
    model = load_config(RECIPES / f"{recipe}.yaml").model
    if model.name != "gemnet-oc":
        return []
    path = directory / f"{recipe}-scales.json"
    if not path.is_file():
        fresh = build_model({"name": model.name, **model.hyperparameters})
        structures = open_store(directory / "features.zarr").structures("store")
        batches = sample_batches(fresh, structures, n_structures=512, batch_size=32)
        write_scale_factors(path, fit_scale_factors(fresh, batches, progress=bars), recipe)
    return [f"model.scale_factors={path}"]


def student_config(
    study: Study, job: Job, directory: Path, teacher_fields: Collection[str]
) -> StudentConfig:
    """The recipe with one strategy applied; the rest is the same for all, control included."""
    config = load_config(
        RECIPES / f"{study.student}.yaml",
        overrides=[
            *scale_factors(study.student, directory),
            f"data.labels={job.labels}",
            f"training.seed={job.seed}",
            f"training.max_steps={job.steps}",
            f"training.eval_every={job.steps // 8}",
            f"training.checkpoint_every={job.steps}",
            *study.few_labels.get(job.labels, ()),
        ],
    )
    if job.strategy == "control, annealed":
        # The ground truth's weights rise as in "annealed", without a teacher.
        return apply_strategy(apply_strategy(config, "annealed"), "control")
    strategy, _, source = job.strategy.partition("@")
    parts = ANNEALED_TERMS if strategy == "annealed" else strategy.split("+")
    weights = {name: study.weights[name] for name in parts if name in study.weights}
    taught = apply_strategy(config, strategy, weights=weights, teacher_fields=teacher_fields)
    terms = []
    for term in taught.terms:
        if term.student in HIDDEN:
            changes = {"normalise": study.normalise, "teacher": source or term.teacher}
            term = term.model_copy(update=changes)
        terms.append(term)
    return taught.model_copy(update={"terms": tuple(terms)})


def evaluated(study: Study, data: Path, run: Path, store: Path, split: str) -> Predictions:
    """Predictions of a run on its test file, or on a split of the store."""
    if split == "test" and study.test_file is not None:
        structures = kept(read_structures(str(data / study.test_file)), max_force=study.max_force)
    else:
        whole = open_store(store).structures("store")
        structures = kept(whole, split=split, max_force=study.max_force)
    return predict_structures(load_potential(run), structures)


def run_one(study: Study, job: Job, data: Path, directory: Path) -> dict[str, Any]:
    """One student, its test errors at each quarter; read back if it ran before."""
    store, run = directory / "features.zarr", directory / study.student / job.name
    report = run / "study.json"
    if report.is_file():
        return dict(json.loads(report.read_text()))
    torch.set_num_threads(1)
    config = student_config(study, job, directory, open_store(store).fields("teachers/teacher"))
    found: dict[str, Any] = {
        "strategy": job.strategy, "labels": job.labels, "seed": job.seed, "at": {},
    }  # fmt: skip
    for share in QUARTERS:
        stop = round(share * job.steps)
        train_student(store, run, config, graph_cache=directory / "graph", stop_after=stop)
        errors = evaluated(study, data, run, store, "test").metrics()
        found["at"][f"{share:g}"] = errors.as_dict()
    found["training_seconds"] = training_seconds(run)
    report.write_text(json.dumps(found, indent=1) + "\n")
    return found


def make_store(study: Study, data: Path, directory: Path) -> Path:
    """The dataset, the teacher and the store with its features."""
    store, teacher = directory / "features.zarr", directory / "teacher"
    if not (store / "manifest.json").is_file():
        read = ReadOptions(group_key=study.group_key)
        options = ImportOptions(read=read, graph=GraphRule(study.cutoff))
        import_dataset([str(data / name) for name in study.files], store, options, progress=bars)
    if open_store(store).teachers:
        return store
    if not (teacher / "finished").is_file():
        overrides = scale_factors(study.teacher, directory)
        config = load_config(RECIPES / f"{study.teacher}.yaml", overrides=overrides)
        train_student(store, teacher, config, progress=bars)
        (teacher / "finished").touch()
    taps = [Tap.parse(text) for text in study.taps]
    loaded = load_native(str(teacher), device="cpu", dtype=torch.float32, taps=taps)
    options = DumpOptions(name="teacher", fields=study.fields)
    dump_teacher(store, loaded, options, progress=bars)
    return store


def spread(values: Iterable[float]) -> str:
    """Mean ± standard deviation over seeds."""
    found = list(values)
    if len(found) < 2:
        return f"{found[0]:.1f}"
    return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"


def summary(results: Sequence[Mapping[str, Any]], teacher: Mapping[str, float]) -> str:
    """A Markdown table per share of labels."""
    lines = [
        f"Teacher on test: energy {teacher[ERRORS[0]]:.1f} meV, forces {teacher[ERRORS[1]]:.1f} "
        f"meV/Å."
    ]
    for labels in sorted({r["labels"] for r in results}, reverse=True):
        chosen = [r for r in results if r["labels"] == labels]
        control = [r for r in chosen if r["strategy"] == "control"]
        baseline = {key: statistics.mean(r["at"]["1"][key] for r in control) for key in ERRORS}
        lines += [
            "",
            f"{100 * labels:g} % of the labels, {len(control)} seeds; test errors, energy meV / "
            f"forces meV/Å:",
            "",
            "| strategy | after 25 % | after 50 % | energy | forces | gap closed E / F |",
            "|---|---|---|---|---|---|",
        ]
        for strategy in dict.fromkeys(r["strategy"] for r in chosen):
            rows = [r for r in chosen if r["strategy"] == strategy]
            early = [
                " / ".join(
                    f"{statistics.mean(r['at'][share][key] for r in rows):.1f}" for key in ERRORS
                )
                for share in ("0.25", "0.5")
            ]
            final = {key: [r["at"]["1"][key] for r in rows] for key in ERRORS}
            closed = (
                gap_closed(statistics.mean(final[key]), baseline[key], teacher[key])
                for key in ERRORS
            )
            gaps = " / ".join(f"{100 * share:.0f} %" for share in closed)
            cells = [strategy, *early, *(spread(final[key]) for key in ERRORS), gaps]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    """The command line of a study."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder of the dataset's files")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of a student")
    parser.add_argument("--strategies", help="separated by ;")
    parser.add_argument("--labels", type=float, nargs="*")
    return parser


def run_study(
    study: Study,
    given: argparse.Namespace,
    *,
    strategies: Sequence[str],
    labels: Sequence[float],
    steps: int,
) -> None:
    """Make the store, run the grid, write and print the tables.

    Args:
        study: what it is about.
        given: the command line, which overrides the rest.
        strategies, labels, steps: of the published grid.
    """
    directory: Path = given.output
    directory.mkdir(parents=True, exist_ok=True)
    store = make_store(study, given.data, directory)
    scale_factors(study.student, directory)
    found = evaluated(study, given.data, directory / "teacher", store, "test")
    teacher = found.metrics().as_dict()
    jobs = [
        Job(strategy, share, seed, given.steps or steps)
        for seed in range(given.seeds)
        for share in given.labels or labels
        for strategy in (given.strategies.split(";") if given.strategies else strategies)
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.processes, mp_context=spawn) as pool:
        waiting = [pool.submit(run_one, study, job, given.data, directory) for job in jobs]
        for _ in tqdm(as_completed(waiting), total=len(jobs), unit=" runs"):
            pass
    results = [done.result() for done in waiting]
    (directory / study.student / "results.json").write_text(
        json.dumps({"teacher": teacher, "runs": results}, indent=1) + "\n"
    )
    text = summary(results, teacher)
    (directory / study.student / "summary.md").write_text(text + "\n")
    print(text)
