"""Stores published to S3, as a server of moto answers for it, and read from there."""

from __future__ import annotations

import hashlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.errors import ConfigError, StoreError
from kdcache.sharing import buckets, publish_rows, publish_store, pull_store, select_rows
from kdcache.sharing.buckets import MARK
from kdcache.sharing.held import source_files
from kdcache.sharing.shipment import Parcel, ship
from kdcache.sharing.transfer import DamagedError
from kdcache.store import open_store, read_manifest, verify_store
from kdcache.store.location import StoreUrl
from kdcache.store.manifest import MANIFEST
from kdcache.store.signature import SIGNATURE
from tests.sharing.buckets import BucketServer, bucket_server
from tests.store.sample import Sample, files_of, make_sample, write_store
from tests.store.serving import flip

pytest.importorskip("moto")

SHARD = "teachers/painn/node/c/0/0"


@pytest.fixture(scope="module")
def service() -> Iterator[BucketServer]:
    with bucket_server() as running:
        yield running


@pytest.fixture
def s3(service: BucketServer, monkeypatch: pytest.MonkeyPatch) -> BucketServer:
    """Given to clients by the environment."""
    for key, value in service.environment.items():
        monkeypatch.setenv(key, value)
    service.requests.clear()
    service.busy = service.sent = service.received = 0
    return service


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> str:
    """Of this test alone."""
    name = str(request.node.name)
    return name.replace("[", "-").replace("]", "") + ".zarr"


@pytest.fixture
def address(folder: str) -> str:
    return f"s3://bucket/{folder}"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another store, of fewer files."""
    return write_store(tmp_path / "other.zarr", make_sample((3, 1, 2, 5, 4, 6)), teachers=())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of few files: each is a request or three of a slow server."""
    return write_store(
        tmp_path_factory.mktemp("small") / "small.zarr", make_sample((3, 1, 2, 5)), teachers=()
    )


def test_a_published_store_is_read_from_there_and_pulled_back(
    s3: BucketServer, address: str, folder: str, finished: Path, tmp_path: Path
) -> None:
    report = publish_store(finished, address)
    assert s3.objects(folder) == files_of(finished)
    assert report.n_moved == report.n_files
    name = "teachers/painn/node"
    np.testing.assert_array_equal(open_store(address).read(name), open_store(finished).read(name))
    pull_store(address, tmp_path / "back.zarr")
    assert files_of(tmp_path / "back.zarr") == files_of(finished)


def test_publishing_again_sends_nothing(s3: BucketServer, address: str, small: Path) -> None:
    publish_store(small, address)
    s3.received = 0
    assert publish_store(small, address).was_there
    assert s3.received == 0


def test_an_object_of_another_content_is_sent_again(
    s3: BucketServer, address: str, folder: str, small: Path
) -> None:
    publish_store(small, address)
    client, name = s3.client(folder), "structures/cell/zarr.json"
    size = (small / name).stat().st_size
    client.put(name, bytes(size))  # of that size, without the metadata
    assert publish_store(small, address).n_moved == 1
    assert s3.objects(folder) == files_of(small)


@pytest.mark.parametrize("damage", [False, True])
def test_a_large_file_goes_up_in_parts_or_not_at_all(
    s3: BucketServer, address: str, folder: str, small: Path, damage: bool
) -> None:
    content = np.random.default_rng(3).bytes(2 * buckets.PART + 100_000)
    digest = hashlib.sha256(content).hexdigest() if not damage else "0" * 64
    pieces = [content[k : k + 2**20] for k in range(0, len(content), 2**20)]
    parcel = Parcel("c/0", len(content), digest, "there/c/0", False, lambda _: iter(pieces))
    client = s3.client(folder)
    shipment = ship(source_files(small))
    delivery = buckets.BucketDelivery(StoreUrl(address), client, shipment, {}, [])
    moved: list[int] = []
    if damage:
        with pytest.raises(DamagedError, match=r"there/c/0 has digest"):
            delivery.put(parcel, moved.append)
        assert s3.objects(folder) == {}
        return
    delivery.put(parcel, moved.append)
    assert s3.objects(folder) == {"c/0": content}
    assert (sum(moved), s3.requests["POST"]) == (len(content), 2)  # begun and completed


def test_damage_is_not_published(
    s3: BucketServer, address: str, folder: str, copied: Path, finished: Path
) -> None:
    flip(copied / SHARD)
    with pytest.raises(StoreError, match=r"node/c/0/0 has digest .* the manifest says"):
        publish_store(copied, address)
    there = s3.objects(folder)
    assert not {SHARD, MANIFEST} & there.keys()
    with pytest.raises(StoreError, match="no finished store"):
        open_store(address)
    report = publish_store(finished, address)
    assert report.n_files - report.n_moved == len(there) - 1  # the mark
    assert s3.objects(folder) == files_of(finished)


def test_another_store_gives_way_when_asked_alone(
    s3: BucketServer, address: str, folder: str, small: Path, other: Path
) -> None:
    publish_store(other, address)
    s3.client(folder).put(SIGNATURE, b"of the other")
    before = s3.objects(folder)
    with pytest.raises(StoreError, match=r"is another store .*Nothing is overwritten.*--replace"):
        publish_store(small, address)
    assert s3.objects(folder) == before
    publish_store(small, address, replace=True)
    assert s3.objects(folder) == files_of(small)


