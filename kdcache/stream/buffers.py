"""Memory that is used again: for fields of a store as they are read, and for batches.

Fresh memory for every window costs as much as filling it: the system hands it out page by page.
Invariant: memory is used again only when no array or tensor refers to it any more.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.store import Store
from kdcache.store.codecs import read_dtype

Array = npt.NDArray[Any]


class Memory:
    """Lends memory by name, the same again once nothing refers to it. Safe for several threads."""

    def __init__(self) -> None:
        self._free: dict[str, list[Array]] = {}

    def lend(self, name: str, n_bytes: int) -> Array:
        """[n_bytes] uint8, the caller's while any view or tensor of it lives.

        Args:
            name: of what is kept there; the next of that name is taken to be about as large.
            n_bytes: wanted.
        """
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

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An array of any content. Sizes that vary by a fifth fit the same memory."""
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if not n_bytes:
            return np.empty(shape, dtype)
        flat = self.lend(name, n_bytes + n_bytes // 4)
        return flat[:n_bytes].view(dtype).reshape(shape)


class FieldReads:
    """Reads fields of a store by block, as `Store.read` does. Safe to use from several threads.

    Args:
        store: an open store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._memory = Memory()

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
        flat = self._memory.lend(name, n_values * dtype.itemsize).view(dtype)
        return self._store.read(name, blocks, out=flat.reshape(-1, *spec.shape))
