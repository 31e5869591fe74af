"""A store as one zip: the same bytes every time, read by others, and safe to take."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.storage import ZipStore

from kdcache.errors import StoreError
from kdcache.sharing import Report, pack_store, publish_store, pull_store, select_rows
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


def test_what_a_killed_packing_left_is_begun_anew(
    copied: Path, packed: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.zip.packing.partial").write_bytes(bytes(10**6))
    pack_store(copied, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == packed.read_bytes()
    assert not (tmp_path / "x.zip.packing.partial").exists()


def test_two_packings_at_once_do_not_write_over_each_other(copied: Path, tmp_path: Path) -> None:
    partial = tmp_path / "x.zip.packing.partial"
    with open(partial, "wb") as file:
        file.write(b"of another process")
        file.flush()
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        with pytest.raises(StoreError, match=r"Another process is writing .*zip\.packing\.partial"):
            pack_store(copied, tmp_path / "x.zip")
    assert partial.read_bytes() == b"of another process"
    assert not (tmp_path / "x.zip").exists()


def test_a_file_that_came_meanwhile_is_not_overwritten(copied: Path, tmp_path: Path) -> None:
    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Any]:
        (tmp_path / "x.zip").write_text("mine")
        yield lambda n_bytes=1, /, note="": None

    with pytest.raises(StoreError, match=r"x\.zip exists, and nothing is overwritten"):
        pack_store(copied, tmp_path / "x.zip", progress)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copied.zarr", "x.zip"]
    assert (tmp_path / "x.zip").read_text() == "mine"


def test_a_disk_too_small_is_said_before_anything_is_packed(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Any = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"takes \d+ more bytes, 1000 are free"):
        pack_store(copied, tmp_path / "deep" / "x.zip")
    assert [file.name for file in tmp_path.iterdir()] == ["copied.zarr"]


def test_every_byte_is_counted_once(copied: Path, tmp_path: Path) -> None:
    counted: list[int] = []

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Any]:
        yield lambda n_bytes=1, /, note="": counted.append(n_bytes)

    moves: tuple[Callable[..., Report], ...] = (pack_store, publish_store, pull_store)
    for k, move in enumerate(moves):
        counted.clear()
        report = move(copied, tmp_path / str(k), progress=progress)
        size = sum(len(c) for name, c in files_of(copied).items() if name != MANIFEST)
        assert sum(counted) == report.n_bytes == report.bytes_moved == size


def test_a_store_beyond_the_plain_format_of_zip_is_written_and_read(
    finished: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the limits of 4 GiB and 65,535 entries were lower: sizes, places and counts of 64 bits
    are written, which readers take as they are."""
    with monkeypatch.context() as small:
        small.setattr(zipfile, "ZIP64_LIMIT", 400)
        small.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
        pack_store(finished, tmp_path / "large.zip")
    content = (tmp_path / "large.zip").read_bytes()
    assert content.count(b"PK\x06\x06") == 1  # the end of the list, in 64 bits
    assert len(content) > packed.stat().st_size
    files = ZipFiles(tmp_path / "large.zip")
    assert verify_store(files).problems == []
    assert_same(open_store(files), open_store(finished))
    for name in FIELDS:
        np.testing.assert_array_equal(
            with_zarr_python(tmp_path / "large.zip", name), with_zarr_python(packed, name)
        )
    pull_store(tmp_path / "large.zip", tmp_path / "back.zarr")
    assert files_of(tmp_path / "back.zarr") == files_of(finished)


def test_entries_beyond_4_gib_are_found(finished: Path, tmp_path: Path) -> None:
    """A file with a hole of 5 GiB, which takes no room on a disk."""
    path = tmp_path / "far.zip"
    with open(path, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("first", b"x")
        file.seek(5 * 2**30)
        archive.start_dir = file.tell()
        for name, content in files_of(finished).items():
            archive.writestr(name, content)
    assert path.stat().st_blocks * 512 < 2**21
    assert_same(open_store(ZipFiles(path)), open_store(finished))
    np.testing.assert_array_equal(
        with_zarr_python(path, FIELDS[0]), zarr.open_array(finished / FIELDS[0], mode="r")[:]
    )
    pull_store(path, tmp_path / "back.zarr")
    assert files_of(tmp_path / "back.zarr") == files_of(finished)


def entry_at(name: bytes, size: int, offset: int) -> bytes:
    """How an entry is listed at the end of a zip, in 64 bits."""
    extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
    fields = (b"PK\1\2", 45, 45, 0, 0, 0, 33, 0, 2**32 - 1, 2**32 - 1, len(name), len(extra))
    return (
        struct.pack("<4s6H3I5H2I", *fields[:7], *fields[7:12], 0, 0, 0, 0, 2**32 - 1) + name + extra
    )


def test_an_entry_beyond_4_gib_is_read_where_it_lies(tmp_path: Path) -> None:
    size, path = 5 * 2**30, tmp_path / "long.zip"
    with open(path, "wb") as file:
        file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, 0, 0, 0, 4, 0) + b"long")
        file.seek(size - 3, os.SEEK_CUR)
        file.write(b"end")
        place = file.tell()
        listed = entry_at(b"long", size, 0)
        file.write(listed)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(listed), place))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, place + len(listed), 1))
        file.write(
            struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, 2**32 - 1, 2**32 - 1, 0)
        )
    files = ZipFiles(path)
    assert files.size("long") == size
    assert files.open("long").tail(4) == (size, b"\0end")
    buffer = np.ones(5, np.uint8)
    files.open("long").read_into([buffer], size - 5)
    assert bytes(buffer) == b"\0\0end"
    with pytest.raises(StoreError, match=f"ends at byte {size}, {size + 1} are expected"):
        files.open("long").read_into([buffer], size - 4)


