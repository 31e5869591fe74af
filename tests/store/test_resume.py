"""Kill -9 anywhere, go on, and the store is the one an undisturbed writer makes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import IdentityError, StoreError
from kdcache.store import add_teacher, open_store, verify_store
from kdcache.store.work import WORK, StoreLock, WorkFolder
from tests.store.interrupted import write
from tests.store.sample import (
    STRUCTURES,
    TEACHER,
    Sample,
    begin_structures,
    files_of,
    make_sample,
    teacher_entry,
    write_all,
)

ROOT = Path(__file__).parents[2]


def run(path: Path, last_event: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.store.interrupted", str(path), str(last_event)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def n_events(tmp_path_factory: pytest.TempPathFactory) -> int:
    """Events of an undisturbed run."""
    undisturbed = run(tmp_path_factory.mktemp("undisturbed") / "store.zarr", 0)
    assert undisturbed.returncode == 0, undisturbed.stderr
    return int(undisturbed.stdout)


@pytest.mark.proof
@pytest.mark.parametrize("part", range(10))
def test_resume_after_kill_writes_the_same_bytes(
    tmp_path: Path, finished: Path, sample: Sample, n_events: int, part: int
) -> None:
    # A random event in each tenth of the run: before, among and after the shards of both groups.
    chosen = random.Random(part).randrange(part * n_events // 10, (part + 1) * n_events // 10) + 1
    path = tmp_path / "store.zarr"
    killed = run(path, chosen)
    assert killed.returncode == -signal.SIGKILL
    write(path, sample)
    ours, undisturbed = files_of(path), files_of(finished)
    assert ours.keys() == undisturbed.keys()
    assert [k for k in ours if ours[k] != undisturbed[k] and k != "manifest.json"] == []
    assert open_store(path).manifest.root_digest == open_store(finished).manifest.root_digest
    assert verify_store(path, data=sample.dataset).problems == []


@pytest.mark.proof
def test_a_writer_killed_again_and_again_gets_there(
    tmp_path: Path, finished: Path, sample: Sample, n_events: int
) -> None:
    path = tmp_path / "store.zarr"
    for lived in (n_events // 3, n_events // 5, n_events // 7):
        assert run(path, lived).returncode == -signal.SIGKILL
    write(path, sample)
    assert open_store(path).manifest.root_digest == open_store(finished).manifest.root_digest


def test_the_order_shards_are_written_in_does_not_matter(
    tmp_path: Path, finished: Path, sample: Sample
) -> None:
    path = tmp_path / "store.zarr"
    shards = np.random.default_rng(3).permutation(sample.plan.n_shards).tolist()
    write_all(begin_structures(path, sample), sample, shards)
    write_all(add_teacher(path, "painn", teacher_entry(), TEACHER), sample, shards[::-1])
    assert open_store(path).manifest.root_digest == open_store(finished).manifest.root_digest


def test_only_shards_that_are_not_on_disk_are_pending(tmp_path: Path, sample: Sample) -> None:
    path = tmp_path / "store.zarr"
    write_all(begin_structures(path, sample), sample, [0, 2])
    everything = list(range(sample.plan.n_shards))
    with begin_structures(path, sample) as writer:
        assert writer.pending_shards() == [s for s in everything if s not in (0, 2)]
        # Journalled, but gone from the disk: written again.
        next((path / "structures" / "forces" / "c" / "2").rglob("*")).unlink()
        assert writer.pending_shards() == [s for s in everything if s != 0]
        with pytest.raises(StoreError, match=f"has 1 of {len(everything)} shards"):
            writer.commit()


def test_an_unfinished_store_of_another_dataset_is_not_gone_on_with(
    tmp_path: Path, sample: Sample
) -> None:
    path = tmp_path / "store.zarr"
    write_all(begin_structures(path, sample), sample, [0])
    other = make_sample((*sample.plan.n_atoms[:-1], 2))
    with pytest.raises(IdentityError, match="holds an unfinished structures with another dataset"):
        begin_structures(path, other).__enter__()


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"digest": "cd" * 32}, {}, IdentityError, "another teacher digest: begun with .*abab"),
        ({"references": {1: -13.7}}, {}, IdentityError, "another teacher references 1"),
        ({}, {"on_overflow": "clip"}, StoreError, 'begun with "stop", now "clip"'),
        ({}, {"fields": TEACHER[:2]}, StoreError, "another fields atomic_energy"),
    ],
)
def test_an_unfinished_teacher_is_gone_on_with_only_as_it_was_begun(
    copied: Path,
    sample: Sample,
    changes: dict[str, object],
    options: dict[str, object],
    error: type[StoreError],
    message: str,
) -> None:
    write_all(add_teacher(copied, "second", teacher_entry(), TEACHER), sample, [0])
    given: dict[str, object] = {"fields": TEACHER, **options}
    entry = teacher_entry(**changes)
    with pytest.raises(error, match=message):
        add_teacher(copied, "second", entry, **given).__enter__()  # type: ignore[arg-type]
    assert "second" not in open_store(copied).teachers


@pytest.mark.parametrize("content", ["[1]", "3", "null", "{", "[" * 100_000])
def test_a_record_of_what_was_begun_that_is_none_is_refused(
    copied: Path, sample: Sample, content: str
) -> None:
    write_all(add_teacher(copied, "second", teacher_entry(), TEACHER), sample, [0])
    (copied / WORK / "teachers" / "second" / "group.json").write_text(content)
    with pytest.raises(StoreError, match=r"group\.json is damaged"):
        add_teacher(copied, "second", teacher_entry(), TEACHER).__enter__()


def test_a_teacher_may_be_left_and_another_one_finished_in_between(
    copied: Path, sample: Sample
) -> None:
    write_all(add_teacher(copied, "left", teacher_entry(), TEACHER), sample, [1])
    write_all(add_teacher(copied, "quick", teacher_entry(), TEACHER[:1]), sample)
    write_all(add_teacher(copied, "left", teacher_entry(), TEACHER), sample)
    assert sorted(open_store(copied).teachers) == ["left", "painn", "quick"]
    assert not (copied / WORK).exists()
    assert verify_store(copied).problems == []


def test_two_processes_do_not_write_at_once(tmp_path: Path, sample: Sample) -> None:
    path = tmp_path / "store.zarr"
    with begin_structures(path, sample), pytest.raises(StoreError, match="Another process"):
        StoreLock(path).__enter__()


def test_a_finished_group_is_never_written_again(copied: Path, sample: Sample) -> None:
    before = files_of(copied)
    with pytest.raises(StoreError, match="has its structures already, finished"):
        begin_structures(copied, sample).__enter__()
    with pytest.raises(StoreError, match="has its teachers/painn already, finished"):
        add_teacher(copied, "painn", teacher_entry(), TEACHER).__enter__()
    assert files_of(copied) == before
    assert not (copied / WORK).exists()


def test_a_kill_between_manifest_and_cleaning_up_leaves_a_finished_store(
    tmp_path: Path, sample: Sample
) -> None:
    path = tmp_path / "store.zarr"
    write_all(begin_structures(path, sample), sample, list(range(sample.plan.n_shards - 1)))
    kept = files_of(path / WORK)
    write_all(begin_structures(path, sample), sample)
    for name, content in kept.items():
        (path / WORK / name).parent.mkdir(parents=True, exist_ok=True)
        (path / WORK / name).write_bytes(content)
    assert WorkFolder(path, "structures").begun
    assert set(open_store(path).fields("structures")) == {spec.name for spec in STRUCTURES}
    write_all(add_teacher(path, "painn", teacher_entry(), TEACHER), sample)
    assert not (path / WORK).exists()
