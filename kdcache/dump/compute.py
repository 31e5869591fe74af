"""What a teacher says of the structures of one shard.

Owns batches, and what happens where a teacher fails: memory that is full, an error, values that are
not finite. Batches are cut within a block, so the rows of a shard depend on the store's order and
the teacher alone; bitwise on one machine with one number of threads, as floating-point sums go.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kdcache.devices import batch_atoms
from kdcache.dump.options import DumpOptions, has_edges
from kdcache.errors import DeviceError, KdcacheError, TeacherError
from kdcache.fields import GRAPH_FIELDS, FieldSpec, Level
from kdcache.store import BlockPlan, Store
from kdcache.store.failures import one_line
from kdcache.stream.reader import WindowReader
from kdcache.stream.searched import lists_read_once
from kdcache.stream.window import Array, Window, atom_bounded, make_batch
from kdcache.structures import Batch, IntArray
from kdcache.teachers import Teacher

log = logging.getLogger(__name__)

Fields = dict[str, Tensor]


@dataclass(slots=True)
class ShardRows:
    """Fields of one shard, filled from its first row on.

    The memory serves shard after shard: fresh memory for each takes longer to get, page by page,
    than to fill, and that on the thread which runs the teacher.

    Attributes:
        failures: why there is nothing of a structure, by store row.
    """

    plan: BlockPlan
    failures: dict[int, str] = field(default_factory=dict)
    _memory: dict[str, Array] = field(default_factory=dict)
    _filled: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Start anew; what `arrays` gave before is overwritten."""
        self._filled = {}
        self.failures = {}

    def append(self, spec: FieldSpec, values: Array) -> None:
        """Further rows of a field."""
        if spec.name not in self._memory:
            most = _most_rows(self.plan, spec.level)
            self._memory[spec.name] = np.empty((most, *spec.shape), values.dtype)
        start = self._filled.get(spec.name, 0)
        self._filled[spec.name] = start + len(values)
        self._memory[spec.name][start : start + len(values)] = values

    def arrays(self) -> dict[str, Array]:
        """What was filled in since `begin`."""
        return {name: self._memory[name][:n_rows] for name, n_rows in self._filled.items()}


def _most_rows(plan: BlockPlan, level: Level) -> int:
    used = plan.used(level)
    starts = np.arange(0, plan.n_blocks, plan.blocks_per_shard)
    return int(np.add.reduceat(used, starts).max())


