"""The files of a store whose small ones are read once and kept.

Owns what a move of a store goes by: every look at its manifest sees the one read first. Invariant:
two reads of a name through one object give the same bytes, whatever happens at the source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from kdcache.errors import ConfigError, StoreError
from kdcache.store.files import OpenFile, Range, StoreFiles, check_size
from kdcache.store.location import StoreUrl, store_location, without_file_scheme
from kdcache.store.manifest import MANIFEST, MAX_MANIFEST_BYTES
from kdcache.store.reader import store_files
from kdcache.store.remote import RemoteFiles
from kdcache.store.zipped import ZipFiles, is_zip

# A store: its path, its address, or its files.
Source = str | Path | StoreFiles

T = TypeVar("T")
R = TypeVar("R")


class HeldFiles:
    """A store of which what was read whole is remembered: manifest, index, documents.

    Args:
        files: of the store.
    """

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._held: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @property
    def is_remote(self) -> bool:
        return self._files.is_remote

    @property
    def asks_ahead(self) -> bool:
        return self._files.asks_ahead

    @property
    def location(self) -> Path | StoreUrl:
        return self._files.location

    @property
    def begins_anywhere(self) -> bool:
        """`stream` may begin within a file without reading what lies before."""
        return isinstance(self._files, RemoteFiles)

    def where(self, name: str) -> str:
        return self._files.where(name)

    def size(self, name: str) -> int:
        return self._files.size(name)

    def read(self, name: str, limit: int) -> bytes:
        with self._lock:
            known = self._held.get(name)
        if known is None:
            content = self._files.read(name, limit)
            with self._lock:
                known = self._held.setdefault(name, content)
        check_size(self.where(name), len(known), limit)
        return known

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """A file from byte `start` on, which is 0 unless `begins_anywhere`."""
        if isinstance(self._files, RemoteFiles):
            return self._files.stream(name, start)
        return self._files.stream(name)

    def open(self, name: str) -> OpenFile:
        return self._files.open(name)

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return self._files.each(work, items)

    def fetched(self, ranges: Sequence[Range]) -> AbstractContextManager[None]:
        return self._files.fetched(ranges)

    def forget(self, name: str) -> bool:
        return self._files.forget(name)

    def has_changed(self) -> bool:
        """Whether the source holds another manifest by now, or none.

        Raises:
            StoreError: a server does not answer.
        """
        try:
            now = self._files.read(MANIFEST, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            return True
        return now != self.read(MANIFEST, MAX_MANIFEST_BYTES)


def check_apart(source: Path | StoreUrl, target: Path | StoreUrl) -> None:
    """A source and a target of which neither lies within the other.

    Raises:
        ConfigError: one does, or they are the same.
    """
    here, there = _parts(source), _parts(target)
    shared = min(len(here), len(there))
    if here[:shared] != there[:shared]:
        return
    if here == there:
        raise ConfigError(f"{source} is source and target. Name another target.")
    inner, outer = (source, target) if len(here) > len(there) else (target, source)
    raise ConfigError(
        f"{inner} lies within {outer}. One would go, or be passed on, with the other. Name another "
        f"target."
    )


def _parts(place: Path | StoreUrl) -> tuple[str, ...]:
    return place.resolve().parts if isinstance(place, Path) else tuple(place.split("/"))


def source_files(source: Source) -> HeldFiles:
    """The files of a store at a path, within a zip file, or at an address.

    Raises:
        StoreError: an address that is none, a zip that no packed store is, or the package for
            remote stores is missing.
    """
    if not isinstance(source, str | Path):
        return source if isinstance(source, HeldFiles) else HeldFiles(source)
    path = without_file_scheme(source)
    if is_zip(path):
        return HeldFiles(ZipFiles(Path(path)))
    location = store_location(path)
    if isinstance(location, StoreUrl) and location.endswith(".zip"):
        raise StoreError(
            f"{location} is a packed store on a server, which is not read in place. Fetch the file "
            f"and name it here."
        )
    return HeldFiles(store_files(str(location)))
