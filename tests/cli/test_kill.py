"""kill -9 at ten random points of a dump; the same command again gives the same bytes."""

from __future__ import annotations

import hashlib
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from kdcache.store import read_manifest
from tests.cli.commands import SMALL_BLOCKS, dataset, kdcache, settings, write_structures
from tests.cli.killing import run

POINTS = 10


# Few fields and structures in many shards: each file is synced to disk, which is what takes time.
DUMP = (*SMALL_BLOCKS, "--fields", "node,energy", "--no-graph")


@pytest.fixture
def few(tmp_path: Path) -> Path:
    return write_structures(tmp_path / "few.extxyz", dataset(14))


def digests(store: Path) -> dict[str, str]:
    """SHA-256 of every file of a store but the manifest, which holds the date."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "manifest.json" and ".work" not in path.parts
    }


@pytest.mark.proof
def test_resume_after_kill_writes_same_bytes(few: Path, teacher: Path, tmp_path: Path) -> None:
    # Below one path each, so that the touches of different runs are the same.
    store = tmp_path / "features.zarr"
    command = ["dump-teacher", few, "--teacher", teacher, "-o", store, *DUMP]
    touches = run(command, store)
    undisturbed, whole = read_manifest(store), digests(store)
    assert undisturbed.capacities.n_blocks >= 5
    assert touches > 100
    # One point in each tenth, wherever it falls: the import is interrupted as well as the dump.
    starts = np.linspace(1, touches, POINTS + 1)
    points = np.random.default_rng().uniform(starts[:-1], starts[1:]).astype(int).tolist()
    for point in points:
        shutil.rmtree(store)
        where = f"killed at touch {point} of {touches}"
        assert run(command, store, kill_at=point) == -signal.SIGKILL, where
        # Among the last touches are those that clean up behind a finished store.
        finished = (store / "manifest.json").exists() and read_manifest(
            store
        ).teachers == undisturbed.teachers
        again = run(command, store)
        assert again > 0 or finished, where
        assert read_manifest(store).root_digest == undisturbed.root_digest, where
        assert digests(store) == whole, where
    assert "the store is whole" in kdcache("verify", store, "--data", few)


@pytest.mark.proof
def test_a_dump_that_is_killed_again_and_again_ends_the_same(
    few: Path, teacher: Path, tmp_path: Path
) -> None:
    store, other = tmp_path / "features.zarr", tmp_path / "undisturbed.zarr"
    command = ["dump-teacher", few, "--teacher", teacher, *DUMP, "-o"]
    # In a process like the killed ones: other threads sum in another order, to other last digits.
    run([*command, other], other)
    kills = 0
    # Each attempt gets a little further than the last shard that was finished.
    while run([*command, store], store, kill_at=150) < 0:
        kills += 1
        assert kills < 30
    assert kills > 1
    assert read_manifest(store).root_digest == read_manifest(other).root_digest
    assert digests(store) == digests(other)


@pytest.mark.proof
@pytest.mark.parametrize("commit", [1, 2])
def test_a_kill_between_the_last_two_files_of_a_commit_is_made_good(
    commit: int, few: Path, teacher: Path, tmp_path: Path
) -> None:
    # First the structures are committed, then the teacher; each time the root, then the manifest.
    store = tmp_path / "features.zarr"
    command = ["dump-teacher", few, "--teacher", teacher, "-o", store, *DUMP]
    killed = run(command, store, kill_at=commit, renaming_to="/manifest.json")
    assert killed == -signal.SIGKILL
    if commit == 2:
        assert "unfinished: teachers/teacher" in kdcache("inspect", store)
    kdcache(*command)
    assert "the store is whole" in kdcache("verify", store, "--data", few)


@pytest.mark.proof
def test_a_training_from_files_goes_on_wherever_it_was_killed(few: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    command = ["train-student", few, "-o", directory, *settings("training.max_steps=3")]
    touches = run(command, directory)
    assert touches > 50
    for point in np.linspace(1, touches - 1, POINTS // 2).astype(int).tolist():
        shutil.rmtree(directory)
        where = f"killed at touch {point} of {touches}"
        assert run(command, directory, kill_at=point) == -signal.SIGKILL, where
        finished = (directory / "state" / "step-000000003").exists()
        assert finished or run(command, directory) > 0, where
        assert (directory / "model.json").exists(), where


@pytest.mark.proof
def test_a_kill_before_the_document_above_the_teachers_leaves_nothing_behind(
    few: Path, teacher: Path, tmp_path: Path
) -> None:
    store = tmp_path / "features.zarr"
    command = ["dump-teacher", few, "--teacher", teacher, "-o", store, *DUMP]
    killed = run(command, store, kill_at=1, renaming_to="/teachers/zarr.json")
    assert killed == -signal.SIGKILL
    assert list((store / "teachers").glob("*.partial"))
    kdcache(*command)
    assert not list(store.rglob("*.partial"))
