"""A store as one zip: the same bytes every time, read by others, and safe to take."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.storage import ZipStore

from kdcache.errors import StoreError
from kdcache.sharing import pack_store, publish_store, pull_store, select_rows
from kdcache.store import open_store, verify_store
from kdcache.store.manifest import MANIFEST
from kdcache.store.zipped import ZipFiles
from tests.store.sample import STRUCTURES, TEACHER, files_of
from tests.store.serving import assert_same, flip

FIELDS = [f"structures/{spec.name}" for spec in STRUCTURES]
FIELDS += [f"teachers/painn/{spec.name}" for spec in TEACHER]


@pytest.fixture(scope="module")
def packed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    path = tmp_path_factory.mktemp("packed") / "finished.zip"
    pack_store(finished, path)
    return path


def test_the_same_store_gives_the_same_zip(copied: Path, packed: Path, tmp_path: Path) -> None:
    for k, file in enumerate(sorted(copied.rglob("*"))):
        os.utime(file, (k, k))
        file.chmod(0o700)
    pack_store(copied, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_entries_are_stored_sorted_and_dated_alike(packed: Path, finished: Path) -> None:
    with zipfile.ZipFile(packed) as archive:
        assert archive.testzip() is None
        listed = archive.infolist()
        assert {one.filename: archive.read(one) for one in listed} == files_of(finished)
    assert [one.filename for one in listed] == sorted(one.filename for one in listed)
    assert {one.compress_type for one in listed} == {zipfile.ZIP_STORED}
    assert {one.date_time for one in listed} == {(1980, 1, 1, 0, 0, 0)}


def with_zarr_python(packed: Path, name: str) -> npt.NDArray[np.generic]:
    with ZipStore(packed, mode="r") as store:
        return np.asarray(zarr.open_group(store, mode="r")[name][:])  # type: ignore[index]


def with_tensorstore(packed: Path, name: str) -> npt.NDArray[np.generic]:
    import tensorstore

    inside = {"driver": "zip", "base": {"driver": "file", "path": str(packed)}, "path": f"{name}/"}
    spec = {"driver": "zarr3", "kvstore": inside}
    return np.asarray(tensorstore.open(spec, read=True).result().read().result())


@pytest.mark.parametrize("read", [with_zarr_python, with_tensorstore])
@pytest.mark.parametrize("name", FIELDS)
def test_other_readers_open_it(
    packed: Path,
    finished: Path,
    name: str,
    read: Callable[[Path, str], npt.NDArray[np.generic]],
) -> None:
    np.testing.assert_array_equal(
        read(packed, name), np.asarray(zarr.open_array(finished / name, mode="r")[:])
    )


def test_it_is_read_where_it_lies(packed: Path, finished: Path) -> None:
    files = ZipFiles(packed)
    assert files.names == sorted(files_of(finished))
    assert_same(open_store(files), open_store(finished))
    report, local = verify_store(files), verify_store(finished)
    assert (report.problems, report.summary) == ([], local.summary)


def test_it_is_unpacked_and_published(packed: Path, finished: Path, tmp_path: Path) -> None:
    pull_store(packed, tmp_path / "unpacked.zarr")
    publish_store(packed, tmp_path / "published.zarr", fields=["node"])
    select_rows(packed, sample=7).write(tmp_path / "rows.zarr")
    assert files_of(tmp_path / "unpacked.zarr") == files_of(finished)
    assert verify_store(tmp_path / "published.zarr").problems == []
    assert len(open_store(tmp_path / "rows.zarr")) == 7


def test_a_damaged_store_is_not_packed_and_nothing_is_overwritten(
    copied: Path, packed: Path, tmp_path: Path
) -> None:
    flip(copied / "teachers/painn/node/c/0/0")
    with pytest.raises(StoreError, match=r"node/c/0/0 has digest"):
        pack_store(copied, tmp_path / "damaged.zip")
    (tmp_path / "mine.zip").write_text("mine")
    with pytest.raises(StoreError, match="nothing is overwritten"):
        pack_store(copied, tmp_path / "mine.zip")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copied.zarr", "mine.zip"]


def write_zip(
    path: Path, contents: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] | None = None
) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name)
            if change is not None:
                change(entry)
            archive.writestr(entry, content)
    return path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../evil", "would lead out of the store"),
        ("structures/../../evil", "would lead out of the store"),
        ("/tmp/evil", "would lead out of the store"),
        ("structures//evil", "would lead out of the store"),
        ("./evil", "would lead out of the store"),
        ("..\\evil", "would lead out of the store"),
        ("C:evil", "would lead out of the store"),
        ("MANIFEST.json", "one file on some disks"),
        ("structures/Zarr.json", "one file on some disks"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(
    finished: Path, tmp_path: Path, name: str, said: str
) -> None:
    path = write_zip(tmp_path / "evil.zip", {**files_of(finished), name: b"evil"})
    with pytest.raises(StoreError, match=said):
        pull_store(path, tmp_path / "target.zarr")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evil.zip"]


def test_a_file_that_is_there_twice_is_refused(finished: Path, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "evil.zip", dict(files_of(finished)))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(MANIFEST, b"another")
    with pytest.raises(StoreError, match="one file on some disks"):
        pull_store(path, tmp_path / "target.zarr")


def as_link(entry: zipfile.ZipInfo) -> None:
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16


def as_compressed(entry: zipfile.ZipInfo) -> None:
    entry.compress_type = zipfile.ZIP_DEFLATED


@pytest.mark.parametrize(("change", "said"), [(as_link, "a link"), (as_compressed, "compressed")])
def test_links_and_compressed_files_are_refused(
    finished: Path, tmp_path: Path, change: Callable[[zipfile.ZipInfo], None], said: str
) -> None:
    path = write_zip(tmp_path / "evil.zip", dict(files_of(finished)), change)
    with pytest.raises(StoreError, match=said):
        pull_store(path, tmp_path / "target.zarr")


def test_folders_that_other_programs_list_are_no_harm(finished: Path, tmp_path: Path) -> None:
    contents = {"structures/": b"", "teachers/": b"", **files_of(finished)}
    pull_store(write_zip(tmp_path / "zipped.zip", contents), tmp_path / "target.zarr")
    assert files_of(tmp_path / "target.zarr") == files_of(finished)


def test_a_stray_file_is_not_unpacked(finished: Path, tmp_path: Path) -> None:
    path = write_zip(tmp_path / "more.zip", {**files_of(finished), "structures/virus.exe": b"x"})
    pull_store(path, tmp_path / "target.zarr")
    assert files_of(tmp_path / "target.zarr") == files_of(finished)


@pytest.mark.parametrize("case", ["on another", "beside", "far off", "endless"])
def test_entries_that_are_not_where_they_are_listed_are_refused(
    packed: Path, tmp_path: Path, case: str
) -> None:
    content = bytearray(packed.read_bytes())
    places = [k for k in range(len(content)) if content[k : k + 4] == b"PK\x01\x02"]
    before = struct.unpack_from("<I", content, places[4] + 42)[0]
    if case == "endless":  # the last entry: no other lies behind it
        struct.pack_into("<II", content, places[-1] + 20, 2**31, 2**31)
    else:
        offset = {"on another": before, "beside": before + 40, "far off": 2**32 - 2}[case]
        struct.pack_into("<I", content, places[5] + 42, offset)
    (tmp_path / "evil.zip").write_bytes(content)
    said = "overlaps" if case in ("on another", "endless") else r"overlaps|no entry where"
    with pytest.raises(StoreError, match=said):
        ZipFiles(tmp_path / "evil.zip")


def test_a_zip_that_is_cut_off_or_damaged_is_refused(packed: Path, tmp_path: Path) -> None:
    content, path = packed.read_bytes(), tmp_path / "cut.zip"
    for end in np.random.default_rng(2).integers(4, len(content), 20).tolist():
        path.write_bytes(content[:end])
        with pytest.raises(StoreError, match=r"cut\.zip is no whole zip file"):
            pull_store(path, tmp_path / "target.zarr")
    generator = np.random.default_rng(7)
    for _ in range(60):
        changed = bytearray(content)
        for place in generator.integers(0, len(content), 40).tolist():
            changed[place] = int(generator.integers(256))
        path.write_bytes(changed)
        with pytest.raises(StoreError) as caught:
            pull_store(path, tmp_path / "target.zarr")
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "target.zarr.incoming", ignore_errors=True)


def test_a_zip_of_something_else_is_said(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "photos.zip", {"photo.jpg": b"x"})
    with pytest.raises(StoreError, match=r"photos\.zip is no kdcache store"):
        pull_store(path, tmp_path / "target.zarr")
