"""What came of a sweep, as rows of a table, CSV and JSON.

Arithmetic on finished numbers only. Invariant: rows that are averaged differ in nothing but the
seed.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.checkpoint import write_json, write_text
from kdcache.evaluate import Metrics, gap_closed
from kdcache.sweep.jobs import SEED, Job, shown

ERRORS = ("energy_mae_mev", "force_mae_mev_per_a")


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What came of a sweep.

    Attributes:
        target: what errors are measured on.
        jobs: all runs.
        reports: "metrics" and "training_seconds" by name of the run, of those that are finished.
        failures: why others are not, one line each.
        teachers: errors of the store's teachers on the same structures.
    """

    target: str
    jobs: tuple[Job, ...]
    reports: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]
    teachers: Mapping[str, Metrics]


@dataclass(frozen=True, slots=True)
class Row:
    """Runs that differ in their seed alone.

    Attributes:
        strategy: name, "" for the base's own terms.
        settings: what they have in common, by column.
        n_runs: how many are finished.
        mean, std: of every metric; std is NaN of a single run.
        gap_closed: share of the gap between control and teacher by error, where both are known.
    """

    strategy: str
    settings: Mapping[str, str]
    n_runs: int
    mean: Mapping[str, float]
    std: Mapping[str, float]
    gap_closed: Mapping[str, float] = field(default_factory=dict)


def rows_of(result: SweepResult) -> list[Row]:
    """One row per choice of everything but the seed, in the order of the jobs.

    The gap is measured from the best control of the same shared settings: a control that is tuned
    counts with its best values.

    Source: gap closed: Ekström Kelvinius et al. 2023, Table 3.
    """
    groups: dict[str, list[Job]] = {}
    for job in result.jobs:
        if job.name in result.reports:
            groups.setdefault(json.dumps([job.strategy, columns_of(job)]), []).append(job)
    teacher = next(iter(result.teachers.values()), None) if len(result.teachers) == 1 else None
    controls: dict[str, list[Mapping[str, float]]] = {}
    averages: list[tuple[list[Job], dict[str, float], dict[str, float]]] = []
    for jobs in groups.values():
        metrics = [result.reports[job.name]["metrics"] for job in jobs]
        mean = {key: statistics.fmean(m[key] for m in metrics) for key in metrics[0]}
        std = {key: _std([m[key] for m in metrics]) for key in metrics[0]}
        averages.append((jobs, mean, std))
        if jobs[0].strategy == "control":
            controls.setdefault(_shared(jobs[0]), []).append(mean)
    rows = []
    for jobs, mean, std in averages:
        closed = {}
        for key in ERRORS:
            found = [control[key] for control in controls.get(_shared(jobs[0]), [])]
            # A teacher that is no better than the control leaves no gap to close.
            if teacher is not None and found and min(found) > teacher.as_dict()[key]:
                closed[key] = gap_closed(mean[key], min(found), teacher.as_dict()[key])
        rows.append(Row(jobs[0].strategy, columns_of(jobs[0]), len(jobs), mean, std, closed))
    return rows


def columns_of(job: Job) -> dict[str, str]:
    """λ and settings of a run by column, the seed left out."""
    columns = {f"lambda.{part}": f"{value:g}" for part, value in job.weights.items()}
    return columns | {key: shown(value) for key, value in job.choices.items() if key != SEED}


def write_results(result: SweepResult, directory: Path) -> list[Path]:
    """Write results.csv, a line per run, and results.json, with everything.

    Returns:
        The two paths.
    """
    runs = []
    for job in result.jobs:
        report = result.reports.get(job.name)
        runs.append(
            {
                "name": job.name,
                "strategy": job.strategy,
                **{f"lambda.{part}": value for part, value in job.weights.items()},
                **job.choices,
                **({} if report is None else report["metrics"]),
                "training_seconds": None if report is None else report["training_seconds"],
                "failure": result.failures.get(job.name),
            }
        )
    whole = {
        "measured_on": result.target,
        "teachers": {name: metrics.as_dict() for name, metrics in result.teachers.items()},
        "runs": runs,
    }
    paths = [directory / "results.csv", directory / "results.json"]
    write_text(paths[0], _csv(runs))
    write_json(paths[1], whole)
    return paths


def _csv(runs: Sequence[Mapping[str, object]]) -> str:
    names = dict.fromkeys(key for run in runs for key in run)
    # What was chosen, of all strategies, before what came of it.
    chosen = [key for key in names if key == "name" or key == "strategy" or "." in key]
    columns = dict.fromkeys([*chosen, *names])
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns), restval="")
    writer.writeheader()
    for run in runs:
        writer.writerow({key: _cell(value) for key, value in run.items()})
    return text.getvalue()


def _cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, dict | list) else value


def _shared(job: Job) -> str:
    return json.dumps({key: shown(value) for key, value in job.shared.items() if key != SEED})


def _std(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.stdev(found) if len(found) > 1 else float("nan")
