"""kill -9 of whatever shares a dump or a rewrite, two writers at once, teachers that fail."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from fault_rows import Row, times

from kdcache.dump import dump_teacher
from kdcache.errors import TeacherError
from kdcache.store import Store, open_store, verify_store
from kdcache.store.rewrite import UNFINISHED_SUFFIX
from kdcache.store.work import WorkFolder
from tests.chain import dump, make_store, make_teacher, structures
from tests.dump.failing import Behaviour, Failing
from tests.faults.dumping import (
    OPTIONS,
    behave,
    command,
    fork,
    problems,
    running_scheduler,
    start,
    wait_for_all,
    workers_of,
    write_undumped,
)
from tests.faults.training import outcome, training_command

SECONDS = 0.1  # of a batch, ten of which make a dump: a moment is easily hit
PATIENCE = 120.0
Command = list[str]


class Stores:
    """Copies of a store without a teacher, one for every try."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(6)
        self.store, self.digest = write_undumped(folder)
        self.slow = behave(folder, seconds=SECONDS)
        self._n_given = 0

    def give(self) -> Path:
        """A further copy."""
        path = self.folder / f"try{self._n_given}.zarr"
        self._n_given += 1
        shutil.copytree(self.store.path, path)
        return path

    def moment(self, seconds: float) -> float:
        """At random within so many seconds."""
        return float(self.rng.uniform(0, seconds))


def kills_of_dumps(folder: Path, scale: float) -> Iterator[Row]:
    """The process that gives out the work, and those that do it."""
    stores = Stores(folder)
    path = stores.give()
    working = _seconds_of_work(path, command(path, stores.slow, "--workers", 2))
    row = Row("kill -9 of `dump-teacher --workers 2`, then the same command: same digest")
    finished = 0
    for _ in range(times(16, scale)):
        path, moment = stores.give(), stores.moment(working)
        dumping = command(path, stores.slow, "--workers", 2)
        process = start(*dumping)
        _await_work(path, lambda process=process: process.poll() is None)  # type: ignore[misc]
        time.sleep(moment)
        process.kill()
        process.communicate()
        strays = wait_for_all(process.pid)
        # Killed behind its last file, it is finished.
        finished += "teacher" in open_store(path).teachers
        _ends(fork(*dumping))
        wrong = [f"still there: {strays}"] if strays else []
        row.count(not (wrong := wrong + problems(path, stores.digest)), f"{moment:.2f} s: {wrong}")
    row.note = f"within {working:.1f} s of work; {finished} finished; no process, no file is left"
    yield row
    row = Row("kill -9 of one of two workers of a dump: it ends by itself, same digest")
    hit = 0
    for _ in range(times(12, scale)):
        path, moment = stores.give(), stores.moment(SECONDS * 5)
        process = start(*command(path, stores.slow, "--workers", 2))
        _await_shard(path, lambda process=process: process.poll() is None)  # type: ignore[misc]
        time.sleep(moment)
        if workers := workers_of(process.pid):
            with suppress(ProcessLookupError):
                os.kill(workers[int(stores.rng.integers(len(workers)))], signal.SIGKILL)
                hit += 1
        said = process.communicate(timeout=PATIENCE)[1]
        wrong = problems(path, stores.digest) if process.returncode == 0 else [said[-200:]]
        row.count(not wrong, f"{moment:.2f} s: {wrong}")
    row.note = f"{hit} hit before the end"
    yield row


