"""Stores between directories and from a web server: the same bytes, or one line."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import ConfigError, StoreError
from kdcache.sharing import directories, pack_store, publish_store, pull_store, select_rows
from kdcache.sharing.held import source_files
from kdcache.sharing.shipment import Parcel, Shipment, ship
from kdcache.sharing.transfer import DamagedError, Moved, Report, checked, transfer
from kdcache.store import add_teacher, open_store, read_manifest, remote, verify_store
from kdcache.store.joining import join_store
from kdcache.store.manifest import MANIFEST
from kdcache.store.signature import SIGNATURE, make_keys, read_private_key, sign_store
from kdcache.store.withholding import write_without_structures
from tests.sharing.counting import CountingServer
from tests.store.sample import (
    TEACHER,
    Sample,
    files_of,
    make_sample,
    teacher_entry,
    write_all,
    write_store,
)
from tests.store.serving import flip

SHARD = "teachers/painn/node/c/0/0"


def incoming(target: Path) -> Path:
    return target.with_name(target.name + directories.INCOMING_SUFFIX)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another store."""
    return write_store(tmp_path / "other.zarr", make_sample((3, 1, 2, 5, 4, 6)))


@pytest.mark.parametrize("jobs", [1, 8])
def test_a_published_store_is_the_same_bytes(finished: Path, tmp_path: Path, jobs: int) -> None:
    target = tmp_path / "deep" / "target.zarr"
    report = publish_store(finished, f"file://{target}", jobs=jobs)
    assert files_of(target) == files_of(finished)
    assert report.n_moved == report.n_files == len(files_of(finished)) - 1
    assert not incoming(target).exists()


def test_a_pulled_store_is_the_same_bytes(url: str, finished: Path, tmp_path: Path) -> None:
    pull_store(url, tmp_path / "target.zarr")
    assert files_of(tmp_path / "target.zarr") == files_of(finished)


def test_a_store_that_is_there_is_not_moved_again(finished: Path, tmp_path: Path) -> None:
    publish_store(finished, tmp_path / "target.zarr")
    report = publish_store(finished, tmp_path / "target.zarr")
    assert (report.was_there, report.n_moved) == (True, 0)


def test_a_store_that_is_there_and_lacks_a_file_is_said(finished: Path, tmp_path: Path) -> None:
    publish_store(finished, tmp_path / "target.zarr")
    (tmp_path / "target.zarr" / SHARD).unlink()
    with pytest.raises(StoreError, match=r"target.zarr/teachers/painn/node/c/0/0 is missing"):
        publish_store(finished, tmp_path / "target.zarr")


