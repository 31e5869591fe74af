"""Move the files of a store, several at once, each checked on its way.

Owns who moves which file, what is skipped, and the order: everything, then the manifest. Where
files go is the target's. Invariant: no byte whose file has another digest than the manifest says
ends under a name of the store, and the store at the target is finished when its manifest is there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kdcache.errors import StoreError
from kdcache.progress import Advance, Progress, silent
from kdcache.sharing.shipment import Parcel, Shipment
from kdcache.store.location import StoreUrl
from kdcache.store.manifest import Manifest

if TYPE_CHECKING:
    from hashlib import _Hash

DEFAULT_JOBS = 8
Moved = Callable[[int], None]


class DamagedError(StoreError):
    """A file is not what the manifest says."""


class Delivery(Protocol):
    """A store that is arriving at a target."""

    def has(self, parcel: Parcel) -> bool:
        """Whether the file is there, found to be right; cheaper than moving it."""

    def put(self, parcel: Parcel, moved: Moved) -> None:
        """Bring a file there: whole, found to be right, or not at all.

        Raises:
            DamagedError: what comes is not what the manifest says.
            StoreError: it cannot be written.
        """

    def finish(self) -> None:
        """All files are there: bring the signature, if there is one, and the manifest."""


class Target(Protocol):
    """A place where stores arrive."""

    @property
    def location(self) -> Path | StoreUrl:
        """Of the store that arrives."""

    def found(self) -> Manifest | None:
        """Of the finished store that is there; None where nothing is, or what was interrupted.

        Raises:
            StoreError: something else is there.
        """

    def receive(self, shipment: Shipment, replace: bool) -> AbstractContextManager[Delivery | None]:
        """Begin, or go on with what was interrupted; None where this very store is there.

        Args:
            shipment: the store.
            replace: another store there gives way.

        Raises:
            StoreError: something else is there, or it cannot be written.
        """


@dataclass(frozen=True, slots=True)
class Report:
    """What was moved.

    Attributes:
        manifest: of the store at its new place.
        n_files: of the store.
        n_moved: of these; the others were there from an earlier attempt.
        n_bytes: of the store, without its manifest.
        bytes_moved: in this call.
        seconds: wall time of this call.
        was_there: nothing was to be done.
        notes: what a user should know, a line each.
    """

    manifest: Manifest
    n_files: int
    n_moved: int
    n_bytes: int
    bytes_moved: int
    seconds: float
    was_there: bool = False
    notes: tuple[str, ...] = ()


def transfer(
    shipment: Shipment,
    target: Target,
    label: str,
    *,
    jobs: int = DEFAULT_JOBS,
    replace: bool = False,
    progress: Progress = silent,
) -> Report:
    """Move a store, or go on with a move that was interrupted.

    Args:
        shipment: what is moved.
        target: where it goes.
        label: of the bar.
        jobs: files at once.
        replace: another store at the target gives way.
        progress: shows bytes.

    Raises:
        StoreError: a file of the source is missing or not what the manifest says, the source was
            replaced meanwhile, something else is at the target, or it cannot be written.
    """
    started = time.perf_counter()
    n_files, n_bytes = len(shipment.sizes), shipment.n_bytes
    with target.receive(shipment, replace) as delivery:
        if delivery is None:
            seconds = time.perf_counter() - started
            return Report(shipment.manifest, n_files, 0, n_bytes, 0, seconds, True, shipment.notes)
        with progress(label, n_bytes, "B") as advance:
            names = _moved_all(shipment, delivery, jobs, _locked(advance))
        delivery.finish()
    return Report(
        shipment.manifest,
        n_files,
        len(names),
        n_bytes,
        sum(shipment.sizes[name] for name in names),
        time.perf_counter() - started,
        not names,
        shipment.notes,
    )


def checked(parcel: Parcel, start: int, digest: _Hash, moved: Moved) -> Iterator[bytes]:
    """A file's bytes as they come; ends in an error unless they are those of the manifest.

    Args:
        parcel: the file.
        start: bytes of it that are there already.
        digest: of those; the rest is added to it.
        moved: told of bytes.

    Raises:
        DamagedError: a byte too many, too few or another one.
    """
    done = start
    try:
        for piece in parcel.stream(start) if start < parcel.size else ():
            done += len(piece)
            if done > parcel.size:
                break
            digest.update(piece)
            moved(len(piece))
            yield piece
    except FileNotFoundError as error:
        raise DamagedError(
            f"{error}: the manifest lists it, and the store there is incomplete. Run the command "
            f"again once it is whole; what arrived is kept."
        ) from None
    if done != parcel.size:
        came = f"{done} bytes" if done < parcel.size else "more"
        raise DamagedError(
            f"{parcel.where} was said to have {parcel.size} bytes, and {came} came: it was edited, "
            f"damaged or cut off. It is not passed on; run the command again, or see what kdcache "
            f"verify says of the store."
        )
    if digest.hexdigest() != parcel.sha256:
        raise DamagedError(
            f"{parcel.where} has digest {digest.hexdigest()[:12]}… ({done} bytes), the manifest "
            f"says {parcel.sha256[:12]}…: it was edited, damaged or cut off. It is not passed on; "
            f"see what kdcache verify says of the store."
        )


def _locked(advance: Advance) -> Moved:
    """A bar that several threads advance."""
    lock = threading.Lock()

    def moved(n_bytes: int) -> None:
        with lock:
            advance(n_bytes)

    return moved


class _StoppedError(Exception):
    """Another file failed, or the user gives up: what is on its way ends where it is."""


def _moved_all(shipment: Shipment, delivery: Delivery, jobs: int, moved: Moved) -> list[str]:
    """Names of the files that had to be moved."""
    stop = threading.Event()

    def count(n_bytes: int) -> None:
        if stop.is_set():
            raise _StoppedError
        moved(n_bytes)

    def move(name: str) -> bool:
        if stop.is_set():
            raise _StoppedError
        parcel = shipment.parcel(name)
        try:
            if delivery.has(parcel):
                count(parcel.size)
                return False
            delivery.put(parcel, count)
        except BaseException:
            stop.set()
            raise
        return True

    # Large files first: at the end no thread is left alone with one.
    names = sorted(shipment.sizes, key=lambda name: (-shipment.sizes[name], name))
    with ThreadPoolExecutor(jobs, thread_name_prefix="kdcache-move") as pool:
        running = {pool.submit(move, name): name for name in names}
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        except BaseException:
            stop.set()
            raise
        finally:
            if stop.is_set():
                pool.shutdown(cancel_futures=True)
    errors = [error for one in running if not one.cancelled() and (error := one.exception())]
    for error in errors:
        if isinstance(error, DamagedError):
            _refuse_replaced(shipment)
        if not isinstance(error, _StoppedError):
            raise error
    return [name for future, name in running.items() if future.result()]


def _refuse_replaced(shipment: Shipment) -> None:
    """A file that is not what the manifest says may be one of another store by now."""
    if shipment.files.has_changed():
        raise StoreError(
            f"{shipment.files.location} was replaced while it was read: it is no longer the store "
            f"{shipment.manifest.root_digest[:12]}… Files of two stores are never mixed. Run the "
            f"command again, once the new one is whole."
        ) from None
