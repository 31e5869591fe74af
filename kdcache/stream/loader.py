"""Batches of a store, read and assembled ahead of the training step on threads.

Owns reading, the frame of energies (references subtracted in float64) and the mask of labels; the
order comes from the sampler, the arithmetic of a batch from the window.
Invariant: the batch of a step depends on the step alone, so a resumed run sees the same batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kdcache.store import Store
from kdcache.stream.edges import match_block_edges, teacher_edges
from kdcache.stream.neighbors import Neighbors, block_rows
from kdcache.stream.sampler import BlockShuffle, WindowPlan
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
        truth: group they are read from; a teacher's, where it stands in for the ground truth.
        origin_weight: weight of these structures in every loss; None where nothing is mixed.
        dtype: floating dtype of the batches.
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

    def read(self, blocks: IntArray) -> Window:
        """The structures of `blocks`, in store order."""
        chosen = [int(block) for block in blocks]
        rows = block_rows(self.store, chosen)
        n_atoms = self.store.index.n_atoms[rows]
        arrays: dict[str, Array] = {}
        levels: dict[str, str] = {}
        known = self.store.fields("structures")
        optional = [name for name in OPTIONAL if name.split("/")[1] in known]
        truth = [f"{self.truth}/energy", f"{self.truth}/forces"] if self.labels else []
        for name in (*INPUTS, *optional, *truth):
            group, _, short = name.rpartition("/")
            arrays[short] = self.store.read(name, chosen)
            levels[short] = self.store.fields(group)[short].level
        table = reference_table(self.references)
        reference = {
            "atom": table[arrays["atomic_numbers"]],
            "structure": reference_totals(arrays["atomic_numbers"], n_atoms, table),
        }
        if self.labels:
            arrays["energy"] = arrays["energy"] - reference["structure"]
        edges = self.neighbors.read(chosen)
        arrays["edge_index"], levels["edge_index"] = edges.edge_index, "edge"
        arrays["edge_shift"], levels["edge_shift"] = edges.edge_shift, "edge"
        matches: dict[str, IntArray] = {}
        for name in self.teacher_fields:
            spec = self.store.spec(f"teachers/{name}")
            array = self.store.read(f"teachers/{name}", chosen)
            arrays[name] = array - reference[spec.level] if spec.unit == "eV" else array
            levels[name] = spec.level
            if spec.level == "edge":
                # Its rows are the teacher's edges, which a batch has the student's own of.
                teacher = name.rpartition("/")[0]
                levels[name] = f"edge of {teacher}"
                if levels[name] not in matches:
                    theirs = teacher_edges(self.store, teacher).read(chosen)
                    matches[levels[name]] = match_block_edges(edges, theirs, n_atoms)
        if self.labels and self.labelled is not None:
            hidden = ~self.labelled[rows]
            arrays["energy"][hidden] = np.nan
            # read() may hand out memory it shares, so labels are hidden in a copy.
            arrays["forces"] = arrays["forces"].copy()
            arrays["forces"][np.repeat(hidden, n_atoms)] = np.nan
        arrays["weight"] = self.store.index.weight[rows]
        levels["weight"] = "structure"
        if self.origin_weight is not None:
            arrays["origin_weight"] = np.full(len(rows), self.origin_weight)
            arrays["weight"] = arrays["weight"] * self.origin_weight
            levels["origin_weight"] = "structure"
        further_edges = {}
        for name, neighbors in self.further.items():
            edges_of = neighbors.read(chosen)
            arrays[f"edge_index@{name}"], levels[f"edge_index@{name}"] = edges_of.edge_index, name
            arrays[f"edge_shift@{name}"], levels[f"edge_shift@{name}"] = edges_of.edge_shift, name
            further_edges[name] = edges_of.n_edges
        return Window(
            rows, n_atoms, edges.n_edges, arrays, levels, self.dtype, further_edges, matches
        )


class _Lane:
    """The windows one sampler walks through, read one ahead of use."""

    def __init__(
        self, read: Callable[[IntArray], Window], sampler: BlockShuffle, pool: ThreadPoolExecutor
    ) -> None:
        self._read = read
        self._sampler = sampler
        self._pool = pool
        self._epoch = -1
        self._plans: list[WindowPlan] = []
        self._first_row: IntArray = np.zeros(1, np.int64)
        self._order: IntArray = np.zeros(0, np.int64)
        self._held: dict[tuple[int, ...], Future[Window]] = {}

    def parts(self, step: int) -> list[dict[str, Array]]:
        """What this lane adds to the batch of `step`, window by window."""
        epoch, batch = self._sampler.place(step)
        if epoch != self._epoch:
            self._epoch = epoch
            self._plans = self._sampler.windows(epoch)
            self._first_row = np.cumsum([0, *(len(plan.rows) for plan in self._plans)])
            self._order = np.concatenate([plan.rows for plan in self._plans])
        size = self._sampler.batch_size * self._sampler.world_size
        rows = self._sampler.rank_share(self._order, batch)
        places = np.arange(batch * size, (batch + 1) * size)[
            self._sampler.rank :: self._sampler.world_size
        ]
        owner = np.searchsorted(self._first_row, places, side="right") - 1
        used = np.unique(owner)
        self._keep(range(int(used[0]), min(int(used[-1]) + 2, len(self._plans))))
        gathered = []
        for k in used:
            window = self._window(int(k))
            gathered.append(window.gather(window.place(rows[owner == k])))
        return gathered

    def _key(self, k: int) -> tuple[int, ...]:
        return tuple(self._plans[k].blocks.tolist())

    def _window(self, k: int) -> Window:
        return self._held[self._key(k)].result()

    def _keep(self, wanted: range) -> None:
        # By blocks, not by number: a store that fits one window is read once for all epochs.
        keys = {self._key(k): self._plans[k].blocks for k in wanted}
        for key in [key for key in self._held if key not in keys]:
            del self._held[key]
        for key, blocks in keys.items():
            if key not in self._held:
                self._held[key] = self._pool.submit(self._read, blocks)


class Loader:
    """An endless stream of batches from a step on.

    Args:
        lanes: a reader and the sampler of its rows; several make up every batch together
            (labelled, unlabelled, of another store).
        start_step: first step to yield.
        ahead: batches assembled ahead of use.
    """

    def __init__(
        self,
        lanes: Sequence[tuple[WindowReader, BlockShuffle]],
        *,
        start_step: int = 0,
        ahead: int = 4,
    ) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="kdcache-read")
        self._lanes = [_Lane(reader.read, sampler, self._pool) for reader, sampler in lanes]
        self._step = start_step
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kdcache-stream", daemon=True)

    def __enter__(self) -> Loader:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.05)
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _drain(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass

    def _run(self) -> None:
        try:
            while not self._closed.is_set():
                parts = [part for lane in self._lanes for part in lane.parts(self._step)]
                self._put(make_batch(parts))
                self._step += 1
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return


def sequential(reader: WindowReader, rows: IntArray, max_atoms: int) -> Iterator[Batch]:
    """Batches of `rows` in store order, each of at most `max_atoms` atoms: for evaluation."""
    block_of_row = reader.store.index.block[rows]
    for block in np.unique(block_of_row):
        window = reader.read(np.array([block]))
        index = window.place(rows[block_of_row == block])
        for run in atom_bounded(window.n_atoms[index], max_atoms):
            yield make_batch([window.gather(index[run])])
