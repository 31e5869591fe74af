"""A store as one zip file that any Zarr reader opens.

Owns the bytes of the zip: entries stored as they are, in the order of their names, with one fixed
date. Invariant: the same store gives the same zip, and one with a damaged file gives none.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from kdcache.errors import StoreError, named
from kdcache.progress import Progress, silent
from kdcache.sharing.directories import check_room
from kdcache.sharing.held import Source, check_apart, source_files
from kdcache.sharing.shipment import ship
from kdcache.sharing.transfer import Report, checked
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST
from kdcache.store.shards import PARTIAL_SUFFIX, sync_directory
from kdcache.store.signature import SIGNATURE

FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say
UNIX = 3
PACKING_SUFFIX = f".packing{PARTIAL_SUFFIX}"


def pack_store(source: Source, target: str | Path, progress: Progress = silent) -> Report:
    """Write a store into a zip file, every file compared with its digest on the way.

    Args:
        source: path or address of a store.
        target: of the zip; nothing may be there.
        progress: shows bytes.

    Raises:
        ConfigError: the zip would lie within the source.
        StoreError: something is at `target`, another process packs there, the disk is too small,
            or the source is damaged.
    """
    started = time.perf_counter()
    path = local_path(target, "a packed store")
    _refuse_existing(path)
    files = source_files(source)
    check_apart(files.location, path)
    shipment = ship(files)
    whole = {MANIFEST: shipment.manifest.to_bytes()}
    if shipment.signature is not None:
        whole[SIGNATURE] = shipment.signature
    check_room(path, shipment.n_bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        progress("pack", shipment.n_bytes, "B") as advance,
        _arriving(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name in sorted([*shipment.sizes, *whole]):
            size = len(whole[name]) if name in whole else shipment.sizes[name]
            with archive.open(_entry(name, size), "w") as entry:
                if name in whole:
                    entry.write(whole[name])
                    continue
                for piece in checked(shipment.parcel(name), 0, hashlib.sha256(), advance):
                    entry.write(piece)
    n_files, n_bytes = len(shipment.sizes), shipment.n_bytes
    seconds = time.perf_counter() - started
    return Report(
        shipment.manifest, n_files, n_files, n_bytes, n_bytes, seconds, False, shipment.notes
    )


@contextmanager
def _arriving(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` at the end of the block, or goes if that fails.

    Until then it is called PATH.packing.partial; what a killed process left there is begun anew.
    """
    partial = path.with_name(path.name + PACKING_SUFFIX)
    with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
        _claim(file, partial)
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            _refuse_existing(path)
            os.rename(partial, path)
        except BaseException as error:
            partial.unlink()
            if isinstance(error, OSError) and error.filename is None:
                raise named(error, str(path)) from None
            raise
    sync_directory(path.parent)


def _claim(file: BinaryIO, partial: Path) -> None:
    """The right to write a file, until it is closed."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Who held it before may have renamed or removed what we opened.
        is_ours = os.path.samestat(os.fstat(file.fileno()), os.stat(partial))
    except (BlockingIOError, FileNotFoundError):
        is_ours = False
    if not is_ours:
        raise StoreError(
            f"Another process is writing {partial}. Two would write over each other: wait until it "
            f"ends."
        )


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise StoreError(f"{path} exists, and nothing is overwritten. Name another path.")


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    """A plain file that anybody may read; by its size zipfile takes the larger form past 2 GiB."""
    entry = zipfile.ZipInfo(name, FIRST_DATE)
    entry.create_system = UNIX
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    entry.file_size = size
    return entry