def kills_of_schedulers(folder: Path, scale: float) -> Iterator[Row]:
    """A cluster of somebody else, and its scheduler gone."""
    stores = Stores(folder)
    row = Row("kill -9 of the scheduler: one line, exit 2; with another: same digest")
    slowest, n_finished = 0.0, 0
    for _ in range(times(6, scale)):
        path, moment = stores.give(), stores.moment(SECONDS * 8)
        with running_scheduler(folder, 2) as (address, processes):
            process = start(*command(path, stores.slow, "--cluster", address))
            _await_shard(path, lambda process=process: process.poll() is None)  # type: ignore[misc]
            time.sleep(moment)
            os.kill(processes[0], signal.SIGKILL)
            killed = time.perf_counter()
            said = process.communicate(timeout=PATIENCE)[1]
            slowest = max(slowest, time.perf_counter() - killed)
        # All shards may have come in before the kill: then it ends well, and says nothing.
        finished = process.returncode == 0 and not said
        n_finished += finished
        refused = finished or _is_refused(process, said)
        wrong = [] if refused else [f"{process.returncode}: {said[-300:]}"]
        with running_scheduler(folder, 2) as (address, _):
            _ends(fork(*command(path, stores.slow, "--cluster", address)))
        wrong += problems(path, stores.digest)
        row.count(not wrong, f"{moment:.2f} s: {wrong}")
    row.note = f"the line came after at most {slowest:.0f} s; {n_finished} had finished"
    yield row


def kills_of_parts(folder: Path, scale: float) -> Iterator[Row]:
    """One of three parts, and one rank of two."""
    stores = Stores(folder)
    row = Row("kill -9 of one of three parts: the others finish, or the next does; same digest")
    by_next = 0
    for _ in range(times(12, scale)):
        path, moment = stores.give(), stores.moment(SECONDS * 5)
        parts = [fork(*command(path, stores.slow, "--part", f"{k}/3")) for k in range(3)]
        _await_work(path, lambda parts=parts: any(p.is_alive() for p in parts))  # type: ignore[misc]
        time.sleep(moment)
        parts[int(stores.rng.integers(3))].kill()
        for part in parts:
            part.join(PATIENCE)
        if "teacher" not in open_store(path).teachers:
            by_next += 1
            _ends(fork(*command(path, stores.slow, "--part", "0/1")))
        row.count(not (wrong := problems(path, stores.digest)), f"{moment:.2f} s: {wrong}")
    row.note = f"{by_next} finished by the next"
    yield row
    row = Row("kill -9 of a rank of a dump under torchrun, then the same command: same digest")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    for _ in range(times(3, scale)):
        path, moment = stores.give(), stores.moment(SECONDS * 5)
        dumping = command(path, stores.slow)
        ranks = start("-m", "kdcache_cli", *dumping, python=torchrun)
        _await_work(path, lambda ranks=ranks: ranks.poll() is None)  # type: ignore[misc]
        time.sleep(moment)
        if children := _children(ranks.pid):
            os.kill(children[int(stores.rng.integers(len(children)))], signal.SIGKILL)
        ranks.communicate(timeout=PATIENCE)
        strays = wait_for_all(ranks.pid)
        again = start("-m", "kdcache_cli", *dumping, python=torchrun)
        again.communicate(timeout=PATIENCE)
        wrong = problems(path, stores.digest) + ([f"still there: {strays}"] if strays else [])
        row.count(not wrong, f"{moment:.2f} s: {wrong}")
    yield row


def kills_of_rewrites(folder: Path, scale: float) -> Iterator[Row]:
    """A convert and a merge by two workers."""
    parts = [_part(folder, name, seed) for seed, name in enumerate(("first", "second"))]
    for store in parts:
        dump_teacher(store.path, Failing(Behaviour()), OPTIONS)
    first, second = (str(store.path) for store in parts)
    rng = np.random.default_rng(7)
    commands = {
        "convert": ["convert", first, "--codec", "exact"],
        "merge": ["merge", first, second, "--block-atoms", "16", "--shard-blocks", "1"],
    }
    for name, said in commands.items():
        row = Row(f"kill -9 of `{name} --workers 2`, then the same command: same digest")
        alone, target = folder / f"{name}-alone.zarr", folder / f"{name}.zarr"
        _ends(fork(*said, "-o", alone))
        digest = open_store(alone).manifest.root_digest
        rewriting = [*said, "--workers", "2", "-o", str(target)]
        started = time.perf_counter()
        _ends(fork(*rewriting))
        seconds = time.perf_counter() - started
        shutil.rmtree(target)
        finished = 0
        for _ in range(times(8, scale)):
            moment = float(rng.uniform(0, seconds))
            process = fork(*rewriting)
            process.join(moment)
            process.kill()
            process.join()
            finished += target.exists()
            if not target.exists():
                _ends(fork(*rewriting))
            wrong = problems(target, digest)
            if target.with_name(target.name + UNFINISHED_SUFFIX).exists():
                wrong.append("left: the unfinished store")
            row.count(not wrong, f"{moment:.2f} s: {wrong}")
            shutil.rmtree(target)
        row.note = f"within {seconds:.1f} s; {finished} finished"
        yield row


