"""Copies of a remote store's files on a local disk, by their SHA-256 and within a bound.

Owns a directory that any number of processes may share. Invariant: a file stands under its digest
only after its bytes were found to have it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from kdcache.errors import ConfigError, StoreError
from kdcache.store.files import LocalFile, OpenFile, Range, StoreFiles, check_size
from kdcache.store.location import StoreUrl
from kdcache.store.shards import PARTIAL_SUFFIX

T = TypeVar("T")
R = TypeVar("R")

DIRECTORY_VARIABLE = "KDCACHE_STORE_CACHE"
SIZE_VARIABLE = "KDCACHE_STORE_CACHE_SIZE"
DEFAULT_SIZE = "20GB"
LOCK = "lock"
TOUCHED_EVERY = 60.0  # s; when a file was last used need not be known better
# A digest, or one on its way.
COPY = re.compile(rf"[0-9a-f]{{64}}({re.escape(PARTIAL_SUFFIX)})?")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of a size.

    Raises:
        ConfigError: it is none.

    Example:
        >>> parse_size("20GB")
        20000000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?B)", text.strip())
    size = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if not 1 <= size < 2**63:
        raise ConfigError(
            f"{text!r} is no size of a cache. Give a number above 0 with a unit: 500MB, 20GB, 1TB."
        )
    return int(size)


class StoreCache:
    """A directory of files by digest.

    Args:
        directory: made when the first file comes.
        n_bytes: at most so many; the least recently used go first.
    """

    def __init__(self, directory: Path, n_bytes: int) -> None:
        self.directory = directory
        self.n_bytes = n_bytes
        self._touched: dict[str, float] = {}

    @classmethod
    def chosen(cls, directory: str | Path | None, n_bytes: int | None) -> StoreCache | None:
        """The cache that is asked for, here or in the environment; None where there is none.

        Raises:
            ConfigError: a size that is none.
        """
        directory = directory or os.environ.get(DIRECTORY_VARIABLE)
        if not directory:
            return None
        if n_bytes is None:
            n_bytes = parse_size(os.environ.get(SIZE_VARIABLE) or DEFAULT_SIZE)
        return cls(Path(directory), n_bytes)

    def path(self, digest: str) -> Path:
        """Where a file with this digest stands."""
        return self.directory / digest[:2] / digest

    def open(self, digest: str) -> int | None:
        """A descriptor of a file, which keeps it from being removed; None where there is none."""
        try:
            descriptor = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        now = time.monotonic()
        if now - self._touched.get(digest, -TOUCHED_EVERY) >= TOUCHED_EVERY:
            self._touched[digest] = now
            with suppress(OSError):  # a cache shared read only
                os.utime(descriptor)
        return descriptor

    def discard(self, digest: str) -> bool:
        """Remove a damaged file; whether there was one."""
        try:
            self.path(digest).unlink()
        except FileNotFoundError:
            return False
        return True

    def add(
        self, digest: str, size: int, pieces: Callable[[], Iterable[bytes]], where: str
    ) -> bool:
        """Keep a file; whoever comes second waits for the first, in whatever process.

        Args:
            digest: SHA-256 it must have.
            size: bytes it has.
            pieces: fetches it.
            where: it comes from, for messages.

        Returns:
            Whether it is kept: not, where the bound leaves no room.

        Raises:
            StoreError: it has another digest, or the disk is full.
        """
        if size > self.n_bytes:
            return False
        target = self.path(digest)
        partial = target.with_name(digest + PARTIAL_SUFFIX)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(partial) as descriptor:
                kept, placed = target.exists(), False
                try:
                    if not kept and self._reserve(descriptor, size):
                        _fill(descriptor, digest, size, pieces(), where)
                        os.replace(partial, target)
                        kept = placed = True
                finally:
                    if not placed:
                        partial.unlink(missing_ok=True)
                return kept
        except OSError as error:
            if error.errno is None:  # the server's, in words
                raise
            raise StoreError(
                f"The cache {self.directory} cannot keep {where}: {error.strerror}. Name another "
                f"--store-cache, a smaller --store-cache-size, or none."
            ) from None

    def _reserve(self, descriptor: int, size: int) -> bool:
        """Make room, removing what was not used for longest and is not open."""
        with _locked(self.directory / LOCK):
            files = sorted(self._files())
            ours = os.fstat(descriptor).st_ino
            total = sum(n_bytes for _, n_bytes, _, inode in files if inode != ours)
            for _, n_bytes, path, inode in files:
                if total + size <= self.n_bytes:
                    break
                if inode != ours and _remove_unused(path):
                    total -= n_bytes
            if total + size > self.n_bytes:
                return False
            # The others count what is on its way, too.
            os.ftruncate(descriptor, size)
            return True

    def _files(self) -> Iterator[tuple[int, int, str, int]]:
        """Last use, size, path and inode of every copy; what else lies there is not ours."""
        for folder in os.scandir(self.directory):
            if folder.is_dir() and len(folder.name) == 2:
                for file in os.scandir(folder):
                    if not COPY.fullmatch(file.name) or file.name[:2] != folder.name:
                        continue
                    with suppress(FileNotFoundError):
                        status = file.stat()
                        yield status.st_mtime_ns, status.st_size, file.path, status.st_ino


class CachedFiles:
    """A remote store of which whole files are kept as they are needed.

    Args:
        files: of the store.
        cache: where copies are kept.
        digests: SHA-256 of every file, from the manifest.
    """

    is_remote = True
    asks_ahead = True

    def __init__(self, files: StoreFiles, cache: StoreCache, digests: Mapping[str, str]) -> None:
        self._files = files
        self._cache = cache
        self._digests = digests

    @property
    def location(self) -> Path | StoreUrl:
        return self._files.location

    def where(self, name: str) -> str:
        return self._files.where(name)

    def size(self, name: str) -> int:
        return self._files.size(name)

    def read(self, name: str, limit: int) -> bytes:
        for _ in range(2):
            descriptor = self._fetch(name)
            if descriptor is None:
                break
            with open(descriptor, "rb") as file:
                check_size(self.where(name), os.fstat(descriptor).st_size, limit)
                content = file.read()
            if hashlib.sha256(content).hexdigest() == self._digests[name]:
                return content
            self.forget(name)
        return self._files.read(name, limit)

    def stream(self, name: str) -> Iterator[bytes]:
        # Whoever wants a file whole checks the store, not the copies.
        return self._files.stream(name)

    def open(self, name: str) -> OpenFile:
        descriptor = self._fetch(name)
        if descriptor is None:
            return self._files.open(name)
        return LocalFile(descriptor, self.where(name))

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return self._files.each(work, items)

    @contextmanager
    def fetched(self, ranges: Sequence[Range]) -> Iterator[None]:
        names = list(dict.fromkeys(part.name for part in ranges))
        wanted = [name for name in names if not self._is_here(name)]
        kept = zip(wanted, self.each(self._keep, wanted), strict=True)
        streamed = {name for name, is_kept in kept if not is_kept}
        with self._files.fetched([part for part in ranges if part.name in streamed]):
            yield

    def forget(self, name: str) -> bool:
        digest = self._digests.get(name)
        return digest is not None and self._cache.discard(digest)

    def _is_here(self, name: str) -> bool:
        digest = self._digests.get(name)
        return digest is not None and self._cache.path(digest).exists()

    def _keep(self, name: str) -> bool:
        descriptor = self._fetch(name)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def _fetch(self, name: str) -> int | None:
        """A descriptor of the copy, made if missing; None where it cannot be kept."""
        digest = self._digests.get(name)
        if digest is None:
            return None
        descriptor = self._cache.open(digest)
        if descriptor is not None:
            return descriptor
        size, where = self._files.size(name), self._files.where(name)
        kept = self._cache.add(digest, size, lambda: self._files.stream(name), where)
        return self._cache.open(digest) if kept else None


def _fill(descriptor: int, digest: str, size: int, pieces: Iterable[bytes], where: str) -> None:
    found, done = hashlib.sha256(), 0
    for piece in pieces:
        if done + len(piece) > size:
            raise StoreError(f"{where} grew beyond {size} bytes while it was read. Try again.")
        found.update(piece)
        view = memoryview(piece)
        while view:
            written = os.pwrite(descriptor, view, done)
            done += written
            view = view[written:]
    if found.hexdigest() != digest:
        raise StoreError(
            f"{where} has digest {found.hexdigest()[:12]}… ({done} bytes), the manifest says "
            f"{digest[:12]}…: it was edited, damaged or cut off on the server. Its rows would be "
            f"wrong. Put the store there again."
        )


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """A descriptor of a file that nobody else holds; made if missing."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # While we waited, the holder may have renamed or removed what we opened.
            try:
                same = os.path.samestat(os.fstat(descriptor), os.stat(path))
            except FileNotFoundError:
                same = False
            if same:
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _remove_unused(path: str) -> bool:
    """Remove a file unless somebody has it open."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        with suppress(FileNotFoundError):
            os.unlink(path)
        return True
    finally:
        os.close(descriptor)
