"""Several processes share a dump, some of them die, and the store is that of one process alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from kdcache.cluster import THREADS_PER_WORKER, ClusterOptions
from kdcache.dump import DumpOptions, DumpReport, Part, TeacherSource, dump_teacher
from kdcache.dump.workers import PrepareDump, worker_device
from kdcache.errors import ConfigError, IdentityError, StoreError, TeacherError
from kdcache.store import Store, TeacherEntry, open_store, verify_store
from kdcache.store.signature import SIGNATURE
from kdcache.store.work import GROUP, WORK, StoreLock, WorkFolder
from tests.chain import make_store
from tests.dump.failing import Behaviour, Failing, load

FIELDS = ("node", "edge", "energy")
OPTIONS = DumpOptions("t", fields=FIELDS, threads=1, compute_threads=1)
TWO = ClusterOptions(workers=2)
RAISES = (3, 30)


def source(directory: Path, behaviour: Behaviour) -> TeacherSource:
    """Where workers load a teacher of this behaviour from."""
    path = behaviour.write(directory / "behaviour.json")
    return TeacherSource("tests.dump.failing:load", str(path))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = make_store(tmp_path)
    shutil.copytree(made.path, tmp_path / "alone.zarr")
    return made


def alone(directory: Path, behaviour: Behaviour, options: DumpOptions = OPTIONS) -> str:
    """The root digest of a dump by one process."""
    other = open_store(directory / "alone.zarr")
    dump_teacher(other.path, Failing(replace(behaviour, deadly=())), options)
    return digest(other)


def digest(store: Store) -> str:
    return open_store(store.path).manifest.root_digest


def assert_clean(store: Store) -> None:
    assert verify_store(store.path).problems == []
    assert not (store.path / WORK).exists()
    assert list(store.path.rglob("*.partial")) == []


@pytest.mark.fault
def test_workers_that_die_or_fail_leave_the_store_of_one_process(
    store: Store, tmp_path: Path
) -> None:
    behaviour = Behaviour(raises=RAISES, deadly=(5, 25), attempts=str(tmp_path))
    options = replace(OPTIONS, on_error="skip")
    assert store.plan.n_shards >= 4
    told = source(tmp_path, behaviour)
    report = dump_teacher(store.path, Failing(behaviour), options, source=told, cluster=TWO)
    assert report.computed == len(store)
    assert len(report.failed) == len(RAISES)
    for row in behaviour.deadly:
        assert len(list(tmp_path.glob(f"{row}.*"))) >= 2
    assert digest(store) == alone(tmp_path, behaviour, options)
    assert_clean(store)


def test_workers_with_another_teacher_compute_nothing(store: Store, tmp_path: Path) -> None:
    teacher = Failing(Behaviour(), digest="0" * 64)
    with pytest.raises(IdentityError, match=r"A worker has teacher .* begun with 0000"):
        dump_teacher(
            store.path, teacher, OPTIONS, source=source(tmp_path, Behaviour()), cluster=TWO
        )
    assert "t" not in open_store(store.path).teachers


def test_a_failure_in_a_worker_names_the_structure(store: Store, tmp_path: Path) -> None:
    behaviour = Behaviour(raises=RAISES)
    with pytest.raises(TeacherError, match="the teacher failed on it"):
        dump_teacher(
            store.path, Failing(behaviour), OPTIONS, source=source(tmp_path, behaviour), cluster=TWO
        )
    # What the workers had finished is there to be gone on with, here and by one process.
    dump_teacher(store.path, Failing(Behaviour()), OPTIONS)
    assert digest(store) == alone(tmp_path, Behaviour())


def test_a_worker_that_failed_again_and_again_is_as_good_as_before(
    store: Store, tmp_path: Path
) -> None:
    # Those of a running cluster stay: memory that a failure kept would be waited for for ever.
    told = source(tmp_path, Behaviour(raises=tuple(range(len(store)))))
    options = replace(OPTIONS, fields=("node",))
    with pytest.raises(TeacherError):
        dump_teacher(store.path, Failing(Behaviour(raises=RAISES)), options)
    begun = json.loads((WorkFolder(store.path, "teachers/t").path / GROUP).read_bytes())
    entry = TeacherEntry.model_validate({**begun["teacher"], "fields": {}})
    shard = PrepareDump(str(store.path), told, options, entry)()
    for _ in range(2 * THREADS_PER_WORKER):
        with pytest.raises(TeacherError, match="the teacher failed on it"):
            shard(store.plan.n_shards - 1)


def test_a_cluster_needs_to_know_where_the_teacher_is(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a source and no part"):
        dump_teacher(store.path, Failing(Behaviour()), OPTIONS, cluster=TWO)


def parts(store: Store, n: int) -> list[DumpReport]:
    """All parts of a dump at the same time."""

    def one(k: int) -> DumpReport:
        return dump_teacher(store.path, Failing(Behaviour()), OPTIONS, part=Part(k, n))

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_parts_together_leave_the_store_of_one_process(
    n: int, store: Store, tmp_path: Path
) -> None:
    reports = parts(store, n)
    assert sum(report.computed for report in reports) == len(store)
    assert [report.left_to_others for report in reports].count(0) >= 1
    assert digest(store) == alone(tmp_path, Behaviour())
    assert_clean(store)
    # One that comes late finds nothing to do.
    late = dump_teacher(store.path, Failing(Behaviour()), OPTIONS, part=Part(0, n))
    assert (late.computed, late.left_to_others) == (0, 0)
    assert_clean(store)


def test_a_part_that_comes_late_with_something_else_is_refused(store: Store) -> None:
    parts(store, 2)
    for teacher, options in (
        (Failing(Behaviour(), digest="0" * 64), OPTIONS),
        (Failing(Behaviour()), replace(OPTIONS, fields=("node",))),
    ):
        with pytest.raises(StoreError, match="has its teachers/t already, finished"):
            dump_teacher(store.path, teacher, options, part=Part(0, 2))
    assert_clean(store)


def test_a_part_does_the_shards_of_those_that_never_come(store: Store, tmp_path: Path) -> None:
    report = dump_teacher(store.path, Failing(Behaviour()), OPTIONS, part=Part(2, 3))
    assert (report.computed, report.left_to_others) == (len(store), 0)
    assert digest(store) == alone(tmp_path, Behaviour())


@pytest.mark.parametrize("part", [None, Part(1, 2)], ids=["alone", "as a part"])
def test_a_signed_store_gets_a_teacher_only_where_its_signature_goes(
    store: Store, tmp_path: Path, part: Part | None
) -> None:
    signature = store.path / SIGNATURE
    signature.write_text("{}")
    told = replace(OPTIONS, on_error="stop")
    with pytest.raises(StoreError, match=r"is signed.*--remove-signature"):
        dump_teacher(store.path, Failing(Behaviour()), told, part=part)
    assert signature.exists()
    assert not (store.path / WORK).exists()
    # Stopped halfway, and gone on with by the same command, or by one without the flag.
    with pytest.raises(TeacherError):
        dump_teacher(
            store.path, Failing(Behaviour(raises=RAISES)), told, part=part, remove_signature=True
        )
    assert (store.path / WORK).exists()
    assert not signature.exists()
    for again in (True, False):
        report = dump_teacher(
            store.path,
            Failing(Behaviour()),
            told,
            part=Part(0, 2) if part else None,
            remove_signature=again,
        )
        assert report.left_to_others == 0
        if part is None:
            break
        # Signed when whole: a part that comes late leaves the signature, which is of this content.
        signature.write_text("{}")
    assert signature.exists() == (part is not None)
    signature.unlink(missing_ok=True)
    assert digest(store) == alone(tmp_path, Behaviour())
    assert_clean(store)


def test_a_shard_another_part_is_at_is_left_to_it(store: Store, tmp_path: Path) -> None:
    held = store.plan.n_shards - 1

    def begun() -> Iterator[None]:
        work = WorkFolder(store.path, "teachers/t")
        with pytest.raises(TeacherError):
            dump_teacher(store.path, Failing(Behaviour(raises=(0,))), OPTIONS, part=Part(0, 2))
        with StoreLock(store.path, shared=True), work.claim(held) as mine:
            assert mine
            yield

    for _ in begun():
        report = dump_teacher(store.path, Failing(Behaviour()), OPTIONS, part=Part(0, 2))
        assert report.left_to_others == 1
        assert "t" not in open_store(store.path).teachers
        # Nor may one process alone begin while a part is at work.
        with pytest.raises(StoreError, match="Another process is writing"):
            dump_teacher(store.path, Failing(Behaviour()), OPTIONS)
    report = dump_teacher(store.path, Failing(Behaviour()), OPTIONS, part=Part(1, 2))
    assert report.left_to_others == 0
    assert digest(store) == alone(tmp_path, Behaviour())
    assert_clean(store)


@pytest.mark.fault
def test_a_part_that_is_killed_leaves_its_shards_to_the_others(
    store: Store, tmp_path: Path
) -> None:
    behaviour = Behaviour(deadly=(11,), attempts=str(tmp_path))
    told = behaviour.write(tmp_path / "behaviour.json")
    program = (
        "import sys, torch; from kdcache.dump import *; from tests.dump.failing import load;"
        "from tests.dump.test_sharing import OPTIONS;"
        "teacher = load(sys.argv[1], device='cpu', dtype=torch.float32, taps=());"
        "dump_teacher(sys.argv[2], teacher, OPTIONS, part=Part(0, 2))"
    )
    command = [sys.executable, "-c", program, str(told), str(store.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    import torch

    teacher = load(str(told), device="cpu", dtype=torch.float32, taps=())
    report = dump_teacher(store.path, teacher, OPTIONS, part=Part(1, 2))
    assert report.left_to_others == 0
    assert report.computed <= len(store)
    assert digest(store) == alone(tmp_path, behaviour)
    assert_clean(store)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4/4", "Part 4/4 does not exist: parts count from 0, so the last of 4 is 3/4"),
        ("1", "'1' is no part: write k/n"),
        ("a/b", "'a/b' is no part"),
        ("0/0", "Part 0/0 does not exist"),
    ],
)
def test_a_part_that_does_not_exist_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Part.parse(text)


def test_parts_begin_with_shards_of_their_own() -> None:
    orders = [Part(k, 3).order(range(7)) for k in range(3)]
    assert [order[0] for order in orders] == [0, 1, 2]
    assert all(sorted(order) == list(range(7)) for order in orders)


def test_outside_a_cluster_a_device_is_the_one_that_was_named() -> None:
    assert worker_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="--device is cuda:99, but torch sees"):
        worker_device("cuda:99")