def test_what_an_attempt_at_another_store_left_gives_way_when_asked_alone(
    s3: BucketServer, address: str, folder: str, small: Path, copied: Path
) -> None:
    (copied / "structures/forces/c/0/0").write_bytes(b"damage")
    with pytest.raises(StoreError):
        publish_store(copied, address, jobs=1)
    with pytest.raises(StoreError, match="holds a part of another store"):
        publish_store(small, address)
    s3.client(folder).put("README", b"mine")
    publish_store(small, address, replace=True)
    assert s3.objects(folder) == {**files_of(small), "README": b"mine"}


def test_while_a_store_gives_way_there_is_none(
    s3: BucketServer, address: str, small: Path, copied: Path, finished: Path
) -> None:
    publish_store(small, address)
    flip(copied / SHARD)
    with pytest.raises(StoreError, match="has digest"):
        publish_store(copied, address, replace=True)
    with pytest.raises(StoreError, match="no finished store"):
        open_store(address)
    publish_store(finished, address)  # its mark says that what it replaces was asked for
    assert verify_store(address).problems == []


def test_an_empty_folder_as_consoles_make_it_is_no_obstacle(
    s3: BucketServer, address: str, folder: str, small: Path
) -> None:
    make = urllib.request.Request(f"{s3.endpoint}/bucket/{folder}/", data=b"", method="PUT")
    urllib.request.urlopen(make).read()
    publish_store(small, address)
    assert open_store(address).manifest.root_digest == read_manifest(small).root_digest


def test_what_a_manifest_lists_beside_a_store_is_not_deleted(
    s3: BucketServer, address: str, folder: str, small: Path, other: Path
) -> None:
    publish_store(other, address)
    manifest, client = read_manifest(other), s3.client(folder)
    listed = {**manifest.digests, "README": "0" * 64, "../other.zarr/zarr.json": "0" * 64}
    client.put(MANIFEST, manifest.model_copy(update={"digests": listed}).sealed().to_bytes())
    client.put("README", b"mine")
    publish_store(small, address, replace=True)
    assert s3.objects(folder) == {**files_of(small), "README": b"mine"}


def test_a_store_is_not_published_into_its_own_folder(
    s3: BucketServer, address: str, folder: str, small: Path
) -> None:
    publish_store(small, address)
    for source, target in ((address, f"{address}/x"), (f"{address}/x", address)):
        with pytest.raises(ConfigError, match=r"/x lies within s3://"):
            publish_store(source, target, replace=True)
    assert s3.objects(folder) == files_of(small)


def test_a_folder_of_other_things_is_never_touched(
    s3: BucketServer, address: str, folder: str, small: Path
) -> None:
    s3.client(folder).put("photo.jpg", b"mine")
    with pytest.raises(StoreError, match=r"holds 1 objects \(such as photo.jpg\) and no store"):
        publish_store(small, address, replace=True)
    assert s3.objects(folder) == {"photo.jpg": b"mine"}


def test_somebody_else_who_begins_meanwhile_is_noticed(
    s3: BucketServer, address: str, folder: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = buckets.BucketDelivery.put

    def interrupted(self: Any, *arguments: Any) -> None:
        put(self, *arguments)
        mark = {"root_digest": "f" * 64, "replaces": []}
        s3.client(folder).put(MARK, json.dumps(mark).encode())

    monkeypatch.setattr(buckets.BucketDelivery, "put", interrupted)
    with pytest.raises(StoreError, match=r"somebody else began to publish ffffffffffff"):
        publish_store(small, address)
    assert MANIFEST not in s3.objects(folder)


def test_somebody_else_who_finishes_meanwhile_is_noticed(
    s3: BucketServer, address: str, folder: str, small: Path
) -> None:
    def publish() -> None:
        publish_store(small, address)

    s3.before[f"/bucket/{folder}/index.parquet"] = publish
    with pytest.raises(StoreError, match=r"somebody else published or deleted there meanwhile"):
        publish_store(small, address)
    assert publish_store(small, address).was_there
    assert s3.objects(folder) == files_of(small)


def test_a_busy_service_is_asked_again(
    s3: BucketServer, address: str, folder: str, small: Path
) -> None:
    s3.busy = 3
    publish_store(small, address)
    assert s3.busy == 0
    assert s3.objects(folder) == files_of(small)


def test_some_structures_and_fields_are_published(
    s3: BucketServer, address: str, finished: Path, sample: Sample, tmp_path: Path
) -> None:
    selection = select_rows(finished, condition="n_atoms < 6", fields=["node"])
    publish_rows(selection, address, tmp_path)
    published = open_store(address)
    assert verify_store(address).problems == []
    assert set(published.index.structure_id) == {
        one.structure_id for one in sample.dataset if one.n_atoms < 6
    }
    assert list(published.fields("teachers/painn")) == ["node"]
    note = published.manifest.dataset.notes[0]
    assert note.startswith(f"subset of {read_manifest(finished).root_digest}: ")
    assert "where n_atoms < 6" in note
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_is_none_is_said_in_one_line(s3: BucketServer, small: Path) -> None:
    with pytest.raises(StoreError) as caught:
        publish_store(small, "s3://nowhere/features.zarr")
    assert "s3://nowhere/features.zarr" in str(caught.value)
    assert "\n" not in str(caught.value)
