"""The files of a store on a server, read in parts: HTTP, S3, Google Cloud Storage, Azure.

Owns requests: how many at once, how often tried, what a failure means to a user. The protocols are
obstore's (an extra). Invariant: a request ends, in bytes or in one line that names the address.
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

from kdcache.errors import StoreError, reason_of
from kdcache.store.files import READ_AT_ONCE, Range, check_size, inside
from kdcache.store.location import StoreUrl
from kdcache.store.shards import FETCH_AGAIN, Bytes

T = TypeVar("T")
R = TypeVar("R")

AT_ONCE = 16  # requests of one open store
ATTEMPTS = 5
FIRST_WAIT = 0.25  # s; doubled after every failure, so the last attempt is after 4 s
# A stalled connection is given up after the first, a whole large file after the second.
CLIENT = {"connect_timeout": "10s", "read_timeout": "30s", "timeout": "15m"}


class ObjectClient(Protocol):
    """What is asked of obstore's stores."""

    def head(self, path: str) -> Any: ...
    def get(self, path: str, *, options: Any = None) -> Any: ...


class RemoteFiles:
    """A store on a server.

    Args:
        location: address of the store, for messages.
        client: an obstore store whose root is the folder; by default made of the address.

    Raises:
        StoreError: obstore is not installed, or the address lacks something.
    """

    is_remote = True
    asks_ahead = True

    def __init__(self, location: StoreUrl, client: ObjectClient | None = None) -> None:
        self.location = location
        self._client = connect(location) if client is None else client
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="kdcache-fetch")
        self._lock = threading.Lock()
        self._coming: dict[Range, tuple[Future[bytes], int]] = {}

    def where(self, name: str) -> str:
        return f"{self.location}/{inside(name)}"

    def size(self, name: str) -> int:
        return int(self._try(name, lambda: self._client.head(inside(name)))["size"])

    def read(self, name: str, limit: int) -> bytes:
        def get() -> bytes:
            result = self._client.get(inside(name))
            check_size(self.where(name), int(result.meta["size"]), limit)
            return self._body(name, result, limit)

        return self._try(name, get)

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """A file from byte `start` on, piece by piece; NoRanges where only the whole is served."""
        done, failures = start, 0
        while True:
            options = {"range": {"offset": done}} if done else None
            try:
                result = self._client.get(inside(name), options=options)
                size = int(result.meta["size"])
                for piece in result.stream(READ_AT_ONCE):
                    done += len(piece)
                    yield bytes(piece)
                if done >= size:
                    return
                raise ConnectionError(f"the answer ends after {done} of {size} bytes")
            except Exception as error:
                failures += 1
                self._wait_or_raise(error, name, failures)

    def open(self, name: str) -> RemoteFile:
        return RemoteFile(self, name)

    def each(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return list(self._pool.map(work, items))

    @contextmanager
    def fetched(self, ranges: Sequence[Range]) -> Iterator[None]:
        wanted = list(dict.fromkeys(ranges))
        with self._lock:
            for part in wanted:
                known = self._coming.get(part)
                future = known[0] if known else self._pool.submit(self.request, part)
                self._coming[part] = future, (known[1] if known else 0) + 1
        try:
            yield
        finally:
            with self._lock:
                for part in wanted:
                    future, users = self._coming.pop(part)
                    if users > 1:
                        self._coming[part] = future, users - 1
                    else:
                        future.cancel()

    def forget(self, name: str) -> bool:
        return False

    def range(self, part: Range) -> bytes:
        """The bytes of a range, those on their way already where `fetched` says so."""
        with self._lock:
            known = self._coming.get(part)
        return known[0].result() if known else self.request(part)

    def request(self, part: Range) -> bytes:
        """The bytes of a range, from the server; fewer where the file ends within it."""
        name, start, end = part

        def get() -> bytes:
            result = self._client.get(inside(name), options={"range": (start, end)})
            return self._body(name, result, end - start)

        return self._try(name, get)

    def tail(self, name: str, n_bytes: int) -> tuple[int, bytes]:
        """Size of a file and its last bytes, in one request where the service can."""

        def get() -> tuple[int, bytes]:
            result = self._client.get(inside(name), options={"range": {"suffix": n_bytes}})
            return int(result.meta["size"]), self._body(name, result, n_bytes)

        try:
            return self._try(name, get)
        except NoRanges:  # Azure knows no ranges from the end
            size = self.size(name)
            return size, self.request(Range(name, max(0, size - n_bytes), size))

    def _body(self, name: str, result: Any, limit: int) -> bytes:
        """What is sent, held as it comes: what is announced is not believed."""
        pieces, done = [], 0
        for piece in result.stream(min(max(limit, 1), READ_AT_ONCE)):
            done += len(piece)
            if done > limit:
                raise StoreError(
                    f"{self.where(name)}: the server sends more than the {limit} bytes asked for. "
                    f"It is not read on."
                )
            pieces.append(bytes(piece))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _try(self, name: str, work: Callable[[], R]) -> R:
        failures = 0
        while True:
            try:
                return work()
            except Exception as error:
                failures += 1
                self._wait_or_raise(error, name, failures)

    def _wait_or_raise(self, error: Exception, name: str, failures: int) -> None:
        """Wait before the next attempt, or say why there is none."""
        known = type(error).__module__.partition(".")[0] == "obstore" or isinstance(error, OSError)
        if not known:
            raise error
        reason, status = reason_and_status(error)
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{self.where(name)} is not there") from None
        self._refuse(type(error).__name__, name)
        hopeless = status is not None and 400 <= status < 500 and status not in (408, 425, 429)
        if hopeless or failures >= ATTEMPTS:
            times = "" if failures == 1 else f" {failures} times"
            raise StoreError(
                f"{self.where(name)} could not be read{times}: {reason}. Check the address and the "
                f"connection and run the command again, or copy the store to a disk."
            ) from None
        time.sleep(FIRST_WAIT * 2 ** (failures - 1) * random.uniform(0.5, 1.0))

    def _refuse(self, kind: str, name: str) -> None:
        if kind in ("PermissionDeniedError", "UnauthenticatedError"):
            raise StoreError(
                f"{self.where(name)}: the server denies access. Check the address, or give "
                f"credentials in the environment as the service's own tools take them."
            ) from None
        if kind == "NotSupportedError":
            raise NoRanges(
                f"{self.where(name)}: the server does not serve parts of files, and rows are parts "
                f"of one. Keep whole files in a local cache (--store-cache DIR, or cache=), or "
                f"copy the store to a disk."
            ) from None


class NoRanges(StoreError):
    """The server answers a request for a part with the whole."""


class RemoteFile:
    """A file on a server; nothing is held open."""

    __slots__ = ("_files", "_name")

    def __init__(self, files: RemoteFiles, name: str) -> None:
        self._files = files
        self._name = name

    def tail(self, n_bytes: int) -> tuple[int, bytes]:
        return self._files.tail(self._name, n_bytes)

    def read_into(self, buffers: Sequence[Bytes], offset: int) -> None:
        total = sum(buffer.nbytes for buffer in buffers)
        if not total:
            return
        data = np.frombuffer(self._files.range(Range(self._name, offset, offset + total)), np.uint8)
        if len(data) != total:
            raise StoreError(
                f"{self._files.where(self._name)} ends at byte {offset + len(data)}, more are "
                f"expected. {FETCH_AGAIN}"
            )
        start = 0
        for buffer in buffers:
            buffer[:] = data[start : start + buffer.nbytes]
            start += buffer.nbytes

    def close(self) -> None:
        pass


def connect(location: StoreUrl, retries: int = 0) -> Any:
    """An obstore client of an address, with credentials as the environment gives them.

    Args:
        location: of a folder, its root.
        retries: of a request, by the client itself.

    Raises:
        StoreError: obstore is not installed, or the address lacks something.
    """
    try:
        from obstore.store import HTTPStore, from_url
    except ImportError:
        raise StoreError(
            f"{location} is on a server, which takes the package obstore. "
            f"Install it: pip install 'kdcache[remote]'"
        ) from None
    scheme = location.partition(":")[0]
    # Attempts are counted here, where a broken answer counts as well as a refused one.
    # An S3 of one's own network may speak plain HTTP; it is allowed as the service's tools ask.
    allowed = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    plain = scheme == "http" or (scheme == "s3" and allowed)
    settings: dict[str, Any] = {
        "client_options": {**CLIENT, "allow_http": plain},
        "retry_config": {"max_retries": retries},
    }
    try:
        # A public bucket has an https address, too: that is plain HTTP, without credentials.
        if scheme in ("http", "https"):
            return HTTPStore(str(location), **settings)
        return from_url(str(location), **settings)
    except Exception as error:
        _refuse_address(location, error)


def _refuse_address(location: StoreUrl, error: Exception) -> NoReturn:
    raise StoreError(
        f"{location} cannot be opened: {reason_and_status(error)[0]}. Give what is missing in the "
        f"environment as the service's own tools take it."
    ) from None


def reason_and_status(error: Exception) -> tuple[str, int | None]:
    """What went wrong in a few words, and the status of the answer where there was one."""
    text = str(error)
    answered = re.search(r"status code: ((\d{3})[A-Za-z '-]*)", text)
    if answered:
        return f"the server answers {answered[1].strip()}", int(answered[2])
    # The system's own words lie at the bottom of obstore's chain of causes.
    system = re.search(r'message: "([^"]{1,200})"', text) or re.search(r'error: "([^"]+)"', text)
    if system:
        return system[1], None
    if "TimedOut" in text:
        return "no answer in time", None
    return reason_of(error), None