def test_another_store_is_overwritten_when_asked_alone(
    finished: Path, other: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.zarr"
    publish_store(other, target)
    before = files_of(target)
    with pytest.raises(StoreError, match=r"is another store .* Nothing is overwritten"):
        publish_store(finished, target)
    assert files_of(target) == before
    publish_store(finished, target, replace=True)
    assert files_of(target) == files_of(finished)


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_no_store_is_never_overwritten(
    finished: Path, tmp_path: Path, replace: bool
) -> None:
    for target in (tmp_path / "file", tmp_path / "folder"):
        if target.name == "file":
            target.write_text("mine")
        else:
            target.mkdir()
            (target / "mine").write_text("mine")
        with pytest.raises(StoreError, match=r"is no finished store\. Nothing is"):
            publish_store(finished, target, replace=replace)


def test_damage_is_not_published(copied: Path, tmp_path: Path) -> None:
    flip(copied / SHARD)
    target = tmp_path / "target.zarr"
    with pytest.raises(StoreError, match=r"node/c/0/0 has digest .* the manifest says .*verify"):
        publish_store(copied, target)
    assert not target.exists()
    assert not (incoming(target) / SHARD).exists()
    assert not (incoming(target) / MANIFEST).exists()


@pytest.mark.parametrize("name", [SHARD, "index.parquet", "structures/cell/zarr.json"])
def test_a_missing_file_is_said_before_anything_is_moved(
    url: str, copied: Path, tmp_path: Path, name: str
) -> None:
    (copied / name).unlink()
    for source in (copied, url):
        with pytest.raises(StoreError, match=rf"{name} is missing"):
            pull_store(source, tmp_path / "target.zarr")
    assert not incoming(tmp_path / "target.zarr").exists()


def test_a_part_holds_the_fields_it_names_and_says_of_what(
    url: str, finished: Path, sample: Sample, tmp_path: Path
) -> None:
    target = tmp_path / "part.zarr"
    pull_store(url, target, fields=["node", "bare"])
    report = verify_store(target, data=sample.dataset)
    assert (report.problems, report.n_compared) == ([], len(sample.dataset))
    part, whole = open_store(target), open_store(finished)
    assert list(part.fields("teachers/painn")) == ["bare", "node"]
    for name in ("teachers/painn/node", "teachers/painn/bare", "structures/forces"):
        np.testing.assert_array_equal(part.read(name), whole.read(name))
    root = read_manifest(finished).root_digest
    assert (
        part.manifest.dataset.notes[0] == f"part of {root}: all structures with painn: bare, node"
    )
    assert part.manifest.root_digest != root
    assert set(part.teachers["painn"].errors) == {"node", "bare"}


def test_a_part_without_teachers_or_with_one_of_two(finished: Path, tmp_path: Path) -> None:
    both = shutil.copytree(finished, tmp_path / "both.zarr")
    write_all(add_teacher(both, "second", teacher_entry(), TEACHER), make_sample())
    publish_store(both, tmp_path / "none.zarr", teachers=[])
    publish_store(both, tmp_path / "one.zarr", teachers=["second"])
    for name, teachers in (("none", []), ("one", ["second"])):
        assert verify_store(tmp_path / f"{name}.zarr").problems == []
        assert list(open_store(tmp_path / f"{name}.zarr").teachers) == teachers
    with pytest.raises(StoreError, match="did you mean painn"):
        publish_store(both, tmp_path / "x.zarr", teachers=["pain"])
    with pytest.raises(StoreError, match="did you mean node"):
        publish_store(both, tmp_path / "x.zarr", fields=["nod"])


def signed(store: Path, target: Path) -> bytes:
    """A signature of a store, as its file."""
    pytest.importorskip("cryptography")
    make_keys(target / "key")
    sign_store(read_manifest(store), read_private_key(target / "key"), target / SIGNATURE)
    return (target / SIGNATURE).read_bytes()


def test_a_signature_goes_along_and_may_come_later(copied: Path, url: str, tmp_path: Path) -> None:
    target, content = tmp_path / "target.zarr", signed(copied, tmp_path)
    pull_store(url, target)
    (copied / SIGNATURE).write_bytes(content)
    assert pull_store(url, target).was_there
    pull_store(url, tmp_path / "second.zarr")
    for store in (target, tmp_path / "second.zarr"):
        assert (store / SIGNATURE).read_bytes() == content
    report = pull_store(url, tmp_path / "part.zarr", fields=["node"])
    assert report.notes == (
        "the signature is left behind: it is of another store than the one moved",
    )
    assert not (tmp_path / "part.zarr" / SIGNATURE).exists()


def test_a_store_without_its_structures_is_moved_whole_alone(
    finished: Path, tmp_path: Path
) -> None:
    write_without_structures(open_store(finished), tmp_path / "without.zarr")
    publish_store(tmp_path / "without.zarr", tmp_path / "target.zarr")
    assert files_of(tmp_path / "target.zarr") == files_of(tmp_path / "without.zarr")
    with pytest.raises(StoreError, match="was passed on without its structures"):
        publish_store(tmp_path / "without.zarr", tmp_path / "part.zarr", fields=["node"])


def test_a_busy_server_and_answers_that_break_off_do_no_harm(
    url: str, server: CountingServer, finished: Path, tmp_path: Path
) -> None:
    server.busy[f"copied.zarr/{SHARD}"] = 2
    server.cut[f"copied.zarr/{SHARD}"] = 1
    server.cut["copied.zarr/index.parquet"] = 2
    pull_store(url, tmp_path / "target.zarr")
    assert files_of(tmp_path / "target.zarr") == files_of(finished)
    assert server.cut[f"copied.zarr/{SHARD}"] == server.busy[f"copied.zarr/{SHARD}"] == 0


@pytest.mark.parametrize("body", [b"", b"x", b"<html>please log in</html>", None])
def test_another_size_than_was_said_is_refused_by_both_numbers(
    url: str, server: CountingServer, finished: Path, tmp_path: Path, body: bytes | None
) -> None:
    content, target = (finished / SHARD).read_bytes(), tmp_path / "target.zarr"
    server.bodies[f"copied.zarr/{SHARD}"] = content + b"x" if body is None else body
    came = "more" if body is None else f"{len(body)} bytes"
    said = rf"{SHARD} was said to have {len(content)} bytes, and {came} came"
    with pytest.raises(StoreError, match=said):
        pull_store(url, target)
    assert not (incoming(target) / SHARD).exists()
    server.bodies.clear()
    pull_store(url, target)
    assert files_of(target) == files_of(finished)


def test_a_file_that_vanishes_meanwhile_is_said(
    url: str, server: CountingServer, tmp_path: Path
) -> None:
    server.fail_gets[f"copied.zarr/{SHARD}"] = 404
    with pytest.raises(StoreError, match=rf"{SHARD} is not there: the manifest lists it"):
        pull_store(url, tmp_path / "target.zarr")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("elsewhere", ""),
        ("index.parquet", r"bytes, its layout allows|has digest|was said to have"),
        (SHARD, "could not be read 5 times"),
        ("file:///etc/hostname", "could not be read 5 times"),
    ],
)
def test_a_server_that_sends_on_is_followed_to_the_right_bytes_alone(
    url: str, server: CountingServer, copied: Path, tmp_path: Path, target: str, said: str
) -> None:
    shutil.copy(copied / SHARD, copied / "elsewhere")
    to = target if ":" in target else f"/copied.zarr/{target}"
    server.moved[f"copied.zarr/{SHARD}"] = to
    if said:
        with pytest.raises(StoreError, match=said):
            pull_store(url, tmp_path / "target.zarr")
        assert not (incoming(tmp_path / "target.zarr") / SHARD).exists()
    else:
        pull_store(url, tmp_path / "target.zarr")
        assert verify_store(tmp_path / "target.zarr").problems == []


