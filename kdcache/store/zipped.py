"""The files of a store within one zip file, read where they lie.

Owns what of a zip is believed: plain entries, stored as they are, that do not overlap. Read only,
safe to use from several threads. Invariant: no name leads out of the store, no byte outside an
entry is read as its content, and nothing is unpacked.
"""

from __future__ import annotations

import os
import stat
import struct
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from kdcache.errors import StoreError, named, naming
from kdcache.store.ahead import DiskAhead, ask_for
from kdcache.store.files import READ_AT_ONCE, Range, check_size, inside
from kdcache.store.shards import FETCH_AGAIN, Bytes, read_into

T = TypeVar("T")
R = TypeVar("R")

ENCRYPTED = 0x1
LOCAL_HEADER = struct.Struct(
    "<4s22xHH"
)  # signature, …, bytes of the name, bytes of the extra field
LOCAL_SIGNATURE = b"PK\x03\x04"


class Entry(NamedTuple):
    """Where the content of a file begins, and its bytes."""

    start: int
    size: int


class ZipFiles:
    """A store in a zip file, as `kdcache pack` writes it.

    Raises:
        FileNotFoundError: there is no such file.
        StoreError: it is no zip, or has entries that no packed store has.
    """

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.location = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)
        self._entries = _entries(path, self._descriptor)
        self._ahead = DiskAhead()

    @property
    def asks_ahead(self) -> bool:
        return self._ahead.gains

    @property
    def names(self) -> list[str]:
        """Of all files in it."""
        return sorted(self._entries)

    def where(self, name: str) -> str:
        return f"{self.location}/{inside(name)}"

    def size(self, name: str) -> int:
        return self._entry(name).size

    def read(self, name: str, limit: int) -> bytes:
        check_size(self.where(name), self._entry(name).size, limit)
        return b"".join(self.stream(name))

    def stream(self, name: str) -> Iterator[bytes]:
        start, size = self._entry(name)
        done = 0
        while done < size:
            with naming(self.where(name)):
                piece = os.pread(self._descriptor, min(READ_AT_ONCE, size - done), start + done)
            if not piece:
                raise StoreError(f"{self.location} ends within {name}. Fetch it again.")
            done += len(piece)
            yield piece

    def open(self, name: str) -> ZippedFile:
        return ZippedFile(self, self._descriptor, self._entry(name), self.where(name))

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [work(item) for item in items]

    @contextmanager
    def fetched(self, ranges: Sequence[Range]) -> Iterator[None]:
        with self._ahead.reading():
            for part in ranges:
                start = self._entry(part.name).start
                ask_for(self._descriptor, start + part.start, start + part.end)
            yield

    def forget(self, name: str) -> bool:
        return False

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[inside(name)]
        except KeyError:
            raise FileNotFoundError(f"{self.where(name)} is not there") from None


class ZippedFile:
    """A file within a zip: the range of bytes it is there."""

    __slots__ = ("_descriptor", "_entry", "_files", "_where")

    def __init__(self, files: ZipFiles, descriptor: int, entry: Entry, where: str) -> None:
        self._files = files  # keeps the descriptor open
        self._descriptor = descriptor
        self._entry = entry
        self._where = where

    def tail(self, n_bytes: int) -> tuple[int, bytes]:
        start, size = self._entry
        n_bytes = min(n_bytes, size)
        with naming(self._where):
            return size, os.pread(self._descriptor, n_bytes, start + size - n_bytes)

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> None:
        start, size = self._entry
        wanted = sum(buffer.nbytes for buffer in buffers)
        if offset + wanted > size:
            raise StoreError(
                f"{self._where} ends at byte {size}, {offset + wanted} are expected. {FETCH_AGAIN}"
            )
        try:
            read_into(self._descriptor, self._where, buffers, start + offset)
        except OSError as error:
            raise named(error, self._where) from None

    def close(self) -> None:
        pass


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Whether a plain file is at a path, and begins as a zip does."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in (LOCAL_SIGNATURE, b"PK\x05\x06")
    except OSError:
        return False


def check_names(names: Iterable[str], where: str) -> None:
    """Names that any file system keeps apart.

    Raises:
        StoreError: one leads out of the store, occurs twice, or differs from another in case alone.
    """
    seen: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts):
            raise StoreError(
                f"{where} names {name!r}, which would lead out of the store. Nothing of it is "
                f"used: it was not packed by kdcache."
            )
        other = seen.setdefault(name.casefold(), name)
        if other is not name:
            raise StoreError(
                f"{where} names {other!r} and {name!r}, which are one file on some disks. One "
                f"would overwrite the other; nothing of it is used."
            )


def _entries(path: Path, descriptor: int) -> dict[str, Entry]:
    try:
        with open(descriptor, "rb", closefd=False) as file, zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError) as error:
        raise StoreError(
            f"{path} is no whole zip file ({error}): it is cut off, or another kind of file. "
            f"Fetch it again."
        ) from None
    check_names((one.filename.removesuffix("/") for one in listed), str(path))
    # Behind the entries lies the list of them, which is nobody's content.
    limit = archive.start_dir
    found: dict[str, Entry] = {}
    end = 0
    for one in sorted(listed, key=lambda entry: entry.header_offset):
        if one.filename.endswith("/") and not one.file_size:
            continue  # a folder, as other programs list them
        _check_plain(path, one)
        if not end <= one.header_offset <= limit:
            raise StoreError(_overlap(path, one))
        header = os.pread(descriptor, LOCAL_HEADER.size, one.header_offset)
        if len(header) < LOCAL_HEADER.size or header[:4] != LOCAL_SIGNATURE:
            raise StoreError(
                f"{path} has no entry where it lists {one.filename!r}. Fetch it again."
            )
        _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        start = one.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
        if start + one.file_size > limit:
            raise StoreError(_overlap(path, one))
        end = start + one.file_size
        found[one.filename] = Entry(start, one.file_size)
    return found


def _overlap(path: Path, entry: zipfile.ZipInfo) -> str:
    return (
        f"{path}: {entry.filename!r} overlaps another entry or the end of the file. It is damaged, "
        f"or made to deceive; nothing of it is used."
    )


def _check_plain(path: Path, entry: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise StoreError(
            f"{path}: {entry.filename!r} is a link or no plain file. A packed store holds none; "
            f"nothing of it is used."
        )
    if entry.flag_bits & ENCRYPTED:
        raise StoreError(f"{path}: {entry.filename!r} is encrypted. Pack the store again.")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise StoreError(
            f"{path}: {entry.filename!r} is compressed, so that no part of it can be read and its "
            f"size may deceive. Unpack it otherwise, or pack the store with kdcache pack."
        )
