"""kill -9 of any process that shares a dump or a rewrite; in the end the store is as in peace."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from kdcache.store import Store, open_store
from kdcache.store.rewrite import UNFINISHED_SUFFIX
from tests.cli import killing
from tests.cli.commands import kdcache, refused
from tests.faults.dumping import (
    behave,
    command,
    problems,
    running_scheduler,
    start,
    wait_for_all,
    write_undumped,
)

pytestmark = pytest.mark.fault


def test_workers_end_with_the_dump_they_work_for(tmp_path: Path) -> None:
    store, digest = write_undumped(tmp_path)
    told = behave(tmp_path, deadly=(20,), victim="dump", attempts=str(tmp_path))
    dump = command(store.path, told, "--workers", 2)
    killed = start(*dump)
    said = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, said
    assert wait_for_all(killed.pid) == []
    assert "teacher" not in open_store(store.path).teachers
    assert "40 structures" in kdcache(*dump)
    assert problems(store.path, digest) == []


def test_a_dump_whose_scheduler_is_killed_says_so_and_goes_on_with_another(
    tmp_path: Path,
) -> None:
    store, digest = write_undumped(tmp_path)
    with running_scheduler(tmp_path) as (address, processes):
        told = behave(tmp_path, deadly=(20,), victim=str(processes[0]), attempts=str(tmp_path))
        line = refused(*command(store.path, told, "--cluster", address))
    assert "The cluster's scheduler is gone" in line
    with running_scheduler(tmp_path) as (address, _):
        kdcache(*command(store.path, told, "--cluster", address))
    assert problems(store.path, digest) == []


def test_a_rewrite_by_workers_killed_anywhere_goes_on(taught_store: Store, tmp_path: Path) -> None:
    target = tmp_path / "converted.zarr"
    convert = ["convert", taught_store.path, "--codec", "exact", "--workers", "2", "-o"]
    kdcache(*convert[:-3], "-o", tmp_path / "alone.zarr")
    digest = open_store(tmp_path / "alone.zarr").manifest.root_digest
    touches = killing.run([*convert, tmp_path / "watched.zarr"], tmp_path / "watched.zarr")
    point = 1 + int(np.random.default_rng().uniform() * (touches - 1))
    killing.run([*convert, target], target, kill_at=point)
    if not target.exists():  # killed behind the rename that ends it, there is nothing to go on with
        kdcache(*convert, target)
    assert not target.with_name(target.name + UNFINISHED_SUFFIX).exists()
    assert problems(target, digest) == [], point


def test_a_dump_under_torchrun_is_that_of_one_process_and_speaks_once(
    tmp_path: Path,
) -> None:
    store, digest = write_undumped(tmp_path)
    program = Path(sys.executable).with_name("kdcache")
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    # So slow that the second rank has work left when it comes, however busy the machine.
    dump = command(store.path, behave(tmp_path, seconds=0.3))
    ranks = start(program, *dump, python=(*several, "--no-python"))
    said, errors = ranks.communicate()
    assert ranks.returncode == 0, errors
    assert said.count("40 structures") == 1
    assert said.count("relative error") == 1
    assert problems(store.path, digest) == []
