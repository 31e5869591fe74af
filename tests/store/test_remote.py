"""A store on a server: the same values as on a disk, and one line for everything that goes wrong.

The server runs in this process; the judge is the store on the disk it serves.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cluster import Here
from kdcache.errors import StoreError
from kdcache.store import describe_store, open_store, verify_store
from kdcache.store import remote as remote_module
from kdcache.store.combining import plan_subset
from kdcache.store.create import add_teacher
from kdcache.store.files import LocalFiles, Range
from kdcache.store.location import StoreUrl, store_location
from kdcache.store.remote import RemoteFiles
from kdcache.store.rewrite import write_rewrite
from tests.store.sample import TEACHER, teacher_entry
from tests.store.serving import FileServer, all_fields, assert_same, copies, flip

pytest.importorskip("obstore")

SHARD = "copied.zarr/structures/positions/c/0/0"


@pytest.mark.parametrize("cached", [False, True])
def test_every_field_is_that_of_the_disk(
    url: str, finished: Path, tmp_path: Path, cached: bool
) -> None:
    store = open_store(url, cache=tmp_path / "cache" if cached else None)
    assert_same(store, open_store(finished))
    assert str(store.path) == url
    assert store.path.name == "copied.zarr"


def test_a_path_made_of_an_address_is_still_the_address(url: str) -> None:
    assert str(open_store(Path(url)).path) == url


def test_verify_finds_a_remote_store_whole(url: str, finished: Path) -> None:
    report, local = verify_store(url), verify_store(finished)
    assert (report.problems, report.summary) == ([], local.summary)


def test_a_description_is_that_of_the_disk(url: str, finished: Path) -> None:
    assert {**describe_store(url), "path": ""} == {**describe_store(finished), "path": ""}


def test_a_window_asks_once_a_run_and_for_all_fields_at_once(url: str, server: FileServer) -> None:
    store = open_store(url)
    names = all_fields(store)
    with store.fetched(names, range(store.plan.n_blocks)):
        pass  # the indices of shards are known from here on
    server.requests.clear()
    server.at_once, server.latency = 0, 0.05
    with store.fetched(names, [0]):
        for name in names:
            store.read(name, [0])
            store.read(name, [0])
    scales = [name for name in names if store.spec(name).codec == "compact"]
    assert server.requests.total() == len(names) + len(scales)
    assert 4 < server.at_once <= remote_module.AT_ONCE


def test_a_window_that_two_threads_share_is_held_until_both_are_done(url: str) -> None:
    files = open_store(url).files
    assert isinstance(files, RemoteFiles)
    part = Range("zarr.json", 0, 10)
    with files.fetched([part]):
        with files.fetched([part]):
            inner = files.range(part)
        assert files.range(part) is inner
    assert files.range(part) is not inner


def test_a_busy_server_is_asked_again(url: str, server: FileServer, finished: Path) -> None:
    server.busy[SHARD] = 2
    name = "structures/positions"
    np.testing.assert_array_equal(open_store(url).read(name), open_store(finished).read(name))
    assert server.busy[SHARD] == 0


def test_a_server_that_stays_busy_is_given_up(url: str, server: FileServer) -> None:
    server.busy[SHARD] = 1000
    with pytest.raises(StoreError, match=r"positions/c/0/0 could not be read 5 times: .*503"):
        open_store(url).read("structures/positions")
    assert server.gets("positions/c/0/0") == remote_module.ATTEMPTS


def test_an_answer_that_breaks_off_is_asked_for_again(
    url: str, server: FileServer, finished: Path
) -> None:
    server.cut[SHARD] = 3
    name = "structures/positions"
    np.testing.assert_array_equal(open_store(url).read(name), open_store(finished).read(name))
    assert server.cut[SHARD] == 0


def test_a_stream_that_breaks_off_goes_on_where_it_ended(
    url: str, server: FileServer, finished: Path
) -> None:
    server.cut[SHARD] = 2
    files = RemoteFiles(StoreUrl(url))
    content = b"".join(files.stream("structures/positions/c/0/0"))
    assert content == (finished / "structures/positions/c/0/0").read_bytes()


@pytest.mark.parametrize(("status", "said"), [(403, "denies access"), (401, "denies access")])
def test_denied_access_is_said_at_once(
    url: str, server: FileServer, status: int, said: str
) -> None:
    server.status["copied.zarr/manifest.json"] = status
    with pytest.raises(StoreError, match=said) as caught:
        open_store(url)
    assert f"{url}/manifest.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.requests.total() == 1


def test_nothing_at_an_address_is_no_store(server: FileServer) -> None:
    with pytest.raises(StoreError, match=r"nowhere.zarr is no finished store. Check the address"):
        open_store(f"{server.url}/nowhere.zarr")


def test_nobody_at_an_address_is_said(server: FileServer) -> None:
    server.server_close()
    with pytest.raises(StoreError, match=r"could not be read 5 times: Connection refused"):
        open_store(f"{server.url}/copied.zarr")


@pytest.mark.parametrize("cached", [False, True])
def test_a_missing_shard_is_named(url: str, copied: Path, tmp_path: Path, cached: bool) -> None:
    store = open_store(url, cache=tmp_path / "cache" if cached else None)
    (copied / "structures/positions/c/0/0").unlink()
    with pytest.raises(StoreError, match=r"positions/c/0/0 is missing \(shard 0 of"):
        store.read("structures/positions")


@pytest.mark.parametrize("name", ["index.parquet", "zarr.json", "structures/cell/zarr.json"])
def test_a_missing_document_is_named(url: str, copied: Path, name: str) -> None:
    (copied / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is missing: the store is incomplete"):
        open_store(url)


def test_a_shard_cut_off_on_the_server_is_refused(url: str, copied: Path, tmp_path: Path) -> None:
    shard = copied / "teachers/painn/node/c/0/0"
    os.truncate(shard, shard.stat().st_size - 7)
    with pytest.raises(StoreError, match=r"node/c/0/0 .*truncated"):
        open_store(url).read("teachers/painn/node")
    with pytest.raises(StoreError, match=r"node/c/0/0 has digest .* the manifest says"):
        open_store(url, cache=tmp_path).read("teachers/painn/node")
    assert not [path for path in copies(tmp_path) if path.stat().st_size == shard.stat().st_size]


def test_a_flipped_byte_on_the_server_is_refused(url: str, copied: Path, tmp_path: Path) -> None:
    flip(copied / "teachers/painn/node/c/0/0")
    with pytest.raises(StoreError, match=r"node/c/0/0, block 0: its bytes have checksum"):
        open_store(url).read("teachers/painn/node")
    with pytest.raises(StoreError, match=r"node/c/0/0 has digest .* the manifest says"):
        open_store(url, cache=tmp_path).read("teachers/painn/node")
    assert verify_store(url).problems


def test_a_server_without_ranges_is_read_through_a_cache_alone(
    url: str, server: FileServer, finished: Path, tmp_path: Path
) -> None:
    server.ranges = False
    with pytest.raises(StoreError, match=r"does not serve parts of files.*--store-cache"):
        open_store(url).read("structures/positions")
    assert_same(open_store(url, cache=tmp_path), open_store(finished))


def test_an_endless_document_is_not_read(url: str, copied: Path) -> None:
    with open(copied / "structures/cell/zarr.json", "ab") as file:
        file.write(b" " * 2**21)
    with pytest.raises(StoreError, match=r"cell/zarr.json has \d+ bytes, at most .* not read"):
        open_store(url)


def test_any_store_of_obstore_serves(finished: Path) -> None:
    from obstore.store import MemoryStore

    memory = MemoryStore()
    for file in finished.rglob("*"):
        if file.is_file():
            memory.put(file.relative_to(finished).as_posix(), file.read_bytes())
    files = RemoteFiles(StoreUrl("s3://bucket/features.zarr"), client=memory)
    assert_same(open_store(files), open_store(finished))


def test_a_service_without_ranges_from_the_end_is_asked_for_the_size(
    url: str, finished: Path
) -> None:
    """As Azure, which refuses them."""
    from obstore.exceptions import NotSupportedError

    client = remote_module.connect(StoreUrl(url))

    class Azure:
        head = staticmethod(client.head)

        @staticmethod
        def get(path: str, *, options: Any = None) -> Any:
            if options and "suffix" in options["range"]:
                raise NotSupportedError("Azure does not support suffix range requests")
            return client.get(path, options=options)

    assert_same(open_store(RemoteFiles(StoreUrl(url), client=Azure())), open_store(finished))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", ""])
def test_no_name_leads_out_of_a_store(url: str, finished: Path, name: str) -> None:
    for files in (LocalFiles(finished), RemoteFiles(StoreUrl(url))):
        with pytest.raises(StoreError, match="outside the store"):
            files.read(name, 100)
        with pytest.raises(StoreError, match="outside the store"):
            files.size(name)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ftp://host/x.zarr", "not from ftp://"),
        ("file:///x.zarr", "not from file://"),
        ("https://host/x.zarr?signature=1", "plain address"),
        ("https://host/../x.zarr", "plain address"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, said: str) -> None:
    with pytest.raises(StoreError, match=said):
        open_store(address)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(StoreError, match="environment") as caught:
        open_store("https://me:secret@host/x.zarr")
    assert "secret" not in str(caught.value)


def test_addresses_are_told_from_paths(tmp_path: Path) -> None:
    assert store_location("HTTPS://host/a/b.zarr//") == "https://host/a/b.zarr"
    assert store_location(Path("s3://bucket/b.zarr")) == "s3://bucket/b.zarr"
    for path in ("data/features.zarr", "/data/a:b/c", "C:/data", str(tmp_path)):
        assert store_location(path) == Path(path)


def test_without_the_package_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(StoreError, match=r"pip install 'kdcache\[remote\]'"):
        open_store("https://host/features.zarr")


def test_what_an_address_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StoreError, match="Account must be specified"):
        open_store("az://container/features.zarr")


def test_nothing_is_written_to_a_server(url: str) -> None:
    with pytest.raises(StoreError, match="a teacher is written to a disk"):
        add_teacher(url, "painn", teacher_entry(), TEACHER)


def test_a_file_without_end_is_not_copied(url: str, copied: Path, tmp_path: Path) -> None:
    store = open_store(url)
    rewrite = plan_subset(store, np.arange(len(store)), "all", Here(), fields=["node"])
    os.truncate(copied / "teachers/painn/node/c/0/0", 2**25)
    with pytest.raises(StoreError, match=r"node/c/0/0 has \d+ bytes, at most \d+ are expected"):
        write_rewrite(tmp_path / "new.zarr", rewrite, Here())
