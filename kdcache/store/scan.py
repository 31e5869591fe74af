"""Go through a store shard by shard, here or by a cluster, and say something of each structure.

Owns how a store gets to those who work on it, and scans whose result is a bit per structure.
Invariant: what is found does not depend on who found it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.cluster import Cluster, Here
from kdcache.errors import StoreError
from kdcache.progress import Progress, silent
from kdcache.store.location import StoreUrl
from kdcache.store.reader import Store, open_store
from kdcache.structures import MAX_ATOMIC_NUMBER

BoolArray = npt.NDArray[np.bool_]
# An open store where the work is done here; else where it is, so that each process opens it.
StoreReference = Store | Path | StoreUrl
Bits = Callable[[Store, int], BoolArray]


def reference(store: Store, cluster: Cluster) -> StoreReference:
    """A store, as work for a cluster carries it."""
    return store if isinstance(cluster, Here) else location(store)


def location(store: Store) -> Path | StoreUrl:
    """Where every process finds a store, whatever its working directory."""
    return store.path.resolve() if isinstance(store.path, Path) else store.path


def opened(store: StoreReference) -> Store:
    """The store a reference is of."""
    return store if isinstance(store, Store) else open_store(store)


def labelled(store: Store, cluster: Cluster, progress: Progress = silent) -> BoolArray:
    """[n_structures] whether a structure has energy and forces, in store order.

    Reads labels only where the manifest leaves it open: some have them and some have not.

    Raises:
        StoreError: a shard is damaged.
    """
    count = store.manifest.dataset.n_labelled
    if count in (0, len(store)):
        return np.full(len(store), count > 0)
    if not {"energy", "forces"} <= set(store.fields("structures")):
        return np.zeros(len(store), bool)
    return _scan("labels", _LabelBits(reference(store, cluster)), store, cluster, progress)


def check_elements(numbers: npt.NDArray[Any], where: str) -> None:
    """Atomic numbers are those of elements, as tables of elements need them.

    Raises:
        StoreError: one of them is not.
    """
    wrong = (numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)
    if wrong.any():
        raise StoreError(
            f"{where}: {int(numbers[wrong][0])} is no element. The store is damaged; see `kdcache "
            f"verify`."
        )


def made_only_of(
    store: Store, numbers: Sequence[int], cluster: Cluster, progress: Progress = silent
) -> BoolArray:
    """[n_structures] whether a structure has no other elements than these, in store order.

    Raises:
        StoreError: a shard is damaged, or the store was published without its structures.
    """
    work = _ElementBits(reference(store, cluster), tuple(numbers))
    return _scan("elements", work, store, cluster, progress)


@dataclass(frozen=True)
class _LabelBits:
    store: StoreReference

    def __call__(self) -> Callable[[int], bytes]:
        store = opened(self.store)

        def scan(shard: int) -> bytes:
            bits = []
            for block in store.plan.shard_blocks(shard):
                energy = store.read("structures/energy", [block])
                known = np.isfinite(store.read("structures/forces", [block])).all(axis=1)
                first = _first_atoms(store, block)
                bits.append(np.isfinite(energy) & np.logical_and.reduceat(known, first))
            return np.packbits(np.concatenate(bits)).tobytes()

        return scan


@dataclass(frozen=True)
class _ElementBits:
    store: StoreReference
    numbers: tuple[int, ...]

    def __call__(self) -> Callable[[int], bytes]:
        store = opened(self.store)
        wanted = np.zeros(MAX_ATOMIC_NUMBER + 1, bool)
        wanted[list(self.numbers)] = True

        def scan(shard: int) -> bytes:
            bits = []
            for block in store.plan.shard_blocks(shard):
                numbers = store.read("structures/atomic_numbers", [block])
                check_elements(numbers, f"structures/atomic_numbers, block {block}")
                known = wanted[numbers]
                bits.append(np.logical_and.reduceat(known, _first_atoms(store, block)))
            return np.packbits(np.concatenate(bits)).tobytes()

        return scan


def _first_atoms(store: Store, block: int) -> npt.NDArray[Any]:
    n_atoms = store.index.n_atoms[store.plan.block_structures(block)]
    return np.cumsum(n_atoms) - n_atoms


def _scan(
    label: str,
    work: Callable[[], Callable[[int], bytes]],
    store: Store,
    cluster: Cluster,
    progress: Progress,
) -> BoolArray:
    bits = np.zeros(len(store), bool)
    with progress(label, len(store), "structures") as advance:
        for shard, packed in cluster.run(work, range(store.plan.n_shards)):
            rows = store.plan.shard_structures(shard)
            count = rows.stop - rows.start
            bits[rows] = np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(bool)
            advance(count)
    return bits
