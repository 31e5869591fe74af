"""Sweeps: every run worked out before any begins, each run once, one table."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdcache.checkpoint import load_potential
from kdcache.errors import ConfigError, DataError, TrainingError
from kdcache.evaluate import Metrics, predict_structures
from kdcache.progress import Advance, silent
from kdcache.selection import select
from kdcache.store import Store, open_store
from kdcache.sweep import (
    SweepConfig,
    SweepResult,
    default_processes,
    load_sweep,
    plan_jobs,
    rows_of,
    run_sweep,
    write_results,
)
from kdcache.sweep.evaluation import Target
from kdcache.sweep.report import columns_of
from kdcache.train import train_student
from tests.chain import PAINN, dump, make_store, make_teacher, structures, write_xyz

BASE: dict[str, Any] = {
    "model": PAINN,
    "ema": None,
    "training": {"max_steps": 3, "batch_size": 5, "eval_every": 3, "checkpoint_every": 2,
                 "device": "cpu", "threads": 1},
}  # fmt: skip
STRATEGIES: list[Any] = ["control", {"name": "n2n", "weights": {"n2n": 0.1}}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    directory = tmp_path_factory.mktemp("store")
    made = make_store(directory, 24)
    dump(made, make_teacher(directory), codec="half")
    return open_store(made.path)


def sweep(store: Store, **settings: Any) -> SweepConfig:
    values = {"store": str(store.path), "base": BASE, "strategies": STRATEGIES, **settings}
    return SweepConfig.model_validate(values)


def names(store: Store, **settings: Any) -> list[str]:
    return [job.name for job in plan_jobs(sweep(store, **settings), store)]


def test_every_combination_is_a_run_with_its_own_configuration(store: Store) -> None:
    strategies = [
        "control",
        {"name": "n2n", "weights": {"n2n": [0.5, 2]}, "grid": {"terms.n2n.loss": ["mse", "mae"]}},
        {"name": "n2n+vanilla1", "weights": {"n2n": 1, "vanilla1": 3}},
    ]
    grid = {"optimizer.lr": [1e-3, 1e-2], "training.seed": [0, 1]}
    jobs = {
        job.name: job for job in plan_jobs(sweep(store, strategies=strategies, grid=grid), store)
    }
    assert len(jobs) == (1 + 2 * 2 + 1) * 4
    name = "n2n,lambda.n2n=2,optimizer.lr=0.01,training.seed=1,terms.n2n.loss=mae"
    config = jobs[name].config
    assert config.optimizer.lr == 0.01
    assert config.training.seed == 1
    assert config.training.max_steps == 3
    (term,) = config.terms
    assert (term.name, term.loss, term.weight.points) == ("n2n", "mae", ((0.0, 2.0),))
    both = jobs["n2n+vanilla1,lambda.n2n=1,lambda.vanilla1=3,optimizer.lr=0.001,training.seed=0"]
    weights = {term.name: term.weight.points[0][1] for term in both.config.terms}
    assert weights == {"n2n": 1.0, "vanilla1_energy": 3.0, "vanilla1_forces": 300.0}
    assert not jobs["control,optimizer.lr=0.01,training.seed=1"].config.terms
    # Shared settings reach a strategy that builds on them.
    heavier = plan_jobs(
        sweep(store, strategies=strategies[2:], grid={"loss.forces_weight": [7]}), store
    )
    assert heavier[0].config.terms[2].weight.points == ((0.0, 21.0),)


def test_further_values_keep_the_names_of_runs(store: Store) -> None:
    before = names(store, grid={"training.seed": [0]})
    after = names(store, grid={"training.seed": [0, 1]})
    assert set(before) < set(after)
    assert before == ["control,training.seed=0", "n2n,lambda.n2n=0.1,training.seed=0"]


def test_values_that_are_no_words_are_named_by_digest(store: Store) -> None:
    projections = [{"kind": "mlp", "hidden": 16}, "linear"]
    own = {"terms.n2n.student_projection": projections}
    found = names(store, strategies=[{"name": "n2n", "weights": {"n2n": 1}, "grid": own}])
    assert found[1].endswith("student_projection=linear")
    assert len(found[0].rpartition("=")[2]) == 8


def test_base_is_a_file_a_preset_or_both(store: Store, tmp_path: Path) -> None:
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump(BASE))
    (job,) = plan_jobs(sweep(store, base=str(file), strategies=[]), store)
    assert job.name == "base"
    assert job.config.training.max_steps == 3
    (job,) = plan_jobs(sweep(store, base={}, strategies=["control"]), store)
    n_trained = sum(s.split == "train" for s in store.structures())
    assert job.config.model.name == "painn"
    assert job.config.training.max_steps == 375 * math.ceil(n_trained / 32)
    (job,) = plan_jobs(
        sweep(store, preset="schnet", base={"training": {"max_steps": 5}}, strategies=["n2n"]),
        store,
    )
    assert (job.config.model.name, job.config.training.max_steps) == ("schnet", 5)
    assert job.config.terms[0].weight.points == ((0.0, 100.0),)  # Table 8, PaiNN to SchNet


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"grid": {"training.sed": [0]}}, r"control,training\.sed=0: .*did you mean seed"),
    ({"grid": {"optimizer.lr": [-1]}}, r"optimizer\.lr=-1: .*greater than 0"),
    ({"grid": {"terms.n2n.loss": ["mse"]}}, "control,terms.n2n.loss=mse: .*no item n2n"),
    ({"grid": {"model.hiden_channels": [4]}}, "did you mean hidden_channels"),
    ({"grid": {"training.device": ["gpu"]}}, r"training\.device gpu is no device"),
    ({"grid": {"training.seed": [1, 1]}}, "control,training.seed=1 twice"),
    ({"strategies": ["n3n"]}, "n3n: .*did you mean n2n"),
    ({"strategies": [{"name": "n2n", "weights": {"v2v": 1}}]}, "v2v is given"),
    ({"strategies": [{"name": "n2n", "teacher_name": "techer"}]}, "did you mean teacher"),
    ({"strategies": ["v2v"], "base": {"model": {"name": "schnet"}}}, "v2v"),
    ({"grid": {"training.seed": [0]}, "strategies": [
        {"name": "n2n", "grid": {"training.seed": [1]}}]}, "and in that of one strategy"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_run(
    settings: dict[str, Any], said: str, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        run_sweep(sweep(store, **settings), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_misspelt_key_of_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("store: a\nstratgies: [n2n]\n")
    with pytest.raises(ConfigError, match=r"sweep\.yaml: unknown key stratgies.*strategies"):
        load_sweep(file)
    file.write_text("store: a\nstrategies: [{name: n2n, wieghts: {n2n: 3}}]\n")
    with pytest.raises(ConfigError, match=r"did you mean weights"):
        load_sweep(file)
    file.write_text("store: a\ngrid: {training.seed: []}\n")
    with pytest.raises(ConfigError, match=r"training\.seed has no values"):
        load_sweep(file)


class Counting:
    """A progress that counts steps, and can fail like a kill."""

    def __init__(self, kill_after: float = math.inf) -> None:
        self.steps = 0
        self.kill_after = kill_after
        self.notes: list[str] = []

    def __call__(self, label: str, total: int | None, unit: str) -> Any:
        return self if unit == "steps" else silent(label, total, unit)

    def __enter__(self) -> Advance:
        return self.advance

    def __exit__(self, *raised: object) -> None: ...

    def advance(self, n: int = 1, /, note: str = "") -> None:
        self.steps += n
        self.notes += [note] if note else []
        if self.steps > self.kill_after:
            raise KeyboardInterrupt


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_killed_sweep_goes_on_and_a_finished_one_runs_nothing(
    store: Store, tmp_path: Path
) -> None:
    grid = {"training.seed": [0, 1]}
    directory = tmp_path / "sweep"
    killed = Counting(kill_after=7)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(sweep(store, grid=grid), directory, processes=1, progress=killed)
    counting = Counting()
    result = run_sweep(sweep(store, grid=grid), directory, processes=1, progress=counting)
    assert not result.failures
    assert counting.steps == 6  # of 12: two runs were finished, the third begins anew at step 0
    assert counting.notes == ["1 of 2 runs", "2 of 2 runs"]
    before = bytes_of(directory)
    counting = Counting()
    again = run_sweep(sweep(store, grid=grid), directory, processes=1, progress=counting)
    assert counting.steps == 0
    assert bytes_of(directory) == before
    assert again.reports == result.reports
    # One more seed runs what is new, and nothing else.
    grid = {"training.seed": [0, 1, 2]}
    counting = Counting()
    run_sweep(sweep(store, grid=grid), directory, processes=1, progress=counting)
    assert counting.steps == 6


def test_a_run_of_a_sweep_is_an_ordinary_run(store: Store, tmp_path: Path) -> None:
    result = run_sweep(sweep(store), tmp_path / "sweep", processes=1)
    job = result.jobs[1]
    run = tmp_path / "sweep" / job.name
    train_student(store.path, tmp_path / "alone", job.config)
    ours, alone = (load_potential(path) for path in (run, tmp_path / "alone"))
    assert all((a == b).all() for a, b in zip(ours.parameters(), alone.parameters(), strict=True))
    rows = select(store, job.config.data).validation
    expected = predict_structures(ours, [store.structure(int(row)) for row in rows]).metrics()
    found = Metrics(**result.reports[job.name]["metrics"])
    assert found.n_structures == expected.n_structures == len(rows)
    assert found.force_mae_mev_per_a == pytest.approx(expected.force_mae_mev_per_a, rel=1e-5)
    assert found.energy_mae_mev == pytest.approx(expected.energy_mae_mev, rel=1e-4)


def test_errors_are_measured_where_they_are_asked_for(store: Store, tmp_path: Path) -> None:
    one = sweep(store, strategies=["control"])
    held_out = write_xyz(tmp_path / "new.extxyz", structures(6, seed=5))
    on_val = run_sweep(one, tmp_path / "sweep", processes=1)
    counting = Counting()
    on_file = run_sweep(
        one, tmp_path / "sweep", target=Target(files=(str(held_out),)), processes=1,
        progress=counting,
    )  # fmt: skip
    assert (on_val.target, on_file.target) == ("split val", "new.extxyz")
    assert counting.steps == 0  # the model is there
    assert on_file.reports["control"]["metrics"]["n_structures"] == 6
    assert on_val.teachers
    assert not on_file.teachers
    with pytest.raises(DataError, match=r"no labelled structures of split test.*--data"):
        run_sweep(one, tmp_path / "sweep", target=Target("test"))


def test_the_stores_own_values_say_how_good_a_teacher_is(store: Store, tmp_path: Path) -> None:
    one = sweep(store, strategies=["control"])
    found = run_sweep(one, tmp_path / "sweep", processes=1).teachers["teacher"]
    rows = select(store, plan_jobs(one, store)[0].config.data).validation
    teacher = load_potential(store.path.parent / "teacher")
    expected = predict_structures(teacher, [store.structure(int(r)) for r in rows]).metrics()
    assert found.force_mae_mev_per_a == pytest.approx(expected.force_mae_mev_per_a, rel=1e-5)
    assert found.energy_mae_mev == pytest.approx(expected.energy_mae_mev, rel=1e-4)


def test_a_failed_run_is_told_and_the_others_go_on(store: Store, tmp_path: Path) -> None:
    settings = {"grid": {"optimizer.lr": [1e20, 1e-3]}, "strategies": ["control"]}
    base = {**BASE, "clip_norm": None}
    counting = Counting()
    result = run_sweep(
        sweep(store, base=base, **settings), tmp_path / "sweep", processes=1, progress=counting
    )
    assert list(result.failures) == ["control,optimizer.lr=1e+20"]
    assert "optimizer.lr" in result.failures["control,optimizer.lr=1e+20"]
    assert list(result.reports) == ["control,optimizer.lr=0.001"]
    assert counting.notes[-1] == "2 of 2 runs, 1 failed"
    write_results(result, tmp_path)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [bool(row["failure"]) for row in rows] == [True, False]


def test_processes_of_their_own_give_what_one_process_gives(store: Store, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    base = {**BASE, "clip_norm": None}
    settings = sweep(store, base=base, strategies=["control"], grid={"optimizer.lr": [1e20, 1e-3]})
    one = run_sweep(settings, alone, processes=1)
    counting = Counting()
    two = run_sweep(settings, together, processes=2, progress=counting)
    assert one.failures.keys() == two.failures.keys()
    name = "control,optimizer.lr=0.001"
    assert two.reports[name]["metrics"] == one.reports[name]["metrics"]
    assert counting.steps >= 3


def test_a_process_that_dies_is_a_failed_run(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdcache.sweep.run._work", die)
    result = run_sweep(sweep(store), tmp_path / "sweep", processes=2)
    assert len(result.failures) == 2
    assert all("signal 9" in line for line in result.failures.values())


def die(*_: object) -> None:
    """In place of a run: what the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_another_runs_directory_is_refused(store: Store, tmp_path: Path) -> None:
    run_sweep(sweep(store, strategies=["control"]), tmp_path, processes=1)
    changed = {**BASE, "clip_norm": 3.0}
    with pytest.raises(TrainingError, match=r"control was started with clip_norm = 10\.0"):
        run_sweep(sweep(store, strategies=["control"], base=changed), tmp_path)
    with pytest.raises(TrainingError, match="is a store"):
        run_sweep(sweep(store, strategies=["control"]), store.path)


