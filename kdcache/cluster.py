"""Work on numbered items, mostly shards: here on threads, or by the workers of a dask cluster.

Owns who does which item and what happens when one dies or dawdles; what an item is, the caller
says. Invariant: every item's result is handed out exactly once, whoever did it and however often.
"""

from __future__ import annotations

import logging
import statistics
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from kdcache.errors import ClusterError, ConfigError

T = TypeVar("T")
Prepare = Callable[[], Callable[[int], T]]

# One thread of a worker writes while the other computes.
THREADS_PER_WORKER = 2
# Deaths of a worker over one item before the item is held to be what kills them.
DEATHS = 3
# An item that takes so much longer than the others is given to one more worker.
SLOW_FACTOR, SLOW_SECONDS = 4.0, 60.0
SECONDS_BETWEEN_LOOKS = 2.0
RESULT_SECONDS = 5.0
CONNECT_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Where shards are worked on.

    Attributes:
        address: of a running dask scheduler, e.g. "tcp://node01:8786".
        workers: processes of a cluster of our own on this machine; 0 without an address: here.
        threads: where the work is done here, items at a time.
    """

    address: str | None = None
    workers: int = 0
    threads: int = 1

    @property
    def is_here(self) -> bool:
        """No other process takes part."""
        return self.address is None and self.workers == 0


HERE = ClusterOptions()


class Cluster(Protocol):
    """Those who do the work."""

    def run(self, prepare: Prepare[T], items: Iterable[int]) -> Iterator[tuple[int, T]]:
        """Results of all items as they finish, in any order.

        Args:
            prepare: called once in every process that takes part, gives what does one item; small,
                and such as can be pickled. What it gives may be called from several threads.
            items: numbers, each once.

        Raises:
            KdcacheError: what the work itself raised; items under way are given up.
            ClusterError: the scheduler is gone, or an item has killed several workers.
        """
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """This process, `threads` items at a time."""

    threads: int = 1

    def run(self, prepare: Prepare[T], items: Iterable[int]) -> Iterator[tuple[int, T]]:
        """As `Cluster.run`."""
        work = prepare()
        waiting = deque(items)
        if self.threads == 1:
            while waiting:
                item = waiting.popleft()
                yield item, work(item)
            return
        running: dict[Future[T], int] = {}
        with ThreadPoolExecutor(self.threads, thread_name_prefix="kdcache-shard") as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * self.threads:
                        item = waiting.popleft()
                        running[pool.submit(work, item)] = item
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
            finally:
                for future in running:
                    future.cancel()


@contextmanager
def open_cluster(options: ClusterOptions) -> Iterator[Cluster]:
    """Those who will do the work; a cluster of our own ends with the `with`.

    Raises:
        ConfigError: dask.distributed is not installed, or both an address and workers are given.
        ClusterError: no scheduler answers at the address.
    """
    if options.is_here:
        yield Here(options.threads)
        return
    if options.address is not None and options.workers:
        raise ConfigError(
            f"--cluster {options.address} names a running cluster, --workers {options.workers} "
            f"asks for one of our own. Say one of them."
        )
    try:
        distributed: Any = import_module("distributed")
    except ImportError:
        raise ConfigError(
            "Work on a cluster needs dask.distributed, which is not installed. "
            "pip install 'kdcache[cluster]', or leave out --cluster and --workers."
        ) from None
    with ExitStack() as stack:
        stack.enter_context(_hushed("distributed", "tornado"))
        address: Any = options.address
        if address is None:
            stack.enter_context(_started_quickly(distributed))
            # Bound to this machine: whoever reaches a scheduler can run code by it.
            try:
                started = distributed.LocalCluster(
                    n_workers=options.workers,
                    threads_per_worker=THREADS_PER_WORKER,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    worker_dashboard_address="127.0.0.1:0",
                    # Memory is the teacher's business: dask would kill a worker that uses much.
                    memory_limit=0,
                    silence_logs=logging.CRITICAL,
                )
            except RuntimeError as error:
                raise ClusterError(
                    f"The {options.workers} workers do not start ({error}). A script of your own "
                    f'must call this under if __name__ == "__main__", as each worker imports it.'
                ) from error
            address = stack.enter_context(started)
        else:
            _check_address(address)
        try:
            client = stack.enter_context(
                distributed.Client(address, set_as_default=False, timeout=CONNECT_SECONDS)
            )
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"No dask scheduler answers at {options.address} ({error}). Start one with `dask "
                f"scheduler`, or use --workers N for processes of this machine."
            ) from None
        yield _Dask(client)


def _check_address(address: str) -> None:
    """Refuse what can be no address: a client made of it would not go for a minute."""
    comm: Any = import_module("distributed.comm")
    try:
        scheme, location = comm.parse_address(address)
        comm.get_address_host_port(f"{scheme}://{location}")
    except ValueError as error:
        raise ConfigError(
            f"--cluster {address} is no address of a dask scheduler ({error}). Say it as the "
            f"scheduler does when it starts, e.g. tcp://node01:8786."
        ) from None


@contextmanager
def _started_quickly(distributed: Any) -> Iterator[None]:
    """Workers are forks of one process that has imported what this one has of ours, with torch.

    So one starts, also in the place of a dead one, in a tenth of the time that importing takes.
    Only on Linux: the libraries of other systems do not bear a fork.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    dask: Any = import_module("dask")
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        forks = distributed.utils.get_mp_context()
        ours = sorted(name for name in sys.modules if name.partition(".")[0] == "kdcache")
        # No effect where the process that forks is there already.
        forks.set_forkserver_preload(["distributed", *ours])
        yield


