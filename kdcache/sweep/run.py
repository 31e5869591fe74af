"""Run the jobs of a sweep, one process each, and gather what came of them.

Owns which job runs where and what is reported of it; a run itself is `train`'s, its errors
`evaluation`'s. A process of its own gives a job a device and threads of its own, its memory back
when it ends, and leaves the others alone when it dies. dask's cluster would do that over sockets;
between processes of one machine a pipe is enough.
Invariant: a job is done when its report stands; everything else is gone on with.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from kdcache.checkpoint import (
    MODEL_CARD,
    check_identity,
    check_run_directory,
    load_state,
    training_seconds,
    write_json,
    write_text,
)
from kdcache.config import dump_config
from kdcache.errors import KdcacheError, TrainingError, reason_of
from kdcache.processors import n_processors
from kdcache.progress import Advance, Progress, silent
from kdcache.store import Store, open_store
from kdcache.stream.neighbors import neighbors_for
from kdcache.sweep.evaluation import Target, evaluate_run, teacher_errors
from kdcache.sweep.jobs import Job, check_jobs, plan_jobs
from kdcache.sweep.report import SweepResult
from kdcache.sweep.settings import SweepConfig
from kdcache.train import run_identity, train_student

log = logging.getLogger(__name__)

REPORT = "evaluation.json"
# A message per step would be more work than the step of a small student.
SECONDS_BETWEEN_MESSAGES = 0.5


@dataclass(frozen=True, slots=True)
class Task:
    """A job with all that a process needs to do it.

    Attributes:
        job: what to run.
        store: path.
        directory: of the sweep.
        target: what errors are measured on.
    """

    job: Job
    store: str
    directory: Path
    target: Target

    @property
    def run(self) -> Path:
        """The directory of the run."""
        return self.directory / self.job.name

    @property
    def graph_cache(self) -> Path:
        """Neighbour lists that all runs share."""
        return self.directory / "graph"


def run_sweep(
    sweep: SweepConfig,
    directory: str | Path,
    *,
    overrides: Sequence[str] = (),
    target: Target | None = None,
    processes: int | None = None,
    progress: Progress = silent,
) -> SweepResult:
    """Train and evaluate every run of a sweep that is not there yet.

    Args:
        sweep: as read.
        directory: a folder for each run, and one for neighbour lists; made if missing.
        overrides: "a.b=c" texts laid on the base of every run.
        target: what errors are measured on; None for the sweep's split.
        processes: runs at a time; None for one per GPU, or as many as the cores allow.
        progress: shows steps, runs and failures.

    Returns:
        Errors of every run, and why some failed.

    Raises:
        ConfigError: a setting that does not exist or does not fit, before anything is run.
        TrainingError: a directory of the sweep holds another run.
        DataError: nothing to measure errors on.
    """
    directory = Path(directory)
    check_run_directory(directory)
    target = target or Target(sweep.split)
    store = open_store(sweep.store)
    jobs = plan_jobs(sweep, store, overrides)
    rules = check_jobs(jobs, store)
    first = jobs[0].config
    teachers = teacher_errors(store, target, first.data, first.loss.free_atoms_only)
    tasks = [Task(job, sweep.store, directory, target) for job in jobs]
    wanted = target.identity(store)
    pending = [task for task in tasks if _report(task, store, wanted) is None]
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / "sweep.yaml", dump_config(sweep))
    for rule in rules.values() if pending else ():
        # Searched once, not by every process at the same time.
        neighbors_for(store, rule, directory / "graph", progress=progress)
    failures: dict[str, str] = {}
    n_steps = sum(task.job.config.training.max_steps for task in pending)
    with progress(f"sweep {directory.name}", n_steps, "steps") as advance:
        count = min(processes or default_processes(jobs), max(len(pending), 1))
        work = _one_by_one if count == 1 else _side_by_side
        for done, (task, failure) in enumerate(work(pending, count, advance), 1):
            if failure is not None:
                failures[task.job.name] = failure
            failed = f", {len(failures)} failed" if failures else ""
            advance(0, note=f"{done} of {len(pending)} runs{failed}")
    reports = {task.job.name: _report(task, store, wanted) for task in tasks}
    return SweepResult(
        target=target.name,
        jobs=tuple(jobs),
        reports={name: report for name, report in reports.items() if report is not None},
        failures=failures,
        teachers=teachers,
    )


def default_processes(jobs: Sequence[Job]) -> int:
    """One per GPU where the runs may use them, else cores over threads of a run."""
    on_cpu = all(job.config.training.device == "cpu" for job in jobs)
    if not on_cpu and torch.cuda.is_available():
        return torch.cuda.device_count()
    threads = max(job.config.training.threads or 1 for job in jobs)
    return max(1, n_processors() // threads)


def run_job(task: Task, progress: Progress) -> None:
    """Train what is left of a run, then measure its errors and write its report."""
    state = load_state(task.run)
    store = open_store(task.store)
    config = task.job.config
    if state is None or state.step < config.training.max_steps:
        train_student(task.store, task.run, config, graph_cache=task.graph_cache, progress=progress)
    metrics = evaluate_run(task.run, store, config, task.target, task.graph_cache)
    report = {
        "of": [task.target.identity(store), _model_digest(task.run)],
        "metrics": metrics.as_dict(),
        "training_seconds": training_seconds(task.run),
    }
    write_json(task.run / REPORT, report)


def _report(task: Task, store: Store, wanted: Sequence[object]) -> dict[str, Any] | None:
    """What a finished job left; None where there is something to do.

    Raises:
        TrainingError: its directory holds another run.
    """
    state = load_state(task.run)
    if state is None:
        if (task.run / MODEL_CARD).exists():
            raise TrainingError(
                f"{task.run} holds a trained model but no checkpoint, so it cannot be told whether "
                f"it is this run's. Name another directory, or remove it."
            )
        return None
    check_identity(task.run, state, run_identity(task.job.config, store))
    if not (task.run / REPORT).is_file():
        return None
    report: dict[str, Any] = json.loads((task.run / REPORT).read_text())
    same = report["of"] == json.loads(json.dumps([wanted, _model_digest(task.run)]))
    return report if same else None


def _model_digest(run: Path) -> str:
    return str(json.loads((run / MODEL_CARD).read_text())["digest"])


Outcome = tuple[Task, str | None]


def _one_by_one(tasks: Sequence[Task], count: int, advance: Advance) -> Iterator[Outcome]:
    """In this process."""
    del count
    for task in tasks:
        yield task, _attempt(task, advance)


def _attempt(task: Task, advance: Callable[[int], None]) -> str | None:
    """Run a job; one line about why it failed, or None."""

    @contextmanager
    def steps_only(label: str, total: int | None, unit: str) -> Iterator[Advance]:
        def count(n: int = 1, /, note: str = "") -> None:
            if unit == "steps":
                advance(n)

        yield count

    try:
        run_job(task, steps_only)
    except KdcacheError as error:
        return str(error)
    except Exception as error:  # one run's trouble is not the others'
        log.info("where %s failed:", task.job.name, exc_info=error)
        return f"{type(error).__name__}: {reason_of(error)}"
    return None


def _side_by_side(tasks: Sequence[Task], count: int, advance: Advance) -> Iterator[Outcome]:
    """In processes of their own, `count` at a time, each with a device to itself if there are."""
    waiting = list(reversed(tasks))
    free = list(reversed(range(count)))
    running: dict[Connection, tuple[Task, SpawnProcess, int]] = {}
    try:
        while waiting or running:
            while waiting and free:
                slot, task = free.pop(), waiting.pop()
                connection, process = _start(task, slot, count)
                running[connection] = task, process, slot
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                task, process, slot = running[ready]
                try:
                    said = ready.recv()
                except EOFError:
                    said = _ended(process)
                if isinstance(said, int):
                    advance(said)
                    continue
                process.join()
                ready.close()
                del running[ready]
                free.append(slot)
                yield task, said or None
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.join()


def _start(task: Task, slot: int, count: int) -> tuple[Connection, SpawnProcess]:
    # Forked, a process would inherit torch's threads in whatever state they are.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_work,
        args=(theirs, task, _device(task, slot), count),
        name=task.job.name,
        daemon=True,
    )
    process.start()
    theirs.close()
    return ours, process


def _device(task: Task, slot: int) -> str | None:
    """The GPU of a slot as CUDA_VISIBLE_DEVICES has it; None without any, or where one is named."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    # Of one GPU that is left to be seen, cuda:1 would be none.
    if not n_gpus or task.job.config.training.device not in ("auto", "cuda"):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(k) for k in range(n_gpus)]
    return names[slot % n_gpus]


def _ended(process: SpawnProcess) -> str:
    process.join()
    code = process.exitcode or 0
    how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
    return f"its process ended by {how}. Where memory ran out, use fewer --processes."


def _work(connection: Connection, task: Task, device: str | None, count: int) -> None:
    """What a process of a sweep does: its job, saying steps as it goes, "" or a line at its end."""
    # The terminal's interrupt goes to all; the sweep ends its processes itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    if task.job.config.training.threads is None:
        torch.set_num_threads(max(1, n_processors() // count))
    steps, last = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal steps, last
        steps += n
        if time.monotonic() - last >= SECONDS_BETWEEN_MESSAGES:
            # Where the sweep was killed nobody listens, and this ends the process with it.
            connection.send(steps)
            steps, last = 0, time.monotonic()

    failure = _attempt(task, advance)
    with suppress(BrokenPipeError):
        connection.send(steps)
        connection.send(failure or "")
