"""Copy one file of a store as it is, held against the store's manifest on the way.

Invariant: a copy that is returned is on disk and has the digest of the manifest.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kdcache.errors import StoreError, naming
from kdcache.store.files import check_size
from kdcache.store.reader import Store
from kdcache.store.shards import Written


def copy_file(store: Store, name: str, target: Path, limit: int) -> Written:
    """Copy a file of a store to a place on this machine.

    Args:
        store: it is of.
        name: of the file.
        target: what is written; its folder is made.
        limit: bytes that the layout allows it (`file_limits`).

    Raises:
        StoreError: it is missing, larger than that, or not what the manifest says.
    """
    where, digest, size = store.files.where(name), hashlib.sha256(), 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with naming(str(target)), open(target, "wb") as copy:
        try:
            for piece in store.files.stream(name):
                size += len(piece)
                check_size(where, size, limit)
                digest.update(piece)
                copy.write(piece)
        except FileNotFoundError:
            raise StoreError(
                f"{where} is missing: the store is incomplete. Fetch it again."
            ) from None
        copy.flush()
        os.fsync(copy.fileno())
    found, expected = digest.hexdigest(), store.manifest.digests.get(name, "none")
    if found != expected:
        raise StoreError(
            f"{where} has digest {found[:12]}…, the manifest says {expected[:12]}…: it was edited "
            f"or damaged. Its copy would be wrong. Fetch it again."
        )
    return Written(found, size)
