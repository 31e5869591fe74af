"""Copies of remote files: fetched once, checked, bounded, shared.

The server runs in this process; the judge is the store on the disk it serves.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from pathlib import Path

import pytest

from kdcache.errors import ConfigError, StoreError
from kdcache.store import open_store
from kdcache.store.cache import CachedFiles, StoreCache, parse_size
from tests.store.serving import FileServer, assert_same, copies, flip

pytest.importorskip("obstore")

SHARD = "copied.zarr/structures/positions/c/0/0"


def test_a_cache_is_filled_once_and_then_asked_alone(
    url: str, server: FileServer, finished: Path, tmp_path: Path
) -> None:
    assert_same(open_store(url, cache=tmp_path), open_store(finished))
    first = copies(tmp_path)
    assert server.gets(SHARD) == 1
    server.requests.clear()
    assert_same(open_store(url, cache=tmp_path), open_store(finished))
    assert dict(server.requests) == {("GET", "copied.zarr/manifest.json"): 1}
    assert copies(tmp_path) == first


def test_stores_that_share_files_share_copies(
    server: FileServer, url: str, copied: Path, tmp_path: Path
) -> None:
    shutil.copytree(copied, copied.parent / "twin.zarr")
    open_store(url, cache=tmp_path).read("structures/positions")
    before = copies(tmp_path)
    open_store(f"{server.url}/twin.zarr", cache=tmp_path).read("structures/positions")
    assert copies(tmp_path) == before
    assert server.gets("twin.zarr") == 1  # its manifest


@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied"])
def test_a_damaged_copy_is_fetched_again(
    url: str, finished: Path, tmp_path: Path, harm: str
) -> None:
    assert_same(open_store(url, cache=tmp_path), open_store(finished))
    store = open_store(url, cache=tmp_path)
    for copy in copies(tmp_path):
        if harm == "flipped":
            flip(copy)
        else:
            os.truncate(copy, 0 if harm == "emptied" else copy.stat().st_size // 2)
    assert_same(store, open_store(finished))  # open before they were damaged
    assert_same(open_store(url, cache=tmp_path), open_store(finished))


def test_a_fetch_that_fails_leaves_nothing(url: str, server: FileServer, tmp_path: Path) -> None:
    store = open_store(url, cache=tmp_path)
    before = copies(tmp_path)
    server.cut[SHARD] = 1000
    with pytest.raises(StoreError, match="could not be read 5 times"):
        store.read("structures/positions")
    assert copies(tmp_path) == before
    server.cut.clear()
    store.read("structures/positions")


def test_what_a_killed_fetch_left_is_taken_over(url: str, finished: Path, tmp_path: Path) -> None:
    store = open_store(url, cache=tmp_path)
    digest = store.manifest.digests["structures/positions/c/0/0"]
    left = tmp_path / digest[:2] / f"{digest}.partial"
    left.parent.mkdir(exist_ok=True)
    left.write_bytes(b"half of somethi")
    assert_same(store, open_store(finished))
    assert not left.exists()


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = StoreCache(tmp_path, 25)
    contents = [bytes([k]) * 10 for k in range(3)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    for k in (0, 1):
        assert cache.add(digests[k], 10, lambda k=k: [contents[k]], "it")  # type: ignore[misc]
        os.utime(cache.path(digests[k]), (k, k))
    descriptor = cache.open(digests[0])  # used now: the other is the oldest
    assert descriptor is not None
    assert cache.add(digests[2], 10, lambda: [contents[2]], "it")
    assert [cache.path(digest).exists() for digest in digests] == [True, False, True]
    os.utime(cache.path(digests[0]), (0, 0))
    assert cache.add(digests[1], 10, lambda: [contents[1]], "it")
    # The first is the oldest again, and open.
    assert [cache.path(digest).exists() for digest in digests] == [True, True, False]
    os.close(descriptor)
    assert not cache.add("0" * 64, 26, lambda: [b"x" * 26], "it")


def test_what_is_no_copy_neither_goes_nor_counts(tmp_path: Path) -> None:
    content = b"x" * 10
    digest = hashlib.sha256(content).hexdigest()
    others = [tmp_path / "v1" / "energies.npz", tmp_path / digest[:2] / "notes.txt"]
    others.append(tmp_path / "v1" / digest)  # not where copies stand
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"y" * 100)
        os.utime(file, (0, 0))
    assert StoreCache(tmp_path, 15).add(digest, 10, lambda: [content], "it")
    assert all(file.exists() for file in others)


@pytest.mark.parametrize("n_bytes", [1, 3000])
def test_a_cache_too_small_is_no_obstacle_and_no_larger(
    url: str, finished: Path, tmp_path: Path, n_bytes: int
) -> None:
    assert_same(open_store(url, cache=tmp_path, cache_bytes=n_bytes), open_store(finished))
    assert sum(copy.stat().st_size for copy in copies(tmp_path)) <= n_bytes


def test_many_readers_fill_one_cache_with_one_fetch_of_each(
    url: str, server: FileServer, finished: Path, tmp_path: Path
) -> None:
    server.latency = 0.01
    expected, failures = open_store(finished), []

    def read() -> None:
        try:
            assert_same(open_store(url, cache=tmp_path), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert server.gets(SHARD) == 1


def test_the_environment_names_a_cache(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDCACHE_STORE_CACHE", str(tmp_path))
    monkeypatch.setenv("KDCACHE_STORE_CACHE_SIZE", "1MB")
    store = open_store(url)
    assert isinstance(store.files, CachedFiles)
    assert copies(tmp_path)
    monkeypatch.setenv("KDCACHE_STORE_CACHE_SIZE", "much")
    with pytest.raises(ConfigError, match="'much' is no size"):
        open_store(url)


def test_sizes_are_parsed() -> None:
    assert [parse_size(text) for text in ("20GB", "1.5 kB", "7B")] == [20 * 10**9, 1500, 7]
    for text in ("", "GB", "-1GB", "0GB", "0.5B", "5", "9" * 400 + "GB"):
        with pytest.raises(ConfigError):
            parse_size(text)