def test_more_entries_than_16_bits_count_are_found(finished: Path, tmp_path: Path) -> None:
    contents, n = files_of(finished), 66_000
    body, listed = io.BytesIO(), io.BytesIO()
    for name, content in [*contents.items(), *((f"more/{k}", b"") for k in range(n))]:
        start, raw = body.tell(), name.encode()
        sizes = (zlib.crc32(content), len(content), len(content), len(raw), 0)
        body.write(struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, *sizes) + raw + content)
        listed.write(
            struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, *sizes, 0, 0, 0, 0, start)
            + raw
        )
    count, place, size = n + len(contents), body.tell(), listed.tell()
    with open(tmp_path / "many.zip", "wb") as file:
        file.write(body.getvalue() + listed.getvalue())
        file.write(
            struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, place)
        )
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, place + size, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2**16 - 1, 2**16 - 1, size, place, 0))
    files = ZipFiles(tmp_path / "many.zip")
    assert len(files.names) == count
    assert_same(open_store(files), open_store(finished))
    np.testing.assert_array_equal(
        with_zarr_python(tmp_path / "many.zip", FIELDS[0]),
        zarr.open_array(finished / FIELDS[0], mode="r")[:],
    )


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


def as_device(entry: zipfile.ZipInfo) -> None:
    entry.create_system = 3
    entry.external_attr = (stat.S_IFCHR | 0o666) << 16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (as_link, "is a link or"),
        (as_device, "or no plain file"),
        (as_compressed, "is compressed, so that"),
    ],
)
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


def changed(packed: Path, place: int, content: bytes, target: Path) -> Path:
    """A packed store with the bytes at a place of the last entry in its list replaced."""
    whole = bytearray(packed.read_bytes())
    start = whole.rindex(b"PK\1\2") + place
    whole[start : start + len(content)] = content
    target.write_bytes(whole)
    return target


def test_encrypted_files_are_refused(packed: Path, tmp_path: Path) -> None:
    path = changed(packed, 8, b"\1\0", tmp_path / "evil.zip")
    with pytest.raises(StoreError, match=r"'zarr\.json' is encrypted"):
        ZipFiles(path)


def test_an_entry_of_two_sizes_is_refused(packed: Path, tmp_path: Path) -> None:
    size = ZipFiles(packed).size("zarr.json") - 1
    path = changed(packed, 20, struct.pack("<I", size), tmp_path / "evil.zip")
    with pytest.raises(StoreError, match=r"'zarr\.json' is compressed, so that"):
        ZipFiles(path)


def test_an_entry_that_does_not_begin_where_it_is_listed_is_refused(
    packed: Path, tmp_path: Path
) -> None:
    content = bytearray(packed.read_bytes())
    content[content.rindex(b"PK\3\4") + 3] = 5  # of the last entry, zarr.json
    (tmp_path / "evil.zip").write_bytes(content)
    with pytest.raises(StoreError, match=r"has no entry where it lists 'zarr\.json'"):
        ZipFiles(tmp_path / "evil.zip")


def test_an_entry_that_reaches_into_the_list_of_entries_is_refused(
    packed: Path, tmp_path: Path
) -> None:
    size = ZipFiles(packed).size("zarr.json") + 1
    path = changed(packed, 20, struct.pack("<II", size, size), tmp_path / "evil.zip")
    with pytest.raises(StoreError, match=r"'zarr\.json' overlaps another entry or the end"):
        ZipFiles(path)


@pytest.mark.parametrize("offset", [2**63, 2**64 - 1, 2**63 - 1, 2**40])
def test_places_that_no_file_has_are_refused(tmp_path: Path, offset: int) -> None:
    body = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, 0, 1, 1, 1, 0) + b"ax"
    listed = entry_at(b"a", 1, offset)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(listed), len(body), 0)
    (tmp_path / "good.zip").write_bytes(body + entry_at(b"a", 1, 0) + end)
    assert b"".join(ZipFiles(tmp_path / "good.zip").stream("a")) == b"x"
    (tmp_path / "evil.zip").write_bytes(body + listed + end)
    with pytest.raises(StoreError, match=r"'a' overlaps another entry or the end"):
        ZipFiles(tmp_path / "evil.zip")


def test_any_damage_to_the_list_of_entries_is_refused_or_harmless(tmp_path: Path) -> None:
    """Zip64's numbers, too: of the smallest zip, so that damage meets every field."""
    inner, path = io.BytesIO(), tmp_path / "evil.zip"
    with zipfile.ZipFile(inner, "w") as archive, archive.open("a", "w", force_zip64=True) as entry:
        entry.write(b"x")
    plain = inner.getvalue()
    listed, place = entry_at(b"a", 1, 0), plain.index(b"PK\1\2")
    large = plain[:place] + listed
    large += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(listed), place)
    large += struct.pack("<4sIQI", b"PK\6\7", 0, place + len(listed), 1)
    large += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65535, 65535, 2**32 - 1, 2**32 - 1, 0)
    generator, refused = np.random.default_rng(4), 0
    extremes = [0, 1, 2**15, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]
    for k in range(400):
        damaged = bytearray((plain, large)[k % 2])
        for _ in range(int(generator.integers(1, 4))):
            at, width = (
                int(generator.integers(place, len(damaged))),
                2 ** int(generator.integers(4)),
            )
            value = extremes[int(generator.integers(8))] % 2 ** (8 * width)
            damaged[at : at + width] = value.to_bytes(width, "little")[: len(damaged) - at]
        path.write_bytes(damaged)
        try:
            files = ZipFiles(path)
            assert all(len(b"".join(files.stream(name))) <= len(damaged) for name in files.names)
        except StoreError:  # one line, whatever it says
            refused += 1
    assert 100 < refused < 400


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
