"""The store a dump goes into: made of a dataset, or found and held against it.

Owns what may be gone on with and what is refused. Invariant: a store that holds something is never
overwritten, and features never go beside structures of another dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdcache.errors import StoreError
from kdcache.ingest import ImportOptions, check_dataset, import_dataset
from kdcache.progress import Progress, silent
from kdcache.store import open_store
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST
from kdcache.store.work import WORK, unfinished_groups


def open_or_import(
    data: Sequence[str],
    path: Path,
    options: ImportOptions,
    *,
    name: str,
    new: bool,
    progress: Progress = silent,
) -> Path:
    """The store a dump goes into: a new one of `data`, or an existing one checked against it.

    Args:
        data: files, globs or a store; may be empty for an existing store.
        path: of the store.
        options: how `data` is read and laid out.
        name: of the teacher about to be dumped.
        new: the caller wants a new store; one that an interrupted dump of the same data left is
            gone on with.

    Raises:
        StoreError: a new store is wanted, and there is one with teachers already.
        IdentityError: the store was made from other data.
    """
    path = local_path(path, "a dump")
    # A spool beside a manifest: the import was killed while it cleaned up, and has that to do.
    cleaned = not (data and (path / WORK / "spool").is_dir())
    finished = (path / MANIFEST).is_file() and cleaned
    if not finished:
        if not new:
            open_store(path)  # says what is missing
        import_dataset(data, path, options, progress=progress)
        return path
    store = open_store(path)
    # Killed between its manifest and the last cleaning up, a dump is gone on with as well.
    begun = f"teachers/{name}" in unfinished_groups(path)
    if new and store.teachers and not begun:
        raise StoreError(
            f"{path} exists and holds teachers {sorted(store.teachers)}. It is not overwritten: "
            f"name another store, or add to it with --into {path} --name {name}."
        )
    if data and not _is_same(data, path):
        check_dataset(store, data, options.read, progress=progress)
    return path


def _is_same(data: Sequence[str], path: Path) -> bool:
    return len(data) == 1 and Path(data[0]).resolve() == path.resolve()