@contextmanager
def _hushed(*packages: str) -> Iterator[None]:
    """What libraries say of workers that come and go is for their authors; we say what matters."""
    # By name: distributed gives some of its loggers a level of their own.
    names = [n for n in logging.root.manager.loggerDict if n.partition(".")[0] in packages]
    loggers = [logging.getLogger(name) for name in {*packages, *names}]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


def worker_number() -> int | None:
    """The number of this process among the workers of `--workers`; None elsewhere."""
    try:
        from distributed import get_worker

        name = get_worker().name
    except (ImportError, ValueError):
        return None
    return name if isinstance(name, int) else None


# What does one item, by job, in a process of a cluster; one job at a time is remembered.
_ready: dict[str, Callable[[int], Any]] = {}
_preparing = threading.Lock()


def _work(job: str, prepare: Prepare[T], item: int) -> T:
    with _preparing:
        if job not in _ready:
            _ready.clear()
            _ready[job] = prepare()
    result: T = _ready[job](item)
    return result


@dataclass
class _Dask:
    """The workers of a dask scheduler, as many as there are at the moment."""

    client: Any

    def run(self, prepare: Prepare[T], items: Iterable[int]) -> Iterator[tuple[int, T]]:
        job = _Job(self.client, prepare, deque(items))
        try:
            yield from job.results()
        finally:
            job.give_up()


