"""Batches of a store, read and assembled ahead of the training step on threads.

What is read is the reader's business, the order the sampler's, the arithmetic of a batch the
window's. Invariant: the batch of a step depends on the step alone, so a resumed run sees the same
batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from kdcache.stream.reader import WindowReader
from kdcache.stream.sampler import BlockShuffle, WindowPlan
from kdcache.stream.window import Array, Window, make_batch
from kdcache.structures import Batch, IntArray


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
