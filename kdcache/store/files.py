"""The files of a store by their names within it: the one door to a disk or a server.

Owns finding and reading bytes; what they mean is everybody else's. Read only, safe to use from
several threads. Invariant: no name leads out of the store, and all files read through one object
are of one directory, whatever is renamed meanwhile.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from kdcache.errors import StoreError, named, naming
from kdcache.store.ahead import DiskAhead, ask_for
from kdcache.store.location import StoreUrl
from kdcache.store.shards import Bytes, read_into

T = TypeVar("T")
R = TypeVar("R")

READ_AT_ONCE = 4 * 2**20
# Where the system has O_PATH, a directory that may be searched but not listed is enough.
DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class Range(NamedTuple):
    """Bytes [start, end) of a file of a store."""

    name: str
    start: int
    end: int


class OpenFile(Protocol):
    """A file of a store, open for reading."""

    def tail(self, n_bytes: int) -> tuple[int, bytes]:
        """Size of the file, and its last bytes: fewer where it is shorter."""

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> None:
        """Fill buffers one after another; StoreError where the file ends before."""

    def close(self) -> None:
        """Give it back."""


class StoreFiles(Protocol):
    """The files of one store. A missing file is a FileNotFoundError, all else a StoreError."""

    @property
    def location(self) -> Path | StoreUrl:
        """Of the store."""

    @property
    def is_remote(self) -> bool:
        """A request takes as long as reading megabytes."""

    @property
    def asks_ahead(self) -> bool:
        """`fetched` gains something by being told ranges; else they need not be found out."""

    def where(self, name: str) -> str:
        """A file's full path or address, for messages."""

    def size(self, name: str) -> int:
        """Bytes in a file."""

    def read(self, name: str, limit: int) -> bytes:
        """All of a small file; StoreError, before anything is read, where it exceeds `limit`."""

    def stream(self, name: str) -> Iterator[bytes]:
        """All of a file, piece by piece."""

    def open(self, name: str) -> OpenFile:
        """A file, to read parts of it."""

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Results of `work`, several at once where waiting is what takes the time."""

    def fetched(self, ranges: Sequence[Range]) -> AbstractContextManager[None]:
        """Within it, these ranges are on their way or there, all at once.

        What is read on this thread meanwhile tells whether the next ones shall be asked for.
        """

    def forget(self, name: str) -> bool:
        """Drop a copy of a file that turned out damaged; whether there was one."""


class LocalFile:
    """An open file on a disk: reads go straight into the caller's memory."""

    __slots__ = ("_descriptor", "_where")

    def __init__(self, descriptor: int, where: str) -> None:
        self._descriptor = descriptor
        self._where = where

    def tail(self, n_bytes: int) -> tuple[int, bytes]:
        with naming(self._where):
            size = os.fstat(self._descriptor).st_size
            return size, os.pread(self._descriptor, n_bytes, max(0, size - n_bytes))

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> None:
        try:
            read_into(self._descriptor, self._where, buffers, offset)
        except OSError as error:
            raise named(error, self._where) from None

    def close(self) -> None:
        os.close(self._descriptor)


class LocalFiles:
    """A store in a directory, which is held open: a store that is moved is still read, and one that
    takes its name is not mixed with it."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.location = path
        self._root = str(path)
        self._paths: dict[str, str] = {}
        self._directory = -1
        self._ahead = DiskAhead()
        self._missing: OSError | None = None
        try:
            self._directory = os.open(path, DIRECTORY)
        except OSError as error:
            self._missing = error.with_traceback(None)  # said when a file is asked for
        else:
            weakref.finalize(self, os.close, self._directory)

    @property
    def asks_ahead(self) -> bool:
        return self._ahead.gains

    def where(self, name: str) -> str:
        path = self._paths.get(name)
        if path is None:  # joined once: a small read takes little longer than that
            path = self._paths[name] = os.path.join(self._root, inside(name))
        return path

    def size(self, name: str) -> int:
        where = self.where(name)
        try:
            return os.stat(name, dir_fd=self._directory).st_size
        except OSError as error:
            raise named(self._missing or error, where) from None

    def read(self, name: str, limit: int) -> bytes:
        where = self.where(name)
        with os.fdopen(self._descriptor(name, where), "rb") as file, naming(where):
            check_size(where, os.fstat(file.fileno()).st_size, limit)
            return file.read()

    def stream(self, name: str) -> Iterator[bytes]:
        with os.fdopen(self._descriptor(name, self.where(name)), "rb") as file:
            while piece := file.read(READ_AT_ONCE):
                yield piece

    def open(self, name: str) -> LocalFile:
        where = self.where(name)
        return LocalFile(self._descriptor(name, where), where)

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [work(item) for item in items]

    @contextmanager
    def fetched(self, ranges: Sequence[Range]) -> Iterator[None]:
        with self._ahead.reading():
            for name, parts in groupby(ranges, key=lambda part: part.name):
                # What is missing, reading says.
                with suppress(OSError):
                    descriptor = self._descriptor(name, self.where(name))
                    for part in parts:
                        ask_for(descriptor, part.start, part.end)
                    os.close(descriptor)
            yield

    def forget(self, name: str) -> bool:
        return False

    def _descriptor(self, name: str, where: str) -> int:
        try:
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._directory)
        except OSError as error:
            raise named(self._missing or error, where) from None


def disk_size(directory: Path) -> int:
    """Bytes of all files in a directory and below."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def inside(name: str) -> str:
    """A name that stays within the store.

    Raises:
        StoreError: it does not.
    """
    if not name or name[0] == "/" or ".." in name.split("/"):
        raise StoreError(f"{name!r} is outside the store. It is not read.")
    return name


def check_size(where: str, size: int, limit: int) -> None:
    """A file is small enough to be read whole.

    Raises:
        StoreError: it is not.
    """
    if size > limit:
        raise StoreError(
            f"{where} has {size} bytes, at most {limit} are expected of it. It is not read."
        )
