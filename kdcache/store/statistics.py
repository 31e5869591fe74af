"""What the values of a store are like: moments, quantiles, elements; shard by shard, here or by a
cluster.

Owns what is counted and in which order parts are put together; the arithmetic is `moments`'.
Invariant: the numbers do not depend on who counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kdcache.cluster import Cluster, Here
from kdcache.fields import ENERGY, FORCES, FieldSpec, Level
from kdcache.progress import Progress, silent
from kdcache.store.codecs import FLOATS, channels
from kdcache.store.metadata import Json
from kdcache.store.moments import QUANTILES, Moments, count_bins, quantiles_of
from kdcache.store.reader import Store
from kdcache.store.scan import StoreReference, check_elements, opened, reference
from kdcache.structures import MAX_ATOMIC_NUMBER, IntArray

Array = npt.NDArray[Any]

# Sums of squares of values beyond 1e154 are infinite, and told as null: no reason to warn.
BEYOND_FLOATS = np.errstate(over="ignore", invalid="ignore")


class Quantity(NamedTuple):
    """Something there is a distribution of.

    Attributes:
        name: "energy per atom" or "painn/node".
        field: path in the store it is read from.
        unit: of its values.
        n_channels: extent of its last axis.
        kind: "" for the field itself, "per atom", or "norm".
    """

    name: str
    field: str
    unit: str
    n_channels: int
    kind: str


@dataclass(frozen=True)
class Distribution:
    """How the values of a quantity are distributed.

    Attributes:
        unit: of its values.
        count: finite values; `n_nan` and `n_infinite` others, which nothing else counts.
        zeros: share of the finite values that are 0.
        mean, std, least, largest, rms: std is divided by the count.
        quantiles: by share, right to within 1/1000 of the range.
        bins: [1000] counts in equal bins from the least to the largest.
        channel_mean, channel_std: [n_channels], empty where not asked for.
    """

    unit: str
    count: int
    n_nan: int
    n_infinite: int
    zeros: float
    mean: float
    std: float
    least: float
    largest: float
    rms: float
    quantiles: Mapping[float, float]
    bins: IntArray = field(repr=False)
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()

    def to_json(self) -> Json:
        """For programs; what does not exist is null."""
        plain: Json = {
            "unit": self.unit,
            "count": self.count,
            "nan": self.n_nan,
            "infinite": self.n_infinite,
            "zeros": self.zeros,
        }
        for name in ("mean", "std", "least", "largest", "rms"):
            plain[name.replace("least", "min").replace("largest", "max")] = _finite(
                getattr(self, name)
            )
        plain["quantiles"] = {f"{q:g}": _finite(value) for q, value in self.quantiles.items()}
        plain["histogram"] = self.bins.tolist() if self.count else []
        if self.channel_mean:
            plain["channel_mean"] = [_finite(value) for value in self.channel_mean]
            plain["channel_std"] = [_finite(value) for value in self.channel_std]
        return plain


@dataclass(frozen=True)
class StoreStatistics:
    """Of one store.

    Attributes:
        root_digest: of the store.
        n_structures, n_atoms, n_edges: of it.
        elements: atoms, and structures they are in, by atomic number.
        quantities: by name.
    """

    root_digest: str
    n_structures: int
    n_atoms: int
    n_edges: int
    elements: Mapping[int, tuple[int, int]]
    quantities: Mapping[str, Distribution]

    def to_json(self) -> Json:
        """For programs."""
        return {
            "root_digest": self.root_digest,
            "n_structures": self.n_structures,
            "n_atoms": self.n_atoms,
            "n_edges": self.n_edges,
            "elements": {
                str(number): {"atoms": atoms, "structures": structures}
                for number, (atoms, structures) in self.elements.items()
            },
            "quantities": {name: found.to_json() for name, found in self.quantities.items()},
        }


@BEYOND_FLOATS
def store_statistics(
    store: Store,
    cluster: Cluster | None = None,
    *,
    by_channel: bool = False,
    progress: Progress = silent,
) -> StoreStatistics:
    """Distributions of all fields of floats, of energies per atom and of norms of forces.

    The store is read twice: first for moments and the range, then for counts in equal bins over
    that range. Counts are whole numbers, so they are the same in whatever order shards are done; a
    sketch that needs one pass alone is not. Sums are float64 and added in the order of shards. Rows
    of structures that a teacher failed on are left out.

    Args:
        store: open.
        cluster: who reads the shards; None for this process.
        by_channel: mean and standard deviation of every channel of features.
        progress: shows shards.

    Raises:
        StoreError: a shard is damaged.
    """
    cluster = Here() if cluster is None else cluster
    where = reference(store, cluster)
    found = _by_shard(store, cluster, CountMoments(where), "moments", progress)
    moments = {
        quantity.name: _summed([shard.moments[quantity.name] for shard in found])
        for quantity in quantities_of(store)
    }
    pooled = {name: one.pooled() for name, one in moments.items()}
    ranges = {
        name: (one.least, one.largest) for name, one in pooled.items() if one.least < one.largest
    }
    counted = _by_shard(store, cluster, CountBins(where, ranges), "histograms", progress)
    bins = {name: np.sum([shard[name] for shard in counted], axis=0) for name in ranges}
    quantities = _of_counts(store)
    for quantity in quantities_of(store):
        name = quantity.name
        channelled = moments[name] if by_channel and quantity.n_channels > 1 else None
        quantities[name] = _distribution(quantity.unit, pooled[name], bins.get(name), channelled)
    atoms = sum(shard.atoms for shard in found)
    structures = sum(shard.structures for shard in found)
    return StoreStatistics(
        root_digest=store.manifest.root_digest,
        n_structures=len(store),
        n_atoms=store.manifest.n_atoms,
        n_edges=store.manifest.n_edges,
        elements={int(z): (int(atoms[z]), int(structures[z])) for z in np.flatnonzero(atoms)},
        quantities=quantities,
    )


def quantities_of(store: Store) -> list[Quantity]:
    """Everything there is a distribution of: ground truth first, then teacher by teacher."""
    found = []
    for group in store.plans:
        prefix = "" if group == "structures" else f"{group.partition('/')[2]}/"
        for name, spec in store.fields(group).items():
            if spec.dtype not in FLOATS:
                continue
            path, unit = f"{group}/{name}", spec.unit
            found.append(Quantity(prefix + name, path, unit, channels(spec), ""))
            if _is_like(spec, ENERGY):
                found.append(Quantity(f"{prefix}{name} per atom", path, unit, 1, "per atom"))
            if _is_like(spec, FORCES):
                found.append(Quantity(f"{prefix}{name} norm", path, unit, 1, "norm"))
    return found


class ShardMoments(NamedTuple):
    """Moments by quantity; [119] atoms of each element and structures with it."""

    moments: dict[str, Moments]
    atoms: IntArray
    structures: IntArray


@dataclass(frozen=True)
class CountMoments:
    """First pass over a shard."""

    store: StoreReference

    def __call__(self) -> Callable[[int], ShardMoments]:
        return partial(_count_moments, opened(self.store))


@dataclass(frozen=True)
class CountBins:
    """Second pass over a shard, with the range of every quantity known."""

    store: StoreReference
    ranges: Mapping[str, tuple[float, float]]

    def __call__(self) -> Callable[[int], dict[str, IntArray]]:
        return partial(_count_bins, opened(self.store), self.ranges)


@BEYOND_FLOATS
def _count_moments(store: Store, shard: int) -> ShardMoments:
    moments = {quantity.name: Moments() for quantity in quantities_of(store)}
    for quantity, values in _values(store, shard):
        found = Moments.of(values, quantity.n_channels)
        moments[quantity.name] = moments[quantity.name].merged(found)
    atoms, structures = _elements(store, shard)
    return ShardMoments(moments, atoms, structures)


@BEYOND_FLOATS
def _count_bins(
    store: Store, ranges: Mapping[str, tuple[float, float]], shard: int
) -> dict[str, IntArray]:
    counts: dict[str, IntArray] = {}
    for quantity, values in _values(store, shard):
        if quantity.name in ranges:
            found = count_bins(values, *ranges[quantity.name])
            counts[quantity.name] = counts.get(quantity.name, 0) + found
    return counts


def _values(store: Store, shard: int) -> Iterator[tuple[Quantity, Array]]:
    """Values of every quantity, block by block."""
    last, values = "", np.empty(0)
    for block in store.plan.shard_blocks(shard):
        for quantity in quantities_of(store):
            if (here := f"{quantity.field} {block}") != last:
                last, values = here, _present(store, quantity.field, block)
            yield quantity, _derived(store, quantity, block, values)


def _present(store: Store, name: str, block: int) -> Array:
    """Rows of a block, without those of structures that the teacher failed on."""
    values = store.read(name, [block])
    gone = _gone(store, name, store.spec(name).level, block)
    return values[~gone] if gone.any() else values


def _gone(store: Store, name: str, level: Level, block: int) -> npt.NDArray[np.bool_]:
    rows = store.plan.block_structures(block)
    return store.failed_rows(name.rpartition("/")[0], level, rows)


def _derived(store: Store, quantity: Quantity, block: int, values: Array) -> Array:
    if quantity.kind == "norm":
        norm: Array = np.linalg.norm(values.astype(np.float64), axis=-1)
        return norm
    if quantity.kind == "per atom":
        n_atoms = store.index.n_atoms[store.plan.block_structures(block)]
        return values / n_atoms[~_gone(store, quantity.field, "structure", block)]
    return values


def _elements(store: Store, shard: int) -> tuple[IntArray, IntArray]:
    size = MAX_ATOMIC_NUMBER + 1
    atoms, structures = np.zeros(size, np.int64), np.zeros(size, np.int64)
    if "atomic_numbers" not in store.fields("structures"):
        return atoms, structures
    for block in store.plan.shard_blocks(shard):
        numbers = store.read("structures/atomic_numbers", [block]).astype(np.int64)
        check_elements(numbers, f"structures/atomic_numbers, block {block}")
        n_atoms = store.index.n_atoms[store.plan.block_structures(block)]
        owner = np.repeat(np.arange(len(n_atoms)), n_atoms)
        atoms += np.bincount(numbers, minlength=size)
        structures += np.bincount(np.unique(owner * size + numbers) % size, minlength=size)
    return atoms, structures


def _by_shard(
    store: Store,
    cluster: Cluster,
    work: Callable[[], Callable[[int], Any]],
    label: str,
    progress: Progress,
) -> list[Any]:
    """Results in the order of shards, however they came."""
    found = {}
    with progress(label, store.plan.n_shards, "shards") as advance:
        for shard, result in cluster.run(work, range(store.plan.n_shards)):
            found[shard] = result
            advance()
    return [found[shard] for shard in range(store.plan.n_shards)]


def _summed(parts: list[Moments]) -> Moments:
    total = Moments()
    for part in parts:
        total = total.merged(part)
    return total


def _of_counts(store: Store) -> dict[str, Distribution]:
    """What the index says already."""
    n_atoms = store.index.n_atoms
    columns: dict[str, Array] = {"atoms per structure": n_atoms}
    if store.graph is not None:
        columns["edges per atom"] = store.index.n_edges / n_atoms
    found = {}
    for name, column in columns.items():
        moments = Moments.of(column, 1)
        bins = count_bins(column, moments.least, moments.largest)
        found[name] = _distribution("", moments, bins, None)
    return found


def _distribution(
    unit: str, pooled: Moments, bins: IntArray | None, by_channel: Moments | None
) -> Distribution:
    count = int(pooled.n.sum())
    mean = float(pooled.mean[0]) if count else np.nan
    std = float(pooled.std[0]) if count else np.nan
    least, largest = (pooled.least, pooled.largest) if count else (np.nan, np.nan)
    quantiles = dict.fromkeys(QUANTILES, least)
    if bins is not None:
        quantiles = dict(zip(QUANTILES, quantiles_of(bins, least, largest), strict=True))
    else:  # all values are the same, or there are none
        bins = count_bins(np.zeros(0), 0.0, 1.0)
        bins[0] = count
    return Distribution(
        unit=unit,
        count=count,
        n_nan=pooled.n_nan,
        n_infinite=pooled.n_infinite,
        zeros=pooled.n_zero / count if count else np.nan,
        mean=mean,
        std=std,
        least=least,
        largest=largest,
        rms=float(np.hypot(mean, std)),
        quantiles=quantiles,
        bins=bins,
        channel_mean=() if by_channel is None else tuple(by_channel.mean.tolist()),
        channel_std=() if by_channel is None else tuple(by_channel.std.tolist()),
    )


def _is_like(spec: FieldSpec, known: FieldSpec) -> bool:
    return (spec.name, spec.level, spec.shape) == (known.name, known.level, known.shape)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