def two_writers(folder: Path, scale: float) -> Iterator[Row]:
    """Two dumps that are started at once, and a dump beside a training."""
    stores = Stores(folder)
    kinds: Mapping[str, tuple[str, ...]] = {
        "under another name": ("--name", "other"),
        "under the same name": (),
        "one of them as a part": ("--part", "0/2"),
    }
    for kind, more in kinds.items():
        row = Row(f"two dumps into one store at once, {kind}: one is refused, none damaged")
        missed = 0
        for _ in range(times(5, scale)):
            path = stores.give()
            both = [fork(*command(path, stores.slow, *options)) for options in (more, ())]
            for process in both:
                process.join(PATIENCE)
            codes = sorted(process.exitcode or 0 for process in both)
            wrong = verify_store(path).problems + [str(p) for p in path.rglob("*.partial")]
            # On a busy machine one may come when the other has ended: only the same is refused.
            missed += codes == [0, 0]
            as_told = codes == [0, 2] or (codes == [0, 0] and bool(more))
            row.count(as_told and not wrong, f"{codes} {wrong}")
        row.note = f"{missed} did not meet"
        yield row
    row = Row("a dump into the store a training streams from: same curve, same bits, store whole")
    made = make_store(folder, name="trained.zarr")
    dump(made, make_teacher(folder), codec="half")
    more = ("--teacher", "teacher", "--set", "training.max_steps=300")
    _ends(fork(*training_command(Path(str(made.path)), folder / "peace"), *more))
    expected = outcome(folder / "peace")
    for k in range(times(5, scale)):
        path = folder / f"trained{k}.zarr"
        shutil.copytree(made.path, path)
        run = folder / f"run{k}"
        training = fork(*training_command(path, run), *more)
        _await(lambda run=run, training=training: run.exists() or not training.is_alive())  # type: ignore[misc]
        dumping = fork(*command(path, stores.slow, "--name", "second"))
        training.join(PATIENCE)
        dumping.join(PATIENCE)
        whole = verify_store(path).problems == [] and "second" in open_store(path).teachers
        row.count(whole and outcome(run) == expected, f"whole: {whole}")
    yield row


