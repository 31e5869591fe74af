"""A bounded part of a store: what the distributions and examples of its card are made of.

A store is in random order, so its first blocks are a fair sample and are read in one go. Invariant:
no more is read than was asked for, whatever the size of the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcache.progress import Progress, silent
from kdcache.store import Store
from kdcache.store.codecs import FLOATS
from kdcache.store.statistics import Quantity, quantities_of
from kdcache.structures import MAX_ATOMIC_NUMBER, IntArray

Array = npt.NDArray[Any]

MAX_BYTES = 2**28
EXAMPLES = 3
SHOWN_VALUES = 6
# As many as a page bears; a store may have a hundred teachers.
MAX_PANELS = 30
# The axis of values beyond has no finite length.
LARGEST_DRAWN = 1e300


@dataclass(frozen=True, slots=True)
class Panel:
    """Values a histogram is drawn of.

    Attributes:
        title: "painn/node, norm per row".
        unit: one of ours, else "".
        values: finite ones, one at least.
    """

    title: str
    unit: str
    values: Array


@dataclass(frozen=True, slots=True)
class Example:
    """A structure, and the first values of every field.

    Attributes:
        structure_id: of it.
        n_atoms: of it.
        fields: first values of the first row by "group/field" name, none where the teacher failed;
            the number of values of a row, and of all rows.
    """

    structure_id: str
    n_atoms: int
    fields: Mapping[str, tuple[list[float], int, int]]


@dataclass(frozen=True)
class Sample:
    """What was read.

    Attributes:
        n_structures: whose values were read: the first in the store.
        elements: [119] atoms by atomic number; empty where the store does not hold them.
        panels: histograms to draw.
        n_left_out: quantities there is no room for.
        examples: the first structures.
    """

    n_structures: int
    elements: IntArray
    panels: list[Panel] = field(default_factory=list)
    n_left_out: int = 0
    examples: list[Example] = field(default_factory=list)


def read_sample(store: Store, n_structures: int, *, progress: Progress = silent) -> Sample:
    """Distributions and examples of the first structures of a store.

    Args:
        store: an open store.
        n_structures: about so many are read, whole blocks of them, and at most 256 MB.
        progress: shows blocks.

    Raises:
        StoreError: a shard is missing or damaged.
    """
    blocks = _blocks(store, n_structures)
    quantities = [q for q in quantities_of(store) if q.kind]
    features = [
        (f"{group}/{name}", spec)
        for group in store.plans
        if group != "structures"
        for name, spec in store.fields(group).items()
        if spec.dtype in FLOATS and not spec.unit
    ]
    n_found = len(quantities) + len(features)
    quantities = quantities[:MAX_PANELS]
    features = features[: MAX_PANELS - len(quantities)]
    names = sorted({q.field for q in quantities} | {name for name, _ in features})
    counted = "atomic_numbers" in store.fields("structures")
    names += ["structures/atomic_numbers"] if counted else []
    values: dict[str, list[Array]] = {}
    elements = np.zeros(MAX_ATOMIC_NUMBER + 1 if counted else 0, np.int64)
    with progress("read", len(blocks), "blocks") as advance:
        for block in blocks:
            with store.fetched(names, [block]):
                for quantity in quantities:
                    found = _derived(store, quantity, block)
                    values.setdefault(quantity.name, []).append(found)
                for name, spec in features:
                    rows = store.read(name, [block]).reshape(-1, spec.row_size)
                    norms = _norms(rows.astype(np.float64))
                    values.setdefault(f"{_short(name)}, norm per row", []).append(norms)
                if counted:
                    numbers = store.read("structures/atomic_numbers", [block]).astype(np.int64)
                    elements += np.bincount(
                        numbers[numbers <= MAX_ATOMIC_NUMBER], minlength=len(elements)
                    )
            advance()
    units = {quantity.name: quantity.unit for quantity in quantities}
    read = store.index.n_atoms[: store.plan.block_structures(blocks[-1]).stop]
    panels = [Panel("atoms per structure (all)", "", store.index.n_atoms)]
    for title, parts in values.items():
        joined = np.concatenate(parts)
        drawn = joined[np.abs(joined) < LARGEST_DRAWN]
        if len(drawn):
            panels.append(Panel(title, _unit(units.get(title, "")), drawn))
    n_left_out = n_found - len(quantities) - len(features)
    return Sample(len(read), elements, panels, n_left_out, _examples(store))


def _blocks(store: Store, n_structures: int) -> list[int]:
    """The first blocks, until they hold as many structures or their values fill the room."""
    per_block = sum(_block_bytes(store, group) for group in store.plans)
    last = int(store.index.block[min(max(n_structures, 1), len(store)) - 1])
    return list(range(min(last + 1, max(1, MAX_BYTES // max(per_block, 1)))))


def _block_bytes(store: Store, group: str) -> int:
    plan = store.plans[group]
    return sum(
        plan.capacity(spec.level) * spec.row_size * 4 for spec in store.fields(group).values()
    )


def _derived(store: Store, quantity: Quantity, block: int) -> Array:
    values = store.read(quantity.field, [block]).astype(np.float64)
    if quantity.kind == "norm":
        return _norms(values)
    return values / store.index.n_atoms[store.plan.block_structures(block)]


def _norms(values: Array) -> Array:
    # What overflows is not drawn.
    with np.errstate(over="ignore"):
        norms: Array = np.linalg.norm(values, axis=-1)
    return norms


def _examples(store: Store) -> list[Example]:
    """The first structures of the first block."""
    rows = range(min(EXAMPLES, store.plan.block_structures(0).stop))
    shown: list[dict[str, tuple[list[float], int, int]]] = [{} for _ in rows]
    for group, plan in store.plans.items():
        failed: list[int] = []
        if group != "structures":
            failed = store.failures(group.partition("/")[2]).row.tolist()
        for name, spec in store.fields(group).items():
            values = store.read(f"{group}/{name}", [0])
            counts = plan.counts(spec.level)
            for row, fields in zip(rows, shown, strict=True):
                n, start = int(counts[row]), int(counts[:row].sum())
                first = values[start : start + min(n, 1)].ravel()[:SHOWN_VALUES]
                said = [] if row in failed else [float(value) for value in first]
                fields[_short(f"{group}/{name}")] = (said, spec.row_size, n * spec.row_size)
    return [
        Example(str(store.index.structure_id[row]), int(store.index.n_atoms[row]), fields)
        for row, fields in zip(rows, shown, strict=True)
    ]


def _short(name: str) -> str:
    """A path in the store as people say it: painn/node, forces."""
    return name.removeprefix("teachers/").removeprefix("structures/")


def _unit(unit: str) -> str:
    # A stranger's text is not drawn.
    return unit if unit in ("eV", "Å", "eV/Å") else ""