def test_a_file_that_breaks_off_is_begun_anew_where_a_server_has_no_ranges(
    url: str,
    server: CountingServer,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "READ_AT_ONCE", 16)  # some of it has come before it breaks off
    server.ranges, target, path = False, tmp_path / "target.zarr", f"copied.zarr/{SHARD}"
    server.cut[path] = 1000
    with pytest.raises(StoreError, match=rf"{SHARD} broke off 5 times, .* whole files only"):
        pull_store(url, target, jobs=1)
    server.ranges_asked.clear()
    server.cut[path] = 3
    counted: list[int] = []

    @contextmanager
    def counting(label: str, total: int | None, unit: str) -> Iterator[Any]:
        yield lambda n_bytes=1, /, note="": counted.append(n_bytes)

    report = pull_store(url, target, jobs=1, progress=counting)
    assert files_of(target) == files_of(finished)
    assert server.ranges_asked[path] == ["bytes=212-", "", "bytes=212-", ""]
    assert sum(counted) == report.n_bytes  # what came in vain is not counted


@pytest.mark.parametrize("status", [500, 503, 403])
def test_a_server_that_fails_is_said_and_what_arrived_is_kept(
    url: str, server: CountingServer, finished: Path, tmp_path: Path, status: int
) -> None:
    target, path = tmp_path / "target.zarr", f"copied.zarr/{SHARD}"
    # Of the size it was said to have, it gives nothing but an error.
    server.busy[path] = 1000 if status == 503 else 0
    if status != 503:
        server.fail_gets[path] = status
    with pytest.raises(StoreError, match=rf"{SHARD}") as caught:
        pull_store(url, target, jobs=1)
    assert "\n" not in str(caught.value)
    server.busy.clear()
    server.fail_gets.clear()
    there = files_of(incoming(target))
    arrived = [n for n in there if not n.startswith(".work/") and not n.endswith(".partial")]
    report = pull_store(url, target)
    assert report.n_files - report.n_moved == len(arrived)
    assert files_of(target) == files_of(finished)


