"""A store as one zip file that any Zarr reader opens.

Owns the bytes of the zip: entries stored as they are, in the order of their names, with one fixed
date. Invariant: the same store gives the same zip, and one with a damaged file gives none.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
import zipfile
from pathlib import Path

from kdcache.errors import StoreError, naming
from kdcache.progress import Progress, silent
from kdcache.sharing.held import source_files
from kdcache.sharing.moving import Source
from kdcache.sharing.shipment import ship
from kdcache.sharing.transfer import Report, checked
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST
from kdcache.store.shards import new_attempt, partial_path, publish_file
from kdcache.store.signature import SIGNATURE

FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say
UNIX = 3


def pack_store(source: Source, target: str | Path, progress: Progress = silent) -> Report:
    """Write a store into a zip file, every file compared with its digest on the way.

    Args:
        source: path or address of a store.
        target: of the zip; nothing may be there.
        progress: shows bytes.

    Raises:
        StoreError: something is at `target`, or the source is damaged.
    """
    started = time.perf_counter()
    path = local_path(target, "a packed store")
    if os.path.lexists(path):
        raise StoreError(f"{path} exists, and nothing is overwritten. Name another path.")
    shipment = ship(source_files(source))
    whole = {MANIFEST: shipment.manifest.to_bytes()}
    if shipment.signature is not None:
        whole[SIGNATURE] = shipment.signature
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = new_attempt()
    partial = partial_path(path, attempt)
    try:
        with (
            naming(str(path)),
            open(partial, "wb") as file,
            progress("pack", shipment.n_bytes, "B") as advance,
        ):
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name in sorted([*shipment.sizes, *whole]):
                    size = len(whole[name]) if name in whole else shipment.sizes[name]
                    with archive.open(_entry(name, size), "w") as entry:
                        if name in whole:
                            entry.write(whole[name])
                            continue
                        for piece in checked(shipment.parcel(name), 0, hashlib.sha256(), advance):
                            entry.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if os.path.lexists(path):
            raise StoreError(f"{path} came to be meanwhile, and nothing is overwritten.")
        publish_file(path, attempt)
    finally:
        partial.unlink(missing_ok=True)
    n_files, n_bytes = len(shipment.sizes), shipment.n_bytes
    seconds = time.perf_counter() - started
    return Report(
        shipment.manifest, n_files, n_files, n_bytes, n_bytes, seconds, False, shipment.notes
    )


def _entry(name: str, size: int) -> zipfile.ZipInfo:
    """A plain file that anybody may read; by its size zipfile takes the larger form past 2 GiB."""
    entry = zipfile.ZipInfo(name, FIRST_DATE)
    entry.create_system = UNIX
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    entry.file_size = size
    return entry
