"""The store a dump goes into: made of a dataset, or found and held against it.

Owns what may be gone on with and what is refused. Invariant: a store that holds something is never
overwritten, and features never go beside structures of another dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdcache.errors import DataError, StoreError
from kdcache.ingest import ImportOptions, check_dataset, import_dataset
from kdcache.progress import Progress, silent
from kdcache.store import open_store
from kdcache.store.location import local_path
from kdcache.store.manifest import MANIFEST
from kdcache.store.work import WORK, unfinished_groups
from kdcache.structures import Structure


def open_or_import(
    data: Sequence[str],
    path: Path,
    options: ImportOptions,
    *,
    name: str,
    new: bool,
    check_elements: Callable[[Tensor], object] = lambda _: None,
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
        check_elements: refuses atomic numbers that the teacher does not know, before a new store
            is made; without it all pass.

    Raises:
        StoreError: a new store is wanted, and there is one with teachers already.
        IdentityError: the store was made from other data.
        DataError: a structure of a new store has an element that the teacher does not know.
    """
    path = local_path(path, "a dump")
    # A spool beside a manifest: the import was killed while it cleaned up, and has that to do.
    cleaned = not (data and (path / WORK / "spool").is_dir())
    finished = (path / MANIFEST).is_file() and cleaned
    if not finished:
        if not new:
            open_store(path)  # says what is missing
        accept = _elements_known_to(check_elements)
        import_dataset(data, path, options, progress=progress, accept=accept)
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


def _elements_known_to(
    check_elements: Callable[[Tensor], object],
) -> Callable[[Structure], None]:
    """Refuses a structure with an element that the teacher does not know; asks once for each."""
    known: set[int] = set()

    def accept(structure: Structure) -> None:
        numbers = set(structure.atomic_numbers.tolist())
        if numbers <= known:
            return
        try:
            check_elements(torch.tensor(sorted(numbers)))
        except DataError as error:
            raise DataError(
                f"Structure {structure.structure_id!r} is none for this teacher: {error}"
            ) from error
        known.update(numbers)

    return accept


def _is_same(data: Sequence[str], path: Path) -> bool:
    return len(data) == 1 and Path(data[0]).resolve() == path.resolve()