def test_a_changed_byte_on_the_server_is_refused(url: str, copied: Path, tmp_path: Path) -> None:
    flip(copied / SHARD)
    with pytest.raises(StoreError, match=r"node/c/0/0 has digest .* edited, damaged"):
        pull_store(url, tmp_path / "target.zarr")
    assert not (tmp_path / "target.zarr").exists()


def test_a_store_replaced_while_it_is_read_is_never_mixed(
    url: str, copied: Path, other: Path, server: CountingServer, tmp_path: Path
) -> None:
    """The server's store becomes another when the first shard is asked for."""
    target = tmp_path / "target.zarr"

    def exchange() -> None:
        os.rename(copied, tmp_path / "old.zarr")
        shutil.copytree(other, copied)

    server.before[f"copied.zarr/{SHARD}"] = exchange
    with pytest.raises(StoreError, match="was replaced while it was read"):
        pull_store(url, target, jobs=1)
    assert not target.exists()
    with pytest.raises(StoreError, match=r"holds what arrived of the store .*never mixed"):
        pull_store(url, target)
    shutil.rmtree(incoming(target))
    pull_store(url, target)
    assert files_of(target) == files_of(other)


def begun(url: str, server: CountingServer, target: Path) -> Path:
    """A pull that ended before one shard, and where it left off."""
    server.fail_gets[f"copied.zarr/{SHARD}"] = 403
    with pytest.raises(StoreError):
        pull_store(url, target, jobs=1)
    server.fail_gets.clear()
    server.ranges_asked.clear()
    (incoming(target) / SHARD).parent.mkdir(parents=True, exist_ok=True)
    return incoming(target) / f"{SHARD}.partial"


@pytest.mark.parametrize("damage", [False, True])
def test_a_partial_file_is_gone_on_with_by_a_range(
    url: str, server: CountingServer, finished: Path, tmp_path: Path, damage: bool
) -> None:
    target, content = tmp_path / "target.zarr", (finished / SHARD).read_bytes()
    partial = begun(url, server, target)
    partial.write_bytes(bytes(300) if damage else content[:300])
    pull_store(url, target, jobs=1)
    assert files_of(target) == files_of(finished)
    assert server.ranges_asked[f"copied.zarr/{SHARD}"] == ["bytes=300-", *([""] * damage)]


