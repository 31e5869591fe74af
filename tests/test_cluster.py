"""Every item is done, once as far as anybody can see, whatever happens to those who do it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache import cluster
from kdcache.cluster import Cluster, ClusterOptions, open_cluster
from kdcache.errors import ClusterError, ConfigError, TeacherError
from tests.cluster_work import Squares

NUMBERS = range(20)
SQUARES = {number: number**2 for number in NUMBERS}


@pytest.fixture(scope="module")
def workers() -> Iterator[Cluster]:
    with open_cluster(ClusterOptions(workers=2)) as opened:
        yield opened


def collected(who: Cluster, work: Squares) -> dict[int, int]:
    found: dict[int, int] = {}
    for number, square in who.run(work, NUMBERS):
        assert number not in found
        found[number] = square
    return found


@pytest.mark.parametrize("threads", [1, 3])
def test_here_every_item_is_done_once(threads: int, tmp_path: Path) -> None:
    with open_cluster(ClusterOptions(threads=threads)) as here:
        work = Squares(tmp_path)
        assert collected(here, work) == SQUARES
        assert [work.attempts(str(number)) for number in NUMBERS] == [1] * len(NUMBERS)
        assert work.attempts("prepared") == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_here_an_error_ends_the_work(threads: int, tmp_path: Path) -> None:
    with (
        open_cluster(ClusterOptions(threads=threads)) as here,
        pytest.raises(TeacherError, match="7 is not to be squared"),
    ):
        collected(here, Squares(tmp_path, wrong=(7,)))


def test_workers_prepare_once_each_and_do_every_item_once(workers: Cluster, tmp_path: Path) -> None:
    work = Squares(tmp_path)
    assert collected(workers, work) == SQUARES
    assert [work.attempts(str(number)) for number in NUMBERS] == [1] * len(NUMBERS)
    assert work.attempts("prepared") == 2


def test_an_error_in_a_worker_is_raised_here_as_it_is(workers: Cluster, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="7 is not to be squared"):
        collected(workers, Squares(tmp_path, wrong=(7,)))
    # The workers are as good as before.
    assert collected(workers, Squares(tmp_path / "..")) == SQUARES


def test_a_full_disk_of_a_worker_is_no_lost_result(workers: Cluster, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        collected(workers, Squares(tmp_path, full=(7,)))
    assert Squares(tmp_path).attempts("7") == 1


def test_items_of_a_worker_that_dies_are_done_by_others(workers: Cluster, tmp_path: Path) -> None:
    work = Squares(tmp_path, deadly=(3, 11))
    assert collected(workers, work) == SQUARES
    assert work.attempts("3") >= 2
    assert work.attempts("11") >= 2


def test_an_item_that_kills_every_worker_is_named(workers: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="Shard 5 is not done: the workers that took it died"):
        collected(workers, Squares(tmp_path, deadly=(5,), again=True))


def test_a_slow_worker_does_not_hold_the_rest(
    workers: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first attempt never ends by itself: it waits for the second.
    monkeypatch.setattr(cluster, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.1)
    work = Squares(tmp_path, slow=(19,))
    assert collected(workers, work) == SQUARES
    assert work.attempts("19") == 2


@pytest.mark.fault
def test_workers_may_come_late_and_a_lost_scheduler_is_said(tmp_path: Path) -> None:
    scheduler_file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-show"]
    command += ["--host", "127.0.0.1", "--no-dashboard", "--scheduler-file", str(scheduler_file)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as scheduler:
        try:
            assert scheduler.stderr is not None
            address = next(line.split()[-1] for line in scheduler.stderr if "Scheduler at:" in line)
            late = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-dashboard"]
            late += ["--local-directory", str(tmp_path), "--nthreads", "1"]
            with open_cluster(ClusterOptions(address=address)) as workers:
                results = workers.run(Squares(tmp_path), range(1000))
                with subprocess.Popen(late, stderr=subprocess.DEVNULL) as worker:
                    try:
                        number, square = next(results)
                        assert square == number**2
                        scheduler.kill()
                        with pytest.raises(ClusterError, match="scheduler is gone"):
                            list(results)
                    finally:
                        worker.kill()
        finally:
            scheduler.kill()


def test_a_scheduler_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.3)
    with (
        pytest.raises(ClusterError, match=r"No dask scheduler answers at tcp://127\.0\.0\.1:9"),
        open_cluster(ClusterOptions(address="tcp://127.0.0.1:9")),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("node01", "node01 is no address of a dask scheduler .*missing port number"),
        ("http://node01:80", "unknown address scheme 'http'"),
        ("tcp://node01:x", "is no address of a dask scheduler"),
    ],
)
def test_an_address_that_is_none_is_refused_at_once(address: str, message: str) -> None:
    with (
        pytest.raises(ConfigError, match=message),
        open_cluster(ClusterOptions(address=address)),
    ):
        pass


def test_a_cluster_is_one_of_ours_or_another() -> None:
    with (
        pytest.raises(ConfigError, match="Say one of them"),
        open_cluster(ClusterOptions(address="tcp://127.0.0.1:9", workers=2)),
    ):
        pass
