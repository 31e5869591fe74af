"""What a worker of a cluster does: load the teacher once, then compute and write shards.

Nothing but a shard's number comes in and nothing but the record of its files goes out.
Invariant: a worker with another teacher, or other software, than the dump was begun with computes
nothing.
"""

from __future__ import annotations

import io
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kdcache.allocator import keep_freed_memory
from kdcache.cluster import THREADS_PER_WORKER, worker_number
from kdcache.devices import find_device
from kdcache.dump.compute import ShardComputer, ShardRows
from kdcache.dump.options import DumpOptions, TeacherSource, choose_fields, has_edges
from kdcache.dump.software import software
from kdcache.errors import ClusterError, ConfigError, DeviceError, IdentityError
from kdcache.store import TeacherEntry, add_teacher, open_store
from kdcache.store.shard_writer import ShardWriter
from kdcache.store.shards import write_file
from kdcache.store.work import ShardRecord, WorkFolder

EDGES = "n_edges.npy"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareDump:
    """Everything a worker has to know of a dump.

    Attributes:
        store: absolute path, the same on every machine.
        source: of the teacher.
        options: of the dump.
        entry: the teacher as the dump was begun with.
    """

    store: str
    source: TeacherSource
    options: DumpOptions
    entry: TeacherEntry

    def __call__(self) -> Callable[[int], ShardRecord]:
        """Load the teacher, hold it against what was begun, and give what does one shard.

        Raises:
            IdentityError: another teacher lies at the source's path here, or other versions run.
            ClusterError: the store is not to be seen from here.
        """
        path = Path(self.store)
        if not path.is_dir():
            raise ClusterError(
                f"A worker does not see {path}. Workers write the store themselves: give a path "
                f"that every machine of the cluster sees."
            )
        keep_freed_memory()
        if self.options.compute_threads is not None:
            torch.set_num_threads(self.options.compute_threads)
        device = worker_device(self.options.device)
        teacher = self.source.load(device)
        here = software(every=self.options.all_software)
        for what, begun, found in (
            ("teacher", self.entry.digest, teacher.digest),
            *((name, self.entry.software[name], here.get(name)) for name in self.entry.software),
        ):
            if begun != found:
                raise IdentityError(
                    f"A worker has {what} {found}, the dump was begun with {begun}. Features of "
                    f"both would be mixed. Give every worker the same environment and checkpoint."
                )
        specs = choose_fields(teacher.field_specs(), self.options.fields, self.options.codec)
        writer = add_teacher(
            path,
            self.options.name,
            self.entry,
            specs,
            n_edges=read_counts(path, self.options.name) if has_edges(specs) else None,
            on_overflow=self.options.on_overflow,
            on_nonfinite=self.options.on_nonfinite,
        )
        computer = ShardComputer(open_store(path), teacher, specs, self.options, device)
        return _ShardWork(computer, writer.shard_writer())


class _ShardWork:
    """Computes one shard at a time, and writes another meanwhile."""

    def __init__(self, computer: ShardComputer, writer: ShardWriter) -> None:
        self._computer = computer
        self._writer = writer
        self._computing = threading.Lock()
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="kdcache-read")
        self._room: queue.Queue[ShardRows] = queue.Queue()
        for _ in range(THREADS_PER_WORKER):
            self._room.put(ShardRows(writer.plan))

    def __call__(self, shard: int) -> ShardRecord:
        rows = self._room.get()
        # Given back whatever happens: workers of a running cluster have other dumps before them.
        try:
            with self._computing:
                self._compute(shard, rows)
            return self._writer.write(shard, rows.arrays(), rows.failures)
        finally:
            self._room.put(rows)

    def _compute(self, shard: int, rows: ShardRows) -> None:
        try:
            self._computer.compute(shard, rows, self._reading, _nobody)
        except DeviceError:
            # A process whose GPU is lost cannot get it back: dask starts another in its place, and
            # has the shard done again.
            log.exception("this worker ends")
            os._exit(1)


def _nobody(_: int) -> None:
    return None


def worker_device(name: str) -> str:
    """The device of this worker: of processes on one machine, each takes a GPU of its own.

    Raises:
        ConfigError: no such device here, or one GPU named for several processes.
    """
    name = str(find_device(name, "--device"))
    number = worker_number()
    if number is None or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise ConfigError(
            f"--device {name} names one GPU for all workers. Say cuda: each takes the next one."
        )
    return f"cuda:{number % torch.cuda.device_count()}"


def write_counts(store: Path, name: str, n_edges: npt.NDArray[np.int64]) -> None:
    """Keep the edges of every structure where workers find them, as long as a dump lasts."""
    content = io.BytesIO()
    np.save(content, n_edges, allow_pickle=False)
    write_file(WorkFolder(store, f"teachers/{name}").path / EDGES, content.getvalue())


def read_counts(store: Path, name: str) -> npt.NDArray[np.int64]:
    """What `write_counts` kept: [n_structures]."""
    file = WorkFolder(store, f"teachers/{name}").path / EDGES
    counts: npt.NDArray[np.int64] = np.load(file, allow_pickle=False)
    return counts
