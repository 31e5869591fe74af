"""Structures in memory as flat arrays, and batches cut from them.

One index operation per field makes a batch; no Python runs per structure.
Invariant: atom and edge rows of a structure are contiguous, structures in the window's order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdcache.graphs import Edges, GraphRule, neighbor_list
from kdcache.store.halves import convert, tiles
from kdcache.structures import (
    DEFAULT_TAG,
    MAX_ATOMIC_NUMBER,
    Batch,
    FloatArray,
    Graph,
    IntArray,
    Structure,
)

Array = npt.NDArray[Any]

NO_GRAPHS: Mapping[str, GraphRule] = MappingProxyType({})


def range_rows(starts: IntArray, counts: IntArray) -> IntArray:
    """Row numbers of the ranges [start, start + count), one after the other.

    Example:
        >>> range_rows(np.array([5, 0]), np.array([2, 3])).tolist()
        [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    rows: IntArray = np.repeat(starts - (ends - counts), counts)
    rows += np.arange(len(rows))
    return rows


def floating(array: Array, dtype: npt.DTypeLike) -> Array:
    """The same numbers in another floating dtype; the array itself where it has it."""
    if array.dtype != np.float16 or array.dtype == dtype:
        return array.astype(dtype, copy=False)
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    wide = np.empty(rows.shape, dtype)
    for tile in tiles(*rows.shape):
        convert(rows[tile], wide[tile])
    return wide.reshape(array.shape)


def take_matched(array: Array, rows: IntArray) -> Array:
    """Rows of a floating array, NaN where the row is -1."""
    if not len(array):
        return np.full((len(rows), *array.shape[1:]), np.nan, array.dtype)
    taken: Array = np.take(array, rows, axis=0)
    taken[rows < 0] = np.nan
    return taken


@dataclass(slots=True)
class Window:
    """Consecutive structures with the fields a batch needs.

    Attributes:
        rows: [n] store or dataset rows of the structures, ascending.
        n_atoms, n_edges: [n].
        arrays: by name; atomic_numbers, positions, cell, pbc, edge_index [n_edges, 2] counted from
            the structure's first atom, edge_shift [n_edges, 3]; energy, forces, weight and teacher
            fields ("teacher/field") where wanted.
        levels: level of every array; for a further graph's edges, the name of that graph; for what
            a teacher keeps by edge, a name of `matches`.
        dtype: floating dtype of the batches.
        further_edges: [n] edge counts of further graphs by name, whose lists are among the arrays
            as `edge_index@name` and `edge_shift@name`.
        matches: [n_edges] row of every edge in arrays of a level of this name, -1 where they have
            none; such an edge is given NaN.
        keep_half: leave float16 as it is, to be widened on a GPU: half the bytes to copy there.
    """

    rows: IntArray
    n_atoms: IntArray
    n_edges: IntArray
    arrays: dict[str, Array]
    levels: dict[str, str]
    dtype: npt.DTypeLike = np.float32
    further_edges: dict[str, IntArray] = field(default_factory=dict)
    matches: dict[str, IntArray] = field(default_factory=dict)
    keep_half: bool = False
    _counts: dict[str, IntArray] = field(default_factory=dict)
    _starts: dict[str, IntArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # take() copies an array of another layout whole, for every batch.
        self.arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        self._counts = {"atom": self.n_atoms, "edge": self.n_edges, **self.further_edges}
        self._starts = {level: np.cumsum(n) - n for level, n in self._counts.items()}

    def place(self, rows: IntArray) -> IntArray:
        """Where store rows stand in this window."""
        return np.searchsorted(self.rows, rows)

    def gather(self, index: IntArray) -> dict[str, Array]:
        """Every field of the structures at `index`, concatenated in that order."""
        lookup = {"structure": index}
        for level, counts in self._counts.items():
            lookup[level] = range_rows(self._starts[level][index], counts[index])
        for level, match in self.matches.items():
            lookup[level] = match[lookup["edge"]]
        gathered: dict[str, Array] = {}
        for name, array in self.arrays.items():
            level = self.levels[name]
            if level in self.matches:
                taken = take_matched(array, lookup[level])
            else:
                taken = np.take(array, lookup[level], axis=0)
            left_half = self.keep_half and taken.dtype == np.float16
            if (taken.dtype.kind == "f" or name.startswith("edge_shift")) and not left_half:
                taken = floating(taken, self.dtype)
            gathered[name] = taken
        gathered["n_atoms"] = self.n_atoms[index]
        gathered["n_edges"] = self.n_edges[index]
        for name, n_edges in self.further_edges.items():
            gathered[f"n_edges@{name}"] = n_edges[index]
        gathered["rows"] = self.rows[index]
        return gathered


def make_batch(parts: Sequence[dict[str, Array]]) -> Batch:
    """One batch from what `Window.gather` gave, possibly by several windows."""
    if len(parts) == 1:
        whole = parts[0]
    else:
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    n_atoms = whole["n_atoms"]
    n_structures = len(n_atoms)
    first_atom = np.cumsum(n_atoms) - n_atoms

    def graph(suffix: str) -> Graph:
        shift = np.repeat(first_atom, whole[f"n_edges{suffix}"])
        edge_index = np.empty((2, len(shift)), np.int64)
        np.add(whole[f"edge_index{suffix}"].T, shift, out=edge_index)
        return Graph(torch.from_numpy(edge_index), torch.from_numpy(whole[f"edge_shift{suffix}"]))

    def tensor(name: str) -> torch.Tensor | None:
        return torch.from_numpy(whole[name]) if name in whole else None

    teacher = {name: torch.from_numpy(array) for name, array in whole.items() if "/" in name}
    main = graph("")
    further = [name.partition("@")[2] for name in whole if name.startswith("n_edges@")]
    return Batch(
        atomic_numbers=torch.from_numpy(whole["atomic_numbers"].astype(np.int64)),
        positions=torch.from_numpy(whole["positions"]),
        cell=torch.from_numpy(whole["cell"]),
        pbc=torch.from_numpy(whole["pbc"]),
        structure_index=torch.from_numpy(np.repeat(np.arange(n_structures), n_atoms)),
        n_structures=n_structures,
        edge_index=main.edge_index,
        edge_shift=main.edge_shift,
        energy=tensor("energy"),
        forces=tensor("forces"),
        weight=tensor("weight"),
        origin_weight=tensor("origin_weight"),
        teacher=teacher,
        graphs={name: graph(f"@{name}") for name in further},
        tags=tensor("tags"),
        fixed=tensor("fixed"),
        rows=whole["rows"],
    )


def window_of(
    structures: Sequence[Structure],
    rule: GraphRule,
    *,
    edges: Sequence[Edges] | None = None,
    further: Mapping[str, GraphRule] = NO_GRAPHS,
    dtype: npt.DTypeLike = np.float32,
) -> Window:
    """Structures that are not in a store, with their neighbour lists and labels.

    Args:
        structures: any number, at least one.
        rule: how their neighbours are found.
        edges: lists found before, instead.
        further: rules of further graphs by name.
        dtype: floating dtype of the batches.

    Returns:
        A window whose rows count from 0; missing labels are NaN.
    """
    found = edges or _lists(structures, rule)
    nan_forces = [
        np.full((s.n_atoms, 3), np.nan) if s.forces is None else s.forces for s in structures
    ]
    energies = [np.nan if s.energy is None else s.energy for s in structures]
    arrays: dict[str, Array] = {
        "atomic_numbers": np.concatenate([s.atomic_numbers for s in structures]),
        "positions": np.concatenate([s.positions for s in structures]),
        "cell": np.stack([s.cell for s in structures]),
        "pbc": np.stack([s.pbc for s in structures]),
        "energy": np.array(energies, np.float64),
        "forces": np.concatenate(nan_forces),
        "weight": np.array([s.weight for s in structures]),
        "edge_index": np.concatenate([e.edge_index.T for e in found]),
        "edge_shift": np.concatenate([e.edge_shift for e in found]),
    }
    levels: dict[str, str] = {
        "atomic_numbers": "atom", "positions": "atom", "cell": "structure", "pbc": "structure",
        "energy": "structure", "forces": "atom", "weight": "structure",
        "edge_index": "edge", "edge_shift": "edge",
    }  # fmt: skip
    for name, default in (("tags", np.uint8(DEFAULT_TAG)), ("fixed", np.False_)):
        said = [getattr(s, name) for s in structures]
        if any(values is not None for values in said):
            arrays[name] = np.concatenate(
                [
                    np.full(s.n_atoms, default) if values is None else values
                    for s, values in zip(structures, said, strict=True)
                ]
            )
            levels[name] = "atom"
    further_edges = {}
    for name, further_rule in further.items():
        lists = _lists(structures, further_rule)
        arrays[f"edge_index@{name}"] = np.concatenate([e.edge_index.T for e in lists])
        arrays[f"edge_shift@{name}"] = np.concatenate([e.edge_shift for e in lists])
        levels |= {f"edge_index@{name}": name, f"edge_shift@{name}": name}
        further_edges[name] = np.array([e.n_edges for e in lists])
    return Window(
        rows=np.arange(len(structures)),
        n_atoms=np.array([s.n_atoms for s in structures]),
        n_edges=np.array([e.n_edges for e in found]),
        arrays=arrays,
        levels=levels,
        dtype=dtype,
        further_edges=further_edges,
    )


def _lists(structures: Sequence[Structure], rule: GraphRule) -> list[Edges]:
    return [neighbor_list(s.positions, s.cell, s.pbc, rule) for s in structures]


def reference_table(references: Mapping[int, float]) -> FloatArray:
    """[119] float64, eV: the reference energy by atomic number, 0 where there is none."""
    table = np.zeros(MAX_ATOMIC_NUMBER + 1)
    for number, energy in references.items():
        table[number] = energy
    return table


def reference_totals(atomic_numbers: Array, n_atoms: IntArray, table: FloatArray) -> FloatArray:
    """[n_structures] float64, eV: the sum of reference energies in each structure."""
    owner = np.repeat(np.arange(len(n_atoms)), n_atoms)
    totals = np.bincount(owner, table[atomic_numbers], minlength=len(n_atoms))
    return totals.astype(np.float64, copy=False)


def collate(
    structures: Sequence[Structure],
    rule: GraphRule,
    dtype: npt.DTypeLike = np.float32,
    *,
    further: Mapping[str, GraphRule] = NO_GRAPHS,
) -> Batch:
    """Structures as one batch, neighbour lists included."""
    window = window_of(structures, rule, further=further, dtype=dtype)
    return make_batch([window.gather(np.arange(len(structures)))])


def atom_bounded(n_atoms: IntArray, max_atoms: int) -> list[slice]:
    """Runs of structures with at most `max_atoms` atoms each; one too large stands alone.

    Example:
        >>> atom_bounded(np.array([3, 3, 9, 1]), 6)
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    runs, first, atoms = [], 0, 0
    for k, n in enumerate(n_atoms.tolist()):
        if k > first and atoms + n > max_atoms:
            runs.append(slice(first, k))
            first, atoms = k, 0
        atoms += n
    if len(n_atoms):
        runs.append(slice(first, len(n_atoms)))
    return runs