def failing_teachers(folder: Path, scale: float) -> Iterator[Row]:
    """A memory that is full, structures that raise or give NaN."""
    store = make_store(folder, atom_capacity=64)
    dump_teacher(store.path, Failing(Behaviour()), replace(OPTIONS, name="whole"))
    rng = np.random.default_rng(8)
    largest = int(store.index.n_atoms.max())
    row = Row("a batch that does not fit the memory: cut, same values")
    cut = 0
    for k in range(times(25, scale)):
        teacher = Failing(Behaviour(memory=int(rng.integers(largest, 64))))
        dump_teacher(store.path, teacher, replace(OPTIONS, name=f"memory{k}"))
        row.count(_differences(store, f"memory{k}", []) == [], teacher.behaviour)
        cut += len(teacher.batches)
    row.note = f"{cut} batches in all"
    yield row
    row = Row("structures that raise or give NaN, --on-error skip: recorded, the others as ever")
    for k in range(times(25, scale)):
        chosen = rng.permutation(len(store))[: int(rng.integers(2, 20))].tolist()
        teacher = Failing(Behaviour(raises=tuple(chosen[1:]), nan=tuple(chosen[:1])))
        dump_teacher(store.path, teacher, replace(OPTIONS, name=f"skip{k}", on_error="skip"))
        failed = open_store(store.path).failures(f"skip{k}").row.tolist()
        wrong = _differences(store, f"skip{k}", failed)
        row.count(failed == sorted(chosen) and not wrong, f"{chosen}: {failed}, {wrong}")
    yield row
    row = Row("a structure that raises or gives NaN, --on-error stop: named, nothing is added")
    for k in range(times(25, scale)):
        number = int(rng.integers(len(store)))
        told = Behaviour(raises=(number,)) if k % 2 else Behaviour(nan=(number,))
        try:
            dump_teacher(store.path, Failing(told), replace(OPTIONS, name=f"stop{k}"))
            said = "nothing"
        except TeacherError as error:
            said = str(error)
        named = repr(store.index.structure_id[number]) in said
        row.count(named and f"stop{k}" not in open_store(store.path).teachers, said)
    yield row


def _part(folder: Path, name: str, seed: int) -> Store:
    """A store of structures of its own."""
    found = [replace(s, structure_id=f"{name}-{s.structure_id}") for s in structures(40, seed)]
    return make_store(folder, found=found, name=f"{name}.zarr", blocks_per_shard=1)


def _differences(store: Store, name: str, failed: list[int]) -> list[str]:
    """Fields with other values than the whole dump's, structures that failed left out."""
    found = open_store(store.path)
    wrong = []
    for field in OPTIONS.fields or ():
        said, expected = (found.read(f"teachers/{t}/{field}") for t in (name, "whole"))
        plan = found.plans[f"teachers/{name}"]
        counts = plan.counts(found.spec(f"teachers/{name}/{field}").level)
        kept = ~np.isin(np.repeat(np.arange(len(store)), counts), failed)
        if not np.array_equal(said[kept], expected[kept]) or np.isfinite(said[~kept]).any():
            wrong.append(field)
    return wrong


def _seconds_of_work(path: Path, dumping: Command) -> float:
    process = start(*dumping)
    _await_work(path, lambda: process.poll() is None)
    started = time.perf_counter()
    process.communicate(timeout=PATIENCE)
    return time.perf_counter() - started


def _await_work(path: Path, alive: Callable[[], bool], name: str = "teacher") -> None:
    """Until a dump has begun to write its teacher."""
    work = WorkFolder(path, f"teachers/{name}")
    _await(lambda: work.begun or not alive())


def _await_shard(path: Path, alive: Callable[[], bool]) -> None:
    """Until the first shard is written: workers import torch before."""
    shards = WorkFolder(path, "teachers/teacher").path
    _await(lambda: any(shards.glob("[0-9]*.json")) or not alive())


def _await(happened: Callable[[], bool]) -> None:
    deadline = time.perf_counter() + PATIENCE
    while not happened():
        if time.perf_counter() > deadline:
            raise TimeoutError(f"nothing happened for {PATIENCE:.0f} s")
        time.sleep(0.005)


def _ends(process: BaseProcess) -> None:
    """Wait for a command that should need no more than that; one that hangs is ended."""
    process.join(PATIENCE)
    process.kill()
    process.join()


def _is_refused(process: subprocess.Popen[str], said: str) -> bool:
    """Exit code 2 and one line; others of the log say that workers are waited for."""
    lines = [line for line in said.splitlines() if not line.startswith("kdcache.cluster: ")]
    return process.returncode == 2 and len(lines) == 1 and "scheduler is gone" in lines[0]


def _children(process: int) -> list[int]:
    try:
        return [
            int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


FAULTS = [
    kills_of_dumps, kills_of_schedulers, kills_of_parts, kills_of_rewrites, two_writers,
    failing_teachers,
]  # fmt: skip
