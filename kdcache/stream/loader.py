"""Batches of a store, read and assembled ahead of the training step on threads.

What is read is the reader's business, the order the sampler's, the arithmetic of a batch the
window's. Invariant: the batch of a step depends on the step alone, so a resumed run sees the same
batches; processes that share it each get a part, and together exactly the whole.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle, WindowPlan, deal
from kdcache.stream.window import Array, Window, make_batch
from kdcache.structures import Batch, IntArray

BoolArray = npt.NDArray[np.bool_]


class _Lane:
    """The windows one sampler walks through, read one ahead of use."""

    def __init__(
        self, reader: WindowReader, sampler: BlockShuffle, pool: ThreadPoolExecutor
    ) -> None:
        self._read = reader.read
        self._n_atoms = reader.store.index.n_atoms
        self._sampler = sampler
        self._pool = pool
        self._epoch = -1
        self._plans: list[WindowPlan] = []
        self._following: list[WindowPlan] | None = None
        self._first_row: IntArray = np.zeros(1, np.int64)
        self._order: IntArray = np.zeros(0, np.int64)
        self._cuts: IntArray = np.zeros(1, np.int64)
        self._held: dict[tuple[int, ...], Future[Window]] = {}

    def places(self, step: int) -> IntArray:
        """Where the batch of `step` lies in the order of its epoch."""
        epoch, batch = self._sampler.place(step)
        if epoch != self._epoch:
            known = self._following if epoch == self._epoch + 1 else None
            self._epoch, self._following = epoch, None
            self._plans = known or self._sampler.windows(epoch)
            self._first_row = np.cumsum([0, *(len(plan.rows) for plan in self._plans)])
            self._order = np.concatenate([plan.rows for plan in self._plans])
            self._cuts = self._sampler.cuts(self._order)
        return np.arange(self._cuts[batch], self._cuts[batch + 1])

    def n_atoms(self, places: IntArray) -> IntArray:
        return self._n_atoms[self._order[places]]

    def parts(self, places: IntArray, mine: BoolArray) -> list[dict[str, Array]]:
        """What this lane adds to a batch, window by window: those of `places` that are `mine`."""
        owner = np.searchsorted(self._first_row, places, side="right") - 1
        first, last = int(owner[0]), int(owner[-1])
        # The window after next waits until a batch has left the first: two are held, not three.
        end = max(first + 2, last + 1)
        wanted = self._plans[first:end]
        if end > len(self._plans):
            if self._following is None:
                self._following = self._sampler.windows(self._epoch + 1)
            wanted = [*wanted, self._following[0]]
        self._keep(wanted)
        rows, owner = self._order[places[mine]], owner[mine]
        gathered = []
        for k in range(first, last + 1):
            here = rows[owner == k]
            if len(here):
                window = self._window(k)
                gathered.append(window.gather(window.place(here)))
        return gathered

    def _window(self, k: int) -> Window:
        return self._held[_key(self._plans[k])].result()

    def _keep(self, wanted: Sequence[WindowPlan]) -> None:
        # By blocks, not by number: a store that fits one window is read once for all epochs.
        keys = {_key(plan): plan.blocks for plan in wanted}
        for key in [key for key in self._held if key not in keys]:
            del self._held[key]
        for key, blocks in keys.items():
            if key not in self._held:
                self._held[key] = self._pool.submit(self._read, blocks)


def _key(plan: WindowPlan) -> tuple[int, ...]:
    return tuple(plan.blocks.tolist())


class Loader:
    """An endless stream of batches from a step on.

    Args:
        lanes: a reader and the sampler of its rows; several make up every batch together
            (labelled, unlabelled, of another store).
        start_step: first step to yield.
        ahead: batches assembled ahead of use.
        rank, n_processes: this process among those that share every batch; each gets a part of
            about as many atoms.
        finish: what is done to a batch on the loader's thread before it is handed out.
    """

    def __init__(
        self,
        lanes: Sequence[tuple[WindowReader, BlockShuffle]],
        *,
        start_step: int = 0,
        ahead: int = 4,
        rank: int = 0,
        n_processes: int = 1,
        finish: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="kdcache-read")
        self._lanes = [_Lane(reader, sampler, self._pool) for reader, sampler in lanes]
        self._step = start_step
        self._rank, self._n_processes = rank, n_processes
        self._finish = finish
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
                batch = self._assemble(self._step)
                self._put(batch if self._finish is None else self._finish(batch))
                self._step += 1
        except BaseException as error:
            self._put(error)

    def _assemble(self, step: int) -> Batch:
        places = [lane.places(step) for lane in self._lanes]
        return make_batch(
            [
                part
                for lane, here, share in zip(self._lanes, places, self._shares(places), strict=True)
                for part in lane.parts(here, share)
            ]
        )

    def _shares(self, places: Sequence[IntArray]) -> list[BoolArray]:
        """Which of the places of every lane this process takes."""
        if self._n_processes == 1:
            return [np.ones(len(here), bool) for here in places]
        n_atoms = [lane.n_atoms(here) for lane, here in zip(self._lanes, places, strict=True)]
        mine = deal(np.concatenate(n_atoms), self._n_processes) == self._rank
        return np.split(mine, np.cumsum([len(here) for here in places[:-1]]))

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return
