"""A directory as the place where a store arrives.

The store grows beside its name, under NAME.incoming, and takes the name when it is whole. Owns the
journal of what arrived. Invariant: a file in it stands under its name only after its bytes were
found right and are on the disk; what is partial is called so, and may be gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from kdcache.errors import StoreError, naming
from kdcache.sharing.shipment import Parcel, Shipment
from kdcache.sharing.transfer import DamagedError, Moved, checked
from kdcache.store.files import READ_AT_ONCE, disk_size, inside
from kdcache.store.manifest import MANIFEST, Manifest, read_manifest
from kdcache.store.reader import open_store
from kdcache.store.remote import NoRanges
from kdcache.store.shards import PARTIAL_SUFFIX, sync_directory, write_file
from kdcache.store.signature import SIGNATURE
from kdcache.store.work import WORK, StoreLock

if TYPE_CHECKING:
    from hashlib import _Hash

INCOMING_SUFFIX = ".incoming"
IDENTITY = "incoming.json"
JOURNAL = "arrived.jsonl"
REPLACED = "replaced"
# Of a file that a server gives as a whole only, and that breaks off.
ATTEMPTS = 5

# SHA-256, bytes and time (ns) of a file that arrived.
Seen = tuple[str, int, int]


class DirectoryTarget:
    """A path on a disk.

    Args:
        path: of the store that arrives; where it is a link to a directory, that is meant, and the
            link stays.
    """

    def __init__(self, path: Path) -> None:
        is_link = path.is_symlink() and path.is_dir()
        # "." has no name to add to.
        self.location = path.resolve() if is_link or not path.name else path

    def found(self) -> Manifest | None:
        """As `Target.found`."""
        return _found(self.location)

    @contextmanager
    def receive(self, shipment: Shipment, replace: bool) -> Iterator[DirectoryDelivery | None]:
        """As `Target.receive`."""
        path = self.location
        if _is_there(path, shipment.manifest, replace):
            # Signed after it was moved: the signature may still come.
            if shipment.signature is not None and not (path / SIGNATURE).exists():
                write_file(path / SIGNATURE, shipment.signature)
            yield None
            return
        _refuse_mounted(path)
        incoming = path.with_name(path.name + INCOMING_SUFFIX)
        _refuse_foreign(incoming)
        there = disk_size(incoming) if incoming.is_dir() else 0
        check_room(path, shipment.n_bytes - there)
        incoming.mkdir(parents=True, exist_ok=True)
        with StoreLock(incoming):
            _begin(incoming, shipment.manifest)
            yield DirectoryDelivery(path, incoming, shipment, replace)


class DirectoryDelivery:
    """A store that is arriving in a directory; made by `DirectoryTarget`."""

    def __init__(self, path: Path, incoming: Path, shipment: Shipment, replace: bool) -> None:
        self._path = path
        self._incoming = incoming
        self._shipment = shipment
        self._replace = replace
        self._lock = threading.Lock()
        self._arrived = _journal(incoming)

    def has(self, parcel: Parcel) -> bool:
        """By the journal where size and time are as noted there, else by the bytes."""
        file = self._incoming / inside(parcel.name)
        try:
            seen = _seen(file, parcel.sha256)
        except FileNotFoundError:
            return False
        if self._arrived.get(parcel.name) == seen:
            return True
        if seen[1] != parcel.size or _digest_of(file) != parcel.sha256:
            file.unlink()
            return False
        self._note(parcel.name, seen)
        return True

    def put(self, parcel: Parcel, moved: Moved) -> None:
        """As `Delivery.put`; goes on within a file where the source can."""
        file = self._incoming / inside(parcel.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + PARTIAL_SUFFIX)
        with open(partial, "a+b", buffering=0) as out:
            start = out.tell() if parcel.begins_anywhere else 0
            if not start or not _goes_on(out, parcel, start, moved):
                _fill_whole(out, parcel, moved)
            with naming(str(file)):
                os.fsync(out.fileno())
        os.replace(partial, file)
        sync_directory(file.parent)
        self._note(parcel.name, _seen(file, parcel.sha256))

    def finish(self) -> None:
        """As `Delivery.finish`: the store takes its name, unless another did meanwhile."""
        if _is_there(self._path, self._shipment.manifest, self._replace):
            shutil.rmtree(self._incoming)
            return
        for partial in self._incoming.rglob(f"*{PARTIAL_SUFFIX}"):
            partial.unlink()
        if self._shipment.signature is not None:
            write_file(self._incoming / SIGNATURE, self._shipment.signature)
        write_file(self._incoming / MANIFEST, self._shipment.manifest.to_bytes())
        if (self._path / MANIFEST).is_file():
            # Within ours: what is removed in the end was put there by us.
            os.rename(self._path, self._incoming / WORK / REPLACED)
        os.rename(self._incoming, self._path)
        sync_directory(self._path.parent)
        shutil.rmtree(self._path / WORK)

    def _note(self, name: str, seen: Seen) -> None:
        journal = self._incoming / WORK / JOURNAL
        with self._lock, naming(str(journal)), open(journal, "a") as file:
            file.write(json.dumps([name, *seen]) + "\n")


def _goes_on(out: BinaryIO, parcel: Parcel, start: int, moved: Moved) -> bool:
    """Whether a file could be completed from byte `start` on."""
    try:
        _fill(out, parcel, start, moved)
    except (DamagedError, NoRanges):
        # What was there may be of another file, or the server gives whole files only.
        return False
    return True


def _fill_whole(out: BinaryIO, parcel: Parcel, moved: Moved) -> None:
    """Write a file from its first byte on, again where it breaks off and cannot be gone on with."""
    for _ in range(ATTEMPTS):
        try:
            _fill(out, parcel, 0, moved)
            return
        except NoRanges:
            continue
    raise StoreError(
        f"{parcel.where} broke off {ATTEMPTS} times, and its server gives whole files only, so it "
        f"began anew each time. Run the command again over a better connection; files that arrived "
        f"are kept."
    )


def _fill(out: BinaryIO, parcel: Parcel, start: int, moved: Moved) -> None:
    """Write a file from byte `start` on; takes back what it counted where that fails."""
    start = start if start <= parcel.size else 0
    os.ftruncate(out.fileno(), start)
    out.seek(0)
    digest = _fingerprint(out)
    counted = start
    moved(start)

    def count(n_bytes: int) -> None:
        nonlocal counted
        counted += n_bytes
        moved(n_bytes)

    try:
        for piece in checked(parcel, start, digest, count):
            view = memoryview(piece)
            with naming(out.name):
                while view:
                    view = view[os.write(out.fileno(), view) :]
    except (DamagedError, NoRanges) as error:
        moved(-counted)
        if isinstance(error, DamagedError):
            os.ftruncate(out.fileno(), 0)
        raise


def _found(path: Path) -> Manifest | None:
    """The manifest of the finished store at a path; None where nothing is.

    Raises:
        StoreError: something else is there.
    """
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return None
    if not path.is_dir() or not (path / MANIFEST).is_file():
        raise StoreError(
            f"{path} exists and is no finished store. Nothing is overwritten: name another path."
        )
    return read_manifest(path)


def _is_there(path: Path, manifest: Manifest, replace: bool) -> bool:
    """Whether this very store is at its place, whole.

    Raises:
        StoreError: something else is, and does not give way; or this store is, and damaged.
    """
    found = _found(path)
    if found is None:
        return False
    if found.root_digest == manifest.root_digest:
        open_store(path)
        if (path / WORK / IDENTITY).is_file():  # a kill between taking the name and cleaning up
            shutil.rmtree(path / WORK)
        return True
    if not replace:
        raise StoreError(
            f"{path} is another store ({found.root_digest[:12]}…, this one is "
            f"{manifest.root_digest[:12]}…). Nothing is overwritten: name another path, or ask for "
            f"it (publish --replace)."
        )
    return False


def _refuse_foreign(incoming: Path) -> None:
    if not os.path.lexists(incoming) or (incoming / WORK / IDENTITY).is_file():
        return
    if not incoming.is_dir() or {file.name for file in incoming.iterdir()} - {WORK}:
        raise StoreError(
            f"{incoming} exists and is nothing that was begun here. A store arrives under that "
            f"name: move it away, or name another path."
        )


def _refuse_mounted(path: Path) -> None:
    if os.path.ismount(path):
        raise StoreError(
            f"{path} is where a disk is mounted. A store takes its name when it is whole, which "
            f"such a path does not allow. Name a path below it."
        )


def check_room(path: Path, n_bytes: int) -> None:
    """There are so many bytes free where a path is, or will be.

    Raises:
        StoreError: there are not.
    """
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise StoreError(
            f"{path} takes {n_bytes} more bytes, {free} are free on its disk. Make room, or name a "
            f"path on another disk."
        )


def _begin(incoming: Path, manifest: Manifest) -> None:
    identity = incoming / WORK / IDENTITY
    try:
        begun = json.loads(identity.read_bytes())["root_digest"]
    except FileNotFoundError:
        write_file(identity, json.dumps({"root_digest": manifest.root_digest}).encode())
        return
    except (ValueError, TypeError, KeyError):
        begun = "damaged"
    if begun != manifest.root_digest:
        raise StoreError(
            f"{incoming} holds what arrived of the store {begun[:12]}…, this one is "
            f"{manifest.root_digest[:12]}…: the source was replaced, or another is named. Files of "
            f"two stores are never mixed. Delete {incoming} to begin anew."
        )


def _journal(incoming: Path) -> Mapping[str, Seen]:
    found: dict[str, Seen] = {}
    try:
        lines = (incoming / WORK / JOURNAL).read_text().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            name, sha256, size, time_ns = json.loads(line)
        except (ValueError, TypeError):
            continue  # cut off by a kill: that file is looked at again
        found[name] = (sha256, size, time_ns)
    return found


def _seen(file: Path, sha256: str) -> Seen:
    status = file.stat()
    return sha256, status.st_size, status.st_mtime_ns


def _digest_of(file: Path) -> str:
    with open(file, "rb", buffering=0) as content:
        return _fingerprint(content).hexdigest()


def _fingerprint(file: BinaryIO) -> _Hash:
    digest = hashlib.sha256()
    while piece := file.read(READ_AT_ONCE):
        digest.update(piece)
    return digest
