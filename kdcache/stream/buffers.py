"""Fields of a store, read into memory that is used again.

Fresh memory for every window costs as much as filling it: the system hands it out page by page.
Invariant: memory is used again only when no array or tensor refers to it any more.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.store import Store
from kdcache.store.codecs import read_dtype

Array = npt.NDArray[Any]


class FieldReads:
    """Reads fields of a store by block, as `Store.read` does. Safe to use from several threads.

    Args:
        store: an open store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._free: dict[str, list[Array]] = {}

    def read(self, name: str, blocks: Sequence[int]) -> Array:
        """Values of a field in some blocks, in memory that is the caller's while referred to.

        Args:
            name: e.g. "structures/forces".
            blocks: block numbers.

        Raises:
            StoreError: as `Store.read`.
        """
        spec = self._store.spec(name)
        capacity = self._store.plans[name.rpartition("/")[0]].capacity(spec.level)
        dtype = read_dtype(spec)
        # Whole blocks, so that windows of as many blocks fit; padding is never touched.
        n_values = len(blocks) * capacity * spec.row_size
        flat = self._memory(name, n_values * dtype.itemsize).view(dtype)
        return self._store.read(name, blocks, out=flat.reshape(-1, *spec.shape))

    def _memory(self, name: str, n_bytes: int) -> Array:
        free = self._free.setdefault(name, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(n_bytes, np.uint8)
        if memory.nbytes < n_bytes:
            memory = np.empty(n_bytes, np.uint8)
        # Every view and tensor of `lent` keeps it alive, and not the memory alone, because what it
        # is based on is no array. Its end is therefore the end of the last of them.
        lent = np.frombuffer(memory.data, np.uint8, n_bytes)
        weakref.finalize(lent, free.append, memory)
        return lent