class _Job:
    """One call of `run`: a few items with the workers at a time, the others waiting here.

    Handing out little at a time keeps the scheduler small whatever the number of items, and workers
    that join find work.
    """

    def __init__(self, client: Any, prepare: Prepare[Any], waiting: deque[int]) -> None:
        self._client = client
        self._prepare = prepare
        self._waiting = waiting
        self._name = f"kdcache-{uuid4().hex[:8]}"
        self._running: dict[Any, int] = {}
        self._begun: dict[int, float] = {}
        self._seconds: list[float] = []
        self._deaths: Counter[int] = Counter()
        self._n_submitted = 0
        self._n_threads = 0
        self._looked = -float("inf")

    def results(self) -> Iterator[tuple[int, Any]]:
        """Results as they finish."""
        distributed: Any = import_module("distributed")
        while self._waiting or self._running:
            self._look()
            while self._waiting and len(self._running) < max(1, 2 * self._n_threads):
                self._submit(self._waiting.popleft())
            for future in self._finished():
                if future not in self._running:
                    continue  # another attempt was quicker by a moment
                item = self._running.pop(future)
                try:
                    # A result is with the worker until it is fetched, and may be lost with it.
                    result = future.result(timeout=RESULT_SECONDS)
                except distributed.KilledWorker:
                    self._count_death(item)
                    self._again(item, future)
                    continue
                except (OSError, CancelledError):
                    if future.status == "error":  # the work's own: a full disk, say
                        raise
                    self._again(item, future)
                    continue
                self._seconds.append(time.monotonic() - self._begun.pop(item))
                # Others may still be at it: what they do no longer counts.
                for other in [f for f, i in self._running.items() if i == item]:
                    del self._running[other]
                    other.cancel()
                yield item, result
            self._help_the_slow()

    def give_up(self) -> None:
        """Take back what is still with the workers."""
        if self._running and self._client.status == "running":
            self._client.cancel(list(self._running))
        self._running.clear()

    def _submit(self, item: int, **where: Any) -> None:
        self._n_submitted += 1
        key = f"{self._name}-{item}-{self._n_submitted}"
        future = self._client.submit(
            _work, self._name, self._prepare, item, key=key, pure=False, **where
        )
        self._running[future] = item
        self._begun.setdefault(item, time.monotonic())

    def _finished(self) -> list[Any]:
        distributed: Any = import_module("distributed")
        try:
            with self._client.as_current():
                found = distributed.wait(
                    list(self._running),
                    timeout=SECONDS_BETWEEN_LOOKS,
                    return_when="FIRST_COMPLETED",
                )
        except TimeoutError:
            return []
        except CancelledError:
            return [future for future in self._running if future.done()]
        return list(found.done)

    def _look(self) -> None:
        """Count the workers now and then, and see whether the scheduler lives."""
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        if self._client.status != "running":
            raise self._gone()
        try:
            threads = self._client.nthreads()
        except OSError:
            raise self._gone() from None
        first = self._looked < 0
        self._looked, self._n_threads = now, sum(threads.values())
        if not threads and first:
            log.warning("the cluster has no workers yet: waiting for some to join")

    def _gone(self) -> ClusterError:
        return ClusterError(
            "The cluster's scheduler is gone. What is finished is kept: start a scheduler and "
            "workers, and repeat the command to go on."
        )

    def _again(self, item: int, lost: Any) -> None:
        """Have an item done once more."""
        if self._client.status != "running":
            raise self._gone()
        lost.cancel()
        if item not in self._running.values():
            self._waiting.appendleft(item)

    def _count_death(self, item: int) -> None:
        # Dask gave up: a few workers died with this item, if not of it.
        self._deaths[item] += 1
        if self._deaths[item] >= DEATHS:
            raise ClusterError(
                f"Shard {item} is not done: the workers that took it died, again and again. Look "
                f"into their logs, mostly for memory; what is finished is kept, and the same "
                f"command goes on."
            )

    def _help_the_slow(self) -> None:
        """Nothing waits any more: what takes far too long is given to one more worker."""
        if self._waiting or not self._running or len(self._seconds) < 2:
            return
        long = max(SLOW_SECONDS, SLOW_FACTOR * statistics.median(self._seconds))
        at_work = Counter(self._running.values())
        for future, item in list(self._running.items()):
            if at_work[item] > 1 or time.monotonic() - self._begun[item] < long:
                continue
            holders = self._client.processing()
            others = [worker for worker, keys in holders.items() if future.key not in keys]
            if others:
                log.warning("shard %d takes long: one more worker is put to it", item)
                self._submit(item, workers=others, allow_other_workers=True)