def metrics(energy: float, force: float) -> dict[str, Any]:
    return Metrics(5, 9, energy, energy, energy, energy, force, force, 0.5, 0.1).as_dict()


@pytest.fixture
def result(store: Store) -> Callable[..., SweepResult]:
    def make(errors: dict[str, float], strategies: list[Any], **grid: Any) -> SweepResult:
        jobs = plan_jobs(sweep(store, strategies=strategies, grid=grid["grid"]), store)
        reports = {
            job.name: {"metrics": metrics(2 * errors[job.name], errors[job.name]),
                       "training_seconds": 1.0}
            for job in jobs
            if job.name in errors
        }  # fmt: skip
        teacher = Metrics(**metrics(20.0, 10.0))
        return SweepResult("split val", tuple(jobs), reports, {}, {"teacher": teacher})

    return make


def test_rows_average_over_seeds_and_know_the_gap(result: Callable[..., SweepResult]) -> None:
    errors = {
        "control,data.labels=1,training.seed=0": 28.0,
        "control,data.labels=1,training.seed=1": 32.0,
        "n2n,lambda.n2n=0.1,data.labels=1,training.seed=0": 20.0,
        "n2n,lambda.n2n=0.1,data.labels=1,training.seed=1": 30.0,
        "n2n,lambda.n2n=0.1,data.labels=0.5,training.seed=0": 40.0,
    }
    found = result(errors, STRATEGIES, grid={"data.labels": [1, 0.5], "training.seed": [0, 1]})
    control, both, single = rows_of(found)
    assert (control.strategy, control.settings, control.n_runs) == (
        "control", {"data.labels": "1"}, 2,
    )  # fmt: skip
    assert control.mean["force_mae_mev_per_a"] == 30.0
    assert control.std["force_mae_mev_per_a"] == pytest.approx(math.sqrt(8.0))
    assert both.mean["force_mae_mev_per_a"] == 25.0
    assert both.gap_closed["force_mae_mev_per_a"] == pytest.approx((30 - 25) / (30 - 10))
    assert both.gap_closed["energy_mae_mev"] == pytest.approx((60 - 50) / (60 - 20))
    # No control of its own labels: no gap; no second seed: no spread.
    assert not single.gap_closed
    assert math.isnan(single.std["force_mae_mev_per_a"])


