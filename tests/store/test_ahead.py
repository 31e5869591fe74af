"""What is asked for before it is read: the same bytes, and only while reads meet a disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from kdcache.errors import StoreError
from kdcache.sharing import pack_store
from kdcache.store import Store, ahead, open_store
from kdcache.store.ahead import DiskAhead
from tests.store.sample import STRUCTURES, TEACHER

FIELDS = [f"structures/{spec.name}" for spec in STRUCTURES]
FIELDS += [f"teachers/painn/{spec.name}" for spec in TEACHER]

Bytes = set[tuple[int, int]]  # inode of the file, place in it


class System:
    """Stands between a store and the system, and notes what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: Bytes = set()
        self.read: Bytes = set()
        self.disk_reads = 0
        self.refuses = False
        self._preadv = os.preadv
        monkeypatch.setattr(os, "posix_fadvise", self._advise)
        monkeypatch.setattr(os, "preadv", self._read_into)
        monkeypatch.setattr(ahead, "_disk_reads", lambda: self.disk_reads)

    def _advise(self, descriptor: int, start: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        if self.refuses:
            raise OSError(errno.ESPIPE, "Illegal seek")
        self.asked |= _places(descriptor, start, length)

    def _read_into(self, descriptor: int, buffers: list[memoryview], start: int) -> int:
        n_bytes = self._preadv(descriptor, buffers, start)
        self.read |= _places(descriptor, start, n_bytes)
        return n_bytes


def _places(descriptor: int, start: int, length: int) -> Bytes:
    inode = os.fstat(descriptor).st_ino
    return {(inode, place) for place in range(start, start + length)}


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    return System(monkeypatch)


@pytest.fixture(params=["directory", "zip"])
def store(request: pytest.FixtureRequest, finished: Path, tmp_path: Path) -> Store:
    if request.param == "directory":
        return open_store(finished)
    pack_store(finished, tmp_path / "packed.zip")
    return open_store(tmp_path / "packed.zip")


def test_what_is_asked_for_is_what_is_read(store: Store, system: System) -> None:
    last = store.plan.n_blocks - 1
    n_open = len(os.listdir("/proc/self/fd"))
    for blocks in ([0], [last, 0], list(range(last + 1))):
        store.files._ahead.gains = True  # type: ignore[attr-defined]
        system.asked, system.read = set(), set()
        with store.fetched(FIELDS, blocks):
            assert not system.read & system.asked
            for name in FIELDS:
                store.read(name, blocks)
        assert system.asked
        assert system.asked == system.read
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_asking_ends_when_no_disk_is_met_and_begins_again_when_one_is(
    store: Store, system: System
) -> None:
    def asks(disk_reads: int) -> bool:
        """Whether a window is asked for, while reading it meets the disk so often."""
        system.asked = set()
        with store.fetched(FIELDS, [0]):
            store.read(FIELDS[0], [0])
            system.disk_reads += disk_reads
        return bool(system.asked)

    assert asks(3)  # nothing is known yet
    assert asks(0)
    assert not asks(0)
    assert not asks(1)
    assert asks(0)
    assert not asks(0)


def test_a_system_that_takes_no_advice_is_read_all_the_same(store: Store, system: System) -> None:
    expected = [store.read(name, [0]) for name in FIELDS]
    system.refuses = True
    with store.fetched(FIELDS, [0]):
        found = [store.read(name, [0]) for name in FIELDS]
    assert not system.asked
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_system_that_knows_no_advice_is_not_asked(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "ADVISES", False)
    monkeypatch.delattr(os, "posix_fadvise")
    monkeypatch.delattr(ahead.resource, "RUSAGE_THREAD")
    store = open_store(finished)
    assert not store.files.asks_ahead
    with store.fetched(FIELDS, [0]):
        assert len(store.read(FIELDS[0], [0]))
    assert not store.files.asks_ahead


def test_a_shard_that_is_missing_is_named(copied: Path, system: System) -> None:
    store = open_store(copied)
    shard = next(path for path in (copied / FIELDS[0] / "c").rglob("*") if path.is_file())
    shard.unlink()
    blocks = range(store.plan.n_blocks)
    with pytest.raises(StoreError, match="is missing"), store.fetched(FIELDS, blocks):
        store.read(FIELDS[0], blocks)


def test_what_a_thread_has_had_read_is_counted() -> None:
    # Of a thread that reads nothing; a disk that can be emptied of its cache is the benchmark's.
    ahead_of = DiskAhead()
    assert ahead_of.gains
    with ahead_of.reading():
        pass
    assert not ahead_of.gains