class ShardComputer:
    """A teacher over the structures of a store, shard by shard.

    Args:
        store: an open store.
        teacher: on `device`.
        specs: fields to give, from `choose_fields`.
        options: of the dump.
        device: where batches go.
    """

    def __init__(
        self,
        store: Store,
        teacher: Teacher,
        specs: Sequence[FieldSpec],
        options: DumpOptions,
        device: str,
    ) -> None:
        self._store = store
        self._teacher = teacher
        self._asked = [spec for spec in specs if spec not in GRAPH_FIELDS]
        self._lists = GRAPH_FIELDS if has_edges(specs) else ()
        self._options = options
        self._device = device
        self.neighbors, further = lists_read_once(
            store, teacher.graph_rule, teacher.further_graphs, options.threads
        )
        dtype = np.float64 if teacher.dtype == torch.float64 else np.float32
        self._reader = WindowReader(store, self.neighbors, further, labels=False, dtype=dtype)
        # Edges of the smallest batch that did not fit the memory: larger ones are cut at once.
        self._too_many_edges = float("inf")

    def compute(
        self,
        shard: int,
        rows: ShardRows,
        reading: ThreadPoolExecutor,
        advance: Callable[[int], object],
    ) -> None:
        """Fill `rows` with the fields of a shard.

        Args:
            shard: its number.
            rows: begun anew here.
            reading: one thread, which reads the next block while one is computed.
            advance: told how many structures are done.

        Raises:
            TeacherError: the teacher fails on a structure, or gives rows of something else.
        """
        rows.begin()
        # Asked here: whoever has workers compute may be without their device, or say auto.
        max_atoms = batch_atoms(self._options.max_atoms, torch.device(self._device))
        for window in self._windows(shard, reading):
            for run in atom_bounded(window.n_atoms, max_atoms):
                for part, fields in self._fields(window, run, rows.failures):
                    for spec in self._asked:
                        rows.append(spec, self._stored(window, part, spec, fields))
            for spec in self._lists:
                # The lists the batches were cut from, so rows belong to edges by construction.
                rows.append(spec, window.arrays[spec.name].astype(spec.dtype))
            advance(len(window.rows))

    def _windows(self, shard: int, reading: ThreadPoolExecutor) -> Iterator[Window]:
        """The blocks of a shard one by one, the next read while one is computed."""
        blocks = self._store.plan.shard_blocks(shard)
        ahead: Future[Window] | None = None
        for block in blocks:
            window = ahead.result() if ahead else self._reader.read(np.array([block]))
            following = block + 1
            ahead = (
                reading.submit(self._reader.read, np.array([following]))
                if following in blocks
                else None
            )
            yield window

    def _fields(
        self, window: Window, run: slice, failures: dict[int, str]
    ) -> Iterator[tuple[slice, Fields | None]]:
        """What the teacher says of consecutive structures, cut further where it cannot take them.

        None for a structure it fails on, which `failures` then names.
        """
        n_edges = int(window.n_edges[run].sum())
        alone = run.stop - run.start == 1
        error: Exception | None = None
        if alone or n_edges < self._too_many_edges:
            try:
                fields = self._ask(window, run)
            except KdcacheError:
                raise
            except Exception as raised:
                # Handled below: until then the traceback keeps the batch in the GPU's memory.
                error = raised
            else:
                if self._options.on_error == "skip":
                    self._check_finite(window, run, fields, failures)
                yield run, fields
                return
        reason = "" if error is None else f"{type(error).__name__}: {one_line(str(error))}"
        if error is not None and _is_device_lost(error):
            raise DeviceError(
                f"{self._device} no longer computes ({reason}). What is finished is kept: "
                f"repeat the command to go on."
            ) from error
        if error is not None and _is_memory_full(error):
            reason, error = "it does not fit the memory", None
            self._make_room(n_edges)
        if not alone:
            middle = _middle(window, run)
            yield from self._fields(window, slice(run.start, middle), failures)
            yield from self._fields(window, slice(middle, run.stop), failures)
            return
        row = int(window.rows[run.start])
        if self._options.on_error == "stop":
            raise TeacherError(self._failed(row, reason)) from error
        failures[row] = reason
        yield run, None

    def _ask(self, window: Window, run: slice) -> Fields:
        batch = make_batch([window.gather(np.arange(run.start, run.stop))])
        said = self._teacher.compute(batch.to(self._device))
        fields = {}
        for spec in self._asked:
            values, shape = said[spec.name], [_n_rows(batch, spec.level), *spec.shape]
            if list(values.shape) != shape:
                raise TeacherError(
                    f"{self._teacher.model_name} gave {spec.name} as {list(values.shape)} for a "
                    f"batch where it must be {shape}: rows would belong to others. Correct the "
                    f"teacher."
                )
            fields[spec.name] = values.cpu()
        return fields

    def _stored(self, window: Window, part: slice, spec: FieldSpec, fields: Fields | None) -> Array:
        if fields is not None:
            return fields[spec.name].numpy()
        return np.zeros((len(_owners(window, part, spec.level)), *spec.shape), spec.dtype)

    def _check_finite(
        self, window: Window, run: slice, fields: Fields, failures: dict[int, str]
    ) -> None:
        """Name the structures of a batch with values that are not finite."""
        if self._options.on_nonfinite == "zero":
            return
        for spec in self._asked:
            values = fields[spec.name]
            if not values.is_floating_point() or _is_finite(values):
                continue
            wrong = ~values.flatten(1).isfinite().all(1) if values.dim() > 1 else ~values.isfinite()
            for place in np.unique(_owners(window, run, spec.level)[wrong.numpy()]):
                failures.setdefault(int(window.rows[place]), f"{spec.name} is not finite")

    def _make_room(self, n_edges: int) -> None:
        if self._too_many_edges == float("inf"):
            log.warning(
                "a batch of %d edges does not fit the memory of %s: batches are cut in two where "
                "they must be. A smaller --max-atoms is faster.",
                n_edges,
                self._device,
            )
        self._too_many_edges = min(self._too_many_edges, n_edges)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _failed(self, row: int, reason: str) -> str:
        n_atoms = int(self._store.index.n_atoms[row])
        return (
            f"Structure {self._store.index.structure_id[row]!r} ({n_atoms} atoms): the teacher "
            f"failed on it ({reason}). There would be no features of it. Leave it out of the "
            f"dataset, or record it as failed and go on (--on-error skip)."
        )


def _owners(window: Window, part: slice, level: Level) -> IntArray:
    """[n_rows] place in the window of the structure that every row of a level belongs to."""
    places = np.arange(part.start, part.stop)
    counts = {"atom": window.n_atoms, "edge": window.n_edges}.get(level)
    return places if counts is None else np.repeat(places, counts[part])


def _is_memory_full(error: Exception) -> bool:
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        # The CPU's allocator, cuBLAS and the CUDA runtime have no type of their own.
        isinstance(error, RuntimeError)
        and any(
            words in said for words in ("can't allocate memory", "ALLOC_FAILED", "out of memory")
        )
    )


def _is_device_lost(error: Exception) -> bool:
    # After such an error every call fails, whatever the structure. What cuBLAS says of full memory
    # begins with the same words.
    return "CUDA error" in str(error) and not _is_memory_full(error)


def _n_rows(batch: Batch, level: Level) -> int:
    rows: Mapping[Level, int] = {
        "structure": batch.n_structures, "atom": batch.n_atoms, "edge": batch.n_edges,
    }  # fmt: skip
    return rows[level]


def _is_finite(values: Tensor) -> bool:
    # Smallest and largest alone are read once; a NaN anywhere makes both NaN.
    if not values.numel():
        return True
    least, most = torch.aminmax(values)
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _middle(window: Window, run: slice) -> int:
    """Where a run is cut in two parts of about as many edges, each of one structure at least."""
    ends = np.cumsum(window.n_edges[run] + window.n_atoms[run])
    half = int(np.searchsorted(ends, ends[-1] / 2)) + 1
    return int(run.start) + min(max(half, 1), int(run.stop) - int(run.start) - 1)