def test_a_tuned_control_counts_with_its_best_values(result: Callable[..., SweepResult]) -> None:
    strategies = [{"name": "control", "grid": {"optimizer.lr": [0.1, 0.01]}}, STRATEGIES[1]]
    errors = {"control,optimizer.lr=0.1": 50.0, "control,optimizer.lr=0.01": 30.0,
              "n2n,lambda.n2n=0.1": 20.0}  # fmt: skip
    *_, taught = rows_of(result(errors, strategies, grid={}))
    assert taught.gap_closed["force_mae_mev_per_a"] == pytest.approx(0.5)


def test_results_are_written_for_people_and_programs(
    result: Callable[..., SweepResult], tmp_path: Path
) -> None:
    errors = {"control,training.seed=0": 30.0, "n2n,lambda.n2n=0.1,training.seed=0": 20.0}
    found = result(errors, STRATEGIES, grid={"training.seed": [0]})
    write_results(found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert list(rows[0])[:4] == ["name", "strategy", "training.seed", "lambda.n2n"]
    assert [row["force_mae_mev_per_a"] for row in rows] == ["30.0", "20.0"]
    assert (rows[0]["lambda.n2n"], rows[1]["lambda.n2n"]) == ("", "0.1")
    whole = json.loads((tmp_path / "results.json").read_text())
    assert whole["teachers"]["teacher"]["force_mae_mev_per_a"] == 10.0
    assert whole["runs"][1]["training.seed"] == 0
    assert columns_of(found.jobs[1]) == {"lambda.n2n": "0.1"}


def test_as_many_processes_as_the_threads_of_a_run_allow(store: Store) -> None:
    many = {**BASE, "training": {**BASE["training"], "threads": 4096}}
    (job,) = plan_jobs(sweep(store, base=many, strategies=["control"]), store)
    assert default_processes([job]) == 1