def test_a_partial_file_is_begun_anew_where_a_server_has_no_ranges(
    url: str, server: CountingServer, finished: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.zarr"
    begun(url, server, target).write_bytes((finished / SHARD).read_bytes()[:300])
    server.ranges = False
    pull_store(url, target, jobs=1)
    assert files_of(target) == files_of(finished)


def test_a_file_that_does_not_end_is_not_read_on() -> None:
    taken: list[int] = []

    def stream(start: int) -> Iterator[bytes]:
        for _ in range(100):
            taken.append(10)
            yield bytes(10)

    parcel = Parcel("c/0", 25, "0" * 64, "there/c/0", False, stream)
    with pytest.raises(DamagedError, match="there/c/0 was said to have 25 bytes, and more came"):
        list(checked(parcel, 0, hashlib.sha256(), lambda _: None))
    assert sum(taken) == 30


def test_a_file_is_on_the_disk_before_it_takes_its_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    named: list[str] = []

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)

    def checking(rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(source: Path, target: Path) -> None:
            if source.is_file():
                assert source.stat().st_ino in synced, source
                named.append(target.name)
            rename(source, target)

        return renamed

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", checking(os.replace))
    monkeypatch.setattr(os, "rename", checking(os.rename))
    report = publish_store(finished, tmp_path / "target.zarr")
    assert len(named) == report.n_files + 2  # the manifest, and the identity of what arrives
    named.clear()
    pack_store(finished, tmp_path / "packed.zip")
    assert named == ["packed.zip"]


def test_what_has_arrived_needs_no_room_again_and_parts_of_files_go(
    url: str,
    server: CountingServer,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "target.zarr"
    begun(url, server, target).write_bytes(b"of this file")
    (incoming(target) / "structures" / "c.partial").write_bytes(b"of no file")
    there = sum(map(len, files_of(incoming(target)).values()))
    missing = ship(source_files(finished)).n_bytes - there
    usage: Any = type("usage", (), {"free": missing - 1})
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(StoreError, match=rf"takes {missing} more bytes, {missing - 1} are"):
            pull_store(url, target)
        usage.free = missing
        pull_store(url, target)
    assert files_of(target) == files_of(finished)


def test_an_arrived_file_that_was_touched_since_is_looked_at_again(
    url: str, server: CountingServer, finished: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.zarr"
    begun(url, server, target)
    names = ["index.parquet", "structures/cell/zarr.json", "teachers/painn/zarr.json"]
    there = [incoming(target) / name for name in names if (incoming(target) / name).exists()]
    if not there:  # small files come last
        pytest.fail("nothing arrived")
    flip(there[0])
    pull_store(url, target)
    assert files_of(target) == files_of(finished)


def test_an_endless_file_is_not_fetched(url: str, copied: Path, tmp_path: Path) -> None:
    with open(copied / SHARD, "ab") as file:
        file.truncate(2**24)
    with pytest.raises(StoreError, match=r"has 16777216 bytes, its layout allows \d+"):
        pull_store(url, tmp_path / "target.zarr")


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "structures/evil/c/0"])
def test_a_manifest_that_lists_what_no_store_has_is_refused(
    copied: Path, tmp_path: Path, name: str
) -> None:
    manifest = read_manifest(copied)
    digests = {**manifest.digests, name: "0" * 64}
    forged = manifest.model_copy(update={"digests": digests}).sealed()
    (copied / MANIFEST).write_bytes(forged.to_bytes())
    with pytest.raises(StoreError, match=r"the manifest lists .*, against what it describes"):
        pull_store(copied, tmp_path / "target.zarr")
    assert not incoming(tmp_path / "target.zarr").exists()


def test_a_manifest_that_claims_endless_shards_is_refused(copied: Path, tmp_path: Path) -> None:
    manifest = read_manifest(copied)
    many = manifest.capacities.model_copy(update={"n_blocks": 2**40})
    forged = manifest.model_copy(update={"capacities": many}).sealed()
    (copied / MANIFEST).write_bytes(forged.to_bytes())
    with pytest.raises(StoreError, match="It was edited or damaged"):
        pull_store(copied, tmp_path / "target.zarr")


def test_two_at_once_do_not_write_over_each_other(
    url: str, server: CountingServer, finished: Path, tmp_path: Path
) -> None:
    target, results = tmp_path / "target.zarr", []
    waiting, going_on = threading.Event(), threading.Event()

    def hold() -> None:
        waiting.set()
        going_on.wait(30)

    server.before[f"copied.zarr/{SHARD}"] = hold
    first = threading.Thread(target=lambda: results.append(pull_store(url, target, jobs=1)))
    first.start()
    assert waiting.wait(30)
    with pytest.raises(StoreError, match="Another process is writing to"):
        pull_store(finished, target)
    going_on.set()
    first.join()
    assert isinstance(results[0], Report)
    assert files_of(target) == files_of(finished)


def test_a_store_that_came_to_the_target_meanwhile_is_not_overwritten(
    url: str, server: CountingServer, finished: Path, other: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.zarr"
    server.before[f"copied.zarr/{SHARD}"] = lambda: os.rename(other, target)
    with pytest.raises(StoreError, match=r"target.zarr is another store .*Nothing is overwritten"):
        pull_store(url, target)
    root = read_manifest(target).root_digest
    assert root != read_manifest(finished).root_digest
    publish_store(finished, target, replace=True)  # asked for: with what has arrived
    assert files_of(target) == files_of(finished)


def test_something_that_came_to_the_target_meanwhile_is_not_overwritten(
    url: str, server: CountingServer, tmp_path: Path
) -> None:
    target = tmp_path / "target.zarr"

    def begin() -> None:
        target.mkdir()
        (target / "mine").write_text("mine")

    server.before[f"copied.zarr/{SHARD}"] = begin
    with pytest.raises(StoreError, match=r"exists and is no finished store\. Nothing is"):
        pull_store(url, target)
    assert files_of(target) == {"mine": b"mine"}


def test_the_same_store_that_came_meanwhile_is_enough(
    url: str, server: CountingServer, finished: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.zarr"

    def bring() -> None:
        shutil.copytree(finished, target)

    server.before[f"copied.zarr/{SHARD}"] = bring
    pull_store(url, target)
    assert files_of(target) == files_of(finished)
    assert not incoming(target).exists()


@pytest.mark.parametrize("replace", [False, True])
def test_a_store_arrives_where_a_link_leads(
    finished: Path, other: Path, tmp_path: Path, replace: bool
) -> None:
    (tmp_path / "disk").mkdir()
    place = tmp_path / "disk" / "place.zarr"
    os.rename(other, place) if replace else place.mkdir()
    (tmp_path / "link.zarr").symlink_to(place)
    publish_store(finished, tmp_path / "link.zarr", replace=replace)
    assert (tmp_path / "link.zarr").is_symlink()
    assert files_of(place) == files_of(finished)
    assert not list(tmp_path.rglob("*.incoming"))


def test_a_path_that_cannot_be_renamed_to_is_said_before_anything_is_moved(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "disk"
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    with pytest.raises(StoreError, match=r"disk is where a disk is mounted\. .*path below it"):
        publish_store(finished, target)
    assert not incoming(target).exists()
    publish_store(finished, target / "below.zarr")
    assert files_of(target / "below.zarr") == files_of(finished)


def test_a_disk_that_is_full_when_an_arrival_is_noted_is_said_by_name(
    url: str, server: CountingServer, finished: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target.zarr"
    journal = incoming(target) / ".work" / "arrived.jsonl"

    def fill() -> None:
        journal.unlink(missing_ok=True)
        journal.symlink_to("/dev/full")

    server.before[f"copied.zarr/{SHARD}"] = fill
    with pytest.raises(OSError, match="No space left") as caught:
        pull_store(url, target, jobs=1)
    assert caught.value.filename == str(journal)
    journal.unlink()
    pull_store(url, target)
    assert files_of(target) == files_of(finished)


def test_a_disk_too_small_is_said_before_anything_is_written(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"takes \d+ more bytes, 1000 are free"):
        publish_store(finished, tmp_path / "target.zarr")
    assert list(tmp_path.iterdir()) == []


class FullTarget:
    """A target whose disk is full at the first shard, while other files are on their way."""

    location = Path("full.zarr")

    def __init__(self) -> None:
        self.failed = threading.Event()
        self.ended: list[str] = []

    def found(self) -> None:
        return None

    @contextmanager
    def receive(self, shipment: Shipment, replace: bool) -> Iterator[FullTarget]:
        yield self

    def has(self, parcel: Parcel) -> bool:
        return False

    def put(self, parcel: Parcel, moved: Moved) -> None:
        if parcel.name == SHARD:
            self.failed.set()
            raise StoreError("full")
        assert self.failed.wait(30)
        for _ in range(10_000):  # until it is told to stop: at once, but for threads that dawdle
            moved(1)
            threading.Event().wait(0.001)
        self.ended.append(parcel.name)

    def finish(self) -> None:
        raise AssertionError("a store that is not whole")


def test_a_failure_ends_the_files_that_are_on_their_way(finished: Path) -> None:
    target = FullTarget()
    with pytest.raises(StoreError, match="full"):
        transfer(ship(source_files(finished)), target, "pull", jobs=100)
    assert target.ended == []


def test_a_store_may_arrive_in_the_directory_one_is_in(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    pull_store(finished, ".")
    assert files_of(tmp_path / "empty") == files_of(finished)


def test_a_store_is_not_moved_to_itself(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "link.zarr").symlink_to(copied)
    for target in (copied.parent / "." / copied.name, f"file://{copied}", tmp_path / "link.zarr"):
        with pytest.raises(ConfigError, match="is source and target"):
            publish_store(copied, target)


def test_neither_source_nor_target_lies_within_the_other(
    copied: Path, finished: Path, other: Path
) -> None:
    before = files_of(copied)
    (copied.parent / "link").symlink_to(copied)
    for within in (copied / "x.zarr", copied.parent / "link" / "deep" / "x.zarr"):
        for move in (publish_store, pull_store, pack_store):
            with pytest.raises(ConfigError, match=r"x\.zarr lies within .*copied\.zarr\. One"):
                move(copied, within)
        with pytest.raises(ConfigError, match=r"x\.zarr lies within"):
            select_rows(copied, sample=3).write(within)
    assert files_of(copied) == before
    inner = Path(shutil.copytree(finished, other / "inner.zarr"))
    with pytest.raises(ConfigError, match=r"inner\.zarr lies within .*other\.zarr\."):
        publish_store(inner, other, replace=True)  # the source would go with what it replaces
    assert files_of(inner) == files_of(finished)
    # A name that merely begins alike is another folder.
    publish_store(finished, copied.with_name(copied.name + "2"))


@pytest.mark.parametrize("target", ["s3://", "https://", "s3:///"])
def test_an_address_without_a_bucket_is_no_path(
    finished: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="must be the plain address of a folder"):
        publish_store(finished, target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["https://host/x.zarr", "ftp://host/x", "file://host/x"])
def test_what_cannot_be_written_to_is_said(finished: Path, target: str) -> None:
    with pytest.raises(StoreError, match=r"read from only|not from ftp|machine host"):
        publish_store(finished, target)


def test_a_store_is_published_without_its_structures_and_completed(
    finished: Path, sample: Sample, tmp_path: Path
) -> None:
    target, whole = tmp_path / "shared.zarr", tmp_path / "whole.zarr"
    publish_store(finished, target, without_structures=True)
    assert not list(target.glob("structures/positions/c/*"))
    assert not list(target.glob("structures/energy/c/*"))
    assert verify_store(target).problems == []
    assert join_store(open_store(target), sample.dataset, whole).is_whole
    assert files_of(whole) == files_of(finished)
    with pytest.raises(ConfigError, match="with its structures, or all of them without"):
        publish_store(finished, tmp_path / "part.zarr", fields=["node"], without_structures=True)


def test_a_teacher_that_is_not_finished_stays_behind_and_is_said(
    copied: Path, sample: Sample, tmp_path: Path
) -> None:
    write_all(add_teacher(copied, "second", teacher_entry(), TEACHER), sample, [0])
    (note,) = publish_store(copied, tmp_path / "target.zarr").notes
    assert note.startswith("teachers/second is unfinished and stays behind")
    assert list(open_store(tmp_path / "target.zarr").teachers) == ["painn"]
