"""Dumps by several processes that are killed (-9), and what they leave behind.

The teacher is told what to do by a file, so that every process of a dump can load it. Invariant:
processes are found by their session, so that none is missed whoever started it.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from kdcache.dump import DumpOptions, dump_teacher
from kdcache.store import Store, open_store, verify_store
from kdcache.store.work import WORK
from tests.chain import make_store
from tests.cli import killing
from tests.dump.failing import Behaviour, Failing

ROOT = Path(__file__).parents[2]
FIELDS = ("node", "edge", "energy")
# What --name, --fields and so on say by their defaults, or `command` does.
OPTIONS = DumpOptions("teacher", fields=FIELDS, compute_threads=1)
PATIENCE = 60.0


def write_undumped(folder: Path) -> tuple[Store, str]:
    """A store of forty structures in ten shards, and its root digest after a dump in peace."""
    store = make_store(folder, blocks_per_shard=1)
    copy = folder / "undisturbed.zarr"
    shutil.copytree(store.path, copy)
    dump_teacher(copy, Failing(Behaviour()), OPTIONS)
    return store, open_store(copy).manifest.root_digest


def command(store: Path, told: Path, *more: object) -> list[str]:
    """Arguments of a dump by a teacher that behaves as told."""
    texts = ["dump-teacher", "--into", store, "--teacher", told, "--fields", ",".join(FIELDS)]
    return [str(text) for text in [*texts, "--teacher-format", "tests.dump.failing:load", *more]]


def start(
    *arguments: object, python: Sequence[str] = ("-m", "kdcache_cli")
) -> subprocess.Popen[str]:
    """A command in a session of its own, with what it starts."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *python, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def fork(*arguments: object) -> BaseProcess:
    """A command in a process that need not import torch; its exit code as a shell would see it."""
    texts = [str(argument) for argument in arguments]
    process = killing._FORKS.Process(target=_run, args=(texts,))
    process.start()
    return process


def _run(texts: list[str]) -> None:
    from kdcache_cli.main import main

    main(texts)


def processes_of(session: int) -> list[int]:
    """Processes of a session that still run, with those whose parents are gone."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            # After the name, which may hold anything: state, parent, group, session.
            state, _, _, its = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state not in "ZX":
                found.append(int(folder.name))
    return found


def workers_of(dump: int) -> list[int]:
    """The workers of a dump that `start` began: started by what it started to make them."""
    parents = {process: _parent(process) for process in processes_of(dump)}
    return [process for process, parent in parents.items() if parents.get(parent) == dump]


def _parent(process: int) -> int:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def wait_for_all(session: int) -> list[int]:
    """Wait until every process of a session has ended by itself; those that have not."""
    for process in processes_of(session):
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(process)
            select.select([descriptor], [], [], PATIENCE)
            os.close(descriptor)
    return processes_of(session)


def problems(store: Path, digest: str) -> list[str]:
    """What is not as after a dump in peace."""
    found = open_store(store)
    said = [] if found.manifest.root_digest == digest else ["another root digest"]
    said += [f"left: {path}" for path in store.rglob("*.partial")]
    said += [f"left: {WORK}"] if (store / WORK).exists() else []
    return said + verify_store(store).problems


@contextmanager
def running_scheduler(folder: Path, n_workers: int = 1) -> Iterator[tuple[str, list[int]]]:
    """A dask scheduler with workers, all processes of their own.

    Yields:
        Its address; the processes, the scheduler first.
    """
    ended = ["--host", "127.0.0.1", "--no-dashboard"]
    with ExitStack() as stack:
        scheduler = start(
            "--port", 0, "--no-show", *ended, python=("-m", "distributed.cli.dask_scheduler")
        )
        stack.enter_context(_ending(scheduler))
        assert scheduler.stderr is not None
        address = next(line.split()[-1] for line in scheduler.stderr if "Scheduler at:" in line)
        numbers = [scheduler.pid]
        for number in range(n_workers):
            place = folder / f"worker{scheduler.pid}-{number}"
            where = (address, "--nthreads", 2, "--local-directory", place, "--no-dashboard")
            worker = start(*where, "--no-nanny", python=("-m", "distributed.cli.dask_worker"))
            stack.enter_context(_ending(worker))
            numbers.append(worker.pid)
        yield address, numbers


@contextmanager
def _ending(process: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def behave(folder: Path, **how: object) -> Path:
    """A file that tells a teacher how to behave."""
    told = Behaviour(**how)  # type: ignore[arg-type]
    return told.write(folder / f"told-{len(list(folder.glob('told-*')))}.json")
