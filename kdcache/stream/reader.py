"""Windows of a store with everything a batch needs: inputs, edges, labels, teachers' features.

Owns the frame of energies (references subtracted in float64) and the mask of labels; which blocks
are read is the sampler's business, the arithmetic of a batch the window's.
Invariant: what a window holds depends on its blocks alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kdcache.store import Store
from kdcache.stream.buffers import FieldReads
from kdcache.stream.edges import match_block_edges, teacher_edges
from kdcache.stream.neighbors import Neighbors, block_rows, read_lists, stored_fields
from kdcache.stream.window import (
    Array,
    Window,
    atom_bounded,
    make_batch,
    reference_table,
    reference_totals,
)
from kdcache.structures import Batch, IntArray

INPUTS = ("structures/atomic_numbers", "structures/positions", "structures/cell", "structures/pbc")
OPTIONAL = ("structures/tags", "structures/fixed")  # only where the dataset says so


@dataclass
class WindowReader:
    """Reads windows of blocks with everything a batch needs.

    Attributes:
        store: an open store.
        neighbors: where neighbour lists come from.
        further: those of further graphs, by name.
        teacher_fields: "teacher/field" names to read beside the ground truth.
        references: eV by atomic number; subtracted from every energy that is read.
        labelled: [n_structures] whether a structure's ground truth may be seen; None for all.
        labels: read energies and forces.
        truth: group they are read from; a teacher's, where it stands in for the ground truth: NaN,
            like a missing label, where it failed.
        origin_weight: weight of these structures in every loss; None where nothing is mixed.
        dtype: floating dtype of the batches.
        keep_half: leave what is stored as float16 so, for a GPU to widen.
    """

    store: Store
    neighbors: Neighbors
    further: Mapping[str, Neighbors] = field(default_factory=dict)
    teacher_fields: Sequence[str] = ()
    references: Mapping[int, float] = field(default_factory=dict)
    labelled: npt.NDArray[np.bool_] | None = None
    labels: bool = True
    truth: str = "structures"
    origin_weight: float | None = None
    dtype: npt.DTypeLike = np.float32
    keep_half: bool = False
    _fields: FieldReads = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._fields = FieldReads(self.store)

    def read(self, blocks: IntArray) -> Window:
        """The structures of `blocks`, in store order."""
        chosen = [int(block) for block in blocks]
        with self.store.fetched(self._stored_fields(), chosen):
            return self._read(chosen)

    def _own_fields(self) -> list[str]:
        """Inputs and labels."""
        known = self.store.fields("structures")
        truth = [f"{self.truth}/energy", f"{self.truth}/forces"] if self.labels else []
        return [*INPUTS, *(name for name in OPTIONAL if name.split("/")[1] in known), *truth]

    def _stored_fields(self) -> list[str]:
        """What `_read` reads of the store, so that a server is asked for all of it at once."""
        names = self._own_fields() + [f"teachers/{name}" for name in self.teacher_fields]
        lists = [self.neighbors, *self.further.values()]
        for name in self.teacher_fields:
            if self.store.spec(f"teachers/{name}").level == "edge":
                lists.append(teacher_edges(self.store, name.rpartition("/")[0]))
        return names + [name for neighbors in lists for name in stored_fields(neighbors)]

    def _read(self, chosen: list[int]) -> Window:
        rows = block_rows(self.store, chosen)
        n_atoms = self.store.index.n_atoms[rows]
        arrays: dict[str, Array] = {}
        levels: dict[str, str] = {}
        for name in self._own_fields():
            group, _, short = name.rpartition("/")
            arrays[short] = self._fields.read(name, chosen)
            levels[short] = self.store.fields(group)[short].level
        reference: dict[str, Array] = {}
        if self.references:
            table = reference_table(self.references)
            reference = {
                "atom": table[arrays["atomic_numbers"]],
                "structure": reference_totals(arrays["atomic_numbers"], n_atoms, table),
            }
        if self.labels:
            arrays["energy"] = _less(arrays["energy"], reference, "structure")
        lists = read_lists({"": self.neighbors, **self.further}, chosen)
        edges = lists.pop("")
        arrays["edge_index"], levels["edge_index"] = edges.edge_index, "edge"
        arrays["edge_shift"], levels["edge_shift"] = edges.edge_shift, "edge"
        matches: dict[str, IntArray] = {}
        for name in self.teacher_fields:
            spec = self.store.spec(f"teachers/{name}")
            array = self._fields.read(f"teachers/{name}", chosen)
            teacher = name.rpartition("/")[0]
            if self.store.teachers[teacher].n_failed:
                # NaN whatever the codec: whole numbers have none.
                array[self.store.failed_rows(f"teachers/{teacher}", spec.level, rows)] = np.nan
            in_ev = spec.unit == "eV"
            arrays[name] = _less(array, reference, spec.level) if in_ev else array
            levels[name] = spec.level
            if spec.level == "edge":
                # Its rows are the teacher's edges, which a batch has the student's own of.
                levels[name] = f"edge of {teacher}"
                if levels[name] not in matches:
                    theirs = teacher_edges(self.store, teacher).read(chosen)
                    matches[levels[name]] = match_block_edges(edges, theirs, n_atoms)
        if self.labels and self.labelled is not None:
            hidden = ~self.labelled[rows]
            arrays["energy"][hidden] = np.nan
            arrays["forces"][np.repeat(hidden, n_atoms)] = np.nan
        arrays["weight"] = self.store.index.weight[rows]
        levels["weight"] = "structure"
        if self.origin_weight is not None:
            arrays["origin_weight"] = np.full(len(rows), self.origin_weight)
            arrays["weight"] = arrays["weight"] * self.origin_weight
            levels["origin_weight"] = "structure"
        further_edges = {}
        for name, edges_of in lists.items():
            arrays[f"edge_index@{name}"], levels[f"edge_index@{name}"] = edges_of.edge_index, name
            arrays[f"edge_shift@{name}"], levels[f"edge_shift@{name}"] = edges_of.edge_shift, name
            further_edges[name] = edges_of.n_edges
        return Window(
            rows,
            n_atoms,
            edges.n_edges,
            arrays,
            levels,
            self.dtype,
            further_edges,
            matches,
            self.keep_half,
        )


def _less(energies: Array, reference: Mapping[str, Array], level: str) -> Array:
    """Energies in float64, less their reference where there are any."""
    if not reference:
        return energies.astype(np.float64, copy=False)
    return energies - reference[level]


def sequential(reader: WindowReader, rows: IntArray, max_atoms: int) -> Iterator[Batch]:
    """Batches of `rows` in store order, each of at most `max_atoms` atoms: for evaluation."""
    block_of_row = reader.store.index.block[rows]
    for block in np.unique(block_of_row):
        window = reader.read(np.array([block]))
        index = window.place(rows[block_of_row == block])
        for run in atom_bounded(window.n_atoms[index], max_atoms):
            yield make_batch([window.gather(index[run])])
