"""Croissant metadata names every file with its digest, and its own library accepts and reads it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from urllib.parse import unquote

import pyarrow.parquet as pq
import pytest

from kdcache.card import write_croissant
from kdcache.errors import StoreError
from kdcache.store import Store
from tests.card.conftest import HOSTILE


def test_every_file_is_named_with_its_digest(taught_store: Store) -> None:
    root = Path(str(taught_store.path))
    target = root.parent / "metadata.json"
    document = json.loads(write_croissant(root, target).read_text())
    target.unlink()
    found = {one["@id"]: one for one in document["distribution"]}
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    assert set(found) == set(files)
    for name, one in found.items():
        content = files[name].read_bytes()
        assert one["sha256"] == hashlib.sha256(content).hexdigest()
        assert one["contentSize"] == f"{len(content)} B"
        assert (root.parent / unquote(one["contentUrl"])).samefile(files[name])


@pytest.mark.filterwarnings("ignore")
def test_its_own_library_validates_it_and_reads_the_index(
    hostile: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    # It takes the address of a file for its path, so that of a folder must be a plain one.
    store = tmp_path / "plain.zarr"
    shutil.copytree(hostile, store)
    target = write_croissant(store, tmp_path / "metadata.json")
    dataset = mlcroissant.Dataset(jsonld=str(target))
    assert not dataset.metadata.ctx.issues.errors
    assert not dataset.metadata.ctx.issues.warnings
    assert not caplog.records
    assert dataset.metadata.cite_as == HOSTILE[5]
    rows = list(dataset.records("structures"))
    table = pq.read_table(hostile / "index.parquet").to_pylist()
    assert len(rows) == len(table) == 20
    for row, expected in zip(rows, table, strict=True):
        assert row["structures/n_atoms"] == expected["n_atoms"]
        said = row["structures/structure_id"]
        assert (said.decode() if isinstance(said, bytes) else said) == expected["structure_id"]


@pytest.mark.filterwarnings("ignore")
def test_its_own_library_refuses_what_is_damaged(taught_store: Store, tmp_path: Path) -> None:
    mlcroissant = pytest.importorskip("mlcroissant")
    target = write_croissant(
        taught_store.path, tmp_path / "metadata.json", url="https://example.org/s.zarr"
    )
    document = json.loads(target.read_text())
    assert document["url"] == "https://example.org/s.zarr"
    assert document["distribution"][0]["contentUrl"].startswith("https://example.org/s.zarr/")
    # A check that accepts anything would prove nothing.
    document["recordSet"][0]["field"][0]["source"]["fileObject"]["@id"] = "no such file"
    with pytest.raises(mlcroissant.ValidationError):
        mlcroissant.Dataset(jsonld=document)


def test_files_that_could_not_be_found_from_it_are_refused(
    taught_store: Store, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match="--url"):
        write_croissant(taught_store.path, tmp_path / "elsewhere" / "metadata.json")
    with pytest.raises(StoreError, match="beside the store"):
        write_croissant(taught_store.path, Path(str(taught_store.path)) / "metadata.json")
