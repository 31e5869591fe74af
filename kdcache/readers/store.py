"""A store as a source of structures: for another order, another split, or a merge.

Reading is the store's own. Invariant: structures come in the order of the dataset the store was
made from, with their ids, groups and splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kdcache.readers.interface import ReadOptions
from kdcache.readers.labels import LabelKeys
from kdcache.store import open_store
from kdcache.structures import Structure


def read_store(path: Path, options: ReadOptions, keys: LabelKeys) -> Iterator[Structure]:
    """Structures of a store, in source order; keys and units of `options` do not concern it.

    Raises:
        StoreError: no store, unfinished or damaged.
    """
    keys.record(path, "energy", "the store")
    for structure in open_store(path).structures("source"):
        if options.split_key == "none":
            structure.split = ""
        yield structure
