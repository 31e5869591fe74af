"""Publish a store, and fetch one: the two ways a store goes from place to place.

Owns which place is meant and which part goes; choosing rows is the business of `rows`, moving files
that of `transfer`. Invariant: a store that exists is not overwritten unless that is asked for.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from kdcache.errors import StoreError
from kdcache.progress import Progress, silent
from kdcache.sharing.buckets import BucketTarget
from kdcache.sharing.directories import DirectoryTarget
from kdcache.sharing.held import Source, check_apart, source_files
from kdcache.sharing.rows import Selection
from kdcache.sharing.shipment import ship
from kdcache.sharing.transfer import DEFAULT_JOBS, Report, Target, transfer
from kdcache.store.location import StoreUrl, local_path, store_location, without_file_scheme


def publish_store(
    source: Source,
    target: str | Path,
    *,
    teachers: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
    without_structures: bool = False,
    jobs: int = DEFAULT_JOBS,
    replace: bool = False,
    progress: Progress = silent,
) -> Report:
    """Copy a store to where others read it, or go on with a copy that was interrupted.

    Every file is compared with its digest as it is copied; the manifest goes last, so that a target
    without one is no store.

    Args:
        source: path, zip file or address of a store.
        target: a directory, also as file://; or a folder on s3://, gs:// or az://.
        teachers, fields: kept; None for all. A part has a root digest of its own.
        without_structures: leave out structures and labels; who has them joins them again.
        jobs: files at once.
        replace: another store at the target gives way.
        progress: shows bytes.

    Raises:
        ConfigError: source and target are the same, or one lies within the other.
        StoreError: the source is damaged or replaced meanwhile, something else is at the target, or
            it cannot be written.
    """
    files, place = source_files(source), target_of(target)
    check_apart(files.location, place.location)
    shipment = ship(files, teachers=teachers, fields=fields, without_structures=without_structures)
    return transfer(shipment, place, "publish", jobs=jobs, replace=replace, progress=progress)


def publish_rows(
    selection: Selection,
    target: str | Path,
    scratch: Path,
    *,
    jobs: int = DEFAULT_JOBS,
    replace: bool = False,
    progress: Progress = silent,
) -> Report:
    """Publish some structures of a store: written to a temporary store, which is then copied.

    Args:
        selection: of the structures.
        target, jobs, replace, progress: as for `publish_store`.
        scratch: a directory for the temporary store, as large as what is published. What an
            interrupted call left there is gone on with.

    Raises:
        StoreError: as `publish_store`; or the temporary store cannot be written.
    """
    # Refused before rows are read.
    place = target_of(target)
    found = place.found()
    if found is not None and not replace and not selection.may_be(found):
        raise StoreError(
            f"{place.location} is another store ({found.root_digest[:12]}…). Nothing is "
            f"overwritten: name another path, or ask for it (publish --replace)."
        )
    if not scratch.is_dir():
        raise StoreError(
            f"{scratch} is no directory. Name one for the temporary store (--scratch)."
        )
    kept = [selection.description, selection.teachers, selection.fields]
    key = f"{selection.store.manifest.root_digest} {kept}"
    path = scratch / f"publish-{hashlib.sha256(key.encode()).hexdigest()[:16]}.zarr"
    if not path.is_dir():
        selection.write(path, jobs, progress)
    try:
        report = publish_store(path, target, jobs=jobs, replace=replace, progress=progress)
    except StoreError as error:
        raise type(error)(
            f"{error} The rows were read already, and are kept in {path} for the same command; "
            f"delete it otherwise."
        ) from error
    shutil.rmtree(path)
    return report


def pull_store(
    source: Source,
    target: str | Path,
    *,
    teachers: Sequence[str] | None = None,
    fields: Sequence[str] | None = None,
    jobs: int = DEFAULT_JOBS,
    progress: Progress = silent,
) -> Report:
    """Fetch a store to a disk, or go on with what was interrupted, within a file where possible.

    Args:
        source: path, zip file or address of a store.
        target: a path; nothing may be there, or this very store.
        teachers, fields, jobs, progress: as for `publish_store`.

    Raises:
        ConfigError, StoreError: as `publish_store`.
    """
    files = source_files(source)
    place = DirectoryTarget(local_path(without_file_scheme(target), "what is pulled"))
    check_apart(files.location, place.location)
    shipment = ship(files, teachers=teachers, fields=fields)
    return transfer(shipment, place, "pull", jobs=jobs, progress=progress)


def target_of(target: str | Path) -> Target:
    """The place that a path or an address names.

    Raises:
        StoreError: an address that nothing can be written to.
    """
    location = store_location(without_file_scheme(target))
    return BucketTarget(location) if isinstance(location, StoreUrl) else DirectoryTarget(location)
