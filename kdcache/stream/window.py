"""Structures in memory as flat arrays, and batches cut from them.

A few operations per field make a batch; per structure, Python only cuts a list of edges out.
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
from kdcache.store.halves import TILE_VALUES
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

# float16 values that leave room in a core's cache (512 kB and more) for what they become.
CACHED_VALUES = 2**17

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


def take_rows(array: Array, rows: IntArray, dtype: npt.DTypeLike) -> Array:
    """Rows of an array in `dtype`; of a row below 0, any, for the caller to overwrite.

    Raises:
        IndexError: a row that the array does not have.
    """
    if array.dtype != np.float16 or array.dtype == dtype or not len(rows):
        return np.take(array, rows, axis=0).astype(dtype, copy=False)
    if int(rows.max()) >= len(array):
        raise IndexError(f"row {int(rows.max())} is asked for, the array has {len(array)}")
    # Piece by piece, so that what is taken is widened while it is in the cache: at once, it would
    # be written to memory and read again.
    flat = array.reshape(len(array), math.prod(array.shape[1:]))
    taken = np.empty((len(rows), *array.shape[1:]), dtype)
    wide = torch.from_numpy(taken.reshape(len(rows), flat.shape[1]))
    # A piece is small enough for torch to start no threads beside those of the step that trains.
    values = TILE_VALUES if torch.get_num_threads() > 1 else CACHED_VALUES
    size = max(1, values // max(1, flat.shape[1]))
    halves = np.empty((min(size, len(rows)), flat.shape[1]), np.float16)
    narrow = torch.from_numpy(halves)
    for first in range(0, len(rows), size):
        some = rows[first : first + size]
        # Checked above: to raise, numpy would take the rows elsewhere first and copy them.
        np.take(flat, some, axis=0, out=halves[: len(some)], mode="clip")
        wide[first : first + size].copy_(narrow[: len(some)])
    return taken


def take_runs(array: Array, starts: IntArray, counts: IntArray, dtype: npt.DTypeLike) -> Array:
    """Rows of the ranges [start, start + count), one range after the other, in `dtype`.

    For ranges of many short rows: copied as they stand and converted in passing. For 64 ranges of
    520 rows of 6 bytes that takes a third of the time of a `take` by row.

    Example:
        >>> rows = np.array([[0, 1], [2, 3], [4, 5]])
        >>> take_runs(rows, np.array([2, 0]), np.array([1, 1]), np.float32).tolist()
        [[4.0, 5.0], [0.0, 1.0]]

    Raises:
        IndexError: a range that the array does not have.
    """
    if int((starts + counts).max(initial=0)) > len(array):
        raise IndexError(
            f"rows up to {int((starts + counts).max())} are asked for, the array has {len(array)}"
        )
    width = math.prod(array.shape[1:])
    flat = array.reshape(-1)
    begins, ends = (starts * width).tolist(), ((starts + counts) * width).tolist()
    runs = [flat[begin:end] for begin, end in zip(begins, ends, strict=True)]
    joined = np.concatenate(runs or [flat[:0]], dtype=dtype, casting="unsafe")
    return joined.reshape(-1, *array.shape[1:])


def take_matched(array: Array, rows: IntArray, dtype: npt.DTypeLike) -> Array:
    """Rows of a floating array in `dtype`, NaN where the row is -1."""
    if not len(array):
        return np.full((len(rows), *array.shape[1:]), np.nan, dtype)
    taken = take_rows(array, rows, dtype)
    taken[rows < 0] = np.nan
    return taken


def counted_over_all(edge_index: Array, first_atom: IntArray, n_edges: IntArray) -> IntArray:
    """[2, n_edges] source and target counted over all atoms of several structures.

    Args:
        edge_index: [n_edges, 2] the same counted from each structure's first atom, below 2^31.
        first_atom, n_edges: [n_structures].

    Example:
        >>> edges = np.array([[0, 1], [1, 0]])
        >>> counted_over_all(edges, np.array([0, 5]), np.array([1, 1])).tolist()
        [[0, 6], [1, 5]]
    """
    # Both ends of an edge as one number, low half and high half: whole vectors are added and split,
    # where every second number of a row would be picked one by one.
    pairs = np.repeat(first_atom * (2**32 + 1), n_edges)
    pairs += np.ascontiguousarray(edge_index, "<i4").view("<i8")[:, 0]
    counted = np.empty((2, len(pairs)), np.int64)
    np.bitwise_and(pairs, 2**32 - 1, out=counted[0])
    np.right_shift(pairs, 32, out=counted[1])
    return counted


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
        counts = {level: n[index] for level, n in self._counts.items()}
        starts = {level: first[index] for level, first in self._starts.items()}
        lookup = {"structure": index, "atom": range_rows(starts["atom"], counts["atom"])}
        for level, match in self.matches.items():
            lookup[level] = take_runs(match, starts["edge"], counts["edge"], match.dtype)
        gathered: dict[str, Array] = {}
        for name, array in self.arrays.items():
            level = self.levels[name]
            is_float = array.dtype.kind == "f" or name.startswith("edge_shift")
            left_half = self.keep_half and array.dtype == np.float16
            dtype = self.dtype if is_float and not left_half else array.dtype
            if level in self.matches:
                gathered[name] = take_matched(array, lookup[level], dtype)
            elif level in lookup:
                gathered[name] = take_rows(array, lookup[level], dtype)
            else:
                gathered[name] = take_runs(array, starts[level], counts[level], dtype)
        gathered["n_atoms"] = counts["atom"]
        gathered["n_edges"] = counts["edge"]
        for name in self.further_edges:
            gathered[f"n_edges@{name}"] = counts[name]
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
        edge_index = counted_over_all(
            whole[f"edge_index{suffix}"], first_atom, whole[f"n_edges{suffix}"]
        )
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
